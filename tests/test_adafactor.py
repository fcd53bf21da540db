"""`pyops.optim.Adafactor` against `torch.optim.Adafactor`, its kernels against the reference of the op, its options."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from optim_cases import assert_equal_states, case_id, copy_of, randn, same, train, value_of
from torch import nn
from torch.nn.utils import prune

from pyops.ops import adafactor_step
from pyops.ops.adafactor import adafactor_step_ref, state_shapes
from pyops.optim import Adafactor

EXACT = {"rtol": 1e-9, "atol": 1e-12}
FP32 = {"rtol": 2e-5, "atol": 2e-6}
INF, NAN = float("inf"), float("nan")
CHANNELS_LAST = torch.channels_last

SHAPES = {
    "0-dim": lambda: randn(),
    "one": lambda: randn(1),
    "seven": lambda: randn(7),
    "vector": lambda: randn(3000),
    "every other element": lambda: randn(40)[::2],
    "matrix": lambda: randn(33, 65),
    "row": lambda: randn(1, 300),
    "column": lambda: randn(300, 1),
    "transposed": lambda: randn(9, 5).T,
    "transposed, in strips": lambda: randn(70, 600).T,
    "every other column": lambda: randn(5, 12)[:, ::2],
    "columns of a wider one": lambda: randn(40, 90)[:, 1:80],
    "batch of small ones": lambda: randn(5, 3, 3),
    "batch of larger ones": lambda: randn(3, 50, 60),
    "batch inside": lambda: randn(50, 60, 3).permute(2, 0, 1),
    "batch between": lambda: randn(4, 3, 50, 6).permute(1, 0, 2, 3).transpose(1, 2),
    "convolution": lambda: randn(64, 16, 3, 3),
    "convolution 7x7": lambda: randn(12, 3, 7, 7),
    "convolution 2x5": lambda: randn(30, 3, 2, 5),
    "convolution 1x1": lambda: randn(40, 30, 1, 1),
    "channels last": lambda: randn(8, 20, 3, 3).to(memory_format=CHANNELS_LAST),
    "channels last, few": lambda: randn(8, 3, 7, 7).to(memory_format=CHANNELS_LAST),
    "channels last, many": lambda: randn(2, 1500, 3, 3).to(memory_format=CHANNELS_LAST),
    "channels last, 1x1": lambda: randn(16, 8, 1, 1).to(memory_format=CHANNELS_LAST),
    "other way round": lambda: randn(6, 5, 4, 3).permute(0, 3, 2, 1),
    "strips": lambda: randn(300, 70),
    "wide": lambda: randn(2, 17000),
    "strips and panels": lambda: randn(36, 16500),
    "tall": lambda: randn(3000, 3),
    "large images": lambda: randn(2, 17, 90, 40).to(memory_format=CHANNELS_LAST),
}
"""What a parameter may look like: a kind of matrices, tiles and memory layout each."""

OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True, "lr": 0.5},
    {"eps": (1e-3, 1e-2), "d": 2.0},
    {"eps": (None, 0.5), "beta2_decay": -0.5},
    {"eps": (0.0, 1e-3), "lr": 1e-4},
]


def typed(t, dtype):
    return torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t)


def make_params(dtype=torch.float64, only=None):
    return [typed(make(), dtype).requires_grad_() for name, make in SHAPES.items() if only is None or name in only]


FEW = ("seven", "matrix", "transposed", "batch of small ones", "channels last", "strips")
"""One for each way through the kernel."""


def few(dtype=torch.float64):
    return make_params(dtype, FEW)


def set_grads(params, step, scale=1.0):
    """The gradients of each third parameter have strides of their own."""
    for i, p in enumerate(params):
        g = randn(*p.shape, seed=100 * step + i, scale=scale).to(p.dtype)
        if (i + step) % 3 == 0 and p.dim() > 1:
            p.grad = g.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            p.grad = typed(g.as_strided(p.shape, g.stride()), p.dtype) if p.dim() == 0 else torch.empty_like(p).copy_(g)


def groups_of(params):
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.02, "weight_decay": 0.05, "eps": (1e-4, 1e-2)}]


@pytest.fixture
def double():
    """fp64 by default, in which torch then counts steps, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def compare(a, b, params, others, steps=4, **tolerance):
    for step in range(steps):
        set_grads(params, step)
        set_grads(others, step)
        a.step()
        b.step()
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            torch.testing.assert_close(p, q, msg=lambda m, i=i: f"{list(SHAPES)[i]}: {m}", **tolerance)
        assert_equal_states(a, b, **tolerance)


