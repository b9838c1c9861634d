"""The folder in which a run leaves its traces.

Owns its emptying and its lock; must never empty a folder that no run has marked.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.processes import PartFailed
from demo.server_process import PROJECT


@contextmanager
def emptied(directory: Path, whose: str) -> Iterator[None]:
    """Keep a folder for this run alone, empty at first.

    Args:
        directory: made if it is not there.
        whose: the program's word for itself, also in the mark.

    Raises:
        PartFailed: another run uses it, or it holds what no run has left there.

    """
    mark = directory / f".topup-{whose}"
    if directory.exists() and any(directory.iterdir()) and not mark.exists():
        raise PartFailed(f"{directory} is not empty, and not the {whose}'s: remove it")
    directory.mkdir(parents=True, exist_ok=True)
    with mark.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PartFailed(f"another {whose} is running in {directory}") from None
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != mark:
                path.unlink()
        yield


def shown(path: Path) -> str:
    """A path as a person would type it."""
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)
