"""What a source yields, what a caption row is, what ingestion refuses (design section 2)."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

PAIR_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # sha256 of the stored encoded image
        pa.field("member", pa.string(), nullable=False),  # its name in the tar, free
        pa.field("shard", pa.int32(), nullable=False),  # number of the tar shard that holds it
        pa.field("offset", pa.int64(), nullable=False),  # first byte of the image in the tar
        pa.field("size", pa.int64(), nullable=False),  # bytes of the image
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),  # human | web | synthetic
        pa.field("source", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("category", pa.string()),  # of what is shown, where the source says it
        pa.field("split", pa.string(), nullable=False),  # train | val | test
        pa.field("subset", pa.string()),  # of an evaluation split
        pa.field("related_key", pa.string()),  # declared relatives: variants of one concept
        # From CapFilt; null before.
        pa.field("round", pa.int32()),
        pa.field("written_by", pa.string()),
        pa.field("judged_by", pa.string()),
        pa.field("match_probability", pa.float32()),
        pa.field("kept", pa.bool_()),
        pa.field("reason", pa.string()),
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # a short word from a fixed list, to count by
        pa.field("error", pa.string(), nullable=False),  # the sentence a person reads
    ]
)


class Refused(ValueError):
    """An input that ingestion puts into quarantine: `reason` to count by, the message to read."""

    def __init__(self, reason: str, error: str):
        super().__init__(error)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Caption:
    """One text of an image as a source gives it."""

    text: str
    origin: str = "web"
    language: str | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a source with its captions.

    `read` gives the encoded bytes (or raises `Refused` or OSError) only when they are wanted, so that a source
    can be listed without being read. `split` None leaves the choice to ingestion. `offset` is where the bytes begin in
    a tar that is used in place.
    """

    member: str
    read: Callable[[], bytes]
    captions: tuple[Caption, ...]
    source: str
    split: str | None = None
    subset: str | None = None
    related_key: str | None = None
    offset: int | None = None