# ----------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("options", OPTIONS, ids=case_id)
def test_equals_torch(options, double):
    params, others = make_params(), make_params()
    a, b = Adafactor(params, **options), torch.optim.Adafactor(others, **options)
    compare(a, b, params, others, **EXACT)
    assert [g.keys() for g in a.param_groups] == [g.keys() for g in b.param_groups]
    assert [list(s) for s in a.state.values()] == [list(s) for s in b.state.values()]


@pytest.mark.parametrize("options", OPTIONS, ids=case_id)
def test_fp32_is_as_torch_in_double_precision(options, isa):
    """Closer than torch in fp32, whose norms of long rows are worse."""
    params = make_params(torch.float32)
    others = [typed(p.detach(), torch.float64).requires_grad_() for p in params]
    eps1, eps2 = options.get("eps", (None, 1e-3))
    wide = {**options, "eps": (torch.finfo(torch.float32).eps if eps1 is None else eps1, eps2)}
    a, b = Adafactor(params, **options), torch.optim.Adafactor(others, **wide)
    for step in range(4):
        set_grads(params, step)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.double()
        a.step()
        b.step()
        for name, p, q in zip(SHAPES, params, others, strict=True):
            torch.testing.assert_close(p.double(), q, msg=lambda m, n=name: f"{n}: {m}", **FP32)


