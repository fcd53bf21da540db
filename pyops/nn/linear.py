"""What the linear layers with a quantized weight share: how they hold it, move it, save it and load it.

A subclass says in a few lines what is its own: the canonical tensors (`layout`), their packed form (`_pack`, `_unpack`,
`_wants_packed`), what their values must be (`_wrong_values`), and how its op is called (`_call`, `_check`).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from pyops.memory import chunks, has_values, put_on_huge_pages
from pyops.nn.effective import effective, trainable
from pyops.nn.state import check_entry, foreign_keys, load_hooks_run, own_keys, wrong_type, wrong_value
from pyops.ops.epilogue import check_activation
from pyops.ops.int8_linear import FLOAT_DTYPES
from pyops.sizes import ceil_div

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

Tensors = dict[str, torch.Tensor | None]
"""Tensors of a layer by their names in its `state_dict`; None for what the layer does without."""


class Layout(NamedTuple):
    """What one canonical tensor must be."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    """All that are allowed; a new layer has the first."""


class QuantLinear(nn.Module):
    """y = act(x · Wᵀ + bias + residual) with a frozen W in quantized form; base of `Int8Linear`, `Int4Linear` …

    The `state_dict` holds the canonical tensors of `layout()` and the bias, the same on every device. Where the kernels
    of a device read a packed form of those named in `packs`, the layer holds that *instead*; the attributes and
    `state_dict()` then unpack copies. `.half()` and `.to(dtype)` change the bias only. `load_state_dict` checks every
    entry before any is taken.
    """

    packs: ClassVar[tuple[str, ...]] = ("weight",)
    """The canonical tensors that are packed, together, and held as the buffers `_<name>`; others keep their names.
    dim() of the first tells the form: 2 is canonical, 3 packed."""
    optional: ClassVar[dict[str, str]] = {}
    """Canonical tensors that not every layer has, and how one is made that has none."""
    piece_rows: ClassVar[int] = 0
    """The rows of a weight can be quantized and packed so many at a time, or any multiple, each tensor along its first
    dimension; 0 if not."""
    max_in_features: ClassVar[int]
    """From here on the sums of the kernels could overflow."""

    in_features: int
    out_features: int
    activation: str
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, activation: str) -> None:
        """The sizes; a subclass then sets what its `layout` depends on and calls `_make`."""
        super().__init__()
        if not 0 <= in_features <= self.max_in_features:
            raise ValueError(f"in_features is {in_features}; allowed: 0 to {self.max_in_features}")
        check_activation(activation)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation

    def _make(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Register the tensors, with the initial values of `torch.nn.Linear`."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
        tensors: Tensors = dict.fromkeys(self.optional)
        tensors |= {
            name: torch.empty(shape, dtype=dtypes[0], device=device) for name, (shape, dtypes) in self.layout().items()
        }
        # What the layer does without comes last: torch.export takes the buffers before it to be all there.
        for name in sorted(tensors, key=lambda name: (tensors[name] is None, name not in self.packs)):
            self.register_buffer(self._key(name), tensors[name], persistent=name not in self.packs)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of `torch.nn.Linear`, quantized."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        device = self._buffers[self._key(self.packs[0])].device
        if device.type != "meta":
            w = torch.empty(self.out_features, self.in_features, device=device).uniform_(-bound, bound)
            self._hold(self._held() | self._quantize(w))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def _made_from(cls, linear: nn.Linear, quantize: Callable[[torch.Tensor], Tensors], **options: Any) -> Self:
        """The quantized form of a float layer: holds what `quantize` makes of its weight; `options` are the class's."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        weight, bias = effective(linear, "weight"), effective(linear, "bias")
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"linear has dtype {weight.dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
        N, K = weight.shape
        # On meta: nothing is initialized only to be overwritten.
        layer = cls(K, N, False, "meta", weight.dtype, **options)
        layer._hold(layer._held() | layer._in_pieces(weight.detach(), quantize))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trainable(linear, "bias"))
        return layer.train(linear.training)

    def _in_pieces(self, weight: torch.Tensor, quantize: Callable[[torch.Tensor], Tensors]) -> Tensors:
        """What `quantize` makes of a weight, packed where its device wants it, with no copy of all of it on the way."""
        (N, K), rows, device = weight.shape, self.piece_rows, weight.device
        if not (rows and N and has_values(weight)):
            return quantize(weight)
        whole: Tensors = {}
        share: dict[str, int] = {}  # how many rows of the weight are one of a tensor: 1, or those of a panel
        for a, b in chunks(ceil_div(N, rows), rows * K, device):
            piece = weight[a * rows : b * rows]
            tensors = quantize(piece)
            if self._wants_packed(device):
                tensors = tensors | self._pack(tensors)
            if len(piece) == N:
                return tensors
            if not whole:  # a full piece
                share = {name: 1 if t is None else len(piece) // len(t) for name, t in tensors.items()}
                whole = {
                    name: None if t is None else t.new_empty(ceil_div(N, share[name]), *t.shape[1:])
                    for name, t in tensors.items()
                }
                for t in whole.values():
                    if t is not None:
                        put_on_huge_pages(t, filled=False)
            for name, t in tensors.items():
                if t is not None:
                    first = a * rows // share[name]
                    whole[name][first : first + len(t)] = t
        for t in whole.values():
            if t is not None:
                put_on_huge_pages(t, filled=True)
        return whole

    # ------------------------------------------------------------------------------- what a subclass says

    def layout(self) -> dict[str, Layout]:
        """Every canonical tensor that this layer has, the quantized weight first; the bias is none of them."""
        raise NotImplementedError

    def _quantize(self, w: torch.Tensor) -> Tensors:
        """The canonical tensors of a new layer, from its float weight [N, K]."""
        raise NotImplementedError

    def _pack(self, tensors: Tensors) -> Tensors:
        """The packed form of the canonical tensors named in `packs`."""
        raise NotImplementedError

    def _unpack(self, tensors: Tensors) -> Tensors:
        """The exact inverse of `_pack`."""
        raise NotImplementedError

    def _wants_packed(self, device: torch.device) -> bool:
        """True if the kernels of `device` read the packed form."""
        return False

    def _wrong_values(self, tensors: Tensors, prefix: str) -> list[str]:
        """What is wrong with the values of these canonical tensors, whose shapes, dtypes and finiteness are right."""
        return []

    def _call(
        self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """The op on checked arguments; `tensors` are the buffers."""
        raise NotImplementedError

    def _check(
        self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> None:
        """Raise the TypeError or ValueError that the op documents; x has the right K if it is a tensor."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """What `extra_repr` shows beside the arguments of `nn.Linear`."""
        return {} if self.activation == "none" else {"activation": self.activation}

    # ------------------------------------------------------------------------------- forward

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """act(x · weightᵀ + bias + residual) in x's dtype; raises TypeError or ValueError naming the argument."""
        # The dicts, not the attributes: nn.Module finds a parameter or buffer in 0.5 µs, a dict in 0.05.
        buffers, parameters = self._buffers, self._parameters
        # Not get("bias", self.bias), which would look up the attribute always; it is one where the bias is pruned.
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if (
            residual is not None
            or not isinstance(x, torch.Tensor)
            or x.dtype not in FLOAT_DTYPES
            or not (shape := x.shape)
            or shape[-1] != self.in_features
            or x.device != buffers["_weight"].device
        ):
            # A packed weight is padded and fits other K as well: the op could not see it.
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] != self.in_features:
                raise ValueError(f"x has K={x.shape[-1]}; in_features is {self.in_features}")
            self._check(x, buffers, bias, residual)
        return self._call(x, buffers, bias, residual)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        return ", ".join(f"{name}={value!r}" for name, value in (sizes | self._options()).items())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of `nn.Module`; the tensors of `packs` are no parameters, and raise TypeError."""
        if name in self.packs and param is not None:
            raise TypeError(
                f"{name} of a {type(self).__name__} is quantized: it cannot be a parameter, nor tied to one. A tie is "
                "cut when the layer is quantized (in transformers: config.tie_word_embeddings = False)"
            )
        super().register_parameter(name, param)

    # ------------------------------------------------------------------------------- the two forms of the weight

    def _key(self, name: str) -> str:
        """Under which name a canonical tensor, or its packed form, is a buffer."""
        return f"_{name}" if name in self.packs else name

    def _held(self) -> Tensors:
        """The tensors as they are held: those of `packs` canonical or packed, then the others."""
        names = dict.fromkeys((*self.packs, *self.layout(), *self.optional))
        return {name: self._buffers[self._key(name)] for name in names}

    def _canonical(self) -> Tensors:
        """All tensors canonical; copies of those that are held packed."""
        held = self._held()
        return held | self._unpack(held) if held[self.packs[0]].dim() == 3 else held

    def _hold(self, tensors: Tensors) -> None:
        """Hold these tensors, canonical or packed, in the form that their device wants."""
        weight = tensors[self.packs[0]]
        packed = weight.dim() == 3
        if packed != self._wants_packed(weight.device):
            tensors = tensors | (self._unpack(tensors) if packed else self._pack(tensors))
        for name, t in tensors.items():
            self._buffers[self._key(name)] = t

    def _set(self, name: str, value: Any) -> None:
        """Replace one canonical tensor; raises ValueError if it is not right."""
        layout = self.layout()
        if name not in layout:
            raise ValueError(f"{name} cannot be set: the layer was made with {self.optional[name]}")
        problem = check_entry(name, value, *layout[name])
        for text in [problem] if problem else self._wrong_values({name: value}, ""):
            raise ValueError(text)
        self._hold(self._canonical() | {name: value})

    def _take(self, tensors: Tensors) -> None:
        """Hold canonical tensors from outside; raises TypeError or ValueError, naming one, if anything is wrong."""
        layout = self.layout()
        for name, (shape, dtypes) in layout.items():
            problem = wrong_type(name, tensors[name], dtypes)
            if problem:
                raise TypeError(problem)
            for text in filter(None, [wrong_value(name, tensors[name], shape, finite=True)]):
                raise ValueError(text)
            device = tensors[self.packs[0]].device
            if tensors[name].device != device:
                raise ValueError(f"{name} is on {tensors[name].device}, {self.packs[0]} on {device}")
        for text in self._wrong_values(tensors, ""):
            raise ValueError(text)
        self._hold(self._held() | tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # fn is .to(), .half(), to_empty(), share_memory_() …: the quantized tensors take its device and memory, never
        # its dtype.
        held = self._held()
        for name in held:
            del self._buffers[self._key(name)]
        try:
            super()._apply(fn, recurse)
            held = {name: None if t is None else moved(t, fn) for name, t in held.items()}
        finally:
            self._hold(held)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Same process, same kernels: the packed form is copied as it is, not through __getstate__.
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(super().__getstate__(), memo)  # without what .compile() made for this one
        for t in new._held().values():
            if t is not None:
                put_on_huge_pages(t)
        return new

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            # A process that starts gets the memory of tensors, not copies, so they must live until it has: these do.
            return super().__getstate__()
        # A pickle is canonical: the machine that loads it may want another form.
        canonical = {self._key(name): t for name, t in self._canonical().items()}
        return {**super().__getstate__(), "_buffers": {**self._buffers, **canonical}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold(self._held())

    # ------------------------------------------------------------------------------- state_dict

    def _packed_keys(self) -> list[str]:
        """Names in the `state_dict` that are no persistent buffers."""
        layout = self.layout()
        return [name for name in self.packs if name in layout]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        canonical = self._canonical()
        for name in self._packed_keys():
            destination[prefix + name] = canonical[name]
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
            problems = self._problems(state_dict, prefix)
            if problems:
                error_msgs += problems
            else:
                self._load(state_dict, prefix, local_metadata)
            if strict:  # torch passes True here and settles strictness later
                also = self._packed_keys()
                missing_keys += [key for key in own_keys(self, prefix, also) if key not in state_dict]
                unexpected_keys += foreign_keys(self, state_dict, prefix, also)

    def _problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Everything that is wrong with the entries that there are; if anything is, none of them is loaded."""
        layout = self.layout()
        given = {name: state_dict[prefix + name] for name in layout if prefix + name in state_dict}
        problems = [check_entry(prefix + name, value, *layout[name]) for name, value in given.items()]
        if self._parameters.get("bias") is not None and prefix + "bias" in state_dict:
            problems.append(check_entry(prefix + "bias", state_dict[prefix + "bias"], (self.out_features,), None))
        problems = [problem for problem in problems if problem]
        for name, made in self.optional.items():
            if name not in layout and prefix + name in state_dict:
                problems.append(f"{prefix}{name} has no place: the layer was made with {made}.")
        lacking = [name for name in layout if name not in given]
        if given and lacking and not problems:
            here = next(iter(given))
            problems.append(
                f"{prefix}{here} comes without {prefix}{lacking[0]}; they are loaded together or not at all."
            )
        return problems or self._wrong_values(given, prefix)

    def _load(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        """Load entries that were found right."""
        layout = self.layout()
        given: Tensors = {name: state_dict[prefix + name] for name in layout if prefix + name in state_dict}
        for name, value in given.items():  # where several dtypes are allowed, the checkpoint's is taken
            held = self._buffers[self._key(name)]
            if name not in self.packs and held.dtype != value.dtype:
                self._buffers[name] = torch.empty_like(held, dtype=value.dtype)
        errors: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, False, [], [], errors)
        if errors:
            raise RuntimeError("\n".join(errors))
        if not given:
            return
        held = self._held()
        stored = held[self.packs[0]]
        with torch.no_grad():
            if local_metadata.get("assign_to_params_buffers", False):
                self._hold(held | given)
            elif stored.is_meta and not given[self.packs[0]].is_meta:
                key = prefix + self.packs[0]
                warnings.warn(f"{key}: copying to a meta tensor does nothing; use assign=True", stacklevel=2)
            else:
                self._copy({name: t.to(stored.device) for name, t in given.items() if name in self.packs}, held)

    def _copy(self, tensors: Tensors, held: Tensors) -> None:
        """Copy canonical tensors of `packs` into the memory that holds them, but for those that change their dtype."""
        new = held | tensors
        if held[self.packs[0]].dim() == 3:
            new |= self._pack(new)
        for name in tensors:
            if held[name].dtype == new[name].dtype:
                held[name].copy_(new[name])
            else:
                self._buffers[self._key(name)] = new[name].clone()


def canonical_tensor(name: str, doc: str) -> property:
    """The attribute of a canonical tensor that may be held packed."""

    def get(layer: QuantLinear) -> torch.Tensor | None:
        return layer._canonical()[name]

    def put(layer: QuantLinear, value: torch.Tensor) -> None:
        layer._set(name, value)

    return property(get, put, doc=doc)


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def moved(t: torch.Tensor, fn: Any) -> torch.Tensor:
    """fn(t) in t's dtype: torch converts floating tensors only, so that they pass as their bits.

    What is no floating tensor, `module.type(dtype)` alone may have given another dtype.
    """
    bits = t.view(BITS[t.element_size()]) if t.is_floating_point() else t
    moved = fn(bits)
    moved = moved if moved.dtype == bits.dtype else bits.to(moved.device)
    return moved.view(t.dtype) if t.is_floating_point() else moved
