"""Checks of sharded parameters: FSDP2 in several layouts, and tensor parallelism."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from optim_cases import NAMES, RICH, ours, randn, theirs
from optim_distributed_cases import (
    EXACT,
    RANKS,
    Net,
    assert_replicas_agree,
    assert_same_model,
    assert_same_state,
    assert_table,
    batch,
    check,
    double,
    full,
    local,
    loss_of,
    losses_of,
    params_of,
    train,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyops.optim
from pyops import backend

WHOLE = [name for name in pyops.optim.__all__ if any(r.whole_tensor for r in getattr(ours(name), "rules", ()))]
"""Classes that need norms or means of whole tensors."""


@functools.cache
def mesh(*shape: int) -> DeviceMesh:
    """Of both ranks: (2,); or (replicas, shards)."""
    shape = shape or (RANKS,)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])


def shard(net: nn.Module, *shape: int, **options) -> nn.Module:
    """A copy under FSDP2, its largest layer on its own."""
    model = copy.deepcopy(net)
    fully_shard(model.hidden, mesh=mesh(*shape), **options)
    return fully_shard(model, mesh=mesh(*shape), **options)


def columns(p: nn.Parameter) -> Shard | None:
    """A `shard_placement_fn`: the largest layer by columns, for its rows are odd."""
    return Shard(1) if p.shape == (71, 80) else None


LAYOUTS = {
    "rows": {},
    "columns": {"shard_placement_fn": columns},
    "hybrid, one replica": {"shape": (1, RANKS)},
    "hybrid, one shard": {"shape": (RANKS, 1)},
}


def laid_out(net: nn.Module, layout: str) -> nn.Module:
    options = dict(LAYOUTS[layout])
    return shard(net, *options.pop("shape", ()), **options)


@check
def fsdp_equals_one_process(folder: Path) -> None:
    """Every class: the weights and the states of torch.optim on the whole batch."""
    with double():
        net = Net()
        for name, options in RICH:
            if name in WHOLE:
                continue
            whole, model = copy.deepcopy(net), shard(net)
            optimizer = ours(name)(model.parameters(), **options)
            expected = (theirs if name in NAMES else ours)(name)(whole.parameters(), **options)
            for step in range(3):
                train(whole, expected, step)
                train(model, optimizer, step)
            try:
                assert_same_model(model, whole, **EXACT)
                assert_same_state(optimizer, expected, **EXACT)
            except AssertionError as error:
                raise AssertionError(f"{name} {options}: {error}") from None
            for p in model.parameters():
                for key, state in optimizer.state[p].items():
                    assert isinstance(state, DTensor) == (key not in ("step", "mu_product")), key
            assert_table(optimizer)


@check
def fsdp_layouts(folder: Path) -> None:
    """Sharded by columns, replicated and sharded: the same weights, and each rank takes its part in the norm once."""
    with double():
        net = Net()
        whole = copy.deepcopy(net)
        expected = torch.optim.AdamW(whole.parameters())
        norms = [train(whole, expected, step, clip=0.1).float() for step in range(3)]
        assert min(norms) > 0.2
        for layout in LAYOUTS:
            model = laid_out(net, layout)
            optimizer = ours("AdamW")(model.parameters(), max_grad_norm=0.1)
            for step in range(3):
                train(model, optimizer, step)
                torch.testing.assert_close(optimizer.grad_norm, norms[step], msg=f"{layout}: {{}}".format)
            assert_same_model(model, whole, **EXACT)
            assert_same_state(optimizer, expected, **EXACT)
            assert_table(optimizer)


@check
def fsdp_clips_by_the_global_norm(folder: Path) -> None:
    """grad_norm is what clip_grad_norm_ returns of the same sharded gradients; only fp32 rounding is between them."""
    net = Net()
    model, other = shard(net), shard(net)
    options = {"lr": 0.05, "momentum": 0.9}
    optimizer = ours("SGD")(model.parameters(), **options, max_grad_norm=0.1)
    expected = torch.optim.SGD(other.parameters(), **options)
    for step in range(4):
        norm = train(other, expected, step, clip=0.1)
        train(model, optimizer, step)
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-5, atol=0)
        assert_replicas_agree([optimizer.grad_norm])
    assert_same_model(model, other, rtol=1e-5, atol=1e-6)
    if dist.get_rank() == 1:
        model.hidden.weight.grad.to_local()[0, 0] = torch.nan
    kept = [full(p).clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="total norm of the gradients is nan"):
        optimizer.step()  # on both ranks
    assert all(torch.equal(full(p), q) for p, q in zip(model.parameters(), kept, strict=True))


@check
def fsdp_parameters_that_go_unused(folder: Path) -> None:
    with double():
        net = Net(extra=True)
        whole, model = copy.deepcopy(net), shard(net)
        expected, optimizer = torch.optim.Adam(whole.parameters()), ours("Adam")(model.parameters(), zero_grad=True)
        for step, extra in enumerate((False, True, True, False, False)):
            train(whole, expected, step, extra=extra)
            train(model, optimizer, step, extra=extra)
            assert not any(full(p.grad).any() for p in model.parameters() if p.grad is not None)
        assert model.extra.weight.grad is None
        assert_same_model(model, whole, **EXACT)
        assert_same_state(optimizer, expected, **EXACT)


@check
def fsdp_averages(folder: Path) -> None:
    """averaged_parameters equals AveragedModel of one process, also in what the sharded model then computes."""
    with double():
        net = Net()
        whole, model = copy.deepcopy(net), shard(net)
        expected, optimizer = torch.optim.AdamW(whole.parameters()), ours("AdamW")(model.parameters(), ema_decay=0.6)
        average = AveragedModel(whole, multi_avg_fn=get_ema_multi_avg_fn(0.6))
        for step in range(4):
            train(whole, expected, step)
            average.update_parameters(whole)
            train(model, optimizer, step)
        x = batch(9).x
        with optimizer.averaged_parameters(), torch.no_grad():
            assert_same_model(model, average.module, **EXACT)
            torch.testing.assert_close(model(x), average(x), **EXACT)
        assert_same_model(model, whole, **EXACT)
        train(whole, expected, 4)
        train(model, optimizer, 4)
        assert_same_model(model, whole, **EXACT)


@check
def fsdp_masks(folder: Path) -> None:
    """Masks that are whole on each rank, sharded as the parameter is, or those of a model that was pruned."""
    with double():
        net = Net()
        kept = {name: randn(*p.shape, seed=i) > 0 for i, (name, p) in enumerate(net.named_parameters())}
        whole = copy.deepcopy(net)
        expected = torch.optim.AdamW(whole.parameters())
        for step in range(3):
            train(whole, expected, step)
            for name, p in whole.named_parameters():
                for t in (p, *(expected.state[p][key] for key in ("exp_avg", "exp_avg_sq"))):
                    t.detach().mul_(kept[name])
        for layout in LAYOUTS:
            for sharded in (False, True):
                model = laid_out(net, layout)
                masks = {p: kept[name] for name, p in model.named_parameters()}
                if sharded:
                    masks = {p: distribute_tensor(m, p.device_mesh, p.placements) for p, m in masks.items()}
                optimizer = ours("AdamW")(model.parameters(), masks=masks)
                for step in range(3):
                    train(model, optimizer, step)
                assert_same_model(model, whole, **EXACT)
                assert_same_state(optimizer, expected, **EXACT)
        model = copy.deepcopy(net)
        nn.utils.prune.custom_from_mask(model.hidden, "weight", kept["hidden.weight"])
        fully_shard(model, mesh=mesh())
        optimizer = ours("SGD")(model.parameters(), lr=0.1, momentum=0.9, masks=model)
        for step in range(3):
            train(model, optimizer, step)
        assert full(model.hidden.weight_orig)[kept["hidden.weight"]].any()
        assert not full(model.hidden.weight_orig)[~kept["hidden.weight"]].any()


@check
def fsdp_mixed_precision(folder: Path) -> None:
    """The step on gradients that bf16 computed, in fp32 parameters, is torch's on the same gradients; it trains."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = Net()
    model, other = shard(net, mp_policy=policy), shard(net)
    optimizer, expected = ours("AdamW")(model.parameters(), lr=3e-3), torch.optim.AdamW(other.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step).mine())
        loss.backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        expected.step()
        losses.append(loss.item())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_model(model, other, rtol=1e-5, atol=1e-6)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses


STEPS = 40


@check
def fsdp_narrow_formats_train_as_well(folder: Path) -> None:
    """8-bit and bf16 states, and bf16 parameters rounded stochastically, over some steps: a loss near that in fp32."""
    net = Net()
    model = shard(net)
    best = losses_of(model, ours("AdamW")(model.parameters(), lr=3e-3), STEPS)
    assert sum(best[-5:]) < 0.3 * sum(best[:5])
    for options, dtype, layout in (
        ({"state_dtype": "int8"}, torch.float32, "rows"),
        ({"state_dtype": "int8"}, torch.float32, "hybrid, one shard"),
        ({"state_dtype": "bfloat16"}, torch.float32, "rows"),
        ({"stochastic_rounding": True, "state_dtype": "int8", "max_grad_norm": 1.0}, torch.bfloat16, "rows"),
    ):
        model = laid_out(copy.deepcopy(net).to(dtype), layout)
        optimizer = ours("AdamW")(model.parameters(), lr=3e-3, **options)
        losses = losses_of(model, optimizer, STEPS)
        assert sum(losses[-5:]) < 1.2 * sum(best[-5:]) + 0.1, (options, losses[-5:], best[-5:])
        state = optimizer.state[model.hidden.weight]
        narrow = {"int8": (torch.int8, torch.uint8), "bfloat16": (torch.bfloat16,) * 2}
        dtypes = narrow.get(options.get("state_dtype"), (torch.float32,) * 2)
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == dtypes
        if "int8" in options.values():
            assert optimizer.state[model.hidden.bias]["exp_avg"].dtype == torch.float32
            for name, size in (("exp_avg", (71, 80)), ("exp_avg_scale", (71, 1)), ("exp_avg_sq_scale", (71, 1))):
                assert state[name].shape == size
                assert state[name].placements == model.hidden.weight.placements
                assert local(state[name]).shape[0] == local(model.hidden.weight).shape[0]
        if layout == "hybrid, one shard":
            assert_replicas_agree([local(t) for p in params_of(optimizer) for t in (p, *optimizer.state[p].values())])
        assert_table(optimizer)