def test_equals_torch_in_groups_and_without_some_gradients(double):
    params, others = few(), few()
    a, b = Adafactor(groups_of(params)), torch.optim.Adafactor(groups_of(others))
    for step in range(5):
        set_grads(params, step)
        set_grads(others, step)
        if step < 2:
            params[step].grad = others[step].grad = None
        a.step()
        b.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, **EXACT)
    assert_equal_states(a, b, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_step_in_fp32(dtype, isa):
    """As fp32 parameters that are rounded after each step, with the epsilon of their own dtype."""
    params = make_params(dtype)
    wide = [typed(p.detach(), torch.float32).requires_grad_() for p in params]
    a, b = Adafactor(params), Adafactor(wide, eps=(torch.finfo(dtype).eps, 1e-3))
    for step in range(3):
        set_grads(params, step)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        a.step()
        b.step()
        for p, w in zip(params, wide, strict=True):
            assert torch.equal(p, w.to(dtype))
            w.data = typed(p.detach(), torch.float32)
    assert same([s for state in a.state.values() for s in state.values()], [*_states(b)])
    assert {s.dtype for s in _states(a)} == {torch.float32}


def _states(optimizer):
    return [s for state in optimizer.state.values() for s in state.values()]


def test_epsilon_is_that_of_each_dtype(double):
    """In torch, the first parameter's of the group."""
    params = [randn(4, 5).to(d).requires_grad_() for d in (torch.float64, torch.float32, torch.bfloat16)]
    alone = copy_of(params)
    optimizer = Adafactor(params)
    for p in params + alone:
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    for p, q in zip(params, alone, strict=True):
        Adafactor([q], eps=(torch.finfo(q.dtype).eps, 1e-3)).step()
        assert torch.equal(p, q)


def test_empty_parameters_are_left_alone():
    params = [torch.empty(*shape).requires_grad_() for shape in ((0,), (3, 0), (0, 4), (2, 0, 3))]
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer = Adafactor(params, ema_decay=0.9, zero_grad=True)
    for _ in range(2):
        optimizer.step()
    assert [s["step"].item() for s in optimizer.state.values()] == [2.0] * 4
    assert all(s.isfinite().all() for s in _states(optimizer))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_gradients_of_any_size(scale):
    """In double precision nothing of this over- or underflows."""
    params = few(torch.float32)
    wide = [typed(p.detach(), torch.float64).requires_grad_() for p in params]
    a, b = Adafactor(params, eps=(1e-20, 1e-3)), torch.optim.Adafactor(wide, eps=(1e-20, 1e-3))
    for step in range(2):
        set_grads(params, step, scale=scale)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.double()
        a.step()
        b.step()
    if scale > 1e-20:  # below, squares vanish in fp32
        for p, w in zip(params, wide, strict=True):
            torch.testing.assert_close(p.double(), w, **FP32)
    assert all(p.isfinite().all() for p in params)


def test_nan_spreads_as_in_torch(isa):
    for name in FEW:
        results = []
        for make in (Adafactor, torch.optim.Adafactor):
            (p,) = make_params(torch.float32, (name,))
            optimizer = make([p])
            p.grad = torch.ones_like(p)
            p.grad[(0,) * p.dim()] = NAN
            optimizer.step()
            results.append(p.isfinite())
        assert torch.equal(*results), name


def test_infinite_gradients_give_nan():
    for p in few(torch.float32):
        p.grad = torch.ones_like(p)
        p.grad[(0,) * p.dim()] = INF
        Adafactor([p]).step()
        assert p[(0,) * p.dim()].isnan()


# ------------------------------------------------------------------------------- the kernels, op by op


def arguments(dtype, full, only=None):
    """Of the op, for every shape; `full` has everything around the step."""
    params, grads = (make_params(dtype, only) for _ in range(2))
    params = [p.detach() for p in params]
    grads = [g.detach().flip(-1) if g.dim() else -g.detach() for g in grads]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = [size for p in params for size in state_shapes(p.shape).values()]
    states = [randn(*size, seed=i).abs().to(wide) for i, size in enumerate(sizes)]
    steps = [torch.full((), float(i % 5)) for i in range(len(params))]
    hyper = [0.01, 0.1, 1.0, float(full), 0.5 * full, 0.9, -0.8, 1e-3, 1.0]
    ema = [p.to(wide, copy=True) + 1 for p in params] if full else []
    masks = [torch.empty(0) if i % 5 == 4 else randn(*p.shape, seed=2) > -0.5 for i, p in enumerate(params)]
    more = (torch.tensor(0.02), torch.tensor(0.5, dtype=torch.float64)) if full else (None, None)
    first = [2 * (i % 2) for i in range(len(params))] if full else []
    tail = (ema, masks if full else [], first, *more, None, full, False, 5, 3)
    return params, grads, states, steps, hyper, None, *tail


def run(op, args):
    op(*args)
    return [*args[0], *args[1], *args[2], *args[3], *args[6]]


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_kernel_equals_reference(dtype, full, isa):
    got = run(torch.ops.pyops.adafactor_step, arguments(dtype, full))
    expected = run(adafactor_step_ref, arguments(dtype, full))
    tolerance = {torch.float64: EXACT, torch.float32: FP32, torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5}}[dtype]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_bits_do_not_depend_on_threads(full, isa, threads):
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(run(torch.ops.pyops.adafactor_step, arguments(torch.float32, full)))
    assert all(same(results[0], other) for other in results[1:])


