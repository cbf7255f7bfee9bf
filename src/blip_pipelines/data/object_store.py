"""Objects on S3 and everything that speaks its protocol: listed, read, fetched in parallel parts, stored, verified.

What comes is checked against the length, the tag or the checksum that the store declares, and against the hash that
the caller knows, and is asked for again where it differs. So a fetch ends in a whole object or in one error that names
it.
"""

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from blip_pipelines.data import object_checks, storage
from blip_pipelines.data.object_checks import About
from blip_pipelines.data.object_requests import (
    Changed,
    ObjectMissingError,
    ObjectStoreConfig,
    ObjectStoreError,
    Passing,
    Requests,
)

SCHEME = "s3://"


class Listed(NamedTuple):
    """One line of a listing."""

    key: str
    size: int
    etag: str


class ObjectStore:
    """Objects by url `s3://bucket/key`. Safe for threads and forks; pickles as its configuration."""

    def __init__(self, config: ObjectStoreConfig):
        self.config, self._requests = config, Requests(config)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.config,)

    def listing(self, url: str) -> Iterator[Listed]:
        """Every object whose key begins as the url does, in the order of keys, page by page.

        Raises:
            ObjectMissingError: there is no such bucket. ObjectStoreError: access is refused or the store fails.
        """
        bucket, prefix = split_url(url)
        token: dict[str, str] = {}
        while True:
            page = self._page(url, "list_objects_v2", Bucket=bucket, Prefix=prefix, **token)
            for entry in page.get("Contents", ()):
                yield Listed(entry["Key"], entry["Size"], entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def about(self, url: str) -> About:
        """Size, tag and checksums.

        Raises:
            ObjectMissingError, ObjectStoreError: as `listing`.
        """
        bucket, key = split_url(url)
        head = self._requests.send(
            url, lambda client: client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        )
        return object_checks.about(head, head["ContentLength"])

    def read(self, url: str, start: int = 0, size: int | None = None) -> bytes:
        """A whole object, or `size` bytes from `start` on; for a few megabytes, else `download`.

        Raises:
            ObjectMissingError, ObjectStoreError: as `listing`; or what comes stays shorter or other than declared.
        """
        bucket, key = split_url(url)
        span = {} if size is None else {"Range": f"bytes={start}-{start + size - 1}"}

        def get(client: Any) -> bytes:
            answer = client.get_object(Bucket=bucket, Key=key, **span, **({} if span else {"ChecksumMode": "ENABLED"}))
            content = self._requests.receive(answer, size)
            if not span and not object_checks.is_intact(content, object_checks.about(answer, len(content))):
                raise Passing("what came is not what its checksum says")
            return content

        return self._requests.send(url, get)

    def download(self, url: str, path: Path, sha256: str | None = None) -> None:
        """Put a whole object at `path`, atomically, in parallel parts.

        Args:
            sha256: of the content, where it is known; else the store's own tag or checksum is the measure.

        Raises:
            ObjectMissingError, ObjectStoreError: as `listing`; or the content stays other than declared.
            StorageError: the disk is full.
        """
        why = None
        with storage.writing(path) as temporary:
            for attempt in range(self.config.attempts):
                if attempt:
                    self._requests.pause(attempt)
                try:
                    about = self.about(url)
                    self._fetch_parts(url, about, temporary)
                    why = self._differs(url, temporary, about, sha256)
                except Changed:
                    why = "it is replaced while it is read"
                if why is None:
                    return
            raise ObjectStoreError(f"{url}: {why}, {self.config.attempts} times; restore the object or ingest again")

    def upload(self, path: Path, url: str) -> str:
        """Store a file; returns its tag. Parts that an earlier, interrupted try stored are not sent again.

        Raises:
            ObjectMissingError: there is no such bucket. ObjectStoreError: access is refused, or the store keeps
                failing or keeps something else than was sent.
        """
        bucket, key = split_url(url)
        part_bytes = max(self.config.part_bytes, 5 * 2**20, -(-path.stat().st_size // 10_000))  # S3's own bounds
        parts = object_checks.parts_of(path, part_bytes)
        expected = object_checks.tag_of([digest for _, _, digest in parts])
        if self._stored_tag(url) == expected:
            return expected
        if len(parts) == 1:
            body, md5 = path.read_bytes(), base64.b64encode(parts[0][2]).decode()
            self._requests.send(url, lambda c: c.put_object(Bucket=bucket, Key=key, Body=body, ContentMD5=md5))
        else:
            upload, there = self._unfinished(bucket, key, url)
            todo = [
                (number, start, size, digest)
                for number, (start, size, digest) in enumerate(parts, start=1)
                if there.get(number) != (size, digest.hex())
            ]
            self._at_once(lambda part: self._send_part(path, url, upload, *part), todo)
            tags = [{"PartNumber": n, "ETag": f'"{part[2].hex()}"'} for n, part in enumerate(parts, start=1)]
            done = {"Bucket": bucket, "Key": key, "UploadId": upload, "MultipartUpload": {"Parts": tags}}
            self._requests.send(url, lambda client: client.complete_multipart_upload(**done))
        about = self.about(url)
        if about.size != path.stat().st_size or (about.checks and about.etag != expected):
            raise ObjectStoreError(f"{url}: the store keeps something else than was sent; upload it again")
        return about.etag

    def _page(self, url: str, operation: str, **request: Any) -> dict[str, Any]:
        return self._requests.send(url, lambda client: getattr(client, operation)(**request))

    def _stored_tag(self, url: str) -> str | None:
        try:
            return self.about(url).etag
        except ObjectMissingError:
            return None

    def _unfinished(self, bucket: str, key: str, url: str) -> tuple[str, dict[int, tuple[int, str]]]:
        """An upload of this object that was begun, with the (size, md5) of its parts; else a new one."""
        begun = self._requests.send(url, lambda client: client.list_multipart_uploads(Bucket=bucket, Prefix=key))
        for upload in begun.get("Uploads", ()):
            if upload["Key"] != key:
                continue
            there: dict[int, tuple[int, str]] = {}
            request: dict[str, Any] = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"]}
            while True:
                page = self._page(url, "list_parts", **request)
                there |= {part["PartNumber"]: (part["Size"], part["ETag"].strip('"')) for part in page.get("Parts", ())}
                if not page.get("IsTruncated"):
                    return upload["UploadId"], there
                request = {**request, "PartNumberMarker": page["NextPartNumberMarker"]}
        made = self._requests.send(url, lambda client: client.create_multipart_upload(Bucket=bucket, Key=key))
        return made["UploadId"], {}

    def _send_part(self, path: Path, url: str, upload: str, number: int, start: int, size: int, digest: bytes) -> None:
        bucket, key = split_url(url)
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(size)
        request = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": number, "Body": body}
        md5 = base64.b64encode(digest).decode()
        self._requests.send(url, lambda client: client.upload_part(**request, ContentMD5=md5))

    def _fetch_parts(self, url: str, about: About, path: Path) -> None:
        bucket, key = split_url(url)
        starts = range(0, about.size, self.config.part_bytes)
        with path.open("wb") as file:
            file.truncate(about.size)

            def fetch(start: int) -> None:
                size = min(self.config.part_bytes, about.size - start)
                span = {"Range": f"bytes={start}-{start + size - 1}", "IfMatch": f'"{about.etag}"'}

                def get(client: Any) -> bytes:
                    return self._requests.receive(client.get_object(Bucket=bucket, Key=key, **span), size)

                os.pwrite(file.fileno(), self._requests.send(url, get), start)

            self._at_once(fetch, starts)

    def _at_once(self, call: Callable[[Any], None], items: Sequence[Any]) -> None:
        """The call for every item; the first failure ends those that have not begun."""
        with ThreadPoolExecutor(max(min(self.config.connections, len(items)), 1)) as pool:
            try:
                for _ in pool.map(call, items):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _differs(self, url: str, path: Path, about: About, sha256: str | None) -> str | None:
        """In what a fetched file is not what it should be."""
        if sha256 is not None:
            found = storage.sha256_file(path)
            return None if found == sha256 else f"content is {found[:12]}, {sha256[:12]} was expected"
        if about.checks:
            is_intact = object_checks.is_intact(path, about)
        elif about.parts:
            is_intact = self._is_of_parts(url, path, about)
        else:
            is_intact = True  # a tag that says nothing of the content; the lengths were checked
        return None if is_intact else "what comes is not what its checksum says"

    def _is_of_parts(self, url: str, path: Path, about: About) -> bool:
        """Whether the tag of an object that was stored in parts is that of the file."""
        bucket, key = split_url(url)
        head = self._requests.send(url, lambda client: client.head_object(Bucket=bucket, Key=key, PartNumber=1))
        size = head["ContentLength"]
        if not (about.parts - 1) * size < about.size <= about.parts * size:
            return True  # parts of several sizes, or a store that does not tell
        return object_checks.tag_of([digest for _, _, digest in object_checks.parts_of(path, size)]) == about.etag


def split_url(url: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`."""
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not bucket:
        raise ObjectStoreError(f"{url}: not a place on S3; write s3://bucket/folder")
    return bucket, key
