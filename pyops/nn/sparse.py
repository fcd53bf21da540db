"""What the sparse layers share: the weight's values and structure, how it is trained, moved, saved and loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyops.nn.effective import effective, trainable
from pyops.nn.masks import find_mask
from pyops.nn.sparse_state import Found, pattern_of, read
from pyops.nn.state import foreign_keys, load_hooks_run, own_keys
from pyops.ops.epilogue import check_activation
from pyops.ops.sparse_checks import FLOAT_DTYPES
from pyops.ops.sparse_conv2d import with_packed
from pyops.ops.sparse_packed import PackedCache
from pyops.ops.sparse_weight import (
    PATTERNS,
    SparseWeight,
    block_columns,
    check_pattern,
    full_structure,
    kept_positions,
    scatter_blocks,
)


class SparseLayer(nn.Module):
    """A layer whose weight keeps some blocks only. Not used by itself: see SparseConv2d, SparseConv1d, SparseLinear.

    State, the same on every device (`ops/sparse_weight.py` has the layout): the Parameter `values` [B, bo, bc], the
    int32 buffers `crow_indices` and `col_indices`, the bool buffer `block_mask` where blocks hold fill-in, the
    Parameter `bias`. `.half()` and `.to(dtype)` change values and bias only.

    The structure is that of a mask, not of the zeros: a kept weight may pass through 0 in training, and the others have
    a gradient of 0 and stay 0 under every optimizer that leaves a 0 with gradient 0 alone.

    `load_state_dict` takes the structure from the checkpoint, of any pattern: the layer adopts it, and its Parameters
    stay the same objects. A dense `weight` with zeros, or one with masks (`weight_orig` and `weight_mask`,
    `parametrizations.weight.original` and `.0.mask`) is stored in the layer's own pattern. Everything is checked before
    anything is changed; a malformed structure raises.
    """

    values: nn.Parameter
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    block_mask: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight_shape: tuple[int, int, int, int],
        dense_shape: tuple[int, ...],
        groups: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        pattern: str,
        activation: str,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
        check_pattern(pattern)
        check_activation(activation)
        self.weight_shape, self.dense_shape = weight_shape, dense_shape
        self.groups, self.pattern, self.activation = groups, pattern, activation
        self._packed = PackedCache()
        device = torch.get_default_device() if device is None else device
        crow, col = full_structure(weight_shape, groups, pattern, device)
        values = torch.zeros(col.numel(), *PATTERNS[pattern], dtype=dtype, device=device)
        self._hold(SparseWeight(values, crow, col, weight_shape, PATTERNS[pattern], groups, None, pattern))
        if bias:
            self.bias = nn.Parameter(torch.empty(weight_shape[0], dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of torch's dense layer, at the positions that are kept."""
        fan_in = math.prod(self.weight_shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        with torch.no_grad():
            self.values.uniform_(-bound, bound)
            if not self.values.is_meta:
                structure = (self.crow_indices, self.col_indices, self.block_mask)
                self.values.mul_(kept_positions(*structure, self.weight_shape, self.block, self.groups))
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    # ------------------------------------------------------------------------------- the weight

    @property
    def block(self) -> tuple[int, int]:
        """Output × input channels of one block."""
        return tuple(self.values.shape[1:])

    @property
    def sparse_weight(self) -> SparseWeight:
        """The weight as the ops take it, sharing the layer's tensors; checked."""
        structure = (self.crow_indices, self.col_indices, self.weight_shape, self.block, self.groups, self.block_mask)
        return SparseWeight(self.values, *structure, self.pattern)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, in the shape of torch's layer; differentiable in values."""
        values = self.values if self.block_mask is None else self.values * self.block_mask
        structure = (self.crow_indices, self.col_indices, self.weight_shape, self.block, self.groups)
        return scatter_blocks(values, *structure).reshape(self.dense_shape)

    @property
    def sparsity(self) -> float:
        """The fraction of the dense weight that is not kept."""
        structure = (self.crow_indices, self.col_indices, self.block_mask, self.weight_shape, self.block, self.groups)
        return 1 - int(kept_positions(*structure).sum()) / max(math.prod(self.weight_shape), 1)

    def clear_packed(self) -> None:
        """Forget the packed forms of the weight, as after a change of `values` that leaves no trace (by numpy, say)."""
        self._packed.clear()

    def _hold(self, weight: SparseWeight) -> None:
        self.values = nn.Parameter(weight.values)
        self.register_buffer("crow_indices", weight.crow_indices)
        self.register_buffer("col_indices", weight.col_indices)
        self.register_buffer("block_mask", weight.block_mask)
        self._packed.clear()

    def _take(self, module: nn.Module, mask: torch.Tensor | None) -> SparseLayer:
        """Hold what `module`, a dense layer of the same shapes, computes with; the module itself is not changed."""
        weight, bias = effective(module, "weight"), effective(module, "bias")
        if mask is None:
            mask = find_mask(module)
            # Never less than the layer computes with: the buffer may be another thing's, or not applied yet.
            mask = None if mask is None else mask | (weight.detach() != 0)
        elif isinstance(mask, torch.Tensor) and mask.shape != weight.shape:
            raise ValueError(f"mask is {tuple(mask.shape)}; the weight is {tuple(weight.shape)}")
        mask = mask.reshape(self.weight_shape) if isinstance(mask, torch.Tensor) else mask
        dense = weight.detach().reshape(self.weight_shape)
        self._hold(SparseWeight.from_dense(dense, mask, pattern=self.pattern, groups=self.groups))
        self.values.requires_grad_(trainable(module, "weight"))
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=trainable(module, "bias"))
        return self.train(module.training)

    def _fill(self, dense: nn.Module) -> nn.Module:
        dense.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def _convolve(
        self,
        x: torch.Tensor,  # [N, C, H, W]
        residual: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
    ) -> torch.Tensor:
        # The dicts, not the attributes: nn.Module finds a parameter or buffer in 0.5 µs, a dict in 0.05. One is an
        # attribute where it is itself pruned.
        buffers, parameters = self._buffers, self._parameters
        values = parameters["values"] if "values" in parameters else self.values  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if values.device != x.device:
            raise ValueError(f"x is on {x.device}, the layer's weight on {values.device}")
        structure = (buffers["crow_indices"], buffers["col_indices"], buffers["block_mask"])
        window = (stride, padding, dilation, self.groups)
        block = tuple(values.shape[1:])
        return with_packed(
            self._packed, x, values, *structure, self.weight_shape, block, bias, residual, *window, self.activation
        )

    def _repr_tail(self) -> str:
        text = f"pattern={self.pattern!r}"
        if not self.values.is_meta:
            text += f", sparsity={self.sparsity:.4g}"
        return text if self.activation == "none" else f"{text}, activation={self.activation!r}"

    # ------------------------------------------------------------------------------- moving

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLayer:
        self._packed.clear()
        integers = {name: t for name, t in self._buffers.items() if t is not None and not t.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in integers.items():
            after = self._buffers[name]
            if after.dtype != before.dtype:  # by module.type(dtype)
                self._buffers[name] = before.to(after.device)
        if any(t.is_meta for t in integers.values()) and not self.crow_indices.is_meta:
            self._first_blocks()
        return self

    def _first_blocks(self) -> None:
        """Give memory that to_empty() left as it was a structure that is one: of a new layer, or the first B blocks."""
        crow, col = full_structure(self.weight_shape, self.groups, self.pattern, self.crow_indices.device)
        if col.numel() != self.col_indices.numel():
            columns, blocks = block_columns(self.weight_shape, self.block), self.col_indices.numel()
            crow = (torch.arange(crow.numel(), device=crow.device) * columns).clamp(max=blocks)
            col = torch.arange(blocks, device=crow.device) % max(columns, 1)
        self.crow_indices.copy_(crow)
        self.col_indices.copy_(col)
        if self.block_mask is not None:
            structure = (self.crow_indices, self.col_indices, None, self.weight_shape, self.block, self.groups)
            self.block_mask.copy_(kept_positions(*structure))

    # ------------------------------------------------------------------------------- state_dict

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        args = (strict, missing_keys, unexpected_keys, error_msgs)
        with load_hooks_run(self, state_dict, prefix, local_metadata, *args):
            found = self._read(state_dict, prefix)
            if found.problems:
                error_msgs += found.problems
            else:
                self._load(found, state_dict, prefix, local_metadata, error_msgs)
            if strict:  # torch passes True here and settles strictness later
                own = [prefix + name for name in found.stands_for | {"block_mask"}]
                missing_keys += [
                    key for key in own_keys(self, prefix, also=()) if key not in own and key not in state_dict
                ]
                known = {prefix + name for name in found.used}
                foreign = foreign_keys(self, state_dict, prefix, also=())
                unexpected_keys += [key for key in foreign if key not in known]

    def _read(self, state_dict: dict[str, Any], prefix: str) -> Found:
        shapes = (self.dense_shape, self.weight_shape)
        return read(state_dict, prefix, *shapes, self.groups, self.pattern, self.bias is not None)

    def _load(
        self, found: Found, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], errors: list[str]
    ) -> None:
        """Load entries that were found right."""
        if "values" in found.tensors:
            self.pattern = pattern_of(found, self.weight_shape, self.groups, self.pattern)
            self._make_room(found)
            assigned = local_metadata.get("assign_to_params_buffers", False)
            if self.values.is_meta and not found.tensors["values"].is_meta and not assigned:
                warnings.warn(f"{prefix}values: copying to meta does nothing; use assign=True", stacklevel=2)
        state = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        state.update({prefix + name: tensor for name, tensor in found.tensors.items()})
        super()._load_from_state_dict(state, prefix, local_metadata, False, [], [], errors)
        self._packed.clear()

    def _make_room(self, found: Found) -> None:
        """Give the layer's tensors the sizes of those to be loaded; the Parameter stays the object that it is."""
        values, col, mask = (found.tensors.get(name) for name in ("values", "col_indices", "block_mask"))
        if self.values.shape != values.shape:
            self.values.data = self.values.data.new_empty(values.shape)
            self.values.grad = None
        crow = found.tensors["crow_indices"]
        for name, size in (("crow_indices", crow.shape), ("col_indices", col.shape)):
            if self._buffers[name].shape != size:
                self._buffers[name] = self._buffers[name].new_empty(size)
        held = self._buffers["block_mask"]
        if mask is None:
            self._buffers["block_mask"] = None
        elif held is None or held.shape != mask.shape:
            self._buffers["block_mask"] = torch.empty(mask.shape, dtype=torch.bool, device=self.crow_indices.device)
