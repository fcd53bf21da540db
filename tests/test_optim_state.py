"""State of `pyops.optim` on every path that it goes: checkpoints from and to torch.optim, copies, other precisions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import needs_native
from optim_cases import (
    ALL,
    CASES,
    NAMES,
    RICH,
    assert_equal_states,
    case_id,
    copy_of,
    groups_of,
    make_params,
    ours,
    randn,
    set_grads,
    states_of,
    theirs,
    torch_options,
)

from pyops import backend
from pyops.ops import optim_codec as codec
from pyops.optim import table

FP32 = {"rtol": 2e-5, "atol": 2e-6}
FULL = {"ema_decay": 0.9, "l1": 0.01, "stochastic_rounding": True, "state_dtype": "bfloat16"}


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def run(optimizer, params, steps):
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def same(a, b):
    """Two state dicts, exactly."""
    if a["param_groups"] != b["param_groups"] or a["state"].keys() != b["state"].keys():
        return False
    for i, state in a["state"].items():
        if state.keys() != b["state"][i].keys():
            return False
        for key, value in state.items():
            other = b["state"][i][key]
            if value.dtype != other.dtype or not torch.equal(value, other):
                return False
    return True


# ------------------------------------------------------------------------------- between torch and here


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_from_torch_and_back(name, options):
    """Three optimizers take turns: torch alone; torch, then ours; ours, then torch."""
    sets = [make_params(torch.float32) for _ in range(3)]
    plain = torch_options(options)
    alone = theirs(name)(groups_of(sets[0]), **plain)
    run(alone, sets[0], range(6))

    first = theirs(name)(groups_of(sets[1]), **plain)
    run(first, sets[1], range(3))
    then = ours(name)(groups_of(sets[1]))  # every option comes from the checkpoint
    then.load_state_dict(through_a_file(first.state_dict()))
    assert then.state_dict()["param_groups"] == first.state_dict()["param_groups"]
    assert_equal_states(then, first, rtol=0, atol=0)
    run(then, sets[1], range(3, 6))

    first = ours(name)(groups_of(sets[2]), **options)
    run(first, sets[2], range(3))
    then_torch = theirs(name)(groups_of(sets[2]), foreach=False)
    then_torch.load_state_dict(through_a_file(first.state_dict()))
    assert_equal_states(then_torch, first, rtol=0, atol=0)
    run(then_torch, sets[2], range(3, 6))

    tolerance = {"rtol": 1e-2, "atol": 1e-2} if "centered" in options else FP32
    for p, q, r in zip(*sets, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        torch.testing.assert_close(p, r, **tolerance)


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize(("name", "options"), [case for case in RICH if case[0] in NAMES], ids=case_id)
def test_checkpoints_of_no_and_one_step(name, options, when):
    sets = [make_params(torch.float32) for _ in range(2)]
    a, b = ours(name)(sets[0], **options), theirs(name)(sets[1], **torch_options(options))
    run(a, sets[0], range(2, 2 + when))
    run(b, sets[1], range(2, 2 + when))
    into_torch, into_ours = theirs(name)(sets[0], foreach=False), ours(name)(sets[1])
    into_torch.load_state_dict(a.state_dict())
    into_ours.load_state_dict(b.state_dict())
    run(into_torch, sets[0], range(3, 6))
    run(into_ours, sets[1], range(3, 6))
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if "centered" in options else FP32
    for p, q in zip(*sets, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_python_numbers_of_old_checkpoints(name):
    params = make_params(torch.float32)
    a = ours(name)(params)
    run(a, params, range(2, 4))
    old = snapshot(a)
    for state in old["state"].values():
        for key in ("step", "mu_product"):
            if key in state:
                state[key] = state[key].item()
    if name == "SGD":  # without momentum, old versions kept None
        old["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    b = ours(name)(copy_of(params))
    b.load_state_dict(old)
    assert same(b.state_dict(), a.state_dict()) or name == "SGD"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), [case for case in RICH if case[0] in NAMES], ids=case_id)
def test_torch_state_dict(name, options, dtype):
    params = [randn(64, 70).to(dtype).requires_grad_(), randn(7).to(dtype).requires_grad_()]
    exact = ours(name)(params, **options)
    narrow = {}
    for state_dtype in ("bfloat16", "int8"):
        narrow[state_dtype] = ours(name)(params, **options, **{**FULL, "state_dtype": state_dtype})
    set_grads(params, 2)
    values = copy_of(params)
    for optimizer in (exact, *narrow.values()):
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        optimizer.step()
    expected = theirs(name)(params, **torch_options(options))
    expected.step()
    expected = expected.state_dict()
    bound = {"bfloat16": 2**-7, "int8": 0.08}  # of the largest in the tensor
    for state_dtype, optimizer in narrow.items():
        state_dict = optimizer.torch_state_dict()
        assert state_dict["param_groups"][0].keys() == expected["param_groups"][0].keys()
        for i, state in state_dict["state"].items():
            assert state.keys() == expected["state"][i].keys()
            for key, value in state.items():
                wide = exact.state[params[i]][key]
                assert value.dtype == torch.float32
                assert (value - wide).abs().max() <= bound[state_dtype] * wide.abs().max()
        torch_optimizer = theirs(name)(params)
        torch_optimizer.load_state_dict(state_dict)
        torch_optimizer.step()
    assert exact.torch_state_dict()["state"][0].keys() == exact.state_dict()["state"][0].keys()


# ------------------------------------------------------------------------------------- without loss


@pytest.mark.parametrize("options", [{}, FULL, {**FULL, "state_dtype": "int8"}], ids=["plain", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_resume_is_exact(name, dtype, options):
    params = [randn(64, 70).to(dtype).requires_grad_(), *make_params(dtype)]
    others = copy_of(params)
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    a = ours(name)(groups_of(params), **momentum, **options)
    run(a, params, range(3))
    state, values = through_a_file(a.state_dict()), copy_of(params)
    run(a, params, range(3, 6))

    b = ours(name)(groups_of(others), **momentum, **options)
    with torch.no_grad():
        for p, value in zip(others, values, strict=True):
            p.copy_(value)
    b.load_state_dict(state)
    assert same(b.state_dict(), state)
    run(b, others, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_loaded_state_is_a_copy_in_the_parameters_layout(name):
    params = make_params(torch.float32)
    a = ours(name)(params, ema_decay=0.9)
    run(a, params, range(2, 4))
    state = a.state_dict()
    for s in state["state"].values():
        for key in s:
            s[key] = s[key].contiguous()
    b = ours(name)(params, ema_decay=0.9)
    b.load_state_dict(state)
    owned = {t.data_ptr() for s in state["state"].values() for t in s.values() if t.numel()}
    for p in params:
        expected = torch.zeros_like(p, memory_format=torch.preserve_format).stride()
        for key, value in b.state[p].items():
            assert key in ("step", "mu_product") or value.stride() == expected
            assert not value.numel() or value.data_ptr() not in owned


FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", [*FORMATS, "float64", "float16"])
def test_state_of_any_format_loads_into_any(source, target):
    params = [randn(64, 70).requires_grad_(), randn(7).requires_grad_()]
    a = ours("Adam")(params, state_dtype=source if source in FORMATS else "float32")
    run(a, params, range(2, 5))
    saved = a.state_dict()
    if source in ("float64", "float16"):
        for state in saved["state"].values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(getattr(torch, source))
    b = ours("Adam")(params, state_dtype=target)
    b.load_state_dict(saved)
    state = b.state[params[0]]
    assert state["exp_avg_sq"].dtype == FORMATS[target]
    assert ("exp_avg_scale" in state) == (target == "int8")
    before, after = (o.torch_state_dict()["state"] for o in (a, b))
    exact = target == source or (target == "float32" and source != "float64")
    for i, key in ((i, key) for i in (0, 1) for key in ("exp_avg", "exp_avg_sq")):
        limit = 0 if exact else 0.04 * before[i][key].abs().max()  # int8: half the distance of the outermost codes
        assert (before[i][key].double() - after[i][key].double()).abs().max() <= limit
    run(b, params, range(5, 7))


def test_quantizing_to_the_nearest():
    x = randn(64, 70).square()
    p = randn(64, 70).requires_grad_()
    optimizer = ours("RMSprop")([p], state_dtype="int8")
    optimizer.load_state_dict(
        {
            "state": {0: {"step": 1.0, "square_avg": x}},
            "param_groups": [{"params": [0], "lr": 0.1, "alpha": 0.9}],
        }
    )
    loaded, scale = optimizer.state[p]["square_avg"], optimizer.state[p]["square_avg_scale"]
    chosen = (codec.dequantize(loaded, scale) - x).abs()
    for other in (-1, 1):
        neighbour = (loaded.int() + other).clamp(1, 255).to(torch.uint8)  # what is positive stays so
        assert (chosen <= (codec.dequantize(neighbour, scale) - x).abs() + 1e-4).all()


def test_mu_product_keeps_its_precision_on_bf16_parameters():
    """torch casts it to the parameter's dtype."""
    p = randn(3).to(torch.bfloat16).requires_grad_()
    optimizer = ours("NAdam")([p])
    run(optimizer, [p], range(2, 5))
    product = optimizer.state[p]["mu_product"].clone()
    optimizer.load_state_dict(snapshot(optimizer))
    assert torch.equal(optimizer.state[p]["mu_product"], product)
    assert product.dtype == torch.float32


