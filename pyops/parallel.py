"""Tensor parallel for quantized linear layers: styles for `torch.distributed.tensor.parallel.parallelize_module`.

    plan = {"mlp.up": pyops.parallel.ColwiseParallel(), "mlp.down": pyops.parallel.RowwiseParallel()}
    parallelize_module(model, mesh, plan)

Colwise  rank r holds rows of W: y_r = act(x · W_rᵀ + bias_r + residual_r), and y is sharded along its last dimension.
Rowwise  rank r holds columns of W, x is sharded along its last dimension: y = act(Σ_r x_r · W_rᵀ + bias + residual).
         The sum runs in fp32 and is rounded once.

Where rows of x are quantized, ranks that did that to their shards by maxima of their own would compute something else
than one process. They agree on the maximum of the whole row first: one number a row is exchanged. `row_maxima="local"`
saves that.

The layers are changed in place: their class becomes one of those below, their sizes those of the rank's part. This
module is not imported with pyops: torch's own part of it takes a while.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.placement_types import Placement

from pyops.nn.int4_linear import Int4Linear
from pyops.nn.int8_linear import Int8Linear
from pyops.nn.linear import QuantLinear
from pyops.ops.epilogue import epilogue_ref
from pyops.ops.int4_linear import dispatch as int4_dispatch
from pyops.ops.int4_linear import resolve_compute
from pyops.ops.int8_linear import QMAX, SMALLEST_AMAX, int8_linear
from pyops.ops.int8_weight_linear import int8_weight_linear

ROW_MAXIMA = ("global", "local")
OF_INPUTS = ("input_order", "input_scale", "smooth")
"""Canonical tensors that belong to the inputs of a layer, not to its output channels."""


# -------------------------------------------------------------------------------------------------------------- styles


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """torch's style of this name, for `Int8Linear` and `Int4Linear` too: their output channels are split over the mesh.

    Args: as torch's: input_layouts (replicated by default), output_layouts (sharded along the last dimension by
    default), use_local_output.

    out_features must be a multiple of the ranks. A `residual` given to such a layer is the rank's own part of it. The
    weights are rank 0's, or each rank's own if `parallelize_module` is called with src_data_rank=None.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear):
            return super()._apply(module, device_mesh)
        return _shard(module, COLWISE, device_mesh, self)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """torch's style of this name, for `Int8Linear` and `Int4Linear` too: their inputs are split over the mesh.

    Args:
        input_layouts: sharded along the last dimension by default.
        output_layouts: replicated by default; may be sharded along another dimension than the last.
        use_local_output: return a plain tensor in place of a DTensor.
        row_maxima: "global": rows of x are quantized by the maximum of all of the row, as one process does it, for
            which the ranks exchange one number a row; "local": each rank by that of its shard, which needs no exchange
            and gives other roundings. Of no meaning where x is not quantized.

    in_features must be a multiple of the ranks; of an `Int4Linear`, which must not have act_order, each part whole
    groups. A `residual` is laid out as the output. The weights are rank 0's, or each rank's own if `parallelize_module`
    is called with src_data_rank=None.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        row_maxima: str = "global",
    ) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        if row_maxima not in ROW_MAXIMA:
            raise ValueError(f"row_maxima={row_maxima!r} is not one of {', '.join(ROW_MAXIMA)}")
        self.row_maxima = row_maxima

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear):
            return super()._apply(module, device_mesh)
        module = _shard(module, ROWWISE, device_mesh, self)
        module._row_maxima = self.row_maxima
        return module


# -------------------------------------------------------------------------------------------------------------- layers


class _Sharded(QuantLinear):
    """What a layer becomes: it holds the rank's part.

    Its `state_dict` holds DTensors. It loads DTensors of any placement, whole tensors, and tensors of the rank's part.
    """

    _mesh: DeviceMesh
    _placements: dict[str, Placement]
    """Of the canonical tensors and the bias."""
    _layouts: tuple[Placement, Placement, bool]
    """Of the input and the output; whether the output is a plain tensor."""

    @classmethod
    def placements(cls, layer: QuantLinear, ranks: int) -> dict[str, Placement]:
        """How the tensors of a layer are split; raises ValueError if they cannot be."""
        raise NotImplementedError

    def _split(self, ranks: int) -> None:
        """Make the sizes those of a part."""
        raise NotImplementedError

    def _input(self, x: torch.Tensor, wanted: Placement) -> DTensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self._mesh, (self._layouts[0],), run_check=False)
        return x.redistribute(placements=(wanted,))

    def _output(self, y: DTensor) -> torch.Tensor:
        y = y.redistribute(placements=(self._layouts[1],))
        return y.to_local() if self._layouts[2] else y

    def extra_repr(self) -> str:
        """The sizes of the rank's part, and of how many it is one."""
        return f"{super().extra_repr()}, one of {self._mesh.size()} parts"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sharded:
        memo[id(self._mesh)] = self._mesh  # processes cannot be copied
        return super().__deepcopy__(memo)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, placement in self._placements.items():
            local = destination[prefix + name]
            destination[prefix + name] = DTensor.from_local(local, self._mesh, (placement,), run_check=False)

    def _problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        for name, placement in self._placements.items():  # load_state_dict's own copy of the dict
            if prefix + name in state_dict:
                state_dict[prefix + name] = self._part(name, state_dict[prefix + name], placement)
        return super()._problems(state_dict, prefix)

    def _part(self, name: str, t: Any, placement: Placement) -> Any:
        """The rank's part of what is loaded; what is no whole tensor stays as it is."""
        if isinstance(t, DTensor):
            return t.redistribute(self._mesh, (placement,)).to_local()
        if not isinstance(placement, Shard) or not isinstance(t, torch.Tensor) or t.dim() <= placement.dim:
            return t
        shape = (self.out_features,) if name == "bias" else self.layout()[name].shape
        ranks = self._mesh.size()
        if t.shape[placement.dim] != ranks * shape[placement.dim]:
            return t
        return t.chunk(ranks, placement.dim)[self._mesh.get_local_rank()]


