"""Pictures that question data bring with them, in tar shards of the table's own."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blip_pipelines.data import shards
from blip_pipelines.data.images import ImageLimits, decode, encode_plain, needs_reencoding
from blip_pipelines.data.records import Refused

log = logging.getLogger(__name__)

_SHOWN = 3  # refused pictures in a message

Place = dict[str, Any]  # of a stored image: the columns key, member, shard, offset, size, width, height


class Stored(NamedTuple):
    """Where each picture lies, by the name under which questions know it; None of one that was refused."""

    places: Mapping[str, Place | None]
    images_hash: str
    refused: dict[str, int]  # by reason


def store(wanted: Mapping[str, Callable[[], bytes]], folder: Path, shard_images: int, limits: ImageLimits) -> Stored:
    """Write pictures into `{shard:05d}.tar` in the order given, each content once; bad ones are refused by name.

    Args:
        wanted: by name, what gives the encoded bytes.
    """
    places: dict[str, Place | None] = {}
    known: dict[str, Place] = {}
    refused: dict[str, list[str]] = {}
    with shards.ShardWriter(folder, shard_images=shard_images) as writer:
        for name, read in wanted.items():
            try:
                content = read()
                image = decode(content, limits=limits)
            except (Refused, OSError) as error:
                reason = error.reason if isinstance(error, Refused) else "unreadable"
                refused.setdefault(reason, []).append(f"{name}: {error}")
                places[name] = None
                continue
            stored = writer.add(encode_plain(image) if needs_reencoding(content) else content)
            place = {**vars(stored), "member": name, "width": image.width, "height": image.height}
            places[name] = known.setdefault(stored.key, place)
    images_hash = shards.write_manifest(folder, writer.shards)
    for path in folder.glob("*.tar"):  # of a larger set that lay here before
        if path.name not in {shard.name for shard in writer.shards}:
            path.unlink()
    for reason, errors in refused.items():
        shown = "; ".join(errors[:_SHOWN])
        log.warning("%d pictures refused as %s, with all questions about them: %s", len(errors), reason, shown)
    return Stored(places, images_hash, {reason: len(errors) for reason, errors in sorted(refused.items())})