def test_groups_survive():
    params = make_params(torch.float32)
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    a = ours("AdamW")(named, lr=torch.tensor(0.1), l1=0.5, stochastic_rounding=True)
    torch.optim.lr_scheduler.ExponentialLR(a, 0.9)
    a.param_groups[0]["mine"] = "kept"
    run(a, params, range(2, 4))
    state = through_a_file(a.state_dict())
    b = ours("AdamW")(named)
    b.load_state_dict(state)
    group = b.param_groups[0]
    assert (group["mine"], group["l1"], group["rounding_step"]) == ("kept", 0.5, 2)
    assert group["param_names"] == [name for name, _ in named]
    assert (group["lr"], group["initial_lr"]) == (torch.tensor(0.1), torch.tensor(0.1))
    del state["param_groups"][0]["param_names"], state["param_groups"][0]["maximize"]
    b.load_state_dict(state)
    assert group["param_names"] == b.param_groups[0]["param_names"]
    assert b.param_groups[0]["maximize"] is False


def test_adamw_stays_adamw():
    params = make_params(torch.float32)
    a, b = ours("Adam")(params), ours("AdamW")(params)
    run(a, params, range(2, 3))
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["decoupled_weight_decay"]
    a.load_state_dict(b.state_dict())
    assert a.param_groups[0]["decoupled_weight_decay"]