@check
def fsdp_grad_scaler(folder: Path) -> None:
    """Inf in one rank's shard: both skip the step. Gradients stay scaled unless the scaler has been told to unscale."""
    net = Net()
    whole = copy.deepcopy(net)
    expected = torch.optim.AdamW(whole.parameters())
    for step in (0, 1, 3):
        train(whole, expected, step, clip=0.1)
    for unscale in (False, True):
        model = shard(net)
        optimizer = ours("AdamW")(model.parameters(), max_grad_norm=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch(step).mine())).backward()
            if step == 2 and dist.get_rank() == 1:
                model.hidden.weight.grad.to_local()[3, 5] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (2.0**10 if step < 2 else 2.0**9)
        # Adam's step depends on a gradient's sign alone: where that is rounding, it may be off by a part of lr.
        assert_same_model(model, whole, rtol=1e-4, atol=3 * 1e-3 * 0.02)


@check
def fsdp_table_notices_what_moves(folder: Path) -> None:
    """The table of pointers is kept while nothing moves, and made anew where a local tensor, state or mesh does."""
    if backend.native is None:
        return
    with double():
        net = Net()
        whole, model = copy.deepcopy(net), shard(net)
        expected, optimizer = torch.optim.AdamW(whole.parameters()), ours("AdamW")(model.parameters())
        weight = model.hidden.weight
        steps = iter(range(100))

        def stays() -> bool:
            before, step = optimizer._table, next(steps)
            train(whole, expected, step)
            train(model, optimizer, step)
            assert_same_model(model, whole, **EXACT)
            return before is optimizer._table is not None

        assert not stays()
        assert stays()
        assert stays()
        model._apply(torch.clone)  # as .to() does
        assert model.hidden.weight is weight
        assert not stays()
        assert stays()
        optimizer.state[weight]["exp_avg_sq"]._local_tensor = local(optimizer.state[weight]["exp_avg_sq"]).clone()
        assert not stays()
        assert stays()
        optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].clone()
        assert not stays()
        assert stays()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert not stays()
        assert stays()


