"""A folder of finished pages, served on 127.0.0.1 alone: the reports beside `make serve`, and `zs-seg view --serve`."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from storage.errors import UserError

HOST = "127.0.0.1"
OURS = (HOST, "localhost")


def serve_pages(folder: Path, port: int, *, cure: str) -> ThreadingHTTPServer:
    """A server of the folder's files, bound to its port; `serve_forever` answers. Port 0 takes a free one.

    Raises UserError, which ends with `cure`, where the port cannot be bound.
    """
    require_port(port)
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise UserError(f"port {port} cannot be used ({error.strerror}); {cure}") from error


def require_port(port: int) -> None:
    """Raises UserError for what is no port."""
    if not 0 <= port < 2**16:
        raise UserError(f"port {port} is none; ports are 1 to 65535")


class _Handler(SimpleHTTPRequestHandler):
    def parse_request(self) -> bool:
        """Refuses requests for other hosts: a name that somebody lets resolve to 127.0.0.1 makes strangers' pages
        readers of ours."""
        if not super().parse_request():
            return False
        if self.headers.get("Host", HOST).partition(":")[0] in OURS:
            return True
        self.send_error(HTTPStatus.FORBIDDEN, f"this server is {HOST}")
        return False

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""
