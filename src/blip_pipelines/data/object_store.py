"""Objects on S3 and everything that speaks its protocol: listed, read, fetched in parallel parts, stored, verified.

The only module that knows boto3. A request is tried again, with growing pauses, while that can help; what comes is
checked against the length, the tag or the checksum that the store declares, and against the hash that the caller knows.
So a failure ends in a whole object or in one error that names it. Credentials come from the standard chain alone
(environment, ~/.aws, role of the machine); no configuration of ours holds any.
"""

import base64
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from blip_pipelines.config import speed_only
from blip_pipelines.data import object_checks, storage
from blip_pipelines.data.object_checks import About
from blip_pipelines.data.storage import StorageError

T = TypeVar("T")

SCHEME = "s3://"
_AT_ONCE = 65_536  # bytes taken from a connection before the clock is looked at
_LONGEST_PAUSE = 20.0
_PASSING = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"}
_PASSING |= {"RequestLimitExceeded", "TooManyRequests", "BadDigest"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_MISSING = {"NoSuchKey", "NoSuchBucket", "404", "NotFound"}


class ObjectStoreError(StorageError):
    """A request that failed for good; the message names the object and what to do. It concerns more than one object."""


class ObjectMissingError(StorageError):
    """There is no such object (any more)."""


class _Passing(Exception):
    """A failure that another try may not meet."""


class _Changed(Exception):
    """The object was replaced while it was being read."""


@dataclass(frozen=True)
class ObjectStoreConfig:
    """How to reach a store and how hard to try. None of it changes what is read.

    Args:
        endpoint: of an S3-compatible store; None for AWS, or for what AWS_ENDPOINT_URL or the profile says.
        profile: section of ~/.aws/config; None for AWS_PROFILE or the default.
        region: None for what the chain says.
        anonymous: send no credentials, for public buckets.
        connections: requests at once, of one process.
        part_bytes: larger objects travel in parts of this size.
        attempts: of each request.
        pause_seconds: after the first failure; doubles, up to 20 s, and is shortened at random.
        timeout_seconds: for an answer to begin, and for a part to arrive: slower is a failure.
        cache: folder of fetched objects, shared by the processes of a machine.
        cache_bytes: what the cache may hold; the objects used longest ago go first.
    """

    endpoint: str | None = speed_only(None)
    profile: str | None = speed_only(None)
    region: str | None = speed_only(None)
    anonymous: bool = speed_only(False)
    connections: int = speed_only(8)
    part_bytes: int = speed_only(8 * 2**20)
    attempts: int = speed_only(6)
    pause_seconds: float = speed_only(0.5)
    timeout_seconds: float = speed_only(60.0)
    cache: str = speed_only("data/.cache/objects")
    cache_bytes: int = speed_only(20 * 2**30)


class Listed(NamedTuple):
    """One line of a listing."""

    key: str
    size: int
    etag: str


@dataclass
class _Connection:
    """A client, made when it is first wanted."""

    client: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class ObjectStore:
    """Objects by url `s3://bucket/key`. Safe for threads and forks; pickles as its configuration."""

    def __init__(self, config: ObjectStoreConfig):
        self.config = config
        # A forked child must neither talk over its parent's sockets nor wait for a lock that a thread there held.
        self._of_process: dict[int, _Connection] = {}

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
        head = self._try(url, lambda client: client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED"))
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
            content = self._receive(answer, size)
            if not span and not object_checks.is_intact(content, object_checks.about(answer, len(content))):
                raise _Passing("what came is not what its checksum says")
            return content

        return self._try(url, get)

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
                    self._pause(attempt)
                try:
                    about = self.about(url)
                    self._fetch_parts(url, about, temporary)
                    why = self._differs(url, temporary, about, sha256)
                except _Changed:
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
            self._try(url, lambda c: c.put_object(Bucket=bucket, Key=key, Body=body, ContentMD5=md5))
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
            self._try(url, lambda client: client.complete_multipart_upload(**done))
        about = self.about(url)
        if about.size != path.stat().st_size or (about.checks and about.etag != expected):
            raise ObjectStoreError(f"{url}: the store keeps something else than was sent; upload it again")
        return about.etag

    def _page(self, url: str, operation: str, **request: Any) -> dict[str, Any]:
        return self._try(url, lambda client: getattr(client, operation)(**request))

    def _stored_tag(self, url: str) -> str | None:
        try:
            return self.about(url).etag
        except ObjectMissingError:
            return None

    def _unfinished(self, bucket: str, key: str, url: str) -> tuple[str, dict[int, tuple[int, str]]]:
        """An upload of this object that was begun, with the (size, md5) of its parts; else a new one."""
        begun = self._try(url, lambda client: client.list_multipart_uploads(Bucket=bucket, Prefix=key))
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
        made = self._try(url, lambda client: client.create_multipart_upload(Bucket=bucket, Key=key))
        return made["UploadId"], {}

    def _send_part(self, path: Path, url: str, upload: str, number: int, start: int, size: int, digest: bytes) -> None:
        bucket, key = split_url(url)
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(size)
        request = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": number, "Body": body}
        md5 = base64.b64encode(digest).decode()
        self._try(url, lambda client: client.upload_part(**request, ContentMD5=md5))

    def _fetch_parts(self, url: str, about: About, path: Path) -> None:
        bucket, key = split_url(url)
        starts = range(0, about.size, self.config.part_bytes)
        with path.open("wb") as file:
            file.truncate(about.size)

            def fetch(start: int) -> None:
                size = min(self.config.part_bytes, about.size - start)
                span = {"Range": f"bytes={start}-{start + size - 1}", "IfMatch": f'"{about.etag}"'}

                def get(client: Any) -> bytes:
                    return self._receive(client.get_object(Bucket=bucket, Key=key, **span), size)

                os.pwrite(file.fileno(), self._try(url, get), start)

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

    def _receive(self, answer: dict[str, Any], size: int | None) -> bytes:
        """The body, whole and in time, or _Passing."""
        import urllib3

        body, declared = answer["Body"], answer["ContentLength"]
        if size is not None and declared != size:
            body.close()
            raise _Passing(f"{declared} bytes came where {size} were asked for")
        # StreamingBody waits until it has all that it was asked for, so that a trickle could hold it for hours.
        raw, content, deadline = body._raw_stream, bytearray(), time.monotonic() + self.config.timeout_seconds
        try:
            while len(content) < declared:
                chunk = raw.read1(_AT_ONCE)
                if not chunk:
                    raise _Passing(f"the answer broke off after {len(content)} of {declared} bytes")
                content += chunk
                if time.monotonic() > deadline and len(content) < declared:
                    seconds = self.config.timeout_seconds
                    raise _Passing(f"only {len(content)} of {declared} bytes came in {seconds:g} s")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Passing(f"the answer broke off after {len(content)} of {declared} bytes ({error})") from error
        finally:
            if len(content) < declared:
                body.close()
        return bytes(content)

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
        head = self._try(url, lambda client: client.head_object(Bucket=bucket, Key=key, PartNumber=1))
        size = head["ContentLength"]
        if not (about.parts - 1) * size < about.size <= about.parts * size:
            return True  # parts of several sizes, or a store that does not tell
        return object_checks.tag_of([digest for _, _, digest in object_checks.parts_of(path, size)]) == about.etag

    def _try(self, url: str, call: Callable[[Any], T]) -> T:
        """What `call(client)` returns, tried again while that may help."""
        why = ""
        for attempt in range(self.config.attempts):
            if attempt:
                self._pause(attempt)
            try:
                return call(self._client())
            except Exception as error:
                why = self._judge(url, error, attempt)
        raise ObjectStoreError(
            f"{url}: {why}, in the last of {self.config.attempts} attempts; look at the network and the store, then "
            "run again: what was finished is kept"
        )

    def _judge(self, url: str, error: Exception, attempt: int) -> str:
        """Why another try may help.

        Raises:
            ObjectMissingError, ObjectStoreError, _Changed: it may not.
        """
        from botocore import exceptions as raised

        if isinstance(error, _Passing):
            return str(error)
        if isinstance(error, raised.NoCredentialsError | raised.PartialCredentialsError):
            raise ObjectStoreError(
                f"{url}: no credentials; give them by AWS_PROFILE, the environment or ~/.aws, or set `anonymous: true`"
            ) from error
        if isinstance(error, raised.ProfileNotFound | raised.TokenRetrievalError | raised.SSOTokenLoadError):
            raise ObjectStoreError(f"{url}: {error}; correct `profile`, or log in again") from error
        if isinstance(error, raised.ClientError):
            return self._judge_answer(url, error, attempt)
        if isinstance(error, raised.HTTPClientError | raised.ConnectionError | OSError):
            if isinstance(error, StorageError):
                raise error
            return f"no answer ({error})"
        if isinstance(error, raised.BotoCoreError | raised.ParamValidationError):
            raise ObjectStoreError(f"{url}: {error}") from error
        raise error

    def _judge_answer(self, url: str, error: Any, attempt: int) -> str:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _EXPIRED:
            if attempt == 0:  # the chain may have fresh ones by now
                self._connection.client = None
                return "the credentials have expired"
            raise ObjectStoreError(
                f"{url}: the credentials have expired; renew them (`aws sso login`, a new token) and run again"
            ) from error
        if code in _MISSING or status == 404:
            raise ObjectMissingError(f"{url}: there is no such object; list the source again, or restore it") from error
        if status == 412:
            raise _Changed from error
        if status in (401, 403):
            raise ObjectStoreError(
                f"{url}: access is refused ({code}); look at the credentials and the bucket's policy"
            ) from error
        if status in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            raise ObjectStoreError(f"{url}: the bucket is elsewhere ({error}); set `region` or `endpoint`") from error
        if status >= 500 or status == 429 or code in _PASSING:
            return f"the store answers {status} {code}"
        raise ObjectStoreError(f"{url}: the store answers {status} {code}: {error}") from error

    def _pause(self, attempt: int) -> None:
        longest = min(self.config.pause_seconds * 2 ** (attempt - 1), _LONGEST_PAUSE)
        time.sleep(longest * (0.5 + random.random() / 2))  # not all at once

    def _client(self) -> Any:
        with self._connection.lock:
            if self._connection.client is None:
                self._connection.client = _connect(self.config)
            return self._connection.client

    @property
    def _connection(self) -> _Connection:
        return self._of_process.setdefault(os.getpid(), _Connection())


def split_url(url: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`."""
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not bucket:
        raise ObjectStoreError(f"{url}: not a place on S3; write s3://bucket/folder")
    return bucket, key


def _connect(config: ObjectStoreConfig) -> Any:
    import boto3
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    settings = Config(
        signature_version=UNSIGNED if config.anonymous else None,
        retries={"total_max_attempts": 1},  # trying again is done here, bodies included
        connect_timeout=min(config.timeout_seconds, 10),
        read_timeout=config.timeout_seconds,
        max_pool_connections=config.connections,
        request_checksum_calculation="when_required",  # Content-MD5 instead, which every store knows
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if config.endpoint else "auto"},
    )
    core = botocore.session.get_session()
    core.register_component("data_loader", _loader())
    session = boto3.session.Session(botocore_session=core, profile_name=config.profile, region_name=config.region)
    return session.client("s3", endpoint_url=config.endpoint, config=settings)


@lru_cache(maxsize=1)
def _loader() -> Any:
    """The descriptions of the services, which are half a second's reading, once for all clients."""
    from botocore.loaders import create_loader

    return create_loader()