def test_states_of_options_that_are_off_are_kept():
    p = randn(5).requires_grad_()
    a = ours("RMSprop")([p], momentum=0.9, centered=True, ema_decay=0.9)
    run(a, [p], range(2, 4))
    state = snapshot(a)
    b = ours("RMSprop")([p])
    b.load_state_dict(state)
    assert same(b.state_dict(), state)


def test_average_begins_where_a_checkpoint_has_none():
    p = randn(5).requires_grad_()
    a = ours("SGD")([p], momentum=0.9)
    run(a, [p], range(2, 4))
    b = ours("SGD")([p], momentum=0.9, ema_decay=0.5)
    b.load_state_dict(a.state_dict())
    run(b, [p], range(4, 5))
    assert torch.equal(b.state[p]["ema"], p)


# -------------------------------------------------------------------------- checkpoints that do not fit


def _broken(change, **options):
    """A checkpoint of two parameters with 8-bit states, changed."""
    params = [randn(64, 70).requires_grad_(), randn(7).requires_grad_()]
    optimizer = ours("Adam")([("w", params[0]), ("b", params[1])], state_dtype="int8")
    run(optimizer, params, range(2, 4))
    state = snapshot(optimizer)
    change(state["state"][0], state)
    return optimizer, state


def _set(key, value):
    def change(state, _):
        state[key] = value(state[key]) if callable(value) else value

    return change


def _remove(key):
    return lambda state, _: state.pop(key)


def _poke(key, value):
    def change(state, _):
        state[key].view(-1)[3] = value

    return change


