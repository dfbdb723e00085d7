"""An S3 server on loopback (moto's) that can be told to fail as real ones do."""

import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Faulty:
    """A WSGI application in front of the server: the faults in `plan` befall the next downloads of objects, one each.

    `500`: the server's own error. `slow down`: S3's 503. `cut`: the connection ends after half of the body. `stall`:
    half of the body, then nothing until `ended`. Every other request goes through.
    """

    def __init__(self, app: WsgiApp) -> None:
        self.app, self.plan, self.done = app, list[str](), list[str]()
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        fault = self._next(environ)
        if fault in ("500", "slow down"):
            code = "InternalError" if fault == "500" else "SlowDown"
            status = "500 Internal Server Error" if fault == "500" else "503 Slow Down"
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        found = self.app(environ, start_response)
        return found if fault is None else self._broken(b"".join(found), fault)

    def _next(self, environ: dict[str, Any]) -> str | None:
        if environ["REQUEST_METHOD"] != "GET" or not environ["PATH_INFO"].endswith(".arrow"):
            return None
        with self._lock:
            fault = self.plan.pop(0) if self.plan else None
            self.done.append(fault or "served")
            return fault

    def _broken(self, body: bytes, fault: str) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        if fault == "stall":
            self.ended.wait()
        raise ConnectionError("injected: the rest never comes")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A server with an empty bucket `shelf`; fsspec is told where it is, as the environment would tell it."""
    for package in ("moto", "s3fs"):
        pytest.importorskip(package, reason=f"{package} is not installed; requirements.lock names it")
    import fsspec
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None:
            """Nothing: the faults would print tracebacks."""

    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    settings = {
        "key": "someone",
        "secret": "something",
        "endpoint_url": endpoint,
        "config_kwargs": {"read_timeout": 3},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.filesystem("s3").mkdir("shelf")
    yield faulty
    faulty.ended.set()
    server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()
