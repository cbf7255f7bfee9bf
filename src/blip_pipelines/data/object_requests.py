"""Requests to S3, tried again, with growing pauses, while that can help; and bodies, whole and in time.

The only module that knows boto3. A failure ends in one error that names the object. Credentials come from the standard
chain alone (environment, ~/.aws, role of the machine); no configuration of ours holds any.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from blip_pipelines.config import speed_only
from blip_pipelines.data.storage import StorageError

T = TypeVar("T")

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


class Passing(Exception):
    """A failure that another try may not meet."""


class Changed(Exception):
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


@dataclass
class _Connection:
    """A client, made when it is first wanted."""

    client: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Requests:
    """What asks a store. Safe for threads and forks."""

    def __init__(self, config: ObjectStoreConfig):
        self.config = config
        # A forked child must neither talk over its parent's sockets nor wait for a lock that a thread there held.
        self._of_process: dict[int, _Connection] = {}

    def send(self, url: str, call: Callable[[Any], T]) -> T:
        """What `call(client)` returns, tried again while that may help.

        Raises:
            ObjectMissingError, Changed: as the store answers. ObjectStoreError: every other failure for good.
        """
        why = ""
        for attempt in range(self.config.attempts):
            if attempt:
                self.pause(attempt)
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
            ObjectMissingError, ObjectStoreError, Changed: it may not.
        """
        from botocore import exceptions as raised

        if isinstance(error, Passing):
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
            raise Changed from error
        if status in (401, 403):
            raise ObjectStoreError(
                f"{url}: access is refused ({code}); look at the credentials and the bucket's policy"
            ) from error
        if status in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            raise ObjectStoreError(f"{url}: the bucket is elsewhere ({error}); set `region` or `endpoint`") from error
        if status >= 500 or status == 429 or code in _PASSING:
            return f"the store answers {status} {code}"
        raise ObjectStoreError(f"{url}: the store answers {status} {code}: {error}") from error

    def pause(self, attempt: int) -> None:
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

    def receive(self, answer: dict[str, Any], size: int | None) -> bytes:
        """The body, whole and in time, or Passing."""
        import urllib3

        body, declared = answer["Body"], answer["ContentLength"]
        if size is not None and declared != size:
            body.close()
            raise Passing(f"{declared} bytes came where {size} were asked for")
        # StreamingBody waits until it has all that it was asked for, so that a trickle could hold it for hours.
        raw, content, deadline = body._raw_stream, bytearray(), time.monotonic() + self.config.timeout_seconds
        try:
            while len(content) < declared:
                chunk = raw.read1(_AT_ONCE)
                if not chunk:
                    raise Passing(f"the answer broke off after {len(content)} of {declared} bytes")
                content += chunk
                if time.monotonic() > deadline and len(content) < declared:
                    seconds = self.config.timeout_seconds
                    raise Passing(f"only {len(content)} of {declared} bytes came in {seconds:g} s")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Passing(f"the answer broke off after {len(content)} of {declared} bytes ({error})") from error
        finally:
            if len(content) < declared:
                body.close()
        return bytes(content)


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
