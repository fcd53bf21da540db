"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterable, Iterator

_wanted: contextvars.ContextVar[bool | None] = contextvars.ContextVar("progress", default=None)


@contextlib.contextmanager
def progress_wanted(progress: bool | None) -> Iterator[None]:
    """What the user said: bars always, never, or (None) where they are usual and stderr is a terminal."""
    token = _wanted.set(progress)
    try:
        yield
    finally:
        _wanted.reset(token)


def with_progress(items: Iterable, total: int | None, usual: bool, what: str, unit: str) -> Iterable:
    """The items, with a bar if one is wanted. Needs tqdm, without which there is none."""
    wanted = _wanted.get()
    show = usual if wanted is None else wanted
    if not show or not (wanted is True or sys.stderr.isatty()):
        return items
    try:
        from tqdm import tqdm
    except ImportError:  # a GPU machine on which nothing may be installed
        return items
    return tqdm(items, total=total, desc=what, unit=unit, leave=False)
