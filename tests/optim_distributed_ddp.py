"""Checks of replicated parameters: DistributedDataParallel, ZeroRedundancyOptimizer, and the number of threads."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from optim_cases import RICH, ours, randn, states_of, theirs
from optim_distributed_cases import (
    EXACT,
    Net,
    assert_replicas_agree,
    assert_same_model,
    assert_same_state,
    assert_table,
    batch,
    check,
    double,
    loss_of,
    losses_of,
    params_of,
    train,
)
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

CLASSES = [
    ("AdamW", {}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    ("RMSprop", {"lr": 1e-3, "centered": True}),
    ("Adagrad", {}),
    ("NAdam", {"weight_decay": 1e-2}),
]


def replicate(net: nn.Module, **options) -> DistributedDataParallel:
    return DistributedDataParallel(copy.deepcopy(net), **options)


@check
def ddp_equals_one_process(folder: Path) -> None:
    """Of torch.optim on the whole batch; gradients are tensors of their own, or views of DDP's buckets."""
    with double():
        net = Net()
        for name, options in CLASSES:
            whole = copy.deepcopy(net)
            expected = theirs(name)(whole.parameters(), **options)
            models = [replicate(net, gradient_as_bucket_view=view) for view in (False, True)]
            optimizers = [ours(name)(model.parameters(), **options) for model in models]
            for step in range(4):
                train(whole, expected, step)
                for model, optimizer in zip(models, optimizers, strict=True):
                    train(model, optimizer, step)
            for model, optimizer in zip(models, optimizers, strict=True):
                assert_same_model(model, whole, **EXACT)
                assert_same_state(optimizer, expected, **EXACT)
                assert_table(optimizer)


@check
def ddp_in_float32_and_channels_last(folder: Path) -> None:
    net = Net().to(memory_format=torch.channels_last)
    for name, options, atol in (
        ("SGD", {"lr": 0.05, "momentum": 0.9}, 1e-6),
        ("AdamW", {}, 4 * 1e-3 * 0.02),  # of four steps of lr: where a gradient is as small as its own rounding error
    ):
        whole, model = copy.deepcopy(net), replicate(net, gradient_as_bucket_view=True)
        expected, optimizer = theirs(name)(whole.parameters(), **options), ours(name)(model.parameters(), **options)
        for step in range(4):
            train(whole, expected, step)
            train(model, optimizer, step)
        assert model.module.deep.weight.is_contiguous(memory_format=torch.channels_last)
        assert_same_model(model, whole, rtol=1e-4, atol=atol)
        assert_replicas_agree(list(model.parameters()))


@check
def ddp_parameters_that_go_unused(folder: Path) -> None:
    """A layer has no gradient for two steps, then has, then keeps none; at last one rank alone uses it."""
    with double():
        for view in (False, True):
            net = Net(extra=True)
            whole = copy.deepcopy(net)
            model = replicate(net, gradient_as_bucket_view=view, find_unused_parameters=True)
            expected, optimizer = torch.optim.AdamW(whole.parameters()), ours("AdamW")(model.parameters())
            for step, extra in enumerate((False, False, True, True, False)):
                train(whole, expected, step, extra=extra)
                train(model, optimizer, step, extra=extra)
                assert_same_model(model, whole, **EXACT)
            assert not extra
            assert model.module.extra.weight.grad is None
            rank, data = dist.get_rank(), batch(9)
            optimizer.zero_grad()
            loss_of(model, data.mine(), extra=rank == 0).backward()
            optimizer.step()
            expected.zero_grad()
            for r in (0, 1):
                part = type(data)(data.x[r::2], data.y[r::2])
                (loss_of(whole, part, extra=r == 0) / 2).backward()
            expected.step()
            assert_same_model(model, whole, **EXACT)
            assert_same_state(optimizer, expected, **EXACT)


@check
def ddp_clips_by_the_norm_of_the_mean_gradient(folder: Path) -> None:
    with double():
        net = Net()
        whole, model = copy.deepcopy(net), replicate(net, gradient_as_bucket_view=True)
        options = {"lr": 0.05, "momentum": 0.9}
        expected = torch.optim.SGD(whole.parameters(), **options)
        optimizer = ours("SGD")(model.parameters(), **options, max_grad_norm=0.1)
        for step in range(4):
            norm = train(whole, expected, step, clip=0.1)
            train(model, optimizer, step)
            assert norm > 0.2
            torch.testing.assert_close(optimizer.grad_norm, norm.float())
            assert_replicas_agree([optimizer.grad_norm])
        assert_same_model(model, whole, **EXACT)


@check
def ddp_zeroed_gradients_stay_in_their_buckets(folder: Path) -> None:
    """zero_grad=True in place of optimizer.zero_grad(), and two backward passes for a step, the first without sync."""
    with double():
        net = Net()
        whole, model = copy.deepcopy(net), replicate(net, gradient_as_bucket_view=True)
        expected, optimizer = torch.optim.AdamW(whole.parameters()), ours("AdamW")(model.parameters(), zero_grad=True)
        used = list(model.parameters())
        kept = []
        for step in range(4):
            for data in (batch(2 * step), batch(2 * step + 1)):
                loss_of(whole, data).backward()
            expected.step()
            expected.zero_grad()
            with model.no_sync():
                loss_of(model, batch(2 * step).mine()).backward()
            loss_of(model, batch(2 * step + 1).mine()).backward()
            optimizer.step()
            assert not any(p.grad.any() for p in used)
            kept.append((optimizer._table, [p.grad.data_ptr() for p in used]))
        assert kept[1] == kept[2] == kept[3]  # the first step is before DDP puts its buckets in order
        assert_same_model(model, whole, **EXACT)
        assert_table(optimizer)


