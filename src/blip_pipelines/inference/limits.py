"""What a server admits: so many requests at a time, of so many bytes; what is over is refused at once, and it stays up.

An ASGI middleware in front of any application, so that the limits hold whatever that does with a request.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class LimitsConfig:
    """Args:
    running: requests that are answered at a time; more would share the same processor.
    waiting: that wait for their turn; one more gets 503 and `Retry-After`.
    patience_seconds: that a request waits at most, then the same.
    body_bytes: of a request; a larger one gets 413.
    body_seconds: that a client may take to send it, else 408.
    """

    running: int = 1
    waiting: int = 64
    patience_seconds: float = 60.0
    body_bytes: int = 32_000_000
    body_seconds: float = 30.0


class Limits:
    """The application behind the limits; GET requests, which cost nothing, pass."""

    def __init__(self, app: App, config: LimitsConfig):
        self.app, self.config = app, config
        self._turns = asyncio.Semaphore(config.running)
        self._inside = 0
        self._seconds = 1.0  # of a request, a running mean: what Retry-After is made of

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        config = self.config
        if self._inside >= config.running + config.waiting:
            await self._busy(send)
            return
        self._inside += 1
        try:
            body = await asyncio.wait_for(_body(scope, receive, config.body_bytes), config.body_seconds)
            if body is None:
                await _refuse(
                    send, 413, f"the request is over {config.body_bytes} bytes; send smaller images, or fewer"
                )
                return
            if wrong := _malformed(scope, body):
                await _refuse(send, *wrong)
                return
            try:
                await asyncio.wait_for(self._turns.acquire(), config.patience_seconds)
            except TimeoutError:
                await self._busy(send)
                return
            started = time.monotonic()
            try:
                await self.app(scope, _replay(body), send)
            finally:
                self._turns.release()
                self._seconds += 0.2 * (time.monotonic() - started - self._seconds)
        except TimeoutError:
            await _refuse(send, 408, f"the request did not arrive within {config.body_seconds:g} s")
        finally:
            self._inside -= 1

    async def _busy(self, send: Send) -> None:
        seconds = max(1, math.ceil(self._seconds * self._inside / self.config.running))
        said = f"{self._inside} requests are in line; try again in {seconds} s"
        await _refuse(send, 503, said, [(b"retry-after", str(seconds).encode())])


async def _body(scope: MutableMapping[str, Any], receive: Receive, most: int) -> bytes | None:
    """The whole body; None where it is, or says that it is, larger."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    too_large = length.isdigit() and int(length) > most
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        size += len(message.get("body", b""))
        too_large = too_large or size > most
        if not too_large:
            parts.append(message.get("body", b""))
        elif size > 4 * most:  # read on a little, so that the client hears the answer; but not forever
            return None
        if not message.get("more_body"):
            return None if too_large else b"".join(parts)


def _malformed(scope: MutableMapping[str, Any], body: bytes) -> tuple[int, str] | None:
    """Status and reason of a request that no application should be troubled with."""
    kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    if not kind:
        return 415, "the request does not say its content-type; send application/json"
    if kind.partition(";")[0].strip().lower() == "application/json":
        try:
            json.loads(body)
        except (ValueError, RecursionError) as error:
            return 400, f"not valid JSON: {error}"
    return None


def _replay(body: bytes) -> Receive:
    """Gives the body once; then the client is silent."""
    left = [body]

    async def receive() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    return receive


async def _refuse(send: Send, status: int, said: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    body = json.dumps({"error": said}).encode()
    given = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": body})