def test_nothing_beside_the_tensors_is_written(isa):
    for name, make in SHAPES.items():
        storage = torch.full((make().numel() * 3 + 128,), 7.0)
        strides = make().stride()
        p = storage.as_strided(make().shape, strides, 64).copy_(make()).requires_grad_()
        inside = torch.zeros_like(storage).as_strided_(p.shape, strides, 64)
        inside.fill_(1.0)
        where = torch.zeros_like(storage)
        where.as_strided(p.shape, strides, 64).fill_(1.0)
        p.grad = torch.ones_like(p)
        Adafactor([p]).step()
        assert (storage[where == 0] == 7.0).all(), name


def test_stochastic_rounding(isa):
    """To one of the two neighbours, as the reference does but for a few elements that fp32 rounds differently."""
    results = []
    for op in (torch.ops.pyops.adafactor_step, adafactor_step_ref):
        args = list(arguments(torch.bfloat16, False, FEW))
        args[13] = True
        op(*args)
        results.append(torch.cat([p.float().reshape(-1) for p in args[0]]))
    assert (results[0] == results[1]).float().mean() > 0.999
    torch.testing.assert_close(*results, rtol=8e-3, atol=1e-5)


def test_stochastic_rounding_is_unbiased():
    ends = {}
    for stochastic in (False, True):
        p = torch.full((100, 200), 1.5).to(torch.bfloat16).requires_grad_()
        optimizer = Adafactor([p], lr=2**-12, stochastic_rounding=stochastic)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[stochastic] = p.detach().double()
    assert (ends[False] == 1.5).all(), "to nearest, steps of a twentieth of bf16's spacing are lost"
    expected = 1.5 * (1 - 2**-12) ** 10  # RMS(p)·lr at a time, as u is 1
    assert abs(ends[True].mean() - expected) < 5 * ends[True].std() / 20000**0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.ones(3, 4)]}, r"grads: \(3, 4\) on cpu for \(4, 3\)"),
        ({"states": []}, "states has 0 items for 1 params"),
        ({"states": [{"row_var": torch.zeros(4, 1)}]}, r"states of a parameter \(4, 3\): row_var \(4, 1\); needed: "),
        ({"steps": []}, "steps has 0 items"),
        ({"ema": [torch.zeros(4)]}, r"ema: \(4,\)"),
        ({"masks": [torch.ones(4), torch.ones(4)]}, "masks has 2 items"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_op(change, message):
    states = [{"row_var": torch.zeros(4, 1), "col_var": torch.zeros(1, 3)}]
    given = {"params": [torch.ones(4, 3)], "grads": [torch.ones(4, 3)], "states": states, "steps": [torch.zeros(())]}
    with pytest.raises(ValueError, match=message):
        adafactor_step(**{**given, **change})


def test_the_op_without_an_optimizer():
    p = randn(4, 3)
    states = [{"row_var": torch.zeros(4, 1), "col_var": torch.zeros(1, 3)}]
    adafactor_step([p], [randn(4, 3, seed=1)], states, [torch.zeros(())], 0.02, d=2.0, weight_decay=0.1)
    q = randn(4, 3).requires_grad_()
    q.grad = randn(4, 3, seed=1)
    torch.optim.Adafactor([q], 0.02, d=2.0, weight_decay=0.1).step()
    torch.testing.assert_close(p, q.detach())


# ----------------------------------------------------------------------------------- arguments and errors


def test_signature_is_torchs():
    mine = list(inspect.signature(Adafactor.__init__).parameters.values())
    expected = list(inspect.signature(torch.optim.Adafactor.__init__).parameters.values())
    assert mine[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert [(p.name, p.kind, p.default) for p in mine[:-1]] == [(p.name, p.kind, p.default) for p in expected]
    p = randn(3).requires_grad_()
    assert Adafactor([p]).defaults == torch.optim.Adafactor([p]).defaults


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": torch.zeros(2)},
        {"lr": torch.tensor(-1.0)},
        {"beta2_decay": 0.1},
        {"eps": (-1.0, 1e-3)},
        {"eps": (None, -1.0)},
        {"d": 0.5},
        {"weight_decay": -1},
    ],
    ids=str,
)
def test_bad_arguments_raise_as_in_torch(options):
    p = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(ValueError) as expected:  # noqa: PT011  compared below
        torch.optim.Adafactor(p, **options)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        Adafactor(p, **options)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_what_torch_does_not_step_raises(kind):
    p = randn(3, 2).to(torch.complex64 if kind == "complex" else torch.float32).requires_grad_()
    p.grad = torch.ones_like(p) if kind == "complex" else torch.ones(3, 2).to_sparse()
    messages = []
    for make in (Adafactor, torch.optim.Adafactor):
        with pytest.raises(RuntimeError) as raised:
            make([p]).step()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_may_be_a_tensor(shape):
    params, others = few(), few()
    lr = torch.full(shape, 0.05, dtype=torch.float64)
    a, b = Adafactor(params, lr=lr, weight_decay=0.1), Adafactor(others, lr=0.05, weight_decay=0.1)
    for step in range(3):
        lr.fill_(0.05 / (step + 1))  # as schedulers do
        b.param_groups[0]["lr"] = 0.05 / (step + 1)
        set_grads(params, step)
        set_grads(others, step)
        a.step()
        b.step()
    assert a.param_groups[0]["lr"] is lr
    assert same(value_of(a), value_of(b))