class _Colwise(_Sharded):
    @classmethod
    def placements(cls, layer: QuantLinear, ranks: int) -> dict[str, Placement]:
        if layer.out_features % ranks:
            raise ValueError(f"out_features={layer.out_features} cannot be split over {ranks} ranks evenly: {layer}")
        split = {name: Replicate() if name in OF_INPUTS else Shard(0) for name in layer.layout()}
        return split if layer.bias is None else split | {"bias": Shard(0)}

    def _split(self, ranks: int) -> None:
        self.out_features //= ranks

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The rank's part of the outputs; of `output_layouts`."""
        x = self._input(x, Replicate()).to_local(grad_placements=(Partial(),))
        y = super().forward(x, residual)
        return self._output(DTensor.from_local(y, self._mesh, (Shard(-1),), run_check=False))


class _Rowwise(_Sharded):
    _row_maxima: str

    @classmethod
    def placements(cls, layer: QuantLinear, ranks: int) -> dict[str, Placement]:
        if layer.in_features % ranks:
            raise ValueError(f"in_features={layer.in_features} cannot be split over {ranks} ranks evenly: {layer}")
        return {} if layer.bias is None else {"bias": Replicate()}

    def _split(self, ranks: int) -> None:
        self.in_features //= ranks

    def _partial(self, x: torch.Tensor) -> torch.Tensor:
        """The rank's summand of x · Wᵀ, in fp32."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Summed over the ranks; of `output_layouts`."""
        x = self._input(x, Shard(-1)).to_local()
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(f"the rank's part of x is {tuple(x.shape)}; expected [..., {self.in_features}]")
        self._check(x, self._buffers, self.bias, None)
        y = DTensor.from_local(self._partial(x), self._mesh, (Partial(),), run_check=False)
        y = y.redistribute(placements=(self._layouts[1],))
        (layout,) = y.placements
        bias = self.bias
        if isinstance(layout, Shard):
            if layout.dim == y.dim() - 1:
                raise ValueError("output_layouts of RowwiseParallel must not be sharded along the last dimension")
            if bias is not None:  # each rank adds it to rows of its own: its gradient is summed
                bias = DTensor.from_local(bias, self._mesh, (Replicate(),), run_check=False)
                bias = bias.to_local(grad_placements=(Partial(),))
        if isinstance(residual, DTensor):
            residual = residual.redistribute(placements=(layout,)).to_local()
        local = epilogue_ref(y.to_local(), bias, residual, self.activation, x.dtype)
        return self._output(DTensor.from_local(local, self._mesh, (layout,), run_check=False))

    def _row_amax(self, x: torch.Tensor) -> torch.Tensor:
        """max|x| of each row over all ranks, fp32 [..., 1]."""
        x = x.detach().float()
        amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
        if self._row_maxima == "local" or not amax.numel():
            return amax
        return collectives.wait_tensor(collectives.all_reduce(amax.contiguous(), "max", self._mesh))


class ColwiseInt8Linear(_Colwise, Int8Linear):
    """Output channels of an `Int8Linear`."""


class ColwiseInt4Linear(_Colwise, Int4Linear):
    """Output channels of an `Int4Linear`."""


class RowwiseInt8Linear(_Rowwise, Int8Linear):
    """Inputs of an `Int8Linear`."""

    @classmethod
    def placements(cls, layer: QuantLinear, ranks: int) -> dict[str, Placement]:
        """Columns of the weight, and what belongs to them; the scales of its rows are needed everywhere."""
        split = {"weight": Shard(1), "weight_scale": Replicate(), "input_scale": Replicate(), "smooth": Shard(0)}
        return super().placements(layer, ranks) | {name: split[name] for name in layer.layout()}

    def _partial(self, x: torch.Tensor) -> torch.Tensor:
        weight, smooth, scale = (self._buffers["_weight"], self.weight_scale), self.smooth, self.input_scale
        if self.mode == "weight_only":
            return int8_weight_linear(x.float(), *weight)
        if self.mode == "dynamic" and self._row_maxima == "global":
            divided = x if smooth is None else x.float() * (1.0 / smooth)
            scale = self._row_amax(divided) / torch.full((), float(QMAX), device=x.device)
            # A row that a scale cannot be made of: of zeros, or with NaN, which gives NaN whatever the scale.
            scale = torch.where(scale.isfinite() & (scale >= SMALLEST_AMAX), scale, 1.0).flatten()
        return int8_linear(x.float(), *weight, x_scale=scale, smooth=smooth)


