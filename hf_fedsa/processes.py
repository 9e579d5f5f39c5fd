"""The other processes of a run: what the first one does for all, and what is done when one is gone."""

import contextlib
from collections.abc import Iterator

from accelerate.utils import broadcast_object_list


@contextlib.contextmanager
def first_process_first(is_first: bool) -> Iterator[None]:
    """
    Lets the first process finish what is in this context before the others enter it.

    Raises:
        `RuntimeError`: in the others, if the first one has failed. They would go on to wait for it.
    """
    if not is_first:
        (failure,) = broadcast_object_list([None])
        if failure is not None:
            raise RuntimeError(f"The first process has stopped: {failure}")
        yield
        return
    try:
        yield
    except BaseException as error:
        broadcast_object_list([f"{type(error).__name__}: {error}"])
        raise
    broadcast_object_list([None])