@pytest.mark.parametrize("key", ["lr", "eps", "d", "beta2_decay", "weight_decay", "maximize"])
def test_groups_may_change_between_steps(key, double):
    params, others = few(), few()
    a, b = Adafactor(params), torch.optim.Adafactor(others)
    changed = {"lr": 0.3, "eps": (1e-2, 0.1), "d": 3.0, "beta2_decay": -0.3, "weight_decay": 0.2, "maximize": True}[key]
    for step in range(4):
        if step == 2:
            a.param_groups[0][key] = b.param_groups[0][key] = changed
        set_grads(params, step)
        set_grads(others, step)
        a.step()
        b.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **EXACT)


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping(max_norm):
    params, others = few(), few()
    a, b = Adafactor(groups_of(params), max_grad_norm=max_norm), Adafactor(groups_of(others))
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        norm = torch.nn.utils.clip_grad_norm_(others, max_norm)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm.float())
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **EXACT)


@pytest.mark.parametrize("bad", [INF, NAN])
def test_gradients_that_are_not_finite(bad):
    params, others = few(torch.float32), few(torch.float32)
    a, b = (Adafactor(ps, max_grad_norm=1.0, ema_decay=0.9) for ps in (params, others))
    set_grads(params, 0)
    params[1].grad[3, 3] = bad
    with pytest.raises(RuntimeError, match=r"total norm of the gradients is (inf|nan)"):
        a.step()
    assert not a.state
    for step in range(3):  # the first step that happens is the first
        for ps, optimizer in ((params, a), (others, b)):
            set_grads(ps, step)
            optimizer.step()
    assert same(value_of(a), value_of(b))


@pytest.mark.parametrize("max_norm", [None, 2.0])
def test_grad_scaler(max_norm):
    results = []
    for make in (Adafactor, torch.optim.Adafactor):
        mine = make is Adafactor
        params = few(torch.float32)
        optimizer = make(params, **({"max_grad_norm": max_norm} if mine else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(6):
            set_grads(params, step, scale=scaler.get_scale())
            if step in (0, 3):
                params[1].grad[0, 0] = INF
            scaler.scale(torch.zeros(()))  # makes the scale
            if not mine:
                scaler.unscale_(optimizer)
                if max_norm:
                    torch.nn.utils.clip_grad_norm_(params, max_norm)
            before = value_of(optimizer)
            scaler.step(optimizer)
            assert same(before, value_of(optimizer)) == (step in (0, 3))
            scaler.update()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, **FP32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_average(dtype):
    params = few(dtype)
    optimizer = Adafactor(params, lr=0.1, ema_decay=0.8)
    averages = None
    for step in range(4):
        set_grads(params, step)
        optimizer.step()
        wide = [p.detach().to(torch.float64 if dtype == torch.float64 else torch.float32) for p in params]
        averages = (
            [w.clone() for w in wide]
            if averages is None
            else [a + 0.2 * (w - a) for a, w in zip(averages, wide, strict=True)]
        )
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}  # that of what is rounded
    for p, average in zip(params, averages, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], average, **tolerance)
    own = [p.detach().clone() for p in params]
    with optimizer.averaged_parameters():
        assert all(torch.equal(p, optimizer.state[p]["ema"].to(dtype)) for p in params)
    assert same(own, [p.detach() for p in params])


