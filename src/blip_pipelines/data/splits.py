"""What is held out, by hash: a row's split depends on the row and the seed, never on the rows around it.

Design section 7: `combo` is an unseen combination of seen parts, `image` an unseen drawing of a seen concept,
`concept` an unseen concept; each has a validation half and a test half, divided by concept, so that whatever is
chosen on one half has seen nothing of the other.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

TRAIN = ("train", None)


@dataclass(frozen=True)
class SplitConfig:
    """Shares that are held out.

    `validation` and `test` are for images that come without a split. The others are for data whose concepts are known:
    of skin-tone variants (`combo`), of concepts whose second drawing is never seen (`image`), of concepts that are
    never seen at all (`concept`).
    """

    validation: float = 0.05
    test: float = 0.05
    combo: float = 0.15
    image: float = 0.25
    concept: float = 0.06


def draw(seed: int, *names: object) -> float:
    """A number in [0, 1) that depends on the seed and the names alone."""
    text = "\x1f".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) / 2**64


def by_image(checksum: str, config: SplitConfig, seed: int) -> str:
    """The split of an image that has none, by its content: equal images land together wherever they lie."""
    position = draw(seed, "split", checksum)
    if position < config.test:
        return "test"
    return "val" if position < config.test + config.validation else "train"


def held_out_variants(variants: Mapping[str, Iterable[Sequence[str]]], share: float, seed: int) -> set[tuple[str, ...]]:
    """(concept, *tones) of combinations that no training row may show; another of each concept is always seen."""
    held_out = set()
    for concept, tones in variants.items():
        all_variants = {(concept, *tone) for tone in tones}
        chosen = {variant for variant in all_variants if draw(seed, "combo", *variant) < share}
        if chosen != all_variants:
            held_out |= chosen
    return held_out


def of_drawing(
    concept: str,
    tones: Sequence[str],
    *,
    second_style: bool,
    combos: set[tuple[str, ...]],
    config: SplitConfig,
    seed: int,
) -> tuple[str, str | None]:
    """(split, subset) of one drawing of one skin-tone variant of a concept.

    The galleries of `image` and `concept` are measured without skin-tone variants, which differ by a few pixels; those
    go to `image_toned` and `concept_toned`. A variant in `combos` whose concept is unseen in this style is not a
    combination of seen parts and goes there too.
    """
    if draw(seed, "concept", concept) < config.concept:
        subset = "concept"
    elif second_style and draw(seed, "image", concept) < config.image:
        subset = "image"
    elif tones and (concept, *tones) in combos:
        return _half(concept, seed), "combo"
    else:
        return TRAIN
    return _half(concept, seed), f"{subset}_toned" if tones else subset


def sample(
    items: Sequence[T], cells: Sequence[tuple[str, str | None]], names: Sequence[str], size: int, seed: int
) -> list[T]:
    """About `size` of the items, in their order: of every cell (split, subset) its share, and at least four if it can.

    Which ones is drawn by hash of their names, so that a larger sample holds the smaller one.
    """
    if size >= len(items):
        return list(items)
    members: dict[tuple[str, str | None], list[int]] = {}
    for index, cell in enumerate(cells):
        members.setdefault(cell, []).append(index)
    chosen: set[int] = set()
    for indices in members.values():
        count = max(round(size * len(indices) / len(items)), 4)
        chosen.update(sorted(indices, key=lambda index: draw(seed, "sample", names[index]))[:count])
    return [item for index, item in enumerate(items) if index in chosen]


def _half(concept: str, seed: int) -> str:
    return "val" if draw(seed, "half", concept) < 0.5 else "test"
