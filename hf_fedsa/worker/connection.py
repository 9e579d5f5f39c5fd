"""How a short-lived process asks a resident worker: the frames between them, and the side of the one that asks.

It loads nothing but the standard library, so that a process that only relays starts in a fraction of a second.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, answer_challenge, deliver_challenge
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from ..messages import Broadcast, ClientInfo, Update

VERSION = 1
ADDRESS = "worker.json"
KEY = "worker.key"


class WorkerError(RuntimeError):
    """A worker refused a request, or could not fulfil it."""


class NoWorkerError(WorkerError):
    """No worker is there, or it ended before it answered."""


@dataclass(frozen=True)
class FlatMessage:
    """
    A `Broadcast` or an `Update` with its tensors as one array, see [`to_flat`].

    Args:
        values (`dict[str, Any]`):
            The message's fields except `shared`. Plain JSON.
        array (`bytes`):
            All tensors as one array of little-endian fp32, in the order of their names. Anything with a contiguous
            buffer will do, such as a NumPy array.
        layout (`str`):
            [`tensors.layout_sha256`] of these tensors.
    """

    values: dict[str, Any]
    array: bytes
    layout: str


# A frame is one message of the connection: the length of the header, the header as JSON, and whatever bytes follow.


def pack(header: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """A header and bytes as one frame."""
    text = json.dumps({"version": VERSION, **header}).encode()
    return b"".join([len(text).to_bytes(4, "big"), text, payload])


def unpack(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """
    The header and the bytes of a frame.

    Raises:
        [`WorkerError`]: the bytes are no frame, or one of another version.
    """
    end = 4 + int.from_bytes(frame[:4], "big")
    try:
        if len(frame) < end:
            raise ValueError("cut off")
        header = json.loads(frame[4:end])
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WorkerError(
            f"{len(frame)} bytes that are no frame of a worker ({type(error).__name__}). Ask through "
            "`WorkerConnection`."
        ) from error
    if version != VERSION:
        raise WorkerError(
            f"A frame of version {version!r:.20}, where this side speaks version {VERSION}. The worker and whoever "
            "asks it need one version of hf_fedsa."
        )
    return header, frame[end:]


def refuse_writable(folder: Path) -> None:
    """
    Checks that no other user could put a worker of their own into the folder.

    Raises:
        `PermissionError`: the folder is another user's, or others can write to it.
    """
    _refuse_others(os.stat(folder), 0o022, f"`folder={str(folder)!r}`", "write to it and answer in the worker's place")


def read_key(path: Path) -> bytes:
    """
    The key of a worker's socket.

    Raises:
        `PermissionError`: the file is another user's, or others can read it.
    """
    with open(path, "rb") as file:
        _refuse_others(os.fstat(file.fileno()), 0o077, f"The key {path}", "read it and connect to the worker")
        return file.read()


def _refuse_others(status: os.stat_result, bits: int, what: str, harm: str) -> None:
    if os.name != "posix":
        return
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(
            f"{what} belongs to the user with number {status.st_uid}, while this process runs as {os.geteuid()}. A "
            "worker serves processes of its own user: run both as one, in a folder that is theirs."
        )
    if status.st_mode & bits:
        raise PermissionError(
            f"{what} has mode {status.st_mode & 0o777:04o}, so other users of this machine can {harm}. Stop the "
            "worker, run `chmod -R go-rwx` on the folder, and start the worker again: it makes a new key. On a file "
            "system without such modes, pass a folder on another one."
        )


class WorkerConnection:
    """
    Asks a resident worker on the same machine, one request at a time. Use it as a context manager.

    Args:
        folder (`str` or `Path`):
            The worker's folder, see [`OverSocket`].
        timeout (`float`, *optional*):
            Longest wait for an answer, in seconds. `None` waits as long as the worker lives.

    Raises:
        [`NoWorkerError`]: no worker is at work in the folder.
        `PermissionError`: other users could write to the folder or read the key.
    """

    def __init__(self, folder: str | Path, *, timeout: float | None = None):
        self.folder = Path(folder)
        self.timeout = timeout
        try:
            refuse_writable(self.folder)
            key = read_key(self.folder / KEY)
            address = json.loads((self.folder / ADDRESS).read_text(encoding="utf-8"))["address"]
            self._connection = Client(tuple(address) if isinstance(address, list) else address)
        except (FileNotFoundError, ConnectionError) as error:
            raise NoWorkerError(
                f"No worker is at work in `folder={str(self.folder)!r}` ({error}). Start one on this machine and in "
                "this folder, and ask again once it waits for requests."
            ) from error
        try:
            self._wait()
            answer_challenge(self._connection, key)
            deliver_challenge(self._connection, key)
        except AuthenticationError as error:
            self.close()
            raise WorkerError(
                f"The worker in `folder={str(self.folder)!r}` has another key than {self.folder / KEY}. If it has "
                "just been started again, connect again."
            ) from error
        except (EOFError, ConnectionError) as error:
            self.close()
            raise self._lost() from error

    def __enter__(self) -> "WorkerConnection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up. What the worker was asked for goes on, and is there for whoever asks for it again."""
        self._connection.close()

    def infos(self) -> "list[ClientInfo]":
        """The worker's clients. It says so at any time, also while they train."""
        from ..messages import ClientInfo

        reply, _ = self._ask({"kind": "infos"})
        return [ClientInfo(**values) for values in reply["infos"]]

    @overload
    def train(
        self, client_id: str, broadcast: "Broadcast", *, together: int = 1, fingerprint: dict[str, Any] | None = None
    ) -> "Update": ...

    @overload
    def train(
        self, client_id: str, broadcast: bytes, *, together: int = 1, fingerprint: dict[str, Any] | None = None
    ) -> bytes: ...

    @overload
    def train(
        self, client_id: str, broadcast: FlatMessage, *, together: int = 1, fingerprint: dict[str, Any] | None = None
    ) -> FlatMessage: ...

    def train(self, client_id, broadcast, *, together=1, fingerprint=None):
        """
        Has a client take part in a round, and waits for its update.

        Asking again for the same is safe: a client trains once, and whoever asks again gets the same update.

        Args:
            client_id (`str`):
                A client of this worker.
            broadcast (`Broadcast`, `bytes` or `FlatMessage`):
                What the server sends to the clients of the round: the message, its `messages.to_bytes`, or its
                tensors as one array.
            together (`int`, *optional*, defaults to `1`):
                How many of the round's clients live in this worker. It waits for them for a moment, so that they
                train side by side.
            fingerprint (`dict[str, Any]`, *optional*):
                What the server takes the client to be. If it is given, it must equal `ClientInfo.fingerprint`.

        Returns:
            `Update`, `bytes` or `FlatMessage`: the update, in the form of `broadcast`.

        Raises:
            [`WorkerError`]: the worker refused, and says why.
            [`NoWorkerError`]: the worker ended before it answered.
            `TimeoutError`: there was no answer within `timeout`.
        """
        header = {"kind": "train", "client_id": client_id, "together": together, "fingerprint": fingerprint}
        form, payload = _in_form(broadcast)
        reply, content = self._ask({**header, **form}, payload)
        if isinstance(broadcast, FlatMessage):
            return FlatMessage(values=reply["values"], array=content, layout=reply["layout"])
        if isinstance(broadcast, bytes):
            return content
        from ..messages import from_bytes

        return from_bytes(content)

    def evaluate(
        self,
        client_id: str,
        broadcast: "Broadcast | bytes | FlatMessage",
        *,
        fingerprint: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """
        Evaluates a client on its own rows, with the shared tensors of `broadcast` and those that it keeps. The worker
        does it between rounds.

        Args, errors: see [`WorkerConnection.train`].
        """
        form, payload = _in_form(broadcast)
        header = {"kind": "evaluate", "client_id": client_id, "fingerprint": fingerprint}
        reply, _ = self._ask({**header, **form}, payload)
        return reply["metrics"]

    def stop(self) -> None:
        """Tells the worker to end: after the round it is in, if it is in one, without opening another."""
        self._ask({"kind": "stop"})

    def _ask(self, header: Mapping[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        if self._connection.closed:
            raise ValueError("This `WorkerConnection` has been closed. Open another.")
        try:
            # A worker that hangs up on a request it does not take says why, and the answer is there to be read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.send_bytes(pack(header, payload))
            self._wait()
            frame = self._connection.recv_bytes()
        except (EOFError, ConnectionError) as error:
            self.close()
            raise self._lost() from error
        reply, content = unpack(frame)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply, content

    def _wait(self) -> None:
        if not self._connection.poll(self.timeout):
            self.close()  # Its answer may still come, and would be taken for that to the next request.
            raise TimeoutError(
                f"The worker in `folder={str(self.folder)!r}` has not answered in `timeout={self.timeout}` seconds. "
                "It goes on: connect and ask for the same again, and you get what it comes to."
            )

    def _lost(self) -> NoWorkerError:
        return NoWorkerError(
            f"The worker in `folder={str(self.folder)!r}` ended before it answered. Its own log says why. Start it "
            "again and ask for the same: an update that was finished is answered without training again."
        )


def _in_form(broadcast: "Broadcast | bytes | FlatMessage") -> tuple[dict[str, Any], bytes]:
    if isinstance(broadcast, FlatMessage):
        return {"values": broadcast.values, "layout": broadcast.layout}, broadcast.array
    if isinstance(broadcast, bytes):
        return {}, broadcast
    from ..messages import to_bytes

    return {}, to_bytes(broadcast)