def test_masked_gradients_count_as_zeros():
    """So that pruning's own gradients, which are masked, and others give the same."""
    params, others = few(), few()
    masks = {p: randn(*p.shape, seed=5) > 0 for p in params}
    a, b = Adafactor(params, masks=masks), Adafactor(others)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.mul_(masks[p])
            q.mul_(masks[p])
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        for p, q in zip(params, others, strict=True):
            q.grad = q.grad * masks[p]
            p.grad[(0,) * p.dim()] = NAN if not masks[p][(0,) * p.dim()] else 1.0
            q.grad[(0,) * q.dim()] = 0.0 if not masks[p][(0,) * p.dim()] else 1.0
        a.step()
        b.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **EXACT)
        assert not p[~masks[p]].any()
    assert_equal_states(a, b, **EXACT)


def test_pruned_models_keep_their_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[2], "bias", 1)
    optimizer = Adafactor(model.parameters(), lr=0.05, masks=model, ema_decay=0.9, zero_grad=True)
    losses = train(model, optimizer, 40)
    assert losses[-1] < losses[0]
    for module, name in ((model[0], "weight"), (model[2], "bias")):
        p, mask = getattr(module, name + "_orig"), getattr(module, name + "_mask").bool()
        assert not p[~mask].any()
        assert not optimizer.state[p]["ema"][~mask].any()


def test_l1_is_the_proximal_step():
    params, others = few(), few()
    a, b = Adafactor(params, lr=0.05, l1=0.7), Adafactor(others, lr=0.05)
    set_grads(params, 2)
    set_grads(others, 2)
    a.step()
    b.step()
    for p, q in zip(params, others, strict=True):
        expected = q.sign() * (q.abs() - 0.05 * 0.7).clamp(min=0)
        torch.testing.assert_close(p, expected, check_stride=False, **EXACT)


def test_zero_grad():
    params, others = make_params(torch.float32), make_params(torch.float32)
    a, b = Adafactor(params, zero_grad=True), Adafactor(others)
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        a.step()
        b.step()
        assert not any(p.grad.any() for p in params)
    assert same([p.detach() for p in params], [p.detach() for p in others])


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_states_stay_wide(state_dtype):
    params, others = few(torch.float32), few(torch.float32)
    a, b = Adafactor(params, state_dtype=state_dtype), Adafactor(others)
    for step in range(3):
        for ps, optimizer in ((params, a), (others, b)):
            set_grads(ps, step)
            optimizer.step()
    assert same(value_of(a), value_of(b))
    assert {s.dtype for s in _states(a)} == {torch.float32}


# ------------------------------------------------------------------------------- checkpoints, compilation


@pytest.mark.parametrize("to_torch", [False, True], ids=["from torch", "to torch"])
def test_resumes_either_way(to_torch, double):
    params, others = make_params(), make_params()
    first, second = (Adafactor, torch.optim.Adafactor) if to_torch else (torch.optim.Adafactor, Adafactor)
    a, b = first(params), torch.optim.Adafactor(others)
    compare(a, b, params, others, steps=2, **EXACT)
    again = second(params)
    again.load_state_dict(pickle.loads(pickle.dumps(a.state_dict())))
    for step in (2, 3):
        for ps, optimizer in ((params, again), (others, b)):
            set_grads(ps, step)
            optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **EXACT)
    assert_equal_states(again, b, **EXACT)


