"""Captions as the web would have them: a known share is wrong, and only the evaluator knows which.

Four kinds, from default-data trials: another concept's caption (the hard kind), a file name, the name in another
language, advertising. Each row's fate depends on its own name and the seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blip_pipelines.config import ConfigError
from blip_pipelines.data.splits import draw

CLEAN, SWAP, FILE_NAME, LANGUAGE, ADVERTISING = "clean", "swap", "file_name", "language", "advertising"
LANGUAGES = ("de", "es", "fr", "it", "pt")

_FILE_NAMES = (
    "img {n}", "img_{n}.jpg", "dsc_{n}.jpg", "dsc{n}", "image {n}.png", "photo-{n}.jpeg", "scan {n}", "untitled-{n}",
    "screenshot {n}.png", "picture_{n}_final.png", "copy of image{n}.jpg", "p{n} 640x480.jpg",
)  # fmt: skip
_ADVERTISING = (
    "buy now and save {n} percent", "free shipping on all orders over {n} dollars", "only {n} left, order today",
    "click here for the best deals of the week", "{n} percent off with your first order", "sign up for our newsletter",
    "limited offer: {n} dollars off until sunday", "compare prices and read {n} reviews", "new arrivals, shop the sale",
    "add to cart, delivered within {n} days", "download {n} free icons for your project", "get it for {n}.99",
)  # fmt: skip


@dataclass(frozen=True)
class NoiseConfig:
    """Who wrote the training captions, and how wrong the web is.

    `human` is the share of clean captions of origin human; of the rest a `share` is wrong, divided over the kinds by
    `swap`, `file_name`, `language` and `advertising`, which sum to 1.
    """

    human: float = 0.2
    share: float = 0.4
    swap: float = 0.55
    file_name: float = 0.15
    language: float = 0.15
    advertising: float = 0.15

    def __post_init__(self) -> None:
        total = self.swap + self.file_name + self.language + self.advertising
        if abs(total - 1) > 1e-6:
            raise ConfigError(f"noise: the shares of swap, file_name, language, advertising sum to {total:g}, not to 1")


@dataclass(frozen=True)
class Pool:
    """What wrong captions are taken from: (concept, caption) of training rows, and the names by language and key."""

    captions: Sequence[tuple[str, str]]
    names: Mapping[str, Mapping[str, str]]


def is_human(row: str, config: NoiseConfig, seed: int) -> bool:
    return draw(seed, "human", row) < config.human


def of_the_web(
    row: str, key: str, concept: str, caption: str, pool: Pool, config: NoiseConfig, seed: int
) -> tuple[str, str]:
    """(kind, text) of a web row: its own caption, or what came in its place.

    Args:
        row: the row's name, from which everything is drawn.
        key: under which `pool.names` has its name in other languages; a swap where none has.
        concept: a swapped caption belongs to another one.
    """
    if draw(seed, "wrong", row) >= config.share:
        return CLEAN, caption
    kind = _kind(draw(seed, "kind", row), config)
    chance = draw(seed, "text", row)
    if kind == FILE_NAME:
        return kind, _pick(_FILE_NAMES, chance).format(n=f"{int(10_000 * draw(seed, 'number', row)):04d}")
    if kind == ADVERTISING:
        return kind, _pick(_ADVERTISING, chance).format(n=5 + int(90 * draw(seed, "number", row)))
    if kind == LANGUAGE:
        first = int(chance * len(LANGUAGES))
        for language in LANGUAGES[first:] + LANGUAGES[:first]:
            name = pool.names.get(language, {}).get(key)
            if name and name != caption:
                return kind, name
    return _swap(concept, caption, pool, chance)


def _swap(concept: str, caption: str, pool: Pool, chance: float) -> tuple[str, str]:
    count = len(pool.captions)
    for step in range(count):
        other, text = pool.captions[(int(chance * count) + step) % count]
        if other != concept and text != caption:
            return SWAP, text
    return CLEAN, caption  # a single concept has nothing to swap with


def _kind(chance: float, config: NoiseConfig) -> str:
    for kind, share in ((SWAP, config.swap), (FILE_NAME, config.file_name), (LANGUAGE, config.language)):
        if chance < share:
            return kind
        chance -= share
    return ADVERTISING


def _pick(options: Sequence[str], chance: float) -> str:
    return options[int(chance * len(options))]
