"""`pyops.tune`: where the file is, what is trusted of it, several processes, and a file that cannot be used."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyops import tune
from pyops.tune import Cache

KEY = {"layer": [3, 4], "machine": "m"}
MS = {"dense": 1.5, "oc_block16": 0.5}


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PYOPS_CACHE", str(tmp_path))


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def filled(path=None, key=KEY, ms=MS):
    cache = Cache(path)
    cache.put(key, ms)
    cache.save()
    return cache


def written(path, entries, form=tune.FORMAT):
    path.write_text(json.dumps({"format": form, "entries": entries}))


# ------------------------------------------------------------------------------------------- where


def test_default_path(monkeypatch, tmp_path):
    assert tune.default_path() == tmp_path / "tune.json"
    monkeypatch.setenv("PYOPS_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tune.default_path() == tmp_path / "xdg" / "pyops" / "tune.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tune.default_path() == tmp_path / "home" / ".cache" / "pyops" / "tune.json"


def test_the_machine_tells_what_times_depend_on(threads):
    facts = tune.machine(torch.device("cpu"))
    assert {"pyops", "torch", "device", "isa", "threads", "forced", "build"} == facts.keys()
    threads(1)
    one = tune.machine(torch.device("cpu"))
    threads(2)
    assert one != tune.machine(torch.device("cpu"))
    json.dumps(facts)


# ------------------------------------------------------------------------------------------- a round trip


def test_times_are_found_again(tmp_path):
    path = tmp_path / "new" / "folder" / "t.json"
    assert Cache(path).get(KEY) is None
    cache = Cache(path)
    cache.put(KEY, MS)
    assert cache.get(KEY) == MS
    assert not path.exists(), "until it is saved"
    cache.save()
    assert Cache(path).get(KEY) == MS
    assert Cache(path).get({"machine": "m", "layer": [3, 4]}) == MS, "in any order"
    assert Cache(path).get(KEY | {"machine": "other"}) is None
    assert [p.name for p in path.parent.iterdir()] == ["t.json"], "no temporary files"


def test_a_hit_cannot_be_changed(tmp_path):
    cache = filled()
    cache.get(KEY).clear()
    assert cache.get(KEY) == Cache().get(KEY) == MS


def test_nothing_new_is_not_written(tmp_path):
    filled()
    before = (tmp_path / "tune.json").stat().st_mtime_ns
    cache = Cache()
    cache.get(KEY)
    cache.save()
    assert (tmp_path / "tune.json").stat().st_mtime_ns == before


def test_what_others_wrote_meanwhile_is_kept():
    one, two = Cache(), Cache()
    one.put({"a": 1}, MS)
    two.put({"b": 1}, MS)
    one.save()
    two.save()
    assert Cache().get({"a": 1}) == Cache().get({"b": 1}) == MS


def test_many_writers_leave_a_file_that_is_whole(tmp_path):
    def write(i):
        filled(key={"i": i})
        return Cache().get({"i": i}) in (None, MS)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(60)))
    assert len(json.loads((tmp_path / "tune.json").read_text())["entries"]) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["tune.json"]


def test_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(tune, "MAX_ENTRIES", 2)
    for i in range(3):
        filled(key={"i": i})
    assert [Cache().get({"i": i}) for i in range(3)] == [None, MS, MS]


# ------------------------------------------------------------------------------------------- nothing is trusted


@pytest.mark.parametrize("ms", [0, -1.0, float("nan"), float("inf"), 1e300, "1", None, True, [1.0], 10**400])
def test_what_is_no_time_is_not_taken(ms, tmp_path):
    with pytest.raises(ValueError, match="not times in ms"):
        Cache().put(KEY, {"dense": ms})
    text = tune._text(KEY)
    written(tmp_path / "tune.json", {text: {"dense": ms}, tune._text({"good": 1}): MS})
    with pytest.warns(UserWarning, match="holds 1 entries that are no times"):
        cache = Cache()
    assert cache.get(KEY) is None
    assert cache.get({"good": 1}) == MS
    cache.put({"new": 1}, MS)
    cache.save()
    assert Cache().get({"good": 1}) == Cache().get({"new": 1}) == MS, "and the file is clean again"


@pytest.mark.parametrize("entry", [{}, [], 3, None, {"x" * 65: 1.0}, {"dense": {"ms": 1.0}}])
def test_what_is_no_entry_is_not_taken(entry, tmp_path):
    written(tmp_path / "tune.json", {tune._text(KEY): entry})
    with pytest.warns(UserWarning, match="no times"):
        assert Cache().get(KEY) is None


FOREIGN = {
    "empty": b"",
    "cut off": b'{"format": 1, "entries": {"a": {"dense": 1.',
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "other JSON": b'{"name": "package", "version": "1"}',
    "another format": b'{"format": 2, "entries": {}}',
    "no entries": b'{"format": 1, "entries": 3}',
    "deep": b"[" * 100_000,
    "long number": b'{"format": 1, "entries": {"a": {"dense": ' + b"9" * 10_000 + b"}}}",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_not_ours_is_neither_used_nor_overwritten(content, tmp_path):
    path = tmp_path / "tune.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is not used: .* Delete it"):
        cache = Cache()
    cache.put(KEY, MS)
    cache.save()
    assert cache.get(KEY) == MS
    assert path.read_bytes() == content


def test_a_file_that_is_too_large_is_not_read(monkeypatch, tmp_path):
    filled()
    monkeypatch.setattr(tune, "MAX_BYTES", 10)
    with pytest.warns(UserWarning, match="too large"):
        assert Cache().get(KEY) is None


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "tune.json").mkdir()
    with pytest.warns(UserWarning, match="is not used"):
        filled()


def test_where_nothing_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "other" / "t.json")
    cache.put(KEY, MS)

    def refused(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tune.os, "replace", refused)
    with pytest.warns(UserWarning, match="cannot be written: .*Permission denied"):
        cache.save()
    cache.save()  # says it once
    assert cache.get(KEY) == MS
    assert list((tmp_path / "other").iterdir()) == [], "no temporary files"
    with pytest.warns(UserWarning, match="the tuning cache"):
        filled(tmp_path / "file" / "t.json")


def test_an_interrupted_write_leaves_the_old_file(monkeypatch, tmp_path):
    filled()
    before = (tmp_path / "tune.json").read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filled(key={"new": 1})
    assert (tmp_path / "tune.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tune.json"]
