"""`make serve` before it serves: ports that are taken, a server that is another's, and the reports' own server."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.pages import serve_pages
from flows.serve import serve, wait_until_healthy
from storage.errors import UserError


class Healthy(BaseHTTPRequestHandler):
    """Answers every GET with 200, as a Prefect server its /api/health, and notes what was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[int]:
    """The server's port, while it serves."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def other() -> Iterator[tuple[int, list[str]]]:
    """The port of somebody's healthy server, and the paths that it was asked for."""
    asked: list[str] = []
    with running(ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Healthy,), {"asked": asked}))) as port:
        yield port, asked


@pytest.mark.parametrize("which", ["server", "reports"])
def test_a_taken_port_stops_it_before_anything_is_started_or_written(
    other: tuple[int, list[str]], which: str, tmp_path: Path
) -> None:
    port, asked = other
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    ports = (port, free) if which == "server" else (free, port)
    name = "PREFECT_PORT" if which == "server" else "REPORTS_PORT"
    with pytest.raises(UserError, match=f"port {port} cannot be used .*nothing was started; .*{name}"):
        serve(tmp_path / "home", ports[0], 1, reports_port=ports[1])
    assert not asked and not (tmp_path / "home").exists()


def test_no_port_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="port 70000 is none"):
        serve(tmp_path / "home", 70000, 1, reports_port=1)


def test_a_server_that_answers_in_place_of_the_child_is_not_taken_for_it(other: tuple[int, list[str]]) -> None:
    """The child lives and does not listen, or listens elsewhere; a child that does listen at the port is taken."""
    port, asked = other
    listen = "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.BaseHTTPRequestHandler); print(s.server_port, flush=True)"
    for code in ("print(flush=True); input()", f"{listen}; input()"):
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout and child.stdout.readline()
            with pytest.raises(UserError, match=f"does not answer on port {port}"):
                wait_until_healthy(child, port, patience=0.5)
            child.kill()
    assert asked and set(asked) == {"/api/health"}
    answer = f"{listen}; h.BaseHTTPRequestHandler.do_GET = lambda self: (self.send_response(200), self.end_headers())"
    command = [sys.executable, "-c", f"{answer}; s.serve_forever()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout
        wait_until_healthy(child, int(child.stdout.readline()), patience=10)
        child.kill()


def test_a_child_that_ended_is_an_error_though_another_server_answers(other: tuple[int, list[str]]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        with pytest.raises(UserError, match=f"did not start; is port {other[0]} taken"):
            wait_until_healthy(child, other[0])


def test_pages_are_served_to_this_machine_and_to_no_other_name(tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "report.html").write_text("<p>a report")
    (tmp_path / "secret").write_text("x")
    with running(serve_pages(tmp_path / "runs", 0, cure="")) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/demo/report.html") as answer:
            assert answer.read() == b"<p>a report" and answer.headers["Content-Type"] == "text/html"
        for path, host, status in (
            ("/demo/report.html", f"localhost:{port}", 200),
            ("/demo/report.html", f"evil.example:{port}", 403),
            ("/demo/report.html", "evil.example", 403),
            ("/../secret", f"127.0.0.1:{port}", 404),
            ("/%2e%2e/secret", f"127.0.0.1:{port}", 404),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", path, headers={"Host": host})
            assert connection.getresponse().status == status, (path, host)
            connection.close()
        with pytest.raises(UserError, match=f"port {port} cannot be used .*; go away"):
            serve_pages(tmp_path, port, cure="go away")
