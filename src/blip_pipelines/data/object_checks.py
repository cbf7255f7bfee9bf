"""What S3 says of an object's content, and whether a content is that: tags, checksums, tags of parts."""

import base64
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_MD5 = re.compile(r"^[0-9a-f]{32}$")
_MD5_OF_PARTS = re.compile(r"^[0-9a-f]{32}-(\d+)$")


class About(NamedTuple):
    """What a store says of an object.

    Attributes:
        checks: (algorithm, value) of its whole content, the strongest first.
        parts: in how many it was stored, where its tag is made of theirs; else 0.
    """

    size: int
    etag: str
    checks: tuple[tuple[str, str], ...]
    parts: int


def about(answer: dict[str, Any], size: int) -> About:
    """From the answer to a HEAD or GET with checksums."""
    etag, checks = answer["ETag"].strip('"'), []
    if answer.get("ChecksumType") != "COMPOSITE":  # that is of the checksums of parts
        found = ((name, answer.get(f"Checksum{name}", "-")) for name in ("SHA256", "CRC32"))
        checks = [(name, value) for name, value in found if "-" not in value]
    is_plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    if is_plain and _MD5.match(etag):  # under a key of the store or of the customer, a tag is no MD5
        checks.append(("MD5", etag))
    parts = _MD5_OF_PARTS.match(etag) if is_plain else None
    return About(size, etag, tuple(checks), int(parts[1]) if parts else 0)


def is_intact(content: bytes | Path, declared: About) -> bool:
    """Whether the content is what the first of the store's checksums says; True where it has none."""
    if not declared.checks:
        return True
    name, expected = declared.checks[0]
    chunks = [content] if isinstance(content, bytes) else _chunks(content)
    if name == "CRC32":
        value = 0
        for chunk in chunks:
            value = zlib.crc32(chunk, value)
        return expected == base64.b64encode(value.to_bytes(4, "big")).decode()
    digest = hashlib.new(name)
    for chunk in chunks:
        digest.update(chunk)
    return expected == (digest.hexdigest() if name == "MD5" else base64.b64encode(digest.digest()).decode())


def parts_of(path: Path, part_bytes: int) -> list[tuple[int, int, bytes]]:
    """(start, size, md5) of the parts of a file; of an empty file one."""
    parts, start = [], 0
    for chunk in _chunks(path, part_bytes):
        parts.append((start, len(chunk), hashlib.md5(chunk).digest()))
        start += len(chunk)
    return parts or [(0, 0, hashlib.md5(b"").digest())]


def tag_of(digests: Sequence[bytes]) -> str:
    """The ETag of an object that was stored in parts with these MD5s; of one part, as a whole."""
    if len(digests) == 1:
        return digests[0].hex()
    return f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def _chunks(path: Path, size: int = 2**20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk
