"""The socket of a worker: its key, its address, and a thread that passes bytes on for each connection."""

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError, connection
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path

from ..files import write_json
from .connection import ADDRESS, KEY, pack, read_key

logger = logging.getLogger(__name__)

# Where there are no socket files, whoever reaches the port of this machine must still know the key.
FAMILY = "AF_UNIX" if "AF_UNIX" in connection.families else "AF_INET"
# Systems allow 104 to 108 bytes, with the byte that ends it.
LONGEST_PATH = 100
PREFIX = "hf_fedsa-"
# How long, in seconds, those who were given an answer have to take it when the socket closes.
PATIENCE = 5.0


class WorkerSocket:
    """
    Listens for processes of this machine and this user, until it is closed.

    Messages are bytes and remain bytes: nothing that comes in is unpickled.

    Args:
        folder (`Path`):
            Where the key and the address are written. Other users must not be able to write to it.
        reply (`Callable[[bytes], bytes]`):
            Makes the answer to a request. Called in a thread of the connection, so it may wait.
        most_bytes (`int`):
            Longest request. One that is longer is refused unread.

    Raises:
        `PermissionError`: the file system of the folder keeps no file from other users.
    """

    def __init__(self, folder: Path, reply: Callable[[bytes], bytes], most_bytes: int):
        self._folder = folder
        self._reply = reply
        self._most_bytes = most_bytes
        self._connections: dict[threading.Thread, Connection] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._remove_leftovers()
        self._key = self._make_key()
        self._socket_folder, address = _new_address()
        try:
            self._listener = Listener(address, family=FAMILY, backlog=64)
            write_json(folder / ADDRESS, {"address": self._listener.address})
        except BaseException:
            self._remove_leftovers()
            self._remove_socket()
            raise
        self._thread = threading.Thread(target=self._accept, name="worker-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening, lets threads that have an answer give it, and removes key and socket."""
        self._closing = True
        for name in (ADDRESS, KEY):
            (self._folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            Client(self._listener.address, family=FAMILY).close()  # Nothing else wakes the thread that accepts.
        self._thread.join(PATIENCE)
        self._listener.close()
        self._remove_socket()
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):
            with self._lock:
                threads = dict(self._connections)
                for open_connection in threads.values():
                    _shut_down(open_connection, how)
            deadline = time.monotonic() + PATIENCE
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while True:
            try:
                accepted = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                logger.warning("A connection to the worker could not be accepted: %s", error)
                time.sleep(0.1)
                continue
            if self._closing:
                accepted.close()
                return
            thread = threading.Thread(target=self._serve, args=(accepted,), name="worker-connection", daemon=True)
            with self._lock:
                self._connections[thread] = accepted
            thread.start()

    def _serve(self, accepted: Connection) -> None:
        try:
            # Here and not in the listener, where one who says nothing would keep all others out.
            deliver_challenge(accepted, self._key)
            answer_challenge(accepted, self._key)
            while True:
                accepted.send_bytes(self._reply(self._receive(accepted)))
        except AuthenticationError:
            logger.warning("A process that does not have the key was kept from connecting to the worker.")
        except (EOFError, OSError) as error:
            logger.debug("A connection to the worker ended: %r", error)
        finally:
            with self._lock:
                del self._connections[threading.current_thread()]
                accepted.close()

    def _receive(self, accepted: Connection) -> bytes:
        try:
            return accepted.recv_bytes(self._most_bytes)
        except OSError:
            # Nobody reads this if the connection is broken, rather than the request too long.
            text = (
                f"The request was longer than the {self._most_bytes} bytes that this worker takes, and was not read."
            )
            accepted.send_bytes(pack({"error": text}))
            raise

    def _make_key(self) -> bytes:
        path = self._folder / KEY
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        try:
            return read_key(path)
        except PermissionError:
            path.unlink()
            raise

    def _remove_socket(self) -> None:
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """What a worker that was killed left: its key, and the address of a socket that nobody listens to."""
        (self._folder / KEY).unlink(missing_ok=True)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            path = Path(json.loads((self._folder / ADDRESS).read_text(encoding="utf-8"))["address"])
            if path.parent.name.startswith(PREFIX):
                path.unlink()
                path.parent.rmdir()
        (self._folder / ADDRESS).unlink(missing_ok=True)


def _new_address() -> tuple[Path | None, str | tuple[str, int]]:
    """The address of a socket in a private folder, and that folder, or a port of this machine."""
    if FAMILY == "AF_INET":
        return None, ("127.0.0.1", 0)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    if len(os.fsencode(folder / "s")) > LONGEST_PATH:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    return folder, str(folder / "s")


def _shut_down(open_connection: Connection, how: int) -> None:
    """Wakes whoever waits on the connection, here and at its other end. Closing it would wake neither."""
    borrowed = socket.socket(fileno=open_connection.fileno())
    with contextlib.suppress(OSError):
        borrowed.shutdown(how)
    borrowed.detach()
