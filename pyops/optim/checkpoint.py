"""Loading and saving the state of an optimizer: checked before anything changes, and without loss of precision.

`torch.optim.Optimizer.load_state_dict` casts every state to its parameter's dtype and checks nothing but counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyops.ops import optim_codec as codec
from pyops.optim import ema
from pyops.optim.distributed import local, shard_as
from pyops.optim.state import CODES, SCALE, WIDE, make, stored_dtype, widened, worth_quantizing, write

if TYPE_CHECKING:
    from pyops.optim.base import FusedOptimizer

OWN_GROUP_KEYS = ("l1", "rounding_step")
"""Keys of groups that torch.optim does not know."""
TELLING = ("lr", "betas", "alpha", "rho", "lr_decay", "dampening", "momentum_decay", "beta2_decay")
"""Keys that every version of torch has put into the groups of the algorithms that have them: they tell them apart."""

Groups = list[dict[str, Any]]


def read(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> tuple[dict[Any, Any], Groups]:
    """(state by parameter, groups) that `state_dict` holds, as `optimizer` would have them. Copies; changes nothing.

    Raises ValueError for a checkpoint that is not one of this optimizer.
    """
    groups = _groups(optimizer, state_dict["param_groups"])
    saved_ids = list(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))
    owner_of = dict(zip(saved_ids, owners(groups), strict=True))
    state: dict[Any, Any] = defaultdict(dict)
    for key, saved in state_dict["state"].items():
        if key in owner_of:
            p, group, label = owner_of[key]
            state[p] = _Reader(optimizer, p, group, label).read(saved)
        else:
            state[key] = saved  # of no parameter: torch keeps it, too
    return state, groups


def _groups(optimizer: FusedOptimizer, saved_groups: Groups) -> Groups:
    groups, saved_groups = optimizer.param_groups, deepcopy(saved_groups)
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, not {len(groups)}"
        )
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {i} has {len(saved['params'])} parameters, not {len(group['params'])}"
            )
        for key in TELLING:
            if key in optimizer.defaults and key not in saved:
                raise ValueError(
                    f"loaded state dict: group {i} has no {key!r}, so that it is none of {type(optimizer).__name__}"
                )
        saved["params"] = group["params"]
        if "param_names" in group:
            saved.setdefault("param_names", group["param_names"])
        for key, value in optimizer.defaults.items():
            saved.setdefault(key, value)
    return saved_groups


def owners(groups: Groups) -> Iterator[tuple[Tensor, dict[str, Any], str]]:
    """(parameter, its group, what to call it in an error), in order."""
    index = 0
    for group in groups:
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            yield p, group, f"parameter {index}" + (f" ({names[i]})" if names else "")
            index += 1


class _Reader:
    """Reads the state of one parameter."""

    def __init__(self, optimizer: FusedOptimizer, p: Tensor, group: dict[str, Any], label: str) -> None:
        self.p, self.group, self.label = p, group, label
        self.rule = optimizer._rule(group)
        self.name = type(optimizer).__name__
        self.state_dtype = "float32" if self.rule.shapes else optimizer.options.state_dtype
        self.shapes = {n: shape for rule in optimizer.rules for n, shape in rule.shapes_of(p.shape).items()}
        self.states = {n: n in rule.unsigned for rule in optimizer.rules for n in rule.states if n in self.shapes}
        self.scalars = {n for rule in optimizer.rules for n in rule.scalars}

    def read(self, saved: Any) -> dict[str, Any]:
        if not isinstance(saved, dict):
            raise ValueError(f"loaded state dict: the state of {self.label} is a {type(saved).__name__}, not a dict")
        saved = {name: value for name, value in saved.items() if value is not None}  # old SGD: no buffer yet
        self._check_keys(saved)
        result: dict[str, Any] = {}
        for name, value in saved.items():
            if name in self.scalars:
                result[name] = self._scalar(name, value)
            elif name == ema.KEY:
                result[name], _ = self._tensor(name, value, None, WIDE[self.p.dtype])
            elif name in self.states:
                dtype = stored_dtype(self.p, self.state_dtype, self.states[name])
                result[name], scale = self._tensor(name, value, saved.get(name + SCALE), dtype)
                if scale is not None:
                    result[name + SCALE] = scale
        return result

    def _check_keys(self, saved: dict[str, Any]) -> None:
        for name in saved:
            base = name[: -len(SCALE)] if name.endswith(SCALE) else name
            known = name in self.states or name in self.scalars or name == ema.KEY
            if not known and not (base in self.states and base in saved):
                raise self._error(name, f"is no state of {self.name}")
        if set(saved) - {ema.KEY} and self.rule.first is None:
            for name in (*self.rule.scalars, *self.rule.shapes_of(self.p.shape)):
                if name not in saved:
                    raise self._error(name, f"is missing, which {self.name} needs")

    def _error(self, name: str, what: str) -> ValueError:
        return ValueError(f"loaded state dict: {name!r} of {self.label} {what}")

    def _scalar(self, name: str, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.is_complex():
                raise self._error(name, f"is {tuple(value.shape)} {value.dtype}; allowed: one real number")
            dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else scalar_dtype()
            value = local(value.detach()).reshape(()).to(dtype)
        elif isinstance(value, (int, float)):  # before torch 1.12
            value = torch.tensor(float(value), dtype=scalar_dtype())
        else:
            raise self._error(name, f"is a {type(value).__name__}; allowed: a number or a tensor of one")
        if value.device.type != "meta" and not (math.isfinite(value.item()) and value.item() >= 0):
            raise self._error(name, f"is {value.item()}; allowed: 0 and above")
        return value.to(self.p.device if self.group.get("capturable") else "cpu", copy=True)

    def _tensor(self, name: str, value: Any, scale: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        p = self.p
        if not isinstance(value, Tensor):
            raise self._error(name, f"is a {type(value).__name__}; allowed: a tensor")
        shape = self.shapes.get(name, p.shape)
        if value.shape != shape:
            raise self._error(name, f"has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}")
        if value.layout != torch.strided:  # the momentum of sparse gradients
            if self.rule.first is None:
                raise self._error(name, f"is {value.layout}; allowed: {torch.strided}")
            return value.detach().clone().to(p.device), None
        value = value.detach()
        if value.dtype in CODES:
            scale = self._scales(name, value, scale)
            if dtype == value.dtype:
                state, own_scale = make(p, dtype)
                local(state).copy_(self._shard(name, value))
                local(own_scale).copy_(self._shard(name + SCALE, scale))
                return state, own_scale
            value = widened(value, scale.to(value.device))
        elif scale is not None:
            raise self._error(name, f"is {value.dtype} and has scales; allowed: {CODES}")
        elif value.dtype not in WIDE or value.is_complex() != p.is_complex():
            raise self._error(name, f"is {value.dtype}, the parameter {p.dtype}")
        elif name in self.states and worth_quantizing(p) and _are_codes(local(value), self.states[name]):
            raise self._error(name, "holds 8-bit codes without their scales; load them with state_dtype='int8'")
        state, own_scale = make(p, dtype, shape)
        write(state, own_scale, self._shard(name, value).to(p.device))
        return state, own_scale

    def _scales(self, name: str, codes: Tensor, scale: Any) -> Tensor:
        expected = torch.uint8 if self.states.get(name) else torch.int8
        if codes.dtype != expected or name not in self.states:
            raise self._error(name, f"is {codes.dtype}; allowed: {expected} and floating point")
        key = name + SCALE
        if not isinstance(scale, Tensor):
            raise self._error(key, f"is missing, which {codes.dtype} codes need")
        shape = codec.scale_shape(codes.shape)
        if tuple(scale.shape) != shape or not scale.is_floating_point():
            raise self._error(key, f"is {tuple(scale.shape)} {scale.dtype}; allowed: {shape} torch.float32")
        here = local(scale.detach())
        if not here.isfinite().all() or (here < 0).any():
            raise self._error(key, "holds a scale that is negative, NaN or infinite")
        return scale.detach().float()

    def _shard(self, name: str, value: Tensor) -> Tensor:
        try:
            return shard_as(value, self.p)
        except ValueError as error:
            raise self._error(name, str(error)) from None


def _are_codes(value: Tensor, unsigned: bool) -> bool:
    """True if floats can only be codes: integers, in each block the largest next to the largest code, or all zero.

    `torch.distributed.checkpoint` copies an int8 state into a tensor of any dtype that it finds under the same name.
    """
    if value.is_meta or value.is_complex() or not value.numel() or not bool((value == value.round()).all()):
        return False
    sizes = value.abs()
    if bool((sizes == sizes.max()).all()):  # the sum of 127 gradients of 1, say
        return False
    tops, largest = codec.blocks(sizes, sizes.shape).amax(2), 255 if unsigned else 127
    return bool(((tops == 0) | (tops == largest) | (tops == largest - 1)).all())


def scalar_dtype() -> torch.dtype:
    """Of the count of steps: fp32, fp64 if that is the default dtype."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def torch_form(state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` as `torch.optim` would have it; see `FusedOptimizer.torch_state_dict`."""
    return {
        **state_dict,
        "state": {key: _plain(s) if isinstance(s, dict) else s for key, s in state_dict["state"].items()},
        "param_groups": [{k: v for k, v in g.items() if k not in OWN_GROUP_KEYS} for g in state_dict["param_groups"]],
    }


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for name, value in state.items():
        if name == ema.KEY or (name.endswith(SCALE) and name[: -len(SCALE)] in state):
            continue
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        result[name] = widened(value, state.get(name + SCALE)) if dense else value
    return {name: value for name, value in result.items() if value is not None}
