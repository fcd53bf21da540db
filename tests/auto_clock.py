"""A clock for tests of `pyops.Auto`: times are given by name, so that what is chosen does not depend on the machine."""

from __future__ import annotations

import contextlib

import pytest

from pyops import measure


@pytest.fixture
def clock(monkeypatch):
    """clock({"int8_dynamic": 0.2}) sets ms; what is not named takes 1 ms. A state of a whole model takes what
    `clock.whole`, called while the model is in that state, says: 1 ms before a change and 0.5 after, by default."""
    ms = {}

    def race(names, seconds, budget_s):
        found = {}
        for name in names:
            seconds(name, 1)
            found[name] = clock.whole(name) if budget_s == measure.STATE_BUDGET_S else ms.get(name, 1.0)
            clock.raced.append(name)
        return found

    def clock(table):
        ms.clear()
        ms.update(table)

    clock.raced = []
    clock.whole = lambda name: {"before": 1.0, "after": 0.5}[name]
    monkeypatch.setattr(measure, "_race", race)
    return clock


@contextlib.contextmanager
def nothing_changed(model):
    """Fails if anything that the model holds is another object, another order or another value afterwards."""
    before = held(model)
    values = {name: t.clone() for name, t in model.state_dict().items()}
    yield
    after = held(model)
    assert list(before) == list(after)
    for key, value in before.items():
        assert after[key] == value, key
    assert list(values) == list(model.state_dict())
    for name, t in model.state_dict().items():
        assert t.equal(values[name]), name


def held(model):
    """Identities of all that the modules hold, with the memory of their tensors."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module.__dict__.items():
            found[path, name] = value if isinstance(value, (bool, int, float, str)) else id(value)
            if isinstance(value, dict):
                found[path, name, "keys"] = [(key, id(content)) for key, content in value.items()]
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and not t.is_meta:
                found[path, name, "memory"] = (t.data_ptr(), t.stride(), t.requires_grad)
    return found