def _group(change):
    return lambda _, whole: change(whole["param_groups"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("exp_avg", lambda t: t[:-1]),
            r"'exp_avg' of parameter 0 \(w\) has shape \(63, 70\), the parameter \(64, 70\)",
        ),
        (_set("exp_avg", 3.0), "'exp_avg' of parameter 0 .* is a float; allowed: a tensor"),
        (_set("exp_avg", lambda t: t.view(torch.uint8)), "'exp_avg' .* is torch.uint8; allowed: torch.int8"),
        (_set("exp_avg", lambda t: t.int()), r"'exp_avg' .* is torch.int32 and has scales"),
        (_set("exp_avg", lambda t: t.float()), r"'exp_avg' .* is torch.float32 and has scales"),
        (_remove("exp_avg"), "'exp_avg_scale' .* is no state of Adam"),
        (_remove("exp_avg_scale"), "'exp_avg_scale' .* is missing, which torch.int8 codes need"),
        (
            _set("exp_avg_scale", lambda t: t[:, :0]),
            r"'exp_avg_scale' .* is \(64, 0\) torch.float32; allowed: \(64, 1\)",
        ),
        (_set("exp_avg_scale", lambda t: t.int()), r"'exp_avg_scale' .* is \(64, 1\) torch.int32"),
        (_poke("exp_avg_scale", -1.0), "'exp_avg_scale' .* holds a scale that is negative, NaN or infinite"),
        (_poke("exp_avg_sq_scale", float("nan")), "'exp_avg_sq_scale' .* holds a scale that is negative"),
        (_poke("exp_avg_sq_scale", float("inf")), "'exp_avg_sq_scale' .* holds a scale that is negative"),
        (_remove("step"), r"'step' of parameter 0 \(w\) is missing, which Adam needs"),
        (_set("step", -1.0), "'step' .* is -1"),
        (_set("step", float("nan")), "'step' .* is nan"),
        (_set("step", "one"), "'step' .* is a str"),
        (_set("step", torch.zeros(2)), r"'step' .* is \(2,\) torch.float32; allowed: one real number"),
        (_set("momentum_buffer", torch.zeros(64, 70)), "'momentum_buffer' .* is no state of Adam"),
        (_set("ema", torch.zeros(64, 70, dtype=torch.int8)), "'ema' .* is torch.int8"),
        (_set("ema", torch.zeros(64, 70, dtype=torch.complex64)), "'ema' .* is torch.complex64, the parameter"),
        (lambda _, whole: whole["state"].update({1: [1]}), r"the state of parameter 1 \(b\) is a list, not a dict"),
        (_group(lambda gs: gs[0].update(amsgrad=True)), "'max_exp_avg_sq' of parameter 0 .* is missing"),
        (_group(lambda gs: gs[0].pop("betas")), "group 0 has no 'betas', so that it is none of Adam"),
        (_group(lambda gs: gs[0].update(params=[0])), "doesn't match the size of optimizer's group: group 0 has 1"),
        (_group(lambda gs: gs.append(gs[0])), "different number of parameter groups: 2, not 1"),
    ],
)
def test_broken_checkpoints_change_nothing(change, message):
    optimizer, state = _broken(change)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(before, optimizer.state_dict())


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("source", NAMES)
def test_checkpoints_of_other_algorithms(source, target):
    params = [randn(5).requires_grad_()]
    a = theirs(source)(params, **({"momentum": 0.9} if source == "SGD" else {}))
    run(a, params, range(2, 4))
    b = ours(target)(params, **({"momentum": 0.9} if target == "SGD" else {}))
    adams = {"Adam", "AdamW", "RAdam", "LAMB"}  # the same moments
    if source == target or (source in adams and target in adams):
        b.load_state_dict(a.state_dict())
        return
    before = snapshot(b)
    with pytest.raises(ValueError, match="loaded state dict"):
        b.load_state_dict(a.state_dict())
    assert same(before, b.state_dict())


# --------------------------------------------------------------------------------------- copies and hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("options", [{}, {**FULL, "max_grad_norm": 1.0, "zero_grad": True}], ids=["plain", "full"])
@pytest.mark.parametrize("name", ALL)
def test_copies(name, options, copied):
    params = make_params(torch.float32)
    a = ours(name)(groups_of(params), lr=torch.tensor(0.01), **options)
    run(a, params, range(2, 4))
    b = copied(a)
    others = [p for group in b.param_groups for p in group["params"]]
    assert not {p.data_ptr() for p in params if p.numel()} & {p.data_ptr() for p in others}
    assert b.options == a.options
    assert repr(a) == repr(b)
    for optimizer, ps in ((a, params), (b, others)):
        run(optimizer, ps, range(4, 6))
        assert optimizer.options.zero_grad == (not any(p.grad.any() for p in ps))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert same(a.state_dict(), b.state_dict())


