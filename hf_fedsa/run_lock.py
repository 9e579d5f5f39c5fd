"""One run at a time in a folder: a file in it says which process is at work there, for as long as it is."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO
from uuid import uuid4

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)

LOCK = "run.lock"
# A process touches its lock this often, in seconds. Only other machines look at that: on its own machine the kernel
# knows whether it lives.
HEARTBEAT = 5.0
# A lock of another machine that is not touched for this long is taken over.
PATIENCE = 60.0

# Locks of this process. A lock that names this process and is not among them is left from a release that failed.
_held: set[str] = set()


class RunLockError(RuntimeError):
    """Another run is at work in the folder."""


class RunLock:
    """
    Keeps other runs out of folders, from `acquire` to `release`.

    The lock is a file, not the kernel's `flock`: forks (such as a loader's workers) would go on holding that after the
    run has died, and on many network file systems it holds on one machine only. `flock` guards the moment in which the
    file is read and written.

    Args:
        folders (`Mapping[str, Path]`):
            Folders, by the argument that named each.
    """

    def __init__(self, folders: Mapping[str, Path]):
        self.folders = folders
        self._owner: _Owner | None = None
        self._taken: dict[Path, str] = {}
        self._released = threading.Event()

    def acquire(self) -> None:
        """
        Takes the folders, those of a run that has died included.

        Raises:
            [`RunLockError`]: another run is at work in one of them.
        """
        if self._owner is not None and self._owner.pid == os.getpid():
            raise RunLockError(f"`train()` of this trainer is running already, since {self._owner.since}.")
        self._owner, self._taken = _Owner.this_process(), {}
        _held.add(self._owner.token)
        try:
            for argument, folder in self.folders.items():
                path = folder.resolve() / LOCK
                if path not in self._taken:
                    self._take(path, argument)
                    self._taken[path] = argument
        except BaseException:
            self.release()
            raise
        self._released = threading.Event()
        beat = threading.Thread(target=_beat, args=(self._owner, list(self._taken), self._released), daemon=True)
        beat.start()

    def release(self) -> None:
        """Lets others in. Nothing happens in a fork of the process that holds the folders."""
        if self._owner is None or self._owner.pid != os.getpid():
            return
        self._released.set()
        for path in self._taken:
            # Whoever deleted the folder needs no lock in it.
            with contextlib.suppress(FileNotFoundError), _exclusively(path, create=False) as file:
                if self._owner == _Owner.read(file):
                    path.unlink()
        _held.discard(self._owner.token)
        self._owner, self._taken = None, {}

    def check(self) -> None:
        """
        Makes sure, before something is written, that the folders are still this run's.

        Raises:
            [`RunLockError`]: a run on another machine took this one for dead, as after a long suspension.
        """
        if self._owner is None or self._owner.pid != os.getpid():
            return
        for path, argument in self._taken.items():
            try:
                owner = _Owner.read_path(path)
            except FileNotFoundError:
                self._take(path, argument)
                continue
            if owner != self._owner:
                raise RunLockError(
                    f"`{argument}={str(path.parent)!r}` has been taken over by {owner or 'another run'}, for which "
                    "this one seemed to have died. It stops here, so as not to write between the files of the other."
                )

    def _take(self, path: Path, argument: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        seen: tuple[_Owner, int] | None = None
        deadline = time.monotonic() + PATIENCE
        while True:
            with _exclusively(path) as file:
                other, touched = _Owner.read(file), os.fstat(file.fileno()).st_mtime_ns
                alive = None if other is None else other.is_alive()
                silent = alive is None and seen == (other, touched) and time.monotonic() >= deadline
                if other is None or alive is False or silent:
                    self._owner.write(file)
                    if other is not None:
                        logger.warning("Taking over %s from %s, which has died.", path.parent, other)
                    return
            if alive or (seen is not None and seen != (other, touched)):
                raise RunLockError(
                    f"`{argument}={str(path.parent)!r}` is in use by {other}. Two runs in one folder would overwrite "
                    "each other's clients and checkpoints. Wait for that run, stop it, or pass another folder. (What "
                    f"says so is {path}, which a run removes when it ends.)"
                )
            if seen is None:
                seen = other, touched
                logger.warning(
                    "%s is held by %s. Whether it lives cannot be seen from here, so its sign of life is awaited for "
                    "up to %d seconds. If it has died, you may delete the file.",
                    path,
                    other,
                    PATIENCE,
                )
            time.sleep(min(1.0, PATIENCE / 10))


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A process, such that it is not taken for a later one with its number, nor for one of another machine."""

    token: str
    pid: int
    started: str | None
    machine: str | None
    host: str
    since: str

    @classmethod
    def this_process(cls) -> "_Owner":
        return cls(
            token=uuid4().hex,
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            machine=_machine(),
            host=socket.gethostname(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    @classmethod
    def read(cls, file: TextIO) -> "_Owner | None":
        """The owner that a lock names. It names none if it is new, or if the writing of it was cut short."""
        try:
            return cls(**json.loads(file.read()))
        except (ValueError, TypeError):
            return None

    @classmethod
    def read_path(cls, path: Path) -> "_Owner | None":
        with open(path, encoding="utf-8") as file:
            return cls.read(file)

    def write(self, file: TextIO) -> None:
        file.seek(0)
        file.truncate()
        file.write(json.dumps(dataclasses.asdict(self)) + "\n")
        file.flush()
        os.fsync(file.fileno())

    def is_alive(self) -> bool | None:
        """Whether the process lives, or `None` if that cannot be seen from here."""
        if self.machine is None or self.machine != _machine():
            return None
        if self.pid == os.getpid() and self.started == _start_of(self.pid):
            return self.token in _held
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # Another user's. `/proc` may hide when it started.
        return _start_of(self.pid) == self.started

    def __str__(self) -> str:
        if self.token in _held and self.pid == os.getpid():
            return f"another `train()` of this same process ({self.pid}), since {self.since}"
        return f"process {self.pid} on {self.host}, since {self.since}"


def _beat(owner: _Owner, paths: list[Path], released: threading.Event) -> None:
    while not released.wait(HEARTBEAT):
        for path in paths:
            # A file server that is away for a moment is no reason to stop: `check` decides before a write.
            with contextlib.suppress(OSError):
                if _Owner.read_path(path) == owner:
                    os.utime(path)


def _machine() -> str | None:
    """Where a process number means the same process: this start of the kernel, in this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None  # No Linux.


def _start_of(pid: int) -> str | None:
    """When a process began, in the kernel's ticks. `None` if it has ended, also if nobody has asked for its status."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, which may hold anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def _exclusively(path: Path, create: bool = True) -> Iterator[TextIO]:
    """The file at `path`, which no other process reads or writes in this context."""
    while True:
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        with os.fdopen(handle, "r+", encoding="utf-8") as file:
            guarded = _flock(file)
            # While it waited, the file may have been removed, and another one made.
            if guarded and not _is_at(file, path):
                continue
            try:
                yield file
            finally:
                if guarded:
                    fcntl.flock(file, fcntl.LOCK_UN)  # Closing would not, if the process was forked meanwhile.
            return


def _flock(file: TextIO) -> bool:
    if os.name != "posix":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        # File systems without it. Of two runs that start in the same instant, `RunLock.check` stops one.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK):
            raise
        return False
    return True


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
