"""What `pyops.optim` folds into a step: clipping, unscaling, averages, masks, L1, narrow states and rounding."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from optim_cases import (
    ALL,
    NAMES,
    RICH,
    case_id,
    groups_of,
    make_params,
    ours,
    randn,
    same,
    set_grads,
    theirs,
    train,
    value_of,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyops.optim import StepOptions

EXACT = {"rtol": 1e-9, "atol": 1e-12}
INF, NAN = float("inf"), float("nan")


# ------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_norm": 1.0}, TypeError, r"__init__\(\) got an unexpected keyword argument 'max_norm'"),
        ({"max_grad_norm": -1.0}, ValueError, r"max_grad_norm is -1\.0; allowed: 0 to inf"),
        ({"max_grad_norm": NAN}, ValueError, "max_grad_norm is nan"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm is '1'; allowed: a number"),
        ({"error_if_nonfinite": 1}, TypeError, "error_if_nonfinite is 1; allowed: True or False"),
        ({"ema_decay": 1.5}, ValueError, r"ema_decay is 1\.5; allowed: 0 to 1"),
        ({"zero_grad": 1}, TypeError, "zero_grad is 1"),
        ({"state_dtype": "int4"}, ValueError, "state_dtype='int4' is not one of float32, bfloat16, int8"),
        ({"stochastic_rounding": None}, TypeError, "stochastic_rounding is None"),
        ({"seed": 0.5}, TypeError, r"seed is 0\.5"),
        ({"seed": -1}, ValueError, r"seed is -1; allowed: 0 to 2\*\*64 - 1"),
        ({"l1": -0.1}, ValueError, r"l1 is -0\.1"),
        ({"l1": INF}, ValueError, "l1 is inf"),
        ({"masks": [1]}, TypeError, "masks is a list"),
        ({"masks": {1: 2}}, TypeError, "masks maps int to int"),
        ({"masks": {torch.zeros(2): torch.ones(3)}}, ValueError, r"a mask is \(3,\), its parameter \(2,\)"),
        ({"masks": {torch.zeros(2): torch.full((2,), 0.5)}}, ValueError, "something else than 0 and 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["SGD", "Lion"])
def test_bad_options(name, options, error, message):
    with pytest.raises(error, match=message):
        ours(name)([randn(2).requires_grad_()], **options)


@pytest.mark.parametrize("name", ALL)
def test_every_class_takes_every_option(name):
    options = {
        "max_grad_norm": 1.0,
        "error_if_nonfinite": False,
        "ema_decay": 0.9,
        "masks": {},
        "zero_grad": True,
        "state_dtype": "bfloat16",
        "stochastic_rounding": True,
        "seed": 3,
        "l1": 0.1,
    }
    assert options.keys() == StepOptions.__annotations__.keys()
    optimizer = ours(name)([randn(2).requires_grad_()], **options)
    assert inspect.ismethod(optimizer.zero_grad)


def test_group_options():
    p, q = randn(3).requires_grad_(), randn(3).requires_grad_()
    optimizer = ours("SGD")([{"params": [p], "l1": 0.5}, {"params": [q]}])
    assert [g.get("l1") for g in optimizer.param_groups] == [0.5, None]
    with pytest.raises(ValueError, match="l1 is -1"):
        optimizer.add_param_group({"params": [randn(3).requires_grad_()], "l1": -1})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_narrow_states_are_not_for_wide_parameters(state_dtype, dtype):
    wide = torch.zeros(3, dtype=dtype, requires_grad=True)
    with pytest.raises(ValueError, match=f"state_dtype='{state_dtype}' is not for {dtype} parameters"):
        ours("Adam")([wide], state_dtype=state_dtype)
    optimizer = ours("Adam")([randn(3).requires_grad_()], state_dtype=state_dtype)
    with pytest.raises(ValueError, match="state_dtype"):
        optimizer.add_param_group({"params": [wide]})
    assert len(optimizer.param_groups) == 1


# -------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0, INF])
@pytest.mark.parametrize("name", ALL)
def test_clipping(name, max_norm):
    params, others = make_params(), make_params()
    a, b = ours(name)(groups_of(params), max_grad_norm=max_norm), ours(name)(groups_of(others))
    assert a.grad_norm is None
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        norm = torch.nn.utils.clip_grad_norm_(others, max_norm)
        before = [None if p.grad is None else p.grad.clone() for p in params]
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm.float())
        assert (a.grad_norm.shape, a.grad_norm.dtype) == ((), torch.float32)
        assert all(g is None or torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **EXACT)


def test_norm_of_mixed_dtypes_and_complex_gradients():
    params = [randn(50).to(d).requires_grad_() for d in (torch.float32, torch.bfloat16, torch.float64, torch.complex64)]
    for i, p in enumerate(params):
        p.grad = randn(50, seed=i + 1).to(p.dtype) * (1 + 1j if p.is_complex() else 1)
    expected = sum(p.grad.abs().double().square().sum() for p in params).sqrt()
    optimizer = ours("SGD")(params, error_if_nonfinite=True)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, expected.float())


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize(
    ("options", "raises"),
    [
        ({"max_grad_norm": 1.0}, True),
        ({"error_if_nonfinite": True}, True),
        ({"max_grad_norm": 1.0, "error_if_nonfinite": False}, False),
        ({}, False),
    ],
    ids=case_id,
)
@pytest.mark.parametrize(("name", "plain"), [("SGD", {"momentum": 0.9, "dampening": 0.5}), ("AdamW", {})], ids=case_id)
def test_gradients_that_are_not_finite(name, plain, options, raises, bad):
    params, others = make_params(torch.float32), make_params(torch.float32)
    a, b = (ours(name)(ps, **plain, **options, ema_decay=0.9, zero_grad=True) for ps in (params, others))
    set_grads(params, 2)
    params[4].grad[3, 3] = bad
    if not raises:
        a.step()
        assert not params[4].isfinite().all()
        return
    before = value_of(a)
    with pytest.raises(RuntimeError, match=r"total norm of the gradients is (inf|nan).* nothing was changed"):
        a.step()
    assert not a.grad_norm or not a.grad_norm.isfinite()
    assert same(before, value_of(a))
    assert not a.state
    assert params[0].grad != 0
    for step in range(2, 5):  # the first step that happens is the first
        set_grads(params, step)
        set_grads(others, step)
        a.step()
        b.step()
    assert same(value_of(a), value_of(b))


# ------------------------------------------------------------------------------------------ GradScaler


def scaled(name, options, theirs_options, steps=6, inf_at=(0, 3), unscale=False, max_norm=None):
    """Ours, and torch's single-tensor optimizer, each under a GradScaler of its own."""
    results = []
    for make in (ours(name), theirs(name)):
        mine = make is ours(name)
        params = make_params(torch.float32)
        optimizer = make(groups_of(params), **(options if mine else theirs_options))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(steps):
            optimizer.zero_grad()
            set_grads(params, step + 2, scale=scaler.get_scale())
            if step in inf_at:
                params[4].grad[0, 0] = INF
            scaler.scale(torch.zeros(()))  # makes the scale
            if unscale or (max_norm and not mine):
                scaler.unscale_(optimizer)
            if max_norm and not mine:
                torch.nn.utils.clip_grad_norm_(params, max_norm)
            before = value_of(optimizer)
            scaler.step(optimizer)
            assert same(before, value_of(optimizer)) == (step in inf_at)
            scaler.update()
        results.append((params, scaler.get_scale()))
    (p, scale), (q, other) = results
    assert scale == other
    for a, b in zip(p, q, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize(("name", "options"), [case for case in RICH if case[0] in NAMES], ids=case_id)
def test_grad_scaler(name, options, unscale):
    scaled(name, options, {**options, "foreach": False}, unscale=unscale)


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_grad_scaler_with_clipping(unscale):
    options = {"momentum": 0.9, "dampening": 0.5}
    scaled("SGD", {**options, "max_grad_norm": 2.0}, {**options, "foreach": False}, unscale=unscale, max_norm=2.0)


def test_grad_scaler_norm_is_unscaled_and_may_skip():
    params = make_params(torch.float32)
    optimizer = ours("AdamW")(params, max_grad_norm=1.0)
    set_grads(params, 2)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    for p in params:
        p.grad *= 64.0
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([64.0]), torch.tensor([0.0])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    before = value_of(optimizer)
    params[4].grad[0, 0] = NAN  # after the scaler has looked
    optimizer.step()
    assert same(before, value_of(optimizer))


def test_grad_scaler_and_zero_grad():
    """Also in a step that is skipped: the next backward would add to Inf."""
    params = make_params(torch.float32)
    optimizer = ours("AdamW")(params, zero_grad=True)
    scaler = torch.amp.GradScaler("cpu")
    for bad in (1.0, INF):
        set_grads(params, 2)
        params[4].grad[0, 0] = bad
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        assert all((p.grad == 0).all() for p in params)


def test_grad_scaler_without_gradients():
    p = randn(3).requires_grad_()
    optimizer = ours("AdamW")([p])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), 0  # the sum over no devices
    optimizer.step()
    assert not optimizer.state


