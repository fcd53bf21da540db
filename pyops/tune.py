"""Times measured on this machine, kept in a file: what was measured once is not measured again.

One JSON file, {"format": 1, "entries": {key: {name: ms}}}. A key holds all that a time depends on, the machine and the
versions included, as JSON; what is asked for under another key is not found. Nothing in the file is trusted: entries
that are not times are left out, a file that is not one of ours is neither used nor overwritten.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyops import backend
from pyops._version import __version__
from pyops.files import write_whole
from pyops.info import cpu_model

FORMAT = 1
MAX_BYTES, MAX_ENTRIES = 64 * 2**20, 20_000
"""What is larger is not read; of more entries the oldest are forgotten."""
MAX_MS = 3_600_000.0
MAX_NAME = 64

Times = dict[str, float]


def default_path() -> Path:
    """$PYOPS_CACHE/tune.json, else $XDG_CACHE_HOME/pyops/tune.json, else ~/.cache/pyops/tune.json."""
    own = os.environ.get("PYOPS_CACHE")
    if own:
        return Path(own) / "tune.json"
    # As the XDG specification has it, a relative path counts for nothing.
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(shared) if os.path.isabs(shared) else Path(os.path.expanduser("~")) / ".cache"
    return base / "pyops" / "tune.json"


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on beside the layer: hardware, threads, versions, and which build of the kernels runs."""
    facts: dict[str, Any] = {"pyops": __version__, "torch": torch.__version__, "forced": backend.forced}
    facts["build"] = _build_stamp()
    if device.type == "cuda":
        return facts | {"device": torch.cuda.get_device_name(device)}
    isa = backend.native.cpu_isa() if backend.native else None
    return facts | {"device": cpu_model(), "isa": isa, "threads": torch.get_num_threads()}


def measured_on(device: torch.device) -> dict[str, Any]:
    """What of it a reader wants to know."""
    facts = machine(device)
    order = ("device", "isa", "threads", "pyops", "torch", "forced")
    return {name: facts[name] for name in order if facts.get(name) is not None}


@functools.cache
def _build_stamp() -> str | None:
    """Tells one build of the kernels from another of the same version."""
    if backend.native is None:
        return None
    with contextlib.suppress(OSError, TypeError):
        stat = os.stat(backend.native.__file__)
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    return None


class Cache:
    """Times by key, read once; `save` writes what was put, if anything was.

    Several processes may use one file: it is replaced as a whole, after what the others have written since was read
    again. Of two that write in the same moment one's entries may be lost, and are measured again.

    Args:
        path: the file, None or True for `default_path()`, False for none, so that times are known to this object only.
            The file's folder is made when something is saved. What cannot be read or written is warned about once and
            otherwise goes without: a cache is never a reason to fail.
    """

    def __init__(self, path: str | os.PathLike | bool | None = None) -> None:
        self.path = None if path is False else default_path() if path in (None, True) else Path(path)
        self._new: dict[str, Times] = {}
        self._entries, self._usable = self._read(warn=True)

    def get(self, key: Mapping[str, Any]) -> Times | None:
        """The times under this key, None if there are none."""
        found = self._new.get(_text(key)) or self._entries.get(_text(key))
        return None if found is None else dict(found)

    def put(self, key: Mapping[str, Any], ms: Mapping[str, float]) -> None:
        """Keep these times; raises ValueError if they are none."""
        if not _is_entry(ms):
            raise ValueError(f"not times in ms: {dict(ms)}")
        self._new[_text(key)] = {name: float(value) for name, value in ms.items()}

    def save(self) -> None:
        """Write the file, if there is something new and nothing foreign in its place."""
        if not self._new or not self._usable:
            return
        others, usable = self._read(warn=False)
        if not usable:
            return
        entries = {k: v for k, v in others.items() if k not in self._new} | self._new
        entries = dict(list(entries.items())[-MAX_ENTRIES:])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps({"format": FORMAT, "entries": entries}, indent=1))
        except OSError as error:
            self._warn(f"cannot be written: {error}")
            self._usable = False
            return
        self._entries, self._new = entries, {}

    def _read(self, warn: bool) -> tuple[dict[str, Times], bool]:
        """(the valid entries, False if there is no file or something in its place that must not be overwritten)."""
        if self.path is None:
            return {}, False
        try:
            stat = self.path.stat()
            if stat.st_size > MAX_BYTES:
                raise ValueError("it is too large")
            entries, dropped = _parsed(self.path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except FileNotFoundError:
            return {}, True
        except (OSError, ValueError, RecursionError) as error:
            if warn:
                self._warn(f"is not used: {error}. Delete it to have a new one")
            return {}, False
        if dropped and warn:
            self._warn(f"holds {dropped} entries that are no times; they are not used")
        return entries, True

    def _warn(self, what: str) -> None:
        warnings.warn(f"the tuning cache {self.path} {what}", stacklevel=2)


@functools.lru_cache(maxsize=1)
def _parsed(path: Path, stamp: tuple[int, ...]) -> tuple[dict[str, Times], int]:
    """(the valid entries, how many are not); a swap asks for each layer, and reads a file that is the same once."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("entries"), dict):
        raise ValueError(f"it is no tuning cache of format {FORMAT}")
    entries = {key: value for key, value in data["entries"].items() if _is_entry(value)}
    return entries, len(data["entries"]) - len(entries)


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))


def _is_entry(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_time(n, ms) for n, ms in value.items())


def _is_time(name: Any, ms: Any) -> bool:
    if not isinstance(name, str) or len(name) > MAX_NAME or isinstance(ms, bool) or not isinstance(ms, (int, float)):
        return False
    return 0 < ms < MAX_MS  # NaN is not
