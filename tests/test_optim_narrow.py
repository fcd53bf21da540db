"""Narrow states and stochastic rounding in `pyops.optim`, and everything at once."""

from __future__ import annotations

import pickle

import pytest
import torch
from optim_cases import RICH, case_id, copy_of, ours, randn, same, set_grads, train, value_of
from torch import nn
from torch.nn.utils import prune

from pyops.optim.state import MIN_NUMEL


def big(dtype=torch.float32):
    return [randn(64, 70).to(dtype), randn(5000).to(dtype), randn(3, 4, 20, 20).to(dtype)]


SMALL = [randn(64, 63), randn(300, 20), randn()]


@pytest.mark.parametrize(("name", "options"), RICH, ids=case_id)
def test_int8_states(name, options):
    params = [p.requires_grad_() for p in [*big(), *SMALL]]
    optimizer = ours(name)(params, state_dtype="int8", **options)
    set_grads(params, 2)
    optimizer.step()
    for i, p in enumerate(params):
        for key, state in optimizer.state[p].items():
            if key == "step" or key == "mu_product":
                assert (state.dtype, state.shape) == (torch.float32, ())
            elif key.endswith("_scale"):
                assert state.dtype == torch.float32
                assert state.numel() == sum(-(-p[j].numel() // 128) for j in range(len(p))) or p.dim() == 1
            else:
                signed = key in ("exp_avg", "momentum_buffer", "grad_avg")
                narrow = torch.int8 if signed else torch.uint8
                assert state.dtype == (narrow if i < 3 else torch.float32), key
                assert (f"{key}_scale" in optimizer.state[p]) == (i < 3)
                assert state.shape == p.shape


def test_which_tensors_keep_fp32_in_int8_mode():
    shapes = {(MIN_NUMEL,): True, (MIN_NUMEL - 1,): False, (128, 32): True, (200, 31): False, (2, 31, 100): True}
    params = [randn(*shape).requires_grad_() for shape in shapes]
    optimizer = ours("SGD")(params, momentum=0.9, state_dtype="int8")
    set_grads(params, 2)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p]["momentum_buffer"].dtype == torch.int8 for p in params] == list(shapes.values())


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("name", "options"), RICH, ids=case_id)
def test_narrow_states_train_as_well(name, options, state_dtype, threads):
    threads(1)  # the reference's many small operations
    options = {k: v for k, v in options.items() if k not in ("maximize", "betas", "lr_decay", "alpha")}
    chaotic = "centered" in options  # by half from seed to seed, and v - a² of almost equal gradients has few bits
    losses = dict.fromkeys(("float32", state_dtype), 0.0)
    for seed in range(3 if chaotic else 1):
        for dtype in losses:
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1))
            optimizer = ours(name)(model.parameters(), **options, state_dtype=dtype)
            losses[dtype] += sum(train(model, optimizer, 40)[-5:])
    assert losses[state_dtype] < (1.6 if chaotic else 1.15) * losses["float32"] + 1e-3


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RMSprop", "Adagrad", "LAMB"])
def test_square_that_overflows_stops_its_element_alone(name, state_dtype, isa):
    """The second moment becomes Inf. In 8 bits it takes the 127 others of its block along, from the next step on."""
    p = torch.ones(64, 128, requires_grad=True)
    optimizer = ours(name)([p], lr=1e-2, state_dtype=state_dtype)
    p.grad = torch.full_like(p, 0.5)
    p.grad[3, 5] = 2e21
    optimizer.step()
    assert p.isfinite().all()
    assert abs(p[3, 5].item() - 1) < 1e-3
    assert (p != 1).sum() >= p.numel() - 1 or name == "LAMB"  # the norm of its update overflows


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_random_bits_are_reproducible(name, state_dtype):
    def run(seed=0, steps=4, resume_at=None):
        params = [p.requires_grad_() for p in big(torch.bfloat16)]
        options = {"lr": 1e-2, "stochastic_rounding": True, "state_dtype": state_dtype, "seed": seed}
        options |= {"momentum": 0.9} if name == "SGD" else {}
        optimizer = ours(name)([{"params": params[:1]}, {"params": params[1:]}], **options)
        for step in range(steps):
            if step == resume_at:
                state = pickle.loads(pickle.dumps(optimizer.state_dict()))
                optimizer = ours(name)([{"params": params[:1]}, {"params": params[1:]}], **options)
                optimizer.load_state_dict(state)
            set_grads(params, step + 2)
            optimizer.step()
        assert [g["rounding_step"] for g in optimizer.param_groups] == [steps, steps]
        return value_of(optimizer)

    first = run()
    assert same(first, run())
    assert same(first, run(resume_at=2))
    assert not same(first, run(seed=1))
    assert not same(first, run(seed=2**40))


def test_no_count_where_nothing_is_random():
    p = randn(3).requires_grad_()
    p.grad = torch.ones(3)
    optimizer = ours("AdamW")([p], seed=3)
    optimizer.step()
    assert "rounding_step" not in optimizer.state_dict()["param_groups"][0]


def test_stochastic_rounding_is_unbiased():
    """A step of a tenth of bf16's spacing: to nearest it is lost each time."""
    n, steps = 20000, 20
    lr = 2**-8 / 10
    ends = {}
    for stochastic in (False, True):
        p = torch.full((n,), 1.5).to(torch.bfloat16).requires_grad_()
        optimizer = ours("SGD")([p], lr=lr, stochastic_rounding=stochastic)
        for _ in range(steps):
            p.grad = torch.ones(n, dtype=torch.bfloat16)
            optimizer.step()
        ends[stochastic] = p.detach().double()
    assert (ends[False] == 1.5).all()
    expected, spread = 1.5 - lr * steps, ends[True].std() / n**0.5
    assert abs(ends[True].mean() - expected) < 5 * spread
    assert spread > 0


def test_stochastic_rounding_is_for_bf16_only():
    for dtype in (torch.float32, torch.float16, torch.float64):
        results = []
        for stochastic in (False, True):
            p = randn(100).to(dtype).requires_grad_()
            p.grad = randn(100, seed=1).to(dtype)
            ours("SGD")([p], lr=1e-4, stochastic_rounding=stochastic).step()
            results.append(p.detach())
        assert torch.equal(*results)


def test_everything_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1)).to(torch.bfloat16)
    prune.l1_unstructured(model[0], "weight", 0.3)
    optimizer = ours("AdamW")(
        model.named_parameters(),
        lr=torch.tensor(3e-3),
        amsgrad=True,
        max_grad_norm=1.0,
        ema_decay=0.9,
        masks=model,
        zero_grad=True,
        state_dtype="int8",
        stochastic_rounding=True,
        l1=1e-4,
    )
    losses = train(model, optimizer, 40)
    assert losses[-1] < 0.7 * losses[0]
    with optimizer.averaged_parameters():
        assert not model[0].weight_orig[model[0].weight_mask == 0].any()
    other = copy_of(list(model.parameters()))
    again = ours("AdamW")(
        other, amsgrad=True, ema_decay=0.9, state_dtype="int8", stochastic_rounding=True, max_grad_norm=1.0
    )
    again.load_state_dict(optimizer.state_dict())
    assert same(value_of(optimizer)[len(other) :], value_of(again)[len(other) :])
