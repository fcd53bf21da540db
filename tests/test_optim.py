"""`pyops.optim` as a drop-in: arguments, keys, errors and results of `torch.optim`, and its place in PyTorch."""

from __future__ import annotations

import gc
import inspect
import warnings

import pytest
import torch
from optim_cases import (
    ALL,
    CASES,
    NAMES,
    OPTIONS,
    RICH,
    assert_equal_states,
    case_id,
    copy_of,
    groups_of,
    make_params,
    ours,
    randn,
    set_grads,
    theirs,
    torch_options,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

EXACT = {"rtol": 1e-9, "atol": 1e-12}
FP32 = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture
def double():
    """fp64 by default, in which torch then counts steps and multiplies NAdam's products, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def compare(a, b, params, others, steps=5, after=lambda: None, **tolerance):
    for step in range(steps):
        set_grads(params, step)
        set_grads(others, step)
        a.step()
        b.step()
        after()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, **tolerance)
        assert_equal_states(a, b, **tolerance)


# ----------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_equals_torch(name, options, double):
    params, others = make_params(), make_params()
    a = ours(name)(groups_of(params), **options)
    b = theirs(name)(groups_of(others), **torch_options(options))
    compare(a, b, params, others, **EXACT)
    assert [g.keys() for g in a.param_groups] == [g.keys() for g in b.param_groups]


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_equals_torch_in_fp32(name, options):
    params, others = make_params(torch.float32), make_params(torch.float32)
    a = ours(name)(groups_of(params), **options)
    b = theirs(name)(groups_of(others), **torch_options(options))
    if "centered" in options:  # v - a² cancels
        compare(a, b, params, others, rtol=1e-2, atol=1e-2)
    else:
        compare(a, b, params, others, **FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), RICH, ids=case_id)
def test_narrow_parameters_step_in_fp32(name, options, dtype):
    """As fp32 parameters that are rounded after each step; the states never are."""
    params = make_params(dtype)
    wide = [p.detach().float().requires_grad_() for p in params]
    a, b = ours(name)(params, **options), ours(name)(wide, **options)
    for step in range(5):
        set_grads(params, step)
        for p, w in zip(params, wide, strict=True):
            w.grad = None if p.grad is None else p.grad.float()
        a.step()
        b.step()
        for p, w in zip(params, wide, strict=True):
            torch.testing.assert_close(
                p.float(), w.detach().to(dtype).float(), rtol=2e-2 if "." in str(w) else 0, atol=0
            )
            w.data = p.detach().float()
    assert_equal_states(a, b, **FP32)
    assert {s.dtype for state in a.state.values() for s in state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_complex_parameters(name, options, dtype, double):
    shapes = ((), (3,), (4, 5))
    params = [torch.complex(randn(*s).double(), randn(*s, seed=9).double()).to(dtype).requires_grad_() for s in shapes]
    others = copy_of(params)
    a, b = ours(name)(params, **options), theirs(name)(others, **torch_options(options))
    tolerance = EXACT if dtype == torch.complex128 else {"rtol": 1e-3, "atol": 1e-5}
    compare(a, b, params, others, **tolerance)


@pytest.mark.parametrize("name", ALL)
def test_mixed_dtypes_in_a_group(name):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    together = [randn(4, 5, seed=i).to(dtype).requires_grad_() for i, dtype in enumerate(dtypes)]
    alone = copy_of(together)
    optimizers = [ours(name)(together, lr=0.01)] + [ours(name)([p], lr=0.01) for p in alone]
    for step in range(3):
        set_grads(together, step + 2)
        for p, q in zip(together, alone, strict=True):
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


def lion(p, g, state, lr, betas, wd):
    m = state.setdefault("m", torch.zeros_like(p))
    p = p - lr * wd * p - lr * torch.sign(betas[0] * m + (1 - betas[0]) * g)
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    return p


def lamb(p, g, state, lr, betas, wd, eps=1e-6, correct=True):
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0 * p) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0 * p) + (1 - betas[1]) * g * g
    if correct:
        m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    u = m / (v.sqrt() + eps) + wd * p
    ratio = p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1.0
    return p - lr * ratio * u


@pytest.mark.parametrize(
    ("name", "rule", "options", "arguments"),
    [
        ("Lion", lion, {}, (1e-4, (0.9, 0.99), 0.0)),
        ("Lion", lion, {"lr": 0.1, "betas": (0.8, 0.5), "weight_decay": 0.3}, (0.1, (0.8, 0.5), 0.3)),
        ("LAMB", lamb, {}, (1e-3, (0.9, 0.999), 0.01)),
        (
            "LAMB",
            lamb,
            {"lr": 0.1, "eps": 0.1, "weight_decay": 0.0, "bias_correction": False},
            (0.1, (0.9, 0.999), 0.0, 0.1, False),
        ),
    ],
)
def test_papers_rule(name, rule, options, arguments, double):
    params = [*make_params(), torch.zeros(3, requires_grad=True)]
    values, memory = [p.detach().clone() for p in params], [{} for _ in params]
    optimizer = ours(name)(params, **options)
    for step in range(5):
        set_grads(params, step)
        for i, p in enumerate(params):
            if p.grad is not None:
                values[i] = rule(values[i], p.grad, memory[i], *arguments)
        optimizer.step()
        for p, value in zip(params, values, strict=True):
            torch.testing.assert_close(p.detach(), value, check_stride=False, **EXACT)


@pytest.mark.parametrize("name", ALL)
def test_maximize(name, double):
    up, down = make_params(), make_params()
    a, b = ours(name)(up, lr=0.01, maximize=True), ours(name)(down, lr=0.01)
    for step in range(3):
        set_grads(up, step)
        set_grads(down, step)
        for p in down:
            p.grad = None if p.grad is None else -p.grad
        a.step()
        b.step()
    for p, q in zip(up, down, strict=True):
        torch.testing.assert_close(p, q, **EXACT)


# ------------------------------------------------------------------------------- learning rates and betas


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ALL)
def test_lr_may_be_a_tensor(name, shape):
    params, others = make_params(), make_params()
    lr = torch.full(shape, 0.05, dtype=torch.float64)
    a, b = ours(name)(params, lr=lr), ours(name)(others, lr=0.05)
    for step in range(3):
        lr.fill_(0.05 / (step + 1))  # as schedulers do
        b.param_groups[0]["lr"] = 0.05 / (step + 1)
        set_grads(params, step)
        set_grads(others, step)
        a.step()
        b.step()
    assert a.param_groups[0]["lr"] is lr
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_betas_may_be_tensors(double):
    params, others = make_params(), make_params()
    a = ours("Adam")(params, betas=(torch.tensor(0.8), torch.tensor([0.95])))
    b = ours("Adam")(others, betas=(0.8, 0.95))
    compare(a, b, params, others, rtol=0, atol=0)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def test_every_scheduler_is_tested():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["", "tensor lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("Adam", {})], ids=case_id)
def test_schedulers(name, options, scheduler, tensor_lr, double):
    params, others = make_params(), make_params()
    lrs = [torch.tensor(0.1) if tensor_lr else 0.1 for _ in range(2)]
    a = ours(name)(params, lr=lrs[0], **options)
    b = theirs(name)(others, lr=lrs[1], **torch_options(options))
    schedules = [SCHEDULERS[scheduler](o) for o in (a, b)]
    arguments = (1.0,) if scheduler == "ReduceLROnPlateau" else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the optimizer's step was not seen, among others
        warnings.filterwarnings("ignore", message="The epoch parameter|To get the last learning rate")
        compare(a, b, params, others, after=lambda: [s.step(*arguments) for s in schedules], **EXACT)
    assert a.param_groups[0].keys() == b.param_groups[0].keys()


# ------------------------------------------------------------------------------------- place in PyTorch


@pytest.mark.parametrize("name", ALL)
def test_closure(name):
    p = randn(3).requires_grad_()
    optimizer = ours(name)([p], lr=0.1)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert p.requires_grad
    assert optimizer.step() is None


@pytest.mark.parametrize(("name", "options"), RICH, ids=case_id)
def test_groups_added_later_and_gradients_that_come_and_go(name, options, double):
    params = make_params()
    late = [randn(4, 3).double().requires_grad_()]
    optimizer = ours(name)(params[:3], **options)
    optimizer.step()  # nothing has a gradient
    if name != "Adagrad":
        assert not optimizer.state
    set_grads(params, 2)
    optimizer.step()
    optimizer.add_param_group({"params": params[3:], "lr": 0.5})
    optimizer.add_param_group({"params": late})
    for step in range(3):
        set_grads(params + late, step)
        optimizer.step()
    # Each parameter alone.
    for i, p in enumerate(make_params()):
        alone = ours(name)([p], **options, **({"lr": 0.5} if i > 2 else {}))
        for step in (2, 0, 1, 2) if i < 3 else (0, 1, 2):
            others = make_params()
            set_grads(others, step)
            p.grad = others[i].grad
            alone.step()
        torch.testing.assert_close(p, params[i], **EXACT)


def test_a_parameter_listed_twice_steps_twice():
    p, q = randn(5).requires_grad_(), randn(5).requires_grad_()
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    with pytest.warns(UserWarning, match="duplicate parameters"):
        a = ours("SGD")([p, p], **options)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        b = theirs("SGD")([q, q], foreach=False, **options)
    for step in range(1, 3):  # torch forgets the buffer of the first turn of the first step
        p.grad = q.grad = randn(5, seed=step)
        if step == 1:
            for o, r in ((a, p), (b, q)):
                o.state[r]["momentum_buffer"] = torch.ones(5)
        a.step()
        b.step()
    torch.testing.assert_close(p, q)


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    optimizer = ours("AdamW")(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [randn(3).requires_grad_()]})


@pytest.mark.parametrize("name", ALL)
def test_hooks(name):
    p = randn(3).requires_grad_()
    p.grad = torch.ones(3)
    optimizer, seen = ours(name)([p]), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("global"))
    optimizer.step()
    handle.remove()
    assert seen == ["before", "after", "global"]
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert f"Optimizer.step#{name}.step" in {event.key for event in profile.key_averages()}


def test_step_counts_as_a_change():
    """Autograd has to see that a saved tensor was changed in place."""
    p = randn(3).requires_grad_()
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    ours("SGD")([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ALL)
def test_in_a_compiled_training_step(name, fresh_compiler):
    torch.manual_seed(0)
    models = [torch.nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [ours(name)(model.parameters(), lr=0.1) for model in models]

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    compiled = torch.compile(step, backend="aot_eager")
    for i in range(3):
        compiled(models[0], optimizers[0], randn(4, 5, seed=i))
        step(models[1], optimizers[1], randn(4, 5, seed=i))
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_on_the_meta_device():
    p = torch.empty(3, 4, device="meta", requires_grad=True)
    p.grad = torch.empty_like(p)
    optimizer = ours("AdamW")([p])
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("name", ALL)
def test_keeps_nothing_alive(name):
    import weakref

    p = randn(3).requires_grad_()
    p.grad = torch.ones(3)
    optimizer = ours(name)([p])
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    watch = weakref.ref(p)
    del p, optimizer
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("name", NAMES)
def test_default_options_are_covered(name):
    """Every boolean of torch's signature is switched by some case."""
    switched = {key for options in OPTIONS[name] for key in options} | {
        "foreach",
        "fused",
        "capturable",
        "differentiable",
    }
    for p in inspect.signature(theirs(name).__init__).parameters.values():
        if isinstance(p.default, bool):
            assert p.name in switched


@pytest.mark.parametrize("name", ALL)
def test_nan_reaches_the_parameter(name, isa):
    p = torch.ones(40, requires_grad=True)
    p.grad = torch.ones(40)
    p.grad[7] = torch.nan
    ours(name)([p], lr=0.1).step()
    assert p[7].isnan()
    assert name == "LAMB" or p.isnan().sum() == 1  # LAMB divides by the norm of all
