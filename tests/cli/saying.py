"""A server that gives one answer to whatever it is asked, and remembers the last request."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer


class Server(HTTPServer):
    status, body = 200, b""
    asked: tuple[str, str | None] = ("", None)
    """Path and Authorization header of the last request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked = self.path, self.headers["Authorization"]
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def saying(body: bytes) -> Iterator[Server]:
    """The server, while it is needed. Its answer can be changed meanwhile."""
    server = Server(("127.0.0.1", 0), Answer)
    server.body = body
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()