@check
def gradients_placed_otherwise(folder: Path) -> None:
    """They are reduced first, even if a table of those before them would find the same local shapes."""
    p = nn.Parameter(distribute_tensor(randn(6), mesh(), [Replicate()]))
    before, optimizer = full(p).clone(), ours("SGD")([p], lr=1.0)
    for placement, total in ((Replicate(), 1.0), (Replicate(), 2.0), (Partial(), 4.0), (Replicate(), 5.0)):
        p.grad = DTensor.from_local(torch.ones(6), mesh(), [placement])
        optimizer.step()
        torch.testing.assert_close(full(p), before - total)
        assert (optimizer._table is None) == (placement.is_partial() or backend.native is None)
    p = nn.Parameter(distribute_tensor(randn(7, 3), mesh()))
    p.grad = distribute_tensor(randn(7, 3), mesh(), [Replicate()])
    expected = full(p) - 2 * full(p.grad)
    ours("SGD")([p], lr=2.0).step()
    torch.testing.assert_close(full(p), expected)


@check
def norm_of_mixed_placements(folder: Path) -> None:
    """What ranks hold in parts is added up over them, what they hold whole is counted once."""
    placements = {"sharded": [Shard(0)], "replicated": [Replicate()], "plain": None}
    params, grads = [], [randn(7, 3, seed=i) for i in range(len(placements))]
    for placement, g in zip(placements.values(), grads, strict=True):
        p, g = (t if placement is None else distribute_tensor(t, mesh(), placement) for t in (torch.zeros(7, 3), g))
        params.append(nn.Parameter(p))
        params[-1].grad = g
    optimizer = ours("SGD")(params, lr=1.0, max_grad_norm=0.5)
    norm = torch.stack(grads).norm()
    for step in (1, 2):
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        for p, g in zip(params, grads, strict=True):
            torch.testing.assert_close(full(p), -step * 0.5 / norm * g)
        assert_table(optimizer)


@check
def fsdp_rules_that_need_whole_tensors(folder: Path) -> None:
    """They equal one process where a rank has them, or say that they cannot be sharded and leave nothing behind."""
    with double():
        for name, layout in ((name, layout) for name in WHOLE for layout in ("rows", "hybrid, one shard")):
            net = Net()
            whole, model = copy.deepcopy(net), laid_out(net, layout)
            expected, optimizer = ours(name)(whole.parameters()), ours(name)(model.parameters())
            try:
                for step in range(3):
                    train(whole, expected, step)
                    train(model, optimizer, step)
            except NotImplementedError as error:
                refused = f"{name}: parameter 0 is a sharded DTensor" in str(error)
                assert refused and layout == "rows"  # noqa: PT018  it need not be raised
                assert not optimizer.state
                assert_same_model(model, net, rtol=0, atol=0)
            else:
                assert_same_model(model, whole, **EXACT)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 142)
        self.down = nn.Linear(142, 64)

    def forward(self, x: Tensor) -> Tensor:  # [batch, sequence, 64]
        return self.down(self.up(self.norm(x)).relu())


@check
def tensor_parallel(folder: Path) -> None:
    """With sequence parallelism, where gradients of the norm come unreduced; and under FSDP2 as a mesh of 1x2."""
    with double():
        net = Block()
        inputs = [randn(4, 6, 64, seed=step).double() for step in range(3)]
        whole = copy.deepcopy(net)
        expected = torch.optim.AdamW(whole.parameters(), lr=1e-2)
        norms = []
        for x in inputs:
            expected.zero_grad()
            whole(x).square().mean().backward()
            norms.append(nn.utils.clip_grad_norm_(whole.parameters(), 0.02).float())
            expected.step()
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        }
        for under_fsdp in (False, True):
            for zero_grad in (False, True):
                model = copy.deepcopy(net)
                both = mesh(1, RANKS)
                parallelize_module(model, both["shards"] if under_fsdp else mesh(), plan)
                if under_fsdp:
                    fully_shard(model, mesh=both["replicas"])
                optimizer = ours("AdamW")(model.parameters(), lr=1e-2, max_grad_norm=0.02, zero_grad=zero_grad)
                for x, norm in zip(inputs, norms, strict=True):
                    if not zero_grad:
                        optimizer.zero_grad()
                    model(x).square().mean().backward()
                    assert model.norm.weight.grad.placements[-1].is_partial() != under_fsdp  # FSDP2 reduces it
                    optimizer.step()
                    torch.testing.assert_close(optimizer.grad_norm, norm)
                    if zero_grad:
                        assert not any(local(p.grad).any() for p in model.parameters())
                assert_same_model(model, whole, **EXACT)
                assert_same_state(optimizer, expected, **EXACT)
