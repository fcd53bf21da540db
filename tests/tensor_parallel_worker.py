"""One of two ranks of a tensor parallel model; `test_tensor_parallel.py` starts it with a rank and a folder.

Each rank runs every case and compares with the model that it made itself, in one process, before it was split.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import cases
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import pyops
from pyops.parallel import ColwiseParallel, RowwiseParallel

RANKS = 2
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Mlp(nn.Module):
    """Sizes that do not divide by the width of a panel."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(70, 256, bias), nn.Linear(256, 38, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gelu between."""
        return self.down(nn.functional.gelu(self.up(x)))


def swapped(config: pyops.Config, bias: bool = True, seed: int = 0) -> nn.Module:
    """The same on every rank if the seed is."""
    torch.manual_seed(seed)
    model = Mlp(bias)
    pyops.swap_(model, config)
    return model


def batch(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[2, 3, 70], the same on every rank, with a row of zeros."""
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(1))
    x[0, 1] = 0
    return x.to(dtype)


CONFIGS = {
    "int8": pyops.Int8Dynamic(),
    "int8_static": pyops.Int8Static([batch()], smooth=0.5),
    "int8_weight": pyops.Int8Weight(),
    "int4": pyops.Int4Weight(group_size=32),
    "int4_symmetric": pyops.Int4Weight(group_size=64, symmetric=True),
    "int4_one_group": pyops.Int4Weight(group_size=-1),
    "int4_float": pyops.Int4Weight(group_size=32, compute="float"),
}


def near(got: torch.Tensor, want: torch.Tensor, computed: torch.dtype | None = None) -> None:
    """Equal but for the order of sums, relative to the largest value; `computed` is their dtype, or else `want`'s."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    error = (got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-30)
    assert error <= CLOSE[computed or want.dtype], float(error)


def equal_to_one_process(mesh: DeviceMesh) -> None:
    """Forward, and the gradients of the input and the biases, in every format."""
    for name, config in CONFIGS.items():
        for bias in (True, False):
            for dtype in CLOSE:
                one = swapped(config, bias)
                many = parallelize_module(copy.deepcopy(one), mesh, PLAN)
                assert (many.up.out_features, many.down.in_features) == (128, 128), name
                x, x_many = batch(dtype).requires_grad_(), batch(dtype).requires_grad_()
                want, got = one(x), many(x_many)
                near(got, want)
                weight = torch.linspace(-1, 1, want.numel()).view_as(want)
                (want * weight).sum().backward()
                (got * weight).sum().backward()
                near(x_many.grad, x.grad)
                if bias:
                    own = slice(128 * mesh.get_local_rank(), 128 * (mesh.get_local_rank() + 1))
                    near(many.up.bias.grad, one.up.bias.grad[own], dtype)
                    near(many.down.bias.grad, one.down.bias.grad, dtype)


def maxima_of_the_rank(mesh: DeviceMesh) -> None:
    """row_maxima="local" is another rounding: near, but only in int8's terms."""
    for name in ("int8", "int4"):
        one = swapped(CONFIGS[name])
        many = parallelize_module(
            copy.deepcopy(one), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel(row_maxima="local")}
        )
        want, got = one(batch()), many(batch())
        error = (got - want).norm() / want.norm()
        assert 1e-5 < error < 2e-2, (name, float(error))


def layouts(mesh: DeviceMesh) -> None:
    """Sharded along the sequence outside, as sequence parallel wants it; DTensors in and out; a fused residual."""
    for name in ("int8", "int4"):
        one = swapped(CONFIGS[name])
        many = parallelize_module(
            copy.deepcopy(one),
            mesh,
            {"up": ColwiseParallel(input_layouts=Shard(0)), "down": RowwiseParallel(output_layouts=Shard(0))},
        )
        x = batch()
        rank = mesh.get_local_rank()
        local = x[rank : rank + 1].clone().requires_grad_()
        whole = x.clone().requires_grad_()
        want, got = one(whole), many(local)
        near(got, want[rank : rank + 1])
        want.square().sum().backward()
        got.square().sum().backward()
        near(local.grad, whole.grad[rank : rank + 1])
        near(many.down.bias.grad, one.down.bias.grad)

        row = copy.deepcopy(one.down)
        row.activation = "relu"
        style = RowwiseParallel(input_layouts=Replicate(), use_local_output=False)
        split = parallelize_module(copy.deepcopy(row), mesh, style)
        h, residual = torch.randn(4, 256), torch.randn(4, 38)
        for t in (h, residual):
            dist.broadcast(t, 0)
        y = split(h, residual)
        assert isinstance(y, DTensor)
        assert y.placements == (Replicate(),)
        near(y.to_local().detach(), row(h, residual).detach())
        empty = split(h[:0])
        assert empty.shape == (0, 38)


def nan_stays_in_its_row(mesh: DeviceMesh) -> None:
    """Also where only one rank sees it."""
    for name in CONFIGS:
        one = swapped(CONFIGS[name])
        split = parallelize_module(copy.deepcopy(one.down), mesh, RowwiseParallel(input_layouts=Replicate()))
        h = torch.ones(3, 256)
        h[1, 200] = torch.nan
        y = split(h)
        assert y[1].isnan().all(), name
        near(y[[0, 2]].detach(), one.down(h)[[0, 2]].detach())