def test_resuming_changes_no_bit():
    def steps(resume):
        params = make_params(torch.bfloat16)
        options = {"stochastic_rounding": True, "ema_decay": 0.9, "seed": 3}
        optimizer = Adafactor(params, **options)
        for step in range(4):
            if resume and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = Adafactor(params, **options)
                optimizer.load_state_dict(state)
            set_grads(params, step)
            optimizer.step()
        return value_of(optimizer)

    assert same(steps(False), steps(True))


def test_narrow_checkpoints_of_torch_are_widened():
    params = few(torch.bfloat16)
    other = torch.optim.Adafactor(params)
    set_grads(params, 0)
    other.step()
    optimizer = Adafactor(params)
    optimizer.load_state_dict(other.state_dict())
    assert {s.dtype for s in _states(optimizer)} == {torch.float32}
    for p in params:
        for name in state_shapes(p.shape):
            assert torch.equal(optimizer.state[p][name], other.state[p][name].float())


def test_checkpoints_that_do_not_fit_raise():
    params = few(torch.float32)
    optimizer = Adafactor(params)
    set_grads(params, 0)
    optimizer.step()
    good = optimizer.state_dict()
    for index, name, value, message in (
        (1, "row_var", torch.zeros(33), r"'row_var' of parameter 1 has shape \(33,\), the parameter \(33, 65\)"),
        (1, "variance", torch.zeros(33, 65), "'variance' of parameter 1 is no state of Adafactor"),
        (0, "row_var", torch.zeros(1), "'row_var' of parameter 0 is no state of Adafactor"),
        (1, "col_var", None, "'col_var' of parameter 1 is missing"),
    ):
        bad = copy.deepcopy(good)
        bad["state"][index][name] = value
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    adam = torch.optim.Adam(params)
    with pytest.raises(ValueError, match="no 'beta2_decay', so that it is none of Adafactor"):
        optimizer.load_state_dict(adam.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on(copied):
    params = few()
    optimizer = Adafactor(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    other = copied(optimizer)
    others = other.param_groups[0]["params"]
    for ps, o in ((params, optimizer), (others, other)):
        set_grads(ps, 1)
        o.step()
    assert same([p.detach() for p in params], [p.detach() for p in others])


def test_states_of_another_layout_are_stepped_in_place():
    """As somebody may put them there; the kernel works on copies of them."""
    (p,) = make_params(torch.float64, ("channels last",))
    (q,) = make_params(torch.float64, ("channels last",))
    a, b = Adafactor([p]), torch.optim.Adafactor([q])
    for step in range(4):
        for x, optimizer in ((p, a), (q, b)):
            set_grads([x], step)
            optimizer.step()
        if step == 1:
            for name in ("row_var", "col_var"):
                a.state[p][name] = a.state[p][name].contiguous()
    torch.testing.assert_close(p, q, **EXACT)
    assert_equal_states(a, b, **EXACT)


def test_moved_gradients_and_new_ones_are_seen():
    params, others = few(), few()
    a, b = Adafactor(params), torch.optim.Adafactor(others)
    for step in range(6):
        for ps, optimizer in ((params, a), (others, b)):
            set_grads(ps, step)
            if step % 2:
                ps[step % len(ps)].grad = None
            optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_trains():
    losses = {}
    for make in (Adafactor, torch.optim.Adafactor):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 1))
        losses[make] = train(model, make(model.parameters(), lr=0.05), 60)
    assert losses[Adafactor][-1] < 0.5 * losses[Adafactor][0]
    assert losses[Adafactor][-1] == pytest.approx(losses[torch.optim.Adafactor][-1], rel=0.05)
