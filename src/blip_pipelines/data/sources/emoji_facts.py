"""What is known of each picture of the embedded default, as a table that templates can ask about."""

from pathlib import Path

import pyarrow as pa

from blip_pipelines.data.colours import main_colour
from blip_pipelines.data.images import decode
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.sources import SourceError
from blip_pipelines.data.sources.emoji import Emoji, emoji_key, emoji_table

# Unicode's groups in words that answer "what kind of thing is this?".
KINDS = {
    "Smileys & Emotion": "a smiley or feeling",
    "People & Body": "a person or body part",
    "Animals & Nature": "an animal or plant",
    "Food & Drink": "food or drink",
    "Travel & Places": "a place or vehicle",
    "Activities": "an activity or game",
    "Objects": "an object",
    "Symbols": "a symbol",
    "Flags": "a flag",
}
_GENDERS = {"female": "woman", "male": "man"}

FACTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # of the stored image
        pa.field("member", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("thing", pa.string()),  # the caption without skin tones
        pa.field("concept", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("tone", pa.string()),  # where all persons share one
        pa.field("gender", pa.string()),
        pa.field("country", pa.string()),
        pa.field("flag", pa.string()),  # yes | no
        pa.field("colour", pa.string()),  # of more than half of what is not white
    ]
)


def emoji_facts(packages: Path, pairs: Pairs) -> pa.Table:
    """`FACTS_SCHEMA` rows, one for each picture of the caption table, in its order.

    Args:
        packages: the wheels of the embedded default.
        pairs: opened with its images, whose pixels give the colour.

    Raises:
        SourceError: a picture is none of the embedded default.
    """
    emojis = emoji_table(packages)
    first_rows = pairs.unique_images()
    members, keys = pairs.column("member")[first_rows], pairs.keys[first_rows]
    rows = []
    if strangers := [member for member in members if emoji_key(member) not in emojis]:
        raise SourceError(
            f"instructions.facts: emoji, but '{strangers[0]}' is no picture of the embedded default; for own pictures "
            "set it to null, or to a table of what is known of them, and say in instructions.data_sets what is asked"
        )
    for row, member, key in zip(first_rows, members, keys, strict=True):
        colour = main_colour(decode(pairs.image_bytes(row), limits=None))
        rows.append({"key": key, "member": member, "colour": colour, **_of(emojis[emoji_key(member)])})
    return pa.Table.from_pylist(rows, FACTS_SCHEMA)


def _of(emoji: Emoji) -> dict[str, str | None]:
    return {
        "caption": emoji.caption,
        "thing": emoji.thing_caption,
        "concept": emoji.concept,
        "kind": KINDS[emoji.category],
        "tone": emoji.tones[0] if len(emoji.tones) == 1 else None,
        "gender": _GENDERS.get(emoji.gender or ""),
        "country": emoji.country,
        "flag": "yes" if emoji.is_flag else "no",
    }