class RowwiseInt4Linear(_Rowwise, Int4Linear):
    """Inputs of an `Int4Linear`, in whole groups."""

    @classmethod
    def placements(cls, layer: Int4Linear, ranks: int) -> dict[str, Placement]:
        """Columns of the weight with their groups; where one group covers all, its scale is needed everywhere."""
        split = super().placements(layer, ranks)
        part, G = layer.in_features // ranks, layer.group_size
        if layer.act_order:
            raise NotImplementedError(f"inputs of a layer with act_order cannot be split: {layer}")
        if part % (G if G > 0 else 2):
            unit = f"groups of {G}" if G > 0 else "pairs, which share a byte"
            raise ValueError(
                f"a part of in_features={layer.in_features} over {ranks} ranks is not whole {unit}: {layer}"
            )
        by_group = [name for name in layer.layout() if name != "weight"]
        return split | {"weight": Shard(1)} | dict.fromkeys(by_group, Shard(1) if G > 0 else Replicate())

    def _partial(self, x: torch.Tensor) -> torch.Tensor:
        compute = resolve_compute(self.compute, x.device)
        if compute == "float" or self._row_maxima == "local":
            return self._product(x.float(), compute)
        # The op takes no scale: it gets the integers, as floats. Straight through their rounding.
        amax = self._row_amax(x)
        qmax = torch.full((), float(QMAX), device=x.device)
        finite = amax.isfinite()
        usable = finite & (amax >= SMALLEST_AMAX)
        inverse = torch.where(usable, qmax / amax, 1.0)  # not 0: the gradient passes here
        scale = torch.where(usable, amax / qmax, torch.where(finite, 1.0, torch.nan))
        exact = x.float() * inverse
        return self._product(exact + (exact.round() - exact).detach(), "float") * scale

    def _product(self, x: torch.Tensor, compute: str) -> torch.Tensor:
        weight = (self._buffers[f"_{name}"] for name in self.packs)
        return int4_dispatch(x, *weight, None, None, "none", self.group_size, self.out_features, None, compute)


# ------------------------------------------------------------------------------------------------------------ sharding

COLWISE: dict[type[QuantLinear], type[_Sharded]] = {Int8Linear: ColwiseInt8Linear, Int4Linear: ColwiseInt4Linear}
ROWWISE: dict[type[QuantLinear], type[_Sharded]] = {Int8Linear: RowwiseInt8Linear, Int4Linear: RowwiseInt4Linear}


def _shard(
    layer: QuantLinear,
    classes: dict[type[QuantLinear], type[_Sharded]],
    mesh: DeviceMesh,
    style: ColwiseParallel | RowwiseParallel,
) -> _Sharded:
    """Make of a layer, in place, its part of this rank."""
    if isinstance(layer, _Sharded):
        raise ValueError(f"the layer is sharded already: {layer}")
    if type(layer) not in classes:
        allowed = ", ".join(cls.__name__ for cls in classes)
        raise NotImplementedError(f"{type(style).__name__} is for {allowed}, not for a {type(layer).__name__}")
    cls, ranks = classes[type(layer)], mesh.size()
    placements = cls.placements(layer, ranks)
    canonical, bias = layer._canonical(), layer.bias
    parts = {name: None if t is None else _own_part(t, placements[name], mesh, style) for name, t in canonical.items()}
    bias_part = None if bias is None else _own_part(bias, placements["bias"], mesh, style)
    layer.__class__ = cls
    layer._split(ranks)
    layer._mesh, layer._placements = mesh, placements
    layer._layouts = (*style.input_layouts, *style.output_layouts, style.use_local_output)
    layer._hold(parts)
    if bias is not None:
        layer.bias = nn.Parameter(bias_part, requires_grad=bias.requires_grad)
    return layer


def _own_part(
    t: torch.Tensor, placement: Placement, mesh: DeviceMesh, style: ColwiseParallel | RowwiseParallel
) -> torch.Tensor:
    t = t.detach()
    if style.src_data_rank is not None:
        t = t.contiguous().clone() if mesh.get_local_rank() != style.src_data_rank else t.contiguous()
        dist.broadcast(t, group=mesh.get_group(), group_src=style.src_data_rank)
    if isinstance(placement, Shard):
        t = t.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()]
    return t.clone(memory_format=torch.contiguous_format)
