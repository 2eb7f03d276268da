"""A real S3 server (moto) on loopback, as a process of its own, that can be told to fail.

    with S3Server() as server:
        server.fail(status=503, code="SlowDown", method="PUT", path="r00001", times=3)
        subprocess.run(..., env={**os.environ, **server.env})
        server.requests("PUT")

The other side is this module run as a program: moto's application behind a few lines that keep a log and inject faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import fsspec

BUCKET = "bucket"


@dataclass
class Fault:
    """What happens to the next `times` requests, after `skip` others, of `method` whose path contains `path`.

    They get an answer of `status` with the S3 error `code`; with status 0 none: the connection ends. `done=True`
    carries the request out before that, so that its answer is all that is lost. `delay` seconds pass first.
    """

    status: int = 503
    code: str = "SlowDown"
    method: str = "PUT"
    path: str = ""
    times: int = 1
    skip: int = 0
    done: bool = False
    delay: float = 0.0


class S3Server:
    """The server's process, with an empty bucket `BUCKET`; `env` are the variables by which s3fs finds it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.env = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT"), timeout=20)
        # fsspec keeps filesystems by their arguments, not by these variables: forget those of another server
        fsspec.get_filesystem_class("s3").clear_instance_cache()

    def fail(self, **fault: Any) -> None:
        """Inject one `Fault`."""
        self._control({"fault": asdict(Fault(**fault))})

    def heal(self) -> None:
        """No more faults, an empty log."""
        self._control({"heal": True})

    def requests(self, method: str = "") -> list[tuple[str, str, int]]:
        """Method, path with query, and status of what was asked since `heal`."""
        return [(m, path, status) for m, path, status in self._control({}) if not method or m == method]

    def _control(self, message: dict[str, Any]) -> Any:
        body = json.dumps(message).encode()
        with urllib.request.urlopen(f"{self.url}/_control", data=body, timeout=20) as answer:
            return json.loads(answer.read())

    def __enter__(self) -> S3Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


class _Faulty:
    """moto's WSGI application with faults."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.lock = threading.Lock()
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/_control":
            return self._control(environ, start_response)
        if query := environ.get("QUERY_STRING"):
            path = f"{path}?{query}"
        fault = self._next(method, path)
        if fault is None:
            return self._forward(environ, start_response, method, path)
        self.log.append((method, path, fault.status))
        time.sleep(fault.delay)
        if fault.done:
            list(self.app(environ, lambda *_: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if not fault.status:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("injected")
        start_response(f"{fault.status} injected", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{fault.code}</Code><Message>injected {fault.code}</Message></Error>".encode()]

    def _forward(self, environ: dict[str, Any], start_response: Any, method: str, path: str) -> Any:
        def answered(status: str, *rest: Any) -> Any:
            self.log.append((method, path, int(status.split()[0])))
            return start_response(status, *rest)

        return self.app(environ, answered)

    def _next(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("", method) and fault.path in path:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _control(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        message = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        with self.lock:
            if "fault" in message:
                self.faults.append(Fault(**message["fault"]))
            if "heal" in message:
                self.faults, self.log = [], []
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(self.log).encode()]


def _serve() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "test"
    app = _Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.server_port, flush=True)
    parent = os.getppid()

    def end_with_the_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    _serve()
