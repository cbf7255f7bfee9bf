"""A real S3-compatible server on loopback, and a proxy before it that does to answers what networks and stores do."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from blip_pipelines.data.object_requests import ObjectStoreConfig
from blip_pipelines.data.object_store import ObjectStore

BUCKET = "photos"
_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class Server:
    """moto's server in a thread; credentials are in the environment, as the standard chain has them."""

    def __init__(self):
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.address = self._server.get_host_and_port()
        self.endpoint = "http://{}:{}".format(*self.address)
        self.client = boto3.client("s3", endpoint_url=self.endpoint)
        self.client.create_bucket(Bucket=BUCKET)

    def config(self, cache: Path, **options) -> ObjectStoreConfig:
        quick = {"endpoint": self.endpoint, "pause_seconds": 0.01, "timeout_seconds": 5.0, "cache": str(cache)}
        return ObjectStoreConfig(**{**quick, **options})

    def put(self, key: str, content: bytes) -> str:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)
        return f"s3://{BUCKET}/{key}"

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Store every file of a folder; returns the url of the place."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def stop(self) -> None:
        self._server.stop()


@dataclass
class Fault:
    """What happens to some requests.

    Args:
        kind: "status" (answers `status` and `code`), "truncated", "wrong_bytes", "trickle" or "reset"; "vanish" and
            "replace" (by `new`) change the object, then the request goes on.
        times: to how many requests; None for all.
        method, path: which ones: equal to the method, contained in the path.
    """

    kind: str
    times: int | None = 1
    method: str = "GET"
    path: str = ""
    status: int = 500
    code: str = "InternalError"
    new: bytes = b""


@dataclass
class Proxy:
    """Forwards to a server; `faults` are applied in turn, `requests` is what came."""

    server: Server
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range

    def __post_init__(self):
        proxy, self._lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_): ...

            def handle_any(self):
                proxy.handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def store(self, cache: Path, **options) -> ObjectStore:
        return ObjectStore(self.server.config(cache, endpoint=self.endpoint, **options))

    def count(self, method: str, path: str = "") -> int:
        return sum(method == asked and path in where for asked, where, _ in self.requests)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self._lock:
            self.requests.append((request.command, request.path, request.headers.get("Range")))
            fault = next((f for f in self.faults if f.method == request.command and f.path in request.path), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
                if fault.times == 0:
                    self.faults.remove(fault)
        kind = fault.kind if fault else ""
        if kind == "status":
            answer = f"<Error><Code>{fault.code}</Code><Message>a fault of the test</Message></Error>".encode()
            return self._answer(request, fault.status, {"Content-Type": "application/xml"}, answer)
        if kind == "reset":
            request.close_connection = True
            return None
        place = dict(zip(("Bucket", "Key"), request.path.partition("?")[0].lstrip("/").split("/", 1), strict=False))
        if fault and kind == "vanish":
            self.server.client.delete_object(**place)
        if fault and kind == "replace":
            self.server.client.put_object(**place, Body=fault.new)
        found, content = self._forward(request, body)
        headers = {name: value for name, value in found.getheaders() if name.lower() not in _HOP}
        if request.command == "HEAD":
            return self._answer(request, found.status, headers, b"", found.getheader("Content-Length", "0"))
        if kind == "wrong_bytes":
            content = bytes([content[0] ^ 1]) + content[1:]
        send: Callable | None = {"truncated": _half, "trickle": _trickle}.get(kind)
        return self._answer(request, found.status, headers, content, send=send)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection(*self.server.address)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
        connection.request(request.command, request.path, body, headers)
        found = connection.getresponse()
        content = found.read()
        connection.close()
        return found, content

    @staticmethod
    def _answer(request, status, headers, content, length=None, send=None) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", length or str(len(content)))
        request.end_headers()
        try:
            (send or (lambda file, whole: file.write(whole)))(request.wfile, content)
        except OSError:  # the other side has had enough
            request.close_connection = True
        if send is not None:
            request.close_connection = True


def _half(file, content: bytes) -> None:
    file.write(content[: len(content) // 2])


def _trickle(file, content: bytes) -> None:
    for byte in content:
        file.write(bytes([byte]))
        file.flush()
        time.sleep(0.05)