def test_hooks_of_state_dicts():
    p = randn(3).requires_grad_()
    optimizer, seen = ours("AdamW")([p]), []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {**s, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    run(optimizer, [p], range(2, 3))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert not optimizer.state
    assert seen == ["save", "loaded"]
    assert len(list(states_of(ours("AdamW")([p])))) == 0


def test_adagrads_state_is_there_at_once():
    params = make_params(torch.float32)
    a, b = (make("Adagrad")(params, initial_accumulator_value=0.5) for make in (ours, theirs))
    assert_equal_states(a, b, rtol=0, atol=0)
    p = randn(64, 70).requires_grad_()
    c = ours("Adagrad")([p], initial_accumulator_value=0.5, state_dtype="int8")
    assert c.state[p]["sum"].dtype == torch.uint8
    assert torch.equal(c.torch_state_dict()["state"][0]["sum"], torch.full((64, 70), 0.5))
    a.share_memory()
    assert a.state[params[4]]["sum"].is_shared()


@pytest.mark.parametrize("name", ALL)
def test_parameters_cast_after_the_first_step(name):
    """Their fp32 states stay."""
    model = torch.nn.Linear(4, 3)
    optimizer = ours(name)(model.parameters(), lr=0.01, ema_decay=0.9)
    run(optimizer, list(model.parameters()), range(2, 3))
    optimizer.zero_grad()
    model.to(torch.bfloat16)
    run(optimizer, list(model.parameters()), range(3, 4))
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {torch.float32}


@needs_native
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_state_whose_memory_moved_is_noticed(name):
    """`.data =` keeps the tensor object and frees what the table points to."""
    p = torch.nn.Parameter(randn(50))
    p.grad = randn(50, seed=1)
    optimizer = ours("AdamW")([p])
    optimizer.step()
    table = optimizer._table
    assert table.holds(optimizer)
    optimizer.state[p][name].data = optimizer.state[p][name].data.clone()
    assert not table.holds(optimizer)
    optimizer.step()
    assert optimizer._table is not table


def test_parameter_that_shrinks_in_place():
    """At the same address; the gradient has to be as small."""
    whole = randn(1000)
    p = torch.nn.Parameter(whole[:])
    optimizer = ours("SGD")([p], lr=1.0, zero_grad=True)
    p.grad = torch.ones(1000)
    optimizer.step()
    p.grad = None
    p.data = whole[:10]
    p.grad = torch.ones(10)
    before = whole.clone()
    optimizer.step()
    assert torch.equal(p, before[:10] - 1)
    assert torch.equal(whole[10:], before[10:])


@pytest.mark.parametrize("geometry", [None, table.Geometry], ids=["guards", "geometry"])
@pytest.mark.parametrize("name", ["SGD", "Adafactor"])
def test_parameter_that_is_transposed_in_place(name, geometry, monkeypatch):
    if geometry:
        monkeypatch.setattr(table, "geometry", lambda tensors: geometry(*tensors))
    p, q = (torch.nn.Parameter(randn(5, 5)) for _ in range(2))
    ends = []
    for x, turn in ((p, lambda t: t.t()), (q, lambda t: t.t().contiguous())):
        optimizer = ours(name)([x], lr=1.0)
        for step in range(3):
            x.grad = randn(5, 5, seed=step)
            optimizer.step()
            if step == 0:
                x.data = turn(x.data)
                if name == "Adafactor":
                    optimizer.state.clear()
        ends.append(x.detach())
    torch.testing.assert_close(*ends, check_stride=False)


def test_gradient_that_is_negated_lazily():
    z = torch.complex(randn(7), randn(7, seed=1))
    p = torch.nn.Parameter(torch.zeros(7))
    optimizer = ours("SGD")([p], lr=1.0)
    grads = [z.conj().imag, randn(14)[::2], z.conj().imag]  # the same strides
    for g in grads:
        p.grad = g
        optimizer.step()
    assert grads[0].is_neg()
    torch.testing.assert_close(p.detach(), -sum(g.resolve_neg() for g in grads))


@pytest.mark.parametrize(
    "value", [torch.full((5000,), 127.0), torch.tensor([255.0, 3.0, -7.0]), torch.arange(-64, 64.0)]
)
def test_integers_are_no_codes(value):
    """Of fp32 states that hold integers only those are refused whose blocks all look like codes."""
    p = torch.zeros(value.shape, requires_grad=True)
    theirs = torch.optim.SGD([p], lr=1.0, momentum=0.9)
    p.grad = value.clone()
    theirs.step()
    optimizer = ours("SGD")([p], lr=1.0, momentum=0.9)
    optimizer.load_state_dict(theirs.state_dict())
    assert torch.equal(optimizer.state[p]["momentum_buffer"], value)


@needs_native
def test_chunks_cover_tensors_beyond_32_bits():
    """Only addresses and counts go into the table: nothing of this size is allocated."""
    table = backend.native.OptimTable()
    sizes = [2**33 + 12345, 2**31, (2**21 + 3) * 129_000]
    operands = [(64, 0)] * 4
    for numel, row in ((sizes[0], sizes[0]), (sizes[1], sizes[1]), (sizes[2], 129_000)):
        shape = [numel // row, row] if row < numel else [numel]
        table.add("adam", numel, row, 0, shape, [*operands, None, None, None], [], [], [], 0, 0)
    table.cut({})
    ends = [0, 0, 0]
    for entry, start, count in table.chunks():
        assert start == ends[entry]
        assert 0 < count <= 32 * 1024
        ends[entry] += count
    assert ends == sizes
