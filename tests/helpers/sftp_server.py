"""An SFTP server on loopback (paramiko's), in threads of the test, that does with files what OpenSSH's does."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from paramiko import (
    ECDSAKey,
    PKey,
    ServerInterface,
    SFTPAttributes,
    SFTPHandle,
    SFTPServer,
    SFTPServerInterface,
    Transport,
)
from paramiko.common import AUTH_SUCCESSFUL, OPEN_SUCCEEDED
from paramiko.sftp import SFTP_OK

Drop = Callable[[], None]


def _answered(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def answer(*given: Any) -> Any:
        try:
            result = call(*given)
        except OSError as error:
            return SFTPServer.convert_errno(error.errno or 0)
        return SFTP_OK if result is None else result

    return answer


class _Handle(SFTPHandle):
    stat = _answered(lambda self: SFTPAttributes.from_stat(os.fstat(self.readfile.fileno())))


class _Files(SFTPServerInterface):
    stat = _answered(lambda _, path: SFTPAttributes.from_stat(os.stat(path)))
    list_folder = _answered(lambda _, path: [SFTPAttributes.from_stat(e.stat(), e.name) for e in os.scandir(path)])
    mkdir = _answered(lambda _, path, attributes: os.mkdir(path))
    rmdir = _answered(lambda _, path: os.rmdir(path))
    remove = _answered(lambda _, path: os.remove(path))
    posix_rename = _answered(lambda _, path, other: os.rename(path, other))

    @_answered
    def rename(self, path: str, other: str) -> None:
        if os.path.lexists(other):
            raise OSError(errno.EEXIST, "exists")
        os.rename(path, other)

    @_answered
    def open(self, path: str, flags: int, attributes: SFTPAttributes) -> SFTPHandle:
        handle, mode = _Handle(flags), "wb" if flags & os.O_WRONLY else "rb+" if flags & os.O_RDWR else "rb"
        handle.readfile = handle.writefile = os.fdopen(os.open(path, flags, 0o666), mode, 0)  # pyright: ignore
        return handle


class _Server(ServerInterface):
    def check_auth_publickey(self, username: str, key: PKey) -> int:
        return AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED


@contextmanager
def sftp_server(home: Path) -> Iterator[tuple[str, Drop]]:
    """The beginning of its addresses, for a user whose home it fills with `.ssh`; and what ends all connections."""
    key, transports, listener = ECDSAKey.generate(), list[Transport](), socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    (home / ".ssh").mkdir(parents=True)
    key.write_private_key_file(str(home / ".ssh" / "id_ecdsa"))
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")

    def serve() -> None:
        while True:
            try:
                transports.append(transport := Transport(listener.accept()[0]))
            except OSError:
                return
            transport.add_server_key(key)
            transport.set_subsystem_handler("sftp", SFTPServer, _Files)
            transport.start_server(server=_Server(), event=threading.Event())

    def drop() -> None:
        while transports:
            transports.pop().close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"ssh://me@127.0.0.1:{port}", drop
    listener.close()
    drop()