# --------------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_average_equals_averaged_model(name, dtype, decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
    optimizer = ours(name)(model.parameters(), lr=0.05, ema_decay=decay)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    train(model, optimizer, 5)
    own = copy.deepcopy(model.state_dict())
    x = randn(3, 5).to(dtype)
    with optimizer.averaged_parameters():
        for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(model(x), averaged(x), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    assert {optimizer.state[p]["ema"].dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
def test_average_of_other_dtypes(dtype):
    p = randn(40).to(dtype).requires_grad_()
    optimizer = ours("Adam")([p], lr=0.1, ema_decay=0.8)
    average = None
    for step in range(4):
        p.grad = randn(40, seed=step).to(dtype)
        optimizer.step()
        wide = p.detach().to(torch.complex64 if dtype.is_complex else torch.float32, copy=True)
        average = wide if average is None else average + 0.2 * (wide - average)
    assert optimizer.state[p]["ema"].dtype == average.dtype
    torch.testing.assert_close(optimizer.state[p]["ema"], average, rtol=1e-2, atol=1e-2)  # of what p is rounded from
    with optimizer.averaged_parameters():
        assert torch.equal(p, optimizer.state[p]["ema"].to(dtype))


def test_options_may_be_changed_between_steps():
    p, q = (randn(5).requires_grad_() for _ in range(2))
    a, b = ours("AdamW")([p], lr=0.1), ours("AdamW")([q], lr=0.1)
    for step in range(6):
        p.grad, q.grad = randn(5, seed=step), randn(5, seed=step)
        if step == 2:
            a.options.max_grad_norm = 0.5
        if step >= 2:
            torch.nn.utils.clip_grad_norm_([q], 0.5)
        if step == 4:
            a.options.ema_decay, a.options.zero_grad = 0.5, True
        a.step()
        b.step()
        torch.testing.assert_close(p, q)
        assert ("ema" in a.state[p], not p.grad.any()) == (step >= 4, step >= 4)


def test_averaged_parameters_are_put_back():
    p, idle = randn(3).requires_grad_(), randn(2).requires_grad_()
    optimizer = ours("SGD")([p, idle], lr=0.1, ema_decay=0.5)
    with pytest.raises(RuntimeError, match="no step was made yet"), optimizer.averaged_parameters():
        pass
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    own, pointer = p.detach().clone(), p.data_ptr()

    def fail():
        with optimizer.averaged_parameters():
            assert not torch.equal(p, own)
            with optimizer.averaged_parameters():  # once more changes nothing
                assert not torch.equal(p, own)
            raise KeyError("from inside")

    with pytest.raises(KeyError, match="from inside"):
        fail()
    assert torch.equal(p, own)
    assert p.data_ptr() == pointer
    with pytest.raises(RuntimeError, match="pass ema_decay"), ours("SGD")([p]).averaged_parameters():
        pass


# ------------------------------------------------------------------------------------ L1, zeroed gradients


@pytest.mark.parametrize("name", ALL)
def test_l1_is_the_proximal_step(name):
    params, others = make_params(), make_params()
    a, b = ours(name)(params, lr=0.05, l1=0.7), ours(name)(others, lr=0.05)
    assert a.param_groups[0]["l1"] == 0.7
    set_grads(params, 2)
    set_grads(others, 2)
    a.step()
    b.step()
    for p, q in zip(params, others, strict=True):
        expected = q.sign() * (q.abs() - 0.05 * 0.7).clamp(min=0)
        torch.testing.assert_close(p, expected, check_stride=False, **EXACT)


def test_l1_makes_zeros():
    """Of 30 features the target depends on 3."""
    x, weight = randn(200, 30), torch.zeros(30, requires_grad=True)
    optimizer = ours("SGD")([weight], lr=0.05, l1=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        (x @ weight - x[:, :3].sum(1)).square().mean().backward()
        optimizer.step()
    assert weight.nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ALL)
def test_zero_grad(name):
    params, others = make_params(), make_params()
    a, b = ours(name)(params, zero_grad=True), ours(name)(others)
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        pointers = [None if p.grad is None else p.grad.data_ptr() for p in params]
        a.step()
        b.step()
        assert [None if p.grad is None else p.grad.data_ptr() for p in params] == pointers
        assert all(p.grad is None or not p.grad.any() for p in params)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    a.zero_grad()
    assert all(p.grad is None for p in params)
