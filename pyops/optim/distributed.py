"""DTensor parameters (FSDP2, tensor parallelism): kernels get the local shards, the global norm is summed over ranks.

What acts elementwise needs nothing else: states, averages and masks are sharded as their parameter is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyops.ops.optim_codec import BLOCK
from pyops.sizes import ceil_div

PLAIN = (Tensor, torch.nn.Parameter)
Spec = tuple[Any, tuple]
"""(device mesh, placements)"""


def is_dtensor(t: Tensor) -> bool:
    """True for DTensors. Nothing is imported unless `t` may be one."""
    if type(t) in PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """The shard of a DTensor that is on this rank, without grad; any other tensor itself."""
    return t.to_local().detach() if is_dtensor(t) else t


def spec_of(t: Tensor) -> Spec | None:
    """How a DTensor is laid out; None for other tensors."""
    return (t.device_mesh, t.placements) if is_dtensor(t) else None


def is_sharded(spec: Spec | None) -> bool:
    """True if a rank may hold only a part."""
    return bool(_cuts(spec))


def _cuts(spec: Spec | None) -> list[int]:
    """The dimensions of the mesh along which tensors are cut."""
    mesh, placements = spec or (None, ())
    return [i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1]


def check_grad(p: Tensor, g: Tensor) -> str | None:
    """Why p cannot be stepped by g, if one of them is a DTensor; None if it can."""
    spec, of_grad = spec_of(p), spec_of(g)
    if spec is None and of_grad is None:
        return None
    if spec is None or of_grad is None:
        return "only one of parameter and gradient is a DTensor"
    if spec[0] != of_grad[0]:
        return f"it is on {spec[0]}, its gradient on {of_grad[0]}"
    return None


def placed_as(g: Tensor, p: Tensor) -> Tensor:
    """The gradient g as its parameter p is placed: itself, or a copy where it is not.

    Of a replicated parameter that acts on sharded activations (`SequenceParallel`) it comes as parts still to be added.
    """
    spec = spec_of(p)
    return g if spec_of(g) == spec else g.redistribute(placements=spec[1])


def keeps_blocks(spec: Spec | None, shape: tuple[int, ...]) -> bool:
    """True if no shard cuts a block of 8-bit state: each has whole slices along dimension 0, or of 1-D whole blocks."""
    if spec is None:
        return True
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = spec
    if not all(type(pl) is Replicate or (type(pl) is Shard and pl.dim == 0) for pl in placements):
        return False
    cuts = _cuts(spec)
    return len(shape) > 1 or not cuts or (len(cuts) == 1 and ceil_div(shape[0], mesh.size(cuts[0])) % BLOCK == 0)


def like(shard: Tensor, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The DTensor of `shape`, row-major, that is placed as p and has `shard` on this rank; `shard` if p is plain."""
    if not is_dtensor(p):
        return shard
    from torch.distributed.tensor import DTensor

    strides = torch.empty(shape, device="meta").stride()
    mesh, placements = spec_of(p)
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)


def shard_as(t: Tensor, p: Tensor) -> Tensor:
    """The part of `t` that belongs to this rank's shard of p: t is sharded as p is, or whole on every rank.

    Raises ValueError if t is sharded otherwise.
    """
    if not is_dtensor(p):
        if is_dtensor(t):
            raise ValueError("is a DTensor, the parameter is not")
        return t
    if is_dtensor(t):
        if spec_of(t) != spec_of(p):
            raise ValueError(f"is placed {t.placements}, the parameter {p.placements}")
        return local(t)
    from torch.distributed.tensor import distribute_tensor

    whole = t.to(p.device)
    return local(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))


def reshard(params: Iterable[Tensor]) -> None:
    """Have FSDP2 gather anew what was changed, if any is of DTensors, outside of training.

    A root module keeps its gathered parameters from a forward without backward to the next one.
    """
    if not any(map(is_dtensor, params)):
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            module.reshard()


def all_reduce(total: Tensor, spec: Spec | None) -> Tensor:
    """Sum `total` over the ranks that hold different parts of tensors laid out as `spec`; replicas count once."""
    cuts = _cuts(spec)
    if not cuts:
        return total
    mesh = spec[0]
    moved = total.to(mesh.device_type)  # where the backend of the mesh can reduce it
    for dim in cuts:
        torch.distributed.all_reduce(moved, group=mesh.get_group(dim))
    return moved.to(total.device)