def state(mesh: DeviceMesh) -> None:
    """The state is of DTensors; gathered it is one process's, and whole, sharded and local ones are loaded."""
    for name, config in CONFIGS.items():
        one = swapped(config)
        whole = one.state_dict()
        many = parallelize_module(copy.deepcopy(one), mesh, PLAN)
        saved = many.state_dict()
        assert all(isinstance(t, DTensor) for t in saved.values())
        gathered = {key: t.full_tensor() for key, t in saved.items()}
        assert gathered.keys() == whole.keys()
        for key, t in whole.items():
            assert torch.equal(gathered[key], t), (name, key)
            assert gathered[key].dtype == t.dtype, (name, key)
        full = get_model_state_dict(many, options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(full[key], t) for key, t in whole.items())
        want = one(batch())
        for given in (whole, saved, {key: t.to_local() for key, t in saved.items()}):
            fresh = parallelize_module(swapped(config, seed=5), mesh, PLAN)
            fresh.load_state_dict(given)
            near(fresh(batch()).detach(), want.detach())
        clone = copy.deepcopy(many)
        assert torch.equal(clone(batch()), many(batch()))
        try:
            pyops.save_quantized(many, "nowhere")
        except ValueError as error:
            assert "cannot be saved in this way" in str(error)  # noqa: PT017
        else:
            raise AssertionError("saved a part")


def weights_of_rank_0(mesh: DeviceMesh) -> None:
    """Ranks that made different models get rank 0's, unless they keep their own."""
    rank = mesh.get_local_rank()
    for name in ("int8", "int4"):
        one = swapped(CONFIGS[name], seed=0)
        many = parallelize_module(swapped(CONFIGS[name], seed=rank), mesh, PLAN)
        near(many(batch()).detach(), one(batch()).detach())
        own = swapped(CONFIGS[name], seed=rank)
        kept = parallelize_module(copy.deepcopy(own), mesh, PLAN, src_data_rank=None)
        assert torch.equal(kept.up.weight, own.up.weight.chunk(RANKS)[rank])


def mixed(mesh: DeviceMesh) -> None:
    """A float layer in the same plan is torch's."""
    torch.manual_seed(0)
    one = Mlp()
    pyops.swap_(one, CONFIGS["int8"], filter_fn=lambda module, name: name == "down")
    many = parallelize_module(copy.deepcopy(one), mesh, PLAN)
    near(many(batch()).detach(), one(batch()).detach())


def llama(mesh: DeviceMesh) -> None:
    """A decoder layer of transformers, forward and backward."""
    import transformers

    plan = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    for name in ("int8", "int4"):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
        )
        one = transformers.LlamaForCausalLM(config).eval()
        pyops.swap_(one, CONFIGS[name], filter_fn=lambda module, name: name != "lm_head")
        many = copy.deepcopy(one)
        parallelize_module(many, mesh, {f"model.layers.*.{key}": style for key, style in plan.items()})
        ids = torch.arange(10).view(2, 5)
        want, got = one(ids, labels=ids), many(ids, labels=ids)
        error = (got.logits - want.logits).norm() / want.logits.norm()
        assert error < 2e-3, float(error)  # a rounding of x that falls otherwise is a step of int8
        want.loss.backward()
        got.loss.backward()
        a, b = one.model.embed_tokens.weight.grad, many.model.embed_tokens.weight.grad
        assert (a - b).norm() / a.norm() < 2e-2
        assert torch.equal(
            one.generate(ids, max_new_tokens=4, do_sample=False), many.generate(ids, max_new_tokens=4, do_sample=False)
        )


def errors(mesh: DeviceMesh) -> None:
    """What cannot be split says so, and the layer is what it was."""

    def refuses(layer: nn.Module, style: ColwiseParallel | RowwiseParallel, kind: type[Exception], text: str) -> None:
        before = type(layer), layer.state_dict()
        try:
            parallelize_module(layer, mesh, style)
        except kind as error:
            assert text in str(error), str(error)  # noqa: PT017
        else:
            raise AssertionError(f"{layer} was split")
        assert type(layer) is before[0]
        assert all(torch.equal(t, before[1][key]) for key, t in layer.state_dict().items())

    from pyops.nn import Int4Linear, Int8Linear

    refuses(Int8Linear(8, 7), ColwiseParallel(), ValueError, "out_features=7 cannot be split over 2 ranks")
    refuses(Int8Linear(7, 8), RowwiseParallel(), ValueError, "in_features=7 cannot be split over 2 ranks")
    refuses(Int4Linear(96, 8, group_size=32), RowwiseParallel(), ValueError, "not whole groups of 32: Int4Linear(")
    refuses(Int4Linear(6, 8, group_size=-1), RowwiseParallel(), ValueError, "not whole pairs")
    refuses(Int4Linear(64, 8, group_size=32, act_order=True), RowwiseParallel(), NotImplementedError, "act_order")
    split = parallelize_module(Int8Linear(8, 8), mesh, ColwiseParallel())
    refuses_again: Callable = ColwiseParallel()._apply
    try:
        refuses_again(split, mesh)
    except ValueError as error:
        assert "sharded already" in str(error)  # noqa: PT017
    else:
        raise AssertionError("split twice")
    whole = parallelize_module(Int4Linear(64, 8, group_size=-1, act_order=True), mesh, ColwiseParallel())
    assert whole.input_order.shape == (64,)
    assert whole.weight.shape == (4, 32)


CHECKS = {
    check.__name__: check
    for check in (
        equal_to_one_process,
        maxima_of_the_rank,
        layouts,
        nan_stays_in_its_row,
        state,
        weights_of_rank_0,
        mixed,
        llama,
        errors,
    )
}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, check in CHECKS.items():
        check(mesh)
        (folder / f"{name}.{rank}").touch()
    cases.end_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