@check
def ddp_replicas_round_alike(folder: Path) -> None:
    """What is rounded stochastically is so by the same bits on each rank, and trains as well."""
    net = Net()
    for dtype, options in (
        (torch.float32, {"state_dtype": "int8"}),
        (torch.bfloat16, {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 7}),
        (torch.float32, {"ema_decay": 0.9, "max_grad_norm": 1.0, "l1": 1e-5}),
    ):
        torch.manual_seed(dist.get_rank())  # that generator is not used
        model = replicate(copy.deepcopy(net).to(dtype))
        optimizer = ours("AdamW")(model.parameters(), lr=3e-3, **options)
        losses = losses_of(model, optimizer, 30)
        assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), (options, losses)
        assert_replicas_agree(list(model.parameters()))
        assert_replicas_agree([s for p in params_of(optimizer) for s in optimizer.state.get(p, {}).values()])


@check
def zero_redundancy_equals_torch(folder: Path) -> None:
    """Each rank holds the states of a part; consolidated, they are those of one process, and are loaded again."""
    for packed in (False, True):
        with double():
            net = Net()
            whole, model = copy.deepcopy(net), replicate(net)
            expected = torch.optim.AdamW(whole.parameters(), lr=2e-3, weight_decay=0.1)
            options = {"lr": 2e-3, "weight_decay": 0.1, "parameters_as_bucket_view": packed}
            sharded = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ours("AdamW"), **options)
            for step in range(3):
                train(whole, expected, step)
                train(model, sharded, step)
            assert_same_model(model, whole, **EXACT)
            assert 0 < len(sharded.optim.state) < len(expected.state)
            sharded.consolidate_state_dict(to=0)
            saved = [copy.deepcopy(sharded.state_dict()) if dist.get_rank() == 0 else None]
            if dist.get_rank() == 0:
                alone = ours("AdamW")(copy.deepcopy(whole).parameters())
                alone.load_state_dict(saved[0])
                assert_same_state(alone, expected, **EXACT)
            dist.broadcast_object_list(saved)
            again = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ours("AdamW"), **options)
            train(model, again, 3)  # with states of its own, which loading replaces
            model.module.load_state_dict(whole.state_dict())
            again.load_state_dict(saved[0])
            for step in range(3, 5):
                train(whole, expected, step)
                train(model, again, step)
            assert_same_model(model, whole, **EXACT)


@check
def zero_redundancy_takes_the_options(folder: Path) -> None:
    net = Net()
    masks = [randn(*p.shape, seed=i) > -0.5 for i, p in enumerate(net.parameters())]
    for options, atol in (
        ({"ema_decay": 0.5, "l1": 1e-4}, 3e-4),  # of three steps of 1e-2; see ddp_in_float32_and_channels_last
        ({"state_dtype": "int8"}, 3e-2),
    ):
        alone, model = copy.deepcopy(net), replicate(net)
        mine, others = (dict(zip(m.parameters(), masks, strict=True)) for m in (model, alone))
        optimizer = ours("Adam")(alone.parameters(), masks=others, lr=1e-2, **options)
        sharded = ZeroRedundancyOptimizer(model.parameters(), ours("Adam"), masks=mine, lr=1e-2, **options)
        for step in range(3):
            train(alone, optimizer, step)
            train(model, sharded, step)
        assert_same_model(model, alone, rtol=1e-4, atol=atol)
        for p, mask in mine.items():
            assert not p[~mask].any()
        sharded.consolidate_state_dict()
        if dist.get_rank() == 0:
            saved, expected = sharded.state_dict(), optimizer.state_dict()
            for i, state in expected["state"].items():
                assert {k: v.dtype for k, v in saved["state"][i].items()} == {k: v.dtype for k, v in state.items()}
            optimizer.load_state_dict(saved)


def stepped(threads: int) -> dict[str, torch.Tensor]:
    """Everything that steps of every class leave behind, on that many threads; tensors that are cut between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    result = {}
    for name, options in RICH:
        for extras in ({"max_grad_norm": 0.5, "ema_decay": 0.9}, {"state_dtype": "int8"}, {"state_dtype": "bfloat16"}):
            params = [randn(*shape, seed=i) for i, shape in enumerate(((70, 257), (9001,), (5, 7, 3), ()))]
            params += [randn(70, 257).bfloat16(), randn(9001)[::3]]
            optimizer = ours(name)([p.requires_grad_() for p in params], **options, **extras, stochastic_rounding=True)
            for step in range(2):
                for i, p in enumerate(params):
                    p.grad = randn(*p.shape, seed=10 * step + i).to(p.dtype)
                optimizer.step()
            found = {"grad_norm": optimizer.grad_norm} if "max_grad_norm" in extras else {}
            found |= {str(i): p.detach() for i, p in enumerate(params)} | dict(states_of(optimizer))
            result |= {f"{name} {extras} {key}": value for key, value in found.items()}
    torch.set_num_threads(before)
    return result


@check
def results_do_not_depend_on_the_number_of_threads(folder: Path) -> None:
    """One thread, to which torchrun limits each rank, against two here, and against those of the test's own process."""
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert torch.get_num_threads() == 1
    one, two = stepped(1), stepped(2)
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different
    if dist.get_rank() == 0:
        torch.save(one, folder / "threads.pt")
