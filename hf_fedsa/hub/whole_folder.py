"""A folder written as a whole, and read as a whole even where a save was cut short.

A save writes its files to a folder of its own, `.saving.*`. One rename, to `.saved.*`, makes it the federation. Only
then are the files moved to their places. Whoever reads takes a file from `.saved.*` if it is still there, so the
federation is the old one up to that rename and the new one from then on. The next save moves what a dead process has
left there.

Stock PEFT, which does not look into `.saved.*`, finds in every folder of an adapter the old one or the new one or,
where their configs differ, for the time between two renames no config.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FEDERATION = "federation.json"
ROUNDS = "rounds.jsonl"
CARD = "README.md"

MIXTURE = (
    f"{{path}} is missing or is not the file that {FEDERATION} lists, so it may belong to another save or another "
    "client. Save or publish the federation again."
)

# Writing

_SAVING, _SAVED = ".saving.", ".saved."


@contextlib.contextmanager
def saving(directory: Path) -> Iterator[Path]:
    """
    A folder to write to, whose files take their places in `directory` at the end: all of them or, if anything fails
    or the process dies, none.

    One process at a time may save to a folder. It needs room for the old files and the new.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _tidy(directory)
    scratch = directory / f"{_SAVING}{socket.gethostname()}-{os.getpid()}.{secrets.token_hex(4)}"
    scratch.mkdir()
    try:
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            _sync(path)
        complete = directory / scratch.name.replace(_SAVING, _SAVED, 1)
        os.replace(scratch, complete)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _sync(directory)
    _move_into_place(complete, directory)


def _tidy(directory: Path) -> None:
    """Ends the saves of processes that died in them: complete ones are moved into place, others removed."""
    for complete in sorted(directory.glob(f"{_SAVED}*")):
        _move_into_place(complete, directory)
    for scratch in directory.glob(f"{_SAVING}*"):
        if not _is_of_another_living_process(scratch.name):
            shutil.rmtree(scratch, ignore_errors=True)


def _is_of_another_living_process(name: str) -> bool:
    found = re.fullmatch(re.escape(_SAVING) + r"(.+)-(\d+)\.[0-9a-f]+", name)
    if found is None or found[1] != socket.gethostname() or int(found[2]) == os.getpid():
        return False
    try:
        os.kill(int(found[2]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # It is someone else's.
    return True


def _move_into_place(complete: Path, directory: Path) -> None:
    """Can be cut short anywhere and called again."""
    files = [path.relative_to(complete) for path in complete.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: (file.name == FEDERATION, file.parent, file.name == CONFIG, file.name)):
        place = directory / file
        place.parent.mkdir(parents=True, exist_ok=True)
        config = file.with_name(CONFIG)
        if file.name == WEIGHTS and (complete / config).is_file() and not _same(complete / config, directory / config):
            # PEFT must not read the old config, and with it another scale, beside the new weights.
            (directory / config).unlink(missing_ok=True)
        os.replace(complete / file, place)
    for folder in {directory / file.parent for file in files}:
        _sync(folder)
    shutil.rmtree(complete, ignore_errors=True)


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # Some network file systems cannot, for folders.
            raise
    finally:
        os.close(handle)


# Reading


def locate(directory: Path, name: str) -> Path:
    """Where a file of the federation in `directory` is. It need not exist."""
    for complete in sorted(directory.glob(f"{_SAVED}*")):
        if (complete / name).is_file():
            return complete / name
    return directory / name


def locate_own(directory: Path, name: str) -> Path:
    """
    [`locate`] for files that are uploaded.

    Raises:
        `ValueError`: a link leads to the file, which may then be any file of this machine.
    """
    path = locate(directory, name)
    if path.resolve() != directory.resolve() / path.relative_to(directory):
        raise ValueError(
            f"{path} is not itself in the folder: a link leads to {path.resolve()}. Files outside of a federation's "
            "folder are not uploaded. Put a copy in the link's place, e.g. of the whole folder with `cp -rL`."
        )
    return path


def join_path(folder: str, name: str) -> str:
    """Path of a file within a federation. The folder may be the federation's own, `""`."""
    return f"{folder}/{name}" if folder else name
