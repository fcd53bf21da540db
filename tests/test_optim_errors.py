"""Arguments and errors of `pyops.optim`: those of `torch.optim`; and sparse gradients, which few rules take."""

from __future__ import annotations

import inspect

import pytest
import torch
from optim_cases import ALL, NAMES, assert_equal_states, case_id, copy_of, ours, randn, theirs, torch_options

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def double():
    """fp64 by default, in which torch then counts steps, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchs(name):
    mine = list(inspect.signature(ours(name).__init__).parameters.values())
    expected = list(inspect.signature(theirs(name).__init__).parameters.values())
    assert mine[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert [(p.name, p.kind, p.default) for p in mine[:-1]] == [(p.name, p.kind, p.default) for p in expected]
    a, b = ours(name)([randn(3).requires_grad_()]), theirs(name)([randn(3).requires_grad_()])
    assert a.defaults == b.defaults


W = [torch.zeros(2, requires_grad=True)]
BAD_EVERYWHERE = [{"lr": -1.0}, {"lr": torch.zeros(2)}, {"lr": torch.tensor(-1.0)}, {"weight_decay": -1}]
BAD = {
    "SGD": [{"momentum": -1}, {"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}],
    "Adam": [
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1},
        {"betas": (0.9, torch.tensor(0.9))},
        {"betas": (0, 0.9)},
        {"lr": torch.tensor(0.1), "foreach": True},
        {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
    ],
    "AdamW": [{"betas": (1.0, 0.9)}, {"eps": -1}],
    "NAdam": [{"betas": (1.0, 0.9)}, {"eps": -1}, {"momentum_decay": -1}],
    "RAdam": [{"betas": (0.9, 1.0)}, {"eps": -1}],
    "Adamax": [{"betas": (0.9, 1.0)}, {"eps": -1}],
    "RMSprop": [{"momentum": -1}, {"alpha": -1}, {"eps": -1}],
    "Adagrad": [{"lr_decay": -1}, {"initial_accumulator_value": -1}, {"eps": -1}],
    "Adadelta": [{"rho": 1.1}, {"rho": -0.1}, {"eps": -1}],
}
BAD_TOGETHER = [{"fused": True, "foreach": True}, {"fused": True, "differentiable": True}]


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in NAMES for options in BAD_EVERYWHERE + BAD[name]]
    + [(name, options) for name in ("SGD", "Adam", "AdamW", "Adagrad") for options in BAD_TOGETHER],
    ids=str,
)
def test_bad_arguments_raise_as_in_torch(name, options):
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs(name)(W, **options)
    with pytest.raises(expected.type) as raised:
        ours(name)(W, **options)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    "params",
    [torch.zeros(2, requires_grad=True), [], [1.0], [torch.zeros(2, requires_grad=True) * 2], [{"params": set(W)}]],
    ids=["tensor", "empty", "number", "no leaf", "set"],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_parameters_raise_as_in_torch(name, params):
    with pytest.raises((TypeError, ValueError)) as expected:
        theirs(name)(params)
    with pytest.raises(expected.type) as raised:
        ours(name)(params)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("name", ["Lion", "LAMB"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        ours(name)(W, **options)


@pytest.mark.parametrize("name", NAMES)
def test_differentiable(name):
    with pytest.raises(NotImplementedError, match="differentiable=True"):
        ours(name)(W, differentiable=True)
    p = randn(3).requires_grad_()
    optimizer = ours(name)([{"params": [p], "differentiable": True}])
    p.grad = torch.ones(3)
    with pytest.raises(NotImplementedError, match="differentiable=True"):
        optimizer.step()


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("SGD", "Adagrad")])
def test_capturable_is_not_for_the_cpu(name):
    p = randn(3).requires_grad_()
    p.grad = torch.ones(3)
    optimizer = ours(name)([p], capturable=True)
    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be on supported devices"):
        optimizer.step()
    assert torch.equal(p, randn(3))
    assert not optimizer.state


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_is_accepted_but_not_for_complex_parameters(name):
    p, z = randn(3).requires_grad_(), torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    p.grad, z.grad = torch.ones(3), torch.ones(3, dtype=torch.complex64)
    ours(name)([p], fused=True).step()
    assert not torch.equal(p, randn(3))
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        ours(name)([z], fused=True).step()


def _sparse(step, rows=6, dtype=torch.float64):
    index = torch.tensor([[4, step % rows, 4]])
    return torch.sparse_coo_tensor(index, randn(3, 5, seed=step).to(dtype), (rows, 5))


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("SGD", "Adagrad")])
def test_sparse_gradients_raise(name):
    p = randn(6, 5).requires_grad_()
    p.grad = _sparse(0, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=f"^{name} does not support sparse gradients"):
        ours(name)([p]).step()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[("SGD", o) for o in ({}, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.9, "nesterov": True})],
        *[("Adagrad", o) for o in ({}, {"lr_decay": 0.1, "maximize": True}, {"initial_accumulator_value": 0.5})],
    ],
    ids=case_id,
)
def test_sparse_gradients(name, options, double):
    params = [randn(6, 5).double().requires_grad_(), randn(3).double().requires_grad_()]
    others = copy_of(params)
    a, b = ours(name)(params, max_grad_norm=2.0, **options), theirs(name)(others, **torch_options(options))
    for step in range(5):
        for p, q in zip(params, others, strict=True):
            p.grad, q.grad = (_sparse(step) if p.dim() > 1 else randn(3, seed=step).double() for _ in range(2))
        norm = torch.sqrt(others[0].grad.coalesce().values().square().sum() + others[1].grad.square().sum())
        for q in others:
            q.grad = q.grad * torch.clamp(2.0 / (norm + 1e-6), max=1.0)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm.float())
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, **EXACT)
    again = ours(name)(params, **options)
    again.load_state_dict(a.state_dict())
    assert_equal_states(again, a)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize(
    "option", [{"weight_decay": 0.1}, {"ema_decay": 0.9}, {"l1": 0.1}, {"state_dtype": "bfloat16"}]
)
def test_options_that_sparse_gradients_do_not_allow(name, option):
    p = randn(6, 5).requires_grad_()
    p.grad = _sparse(0, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=f"{next(iter(option))} option is not compatible with sparse gradients"):
        ours(name)([p], **option).step()
    assert torch.equal(p, randn(6, 5))


def test_sparse_embedding_trains():
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = ours("SGD")(embedding.parameters(), lr=0.5, momentum=0.5, zero_grad=True)
    before = embedding.weight.detach().clone()
    for _ in range(2):
        embedding(torch.tensor([1, 3, 1])).sum().backward()
        optimizer.step()
    assert (embedding.weight != before).any(1).nonzero().flatten().tolist() == [1, 3]
    torch.testing.assert_close(embedding.weight[1], before[1] - 0.5 * (2 + 3))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_raise(dtype):
    p, q = torch.ones(3).to(dtype), randn(3).requires_grad_()
    p.grad, q.grad = torch.ones(3).to(dtype), torch.ones(3)
    optimizer = ours("SGD")([q, p], momentum=0.9)
    with pytest.raises(RuntimeError, match=f"SGD: parameter 1 cannot be stepped: it is {dtype}"):
        optimizer.step()
    assert torch.equal(q, randn(3))
    assert not optimizer.state, "no trace of a step that did not happen"


def test_a_state_that_does_not_fit_raises():
    p = randn(3).requires_grad_()
    optimizer = ours("Adam")([("w", p)])
    p.grad = torch.ones(3)
    optimizer.step()
    p.grad = None
    p.data = randn(4)
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"Adam: state 'exp_avg' of parameter 0 \(w\) is \(3,\)"):
        optimizer.step()
