"""A Hugging Face Hub on 127.0.0.1 for tests: strict, in memory, with faults on demand."""

import socket
import threading
import traceback
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_hex
from urllib.parse import parse_qs, urlsplit

from hub.repositories import HubError, Refused, Repository
from hub.routes import Request, Response, User, dispatch, error_response, json_response


def _is_upload(method: str, path: str) -> bool:
    return method == "PUT" and ".git/lfs/" in path or _is_commit(method, path)


def _is_commit(method: str, path: str) -> bool:
    return method == "POST" and path.startswith("/api/") and "/commit/" in path


def _is_download(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


# Each kind of fault, and the requests to which it can apply.
FAULTS = {
    "500": lambda method, path: True,
    "429": lambda method, path: True,
    "drop": _is_upload,
    "drop-after": _is_commit,
    "truncate": _is_download,
    "stall": lambda method, path: True,
}
NO_ANSWER = 0  # the status in `requests` where the connection was closed instead


@dataclass
class Fault:
    kind: str
    times: int
    on: str


class LoopbackHub:
    """The server. It runs in a daemon thread from the start until `stop`."""

    def __init__(self, bound: socket.socket | None = None):
        """`bound`: a socket with an address, where the server is then. Otherwise it takes any free port."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.refused: list[str] = []
        self.faults: list[Fault] = []
        self.stopped = False
        self.ended = threading.Event()
        self._users: dict[str, User] = {}
        self._lock = threading.Lock()
        self._server = _Server(self, bound)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def add_user(self, name: str, write: bool = True) -> str:
        """Returns a new token of the user. Earlier ones stay valid."""
        token = f"hf_{name}_{token_hex(8)}"
        self._users[token] = User(name, write)
        return token

    def repository(self, id: str, type: str = "model") -> Repository:
        return self.repositories[type, id]

    def fail(self, kind: str, times: int = 1, on: str = ""):
        """The next `times` requests whose path contains `on` fail, among those to which this fault can apply.

        Kinds: "500"; "429" with Retry-After: 1; "drop" closes the connection in the middle of an upload; "truncate"
        sends half of a file; "drop-after" carries a commit out and closes the connection instead of answering; "stall"
        reads the request and says nothing for a minute, or until `stop`.
        """
        if kind not in FAULTS:
            raise ValueError(f"no such fault: {kind}")
        with self._lock:
            self.faults.append(Fault(kind, times, on))

    def clear(self):
        """Forgets requests and faults; repositories and users stay."""
        for left in (self.refused, self.requests, self.faults):
            left.clear()

    def stop(self):
        """Ends the server. Connections that are still open are closed at their next request."""
        self.stopped = True
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def take_fault(self, method: str, path: str) -> str | None:
        """The kind of fault that this request meets, which is then used up once."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.on in path and FAULTS[fault.kind](method, path):
                    fault.times -= 1
                    return fault.kind
        return None

    def answer(self, request: Request) -> Response:
        """Carries out one request. One at a time, so every change is atomic."""
        with self._lock:
            try:
                return dispatch(self, replace(request, user=self._authenticate(request)))
            except HubError as error:
                if isinstance(error, Refused):
                    self.refused.append(f"{request.method} {request.path}: {error.status} {error.message}")
                return error_response(error)
            except Exception:
                # A mistake of this server; tests must not take it for a fault that they asked for.
                self.refused.append(f"{request.method} {request.path}: {traceback.format_exc()}")
                return json_response({"error": "the loopback Hub failed"}, 501)

    def _authenticate(self, request: Request) -> User | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        if header.removeprefix("Bearer ") not in self._users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self._users[header.removeprefix("Bearer ")]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, bound: socket.socket | None):
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=bound is None)
        self.hub = hub
        if bound is not None:
            self.socket.close()
            self.socket = bound
            self.server_port = bound.getsockname()[1]
            self.server_activate()

    def handle_error(self, request, client_address):
        """A client that went away is no error."""


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1: reads one request with its body, lets the hub answer it and carries out faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format, *args):
        """Silent."""

    def do_GET(self):
        hub, url = self.server.hub, urlsplit(self.path)
        if hub.stopped:
            self.close_connection = True
            return
        fault = hub.take_fault(self.command, url.path)
        if fault == "drop":
            self._read_half_of_body()
            self._hang_up(url.path)
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, parse_qs(url.query), headers, self._read_body())
        if fault == "stall":
            hub.ended.wait(60)
            self._hang_up(url.path)
            return
        if fault == "500":
            response = json_response({"error": "Internal Server Error"}, 500)
        elif fault == "429":
            response = json_response({"error": "Too Many Requests"}, 429, {"Retry-After": "1"})
        else:
            response = hub.answer(request)
        if fault == "drop-after":
            self._hang_up(url.path)
            return
        hub.requests.append((self.command, url.path, response.status))
        self._send(response, truncate=fault == "truncate")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _send(self, response: Response, truncate: bool):
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else response.body
        if truncate:
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def _hang_up(self, path: str):
        self.server.hub.requests.append((self.command, path, NO_ANSWER))
        self.close_connection = True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self._read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := self._read_chunk_size():
            body += self._read(size)
            self.rfile.readline()
        while self.rfile.readline() not in (b"\r\n", b"\n", b""):
            pass  # trailers
        return body

    def _read_half_of_body(self):
        if "Content-Length" in self.headers:
            self._read(int(self.headers["Content-Length"]) // 2)
        else:
            self._read(self._read_chunk_size() // 2)

    def _read_chunk_size(self) -> int:
        return int(self.rfile.readline().split(b";")[0], 16)

    def _read(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionError("the client went away in the middle of a body")
        return content
