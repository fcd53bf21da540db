"""Masks in `pyops.optim`: what is pruned stays exactly zero, whatever is done to the model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from optim_cases import RICH, case_id, make_params, ours, randn, set_grads, train
from torch import nn
from torch.nn.utils import prune

from pyops.optim import SGD, masks_of

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def pruned_model(amount=0.5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
    prune.l1_unstructured(model[0], "weight", amount)
    prune.random_unstructured(model[2], "bias", amount=1)
    return model


def assert_masked(optimizer, p, mask):
    assert not (p * ~mask).any()
    assert (p * mask != 0).any() or not mask.any()
    for name, state in optimizer.state[p].items():
        if state.dim() and name != "step":
            assert not (state * ~mask).any(), name


@pytest.mark.parametrize("given", ["module", "dict"])
@pytest.mark.parametrize(("name", "options"), RICH, ids=case_id)
def test_masks(name, options, given):
    model = pruned_model()
    masks = model if given == "module" else masks_of(model)
    if given == "dict":
        assert {id(p) for p in masks} == {id(model[0].weight_orig), id(model[2].bias_orig)}
    optimizer = ours(name)(model.parameters(), lr=0.05, masks=masks, ema_decay=0.9, weight_decay=0.01)
    losses = train(model, optimizer, 10)
    assert losses[-1] < losses[0] or name == "LAMB"
    assert_masked(optimizer, model[0].weight_orig, model[0].weight_mask.bool())
    assert_masked(optimizer, model[2].bias_orig, model[2].bias_mask.bool())
    assert (model[0].bias != 0).all()


def test_masks_follow_the_module():
    """Pruned again, changed in place, unpruned, and pruned only after the optimizer was made."""
    model = pruned_model()
    optimizer = ours("AdamW")(model.parameters(), lr=0.05, masks=model, ema_decay=0.9)
    train(model, optimizer, 3)
    prune.l1_unstructured(model[0], "weight", 0.6)
    train(model, optimizer, 1)
    mask = model[0].weight_mask.bool()
    assert mask.sum() < 60
    assert_masked(optimizer, model[0].weight_orig, mask)
    model[0].weight_mask[:4] = 0
    train(model, optimizer, 1)
    assert_masked(optimizer, model[0].weight_orig, model[0].weight_mask.bool())
    prune.l1_unstructured(model[2], "weight", 0.5)
    train(model, optimizer, 1)
    assert_masked(optimizer, model[2].weight_orig, model[2].weight_mask.bool())
    prune.remove(model[0], "weight")
    train(model, optimizer, 1)
    assert (model[0].weight != 0).sum() > mask.sum()


def test_masks_of_zeros():
    model = pruned_model()
    prune.remove(model[0], "weight")
    nn.init.zeros_(model[0].bias)
    masks = masks_of(model, zeros=True)
    assert {id(p) for p in masks} == {id(model[0].weight), id(model[2].bias_orig)}
    optimizer = ours("SGD")(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
    train(model, optimizer, 5)
    assert_masked(optimizer, model[0].weight, masks[model[0].weight])
    assert (model[0].bias != 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.int64], ids=str)
def test_masks_of_any_layout_and_dtype(dtype):
    params, others = make_params(), make_params()
    masks = [torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) > 0.5 for i, p in enumerate(params)]
    a = ours("Adam")(params, masks={p: m.to(dtype) for p, m in zip(params, masks, strict=True)})
    b = ours("Adam")(others)
    for step in range(2, 4):
        set_grads(params, step)
        set_grads(others, step)
        a.step()
        b.step()
    for p, q, mask in zip(params, others, masks, strict=True):
        torch.testing.assert_close(p, torch.where(mask, q, 0.0), check_stride=False, **EXACT)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("same", [True, False], ids=["gradient alike", "gradient row-major"])
@pytest.mark.parametrize("turn", [lambda t: t.to(memory_format=torch.channels_last), lambda t: t.transpose(0, 1)])
def test_masks_where_memory_is_in_another_order(turn, same, state_dtype):
    p = turn(randn(40, 32, 3, 3)).requires_grad_()
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    optimizer = ours("AdamW")([p], masks={p: mask}, state_dtype=state_dtype)
    for step in range(3):
        g = randn(*p.shape, seed=step)
        p.grad = torch.empty_like(p).copy_(g) if same else g
        optimizer.step()
    assert torch.equal(p != 0, mask)


def test_masks_of_complex_parameters():
    p = torch.complex(randn(4, 3), randn(4, 3, seed=1)).requires_grad_()
    mask = randn(4, 3, seed=2) > 0
    optimizer = ours("Adam")([p], masks={p: mask})
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p != 0, mask)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_masks(copied):
    model = pruned_model()
    optimizer = ours("Adam")(model.parameters(), lr=0.1, masks=model)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    other = copied(optimizer)
    params = other.param_groups[0]["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    other.step()
    where = [p is model[0].weight_orig for p in model.parameters()].index(True)
    assert_masked(other, params[where], model[0].weight_mask.bool())


def test_masks_are_applied_by_the_first_step():
    p = torch.ones(5, requires_grad=True)
    optimizer = ours("SGD")([p], masks={p: torch.tensor([1, 0, 1, 0, 0])}, ema_decay=0.5)
    p.grad = torch.zeros(5)
    optimizer.step()
    assert p.tolist() == [1, 0, 1, 0, 0]
    assert optimizer.state[p]["ema"].tolist() == [1, 0, 1, 0, 0]


def test_a_model_pruned_after_the_first_step_is_followed():
    """masks=module looks again at every step, also where nothing was pruned when the optimizer was made."""
    layer = nn.Linear(8, 8, bias=False)
    optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9, masks=layer)
    layer(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    prune.l1_unstructured(layer, "weight", 0.5)
    layer.weight_orig.grad = torch.ones(8, 8)  # of everything, also where the mask is zero
    optimizer.step()
    assert bool((layer.weight_orig[layer.weight_mask == 0] == 0).all())
