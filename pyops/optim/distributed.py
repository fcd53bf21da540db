"""DTensor parameters (FSDP2, tensor parallelism): kernels get the local shards, the global norm is summed over ranks.

What acts elementwise needs nothing else: states, averages and masks are sharded as their parameter is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    return spec is not None and not all(placement.is_replicate() for placement in spec[1])


def check_grad(p: Tensor, g: Tensor) -> str | None:
    """Why a kernel cannot take the local shards of p and g together; None if it can."""
    spec, of_grad = spec_of(p), spec_of(g)
    if spec is None and of_grad is None:
        return None
    if spec is None or of_grad is None:
        return "only one of parameter and gradient is a DTensor"
    if any(placement.is_partial() for placement in of_grad[1]):
        return f"its gradient is not reduced yet: placements {of_grad[1]}"
    if spec != of_grad:
        return f"it is placed {spec[1]} on {spec[0]}, its gradient {of_grad[1]} on {of_grad[0]}"
    return None


def keeps_blocks(spec: Spec | None, dim: int) -> bool:
    """True if shards are whole slices along dimension 0, so that no block of 8-bit state is cut."""
    if spec is None:
        return True
    from torch.distributed.tensor import Replicate, Shard

    whole = all(type(pl) is Replicate or (type(pl) is Shard and pl.dim == 0) for pl in spec[1])
    return whole and (dim > 1 or not is_sharded(spec))


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


def all_reduce(total: Tensor, spec: Spec | None) -> Tensor:
    """Sum `total` over the ranks that hold different parts of tensors laid out as `spec`; replicas count once."""
    if spec is None or not is_sharded(spec):
        return total
    mesh, placements = spec
    moved = total.to(mesh.device_type)  # where the backend of the mesh can reduce it
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(moved, group=mesh.get_group(dim))
    return moved.to(total.device)
