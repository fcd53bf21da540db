"""Make Triton's interpreter trustworthy: call `install()` before the first kernel runs, with TRITON_INTERPRET=1.

As shipped (3.6 to 3.7) the interpreter keeps bf16 as uint16 and fp8 as uint8, and computes on those bits: bf16
arithmetic is silently wrong, fp32 → bf16 truncates instead of rounding, fp8 conversions round half up. It reads and
writes any address it is given. `install()`

- converts between floating types with torch, which rounds to nearest even as the hardware does; fp8 saturates,
- computes bf16 arithmetic and dots in fp32 and rounds the result once,
- lets a loop over `range(0, n)` run under Triton 3.6 with NumPy 2.4, which refuses `int()` of a one-element array,
- rounds `tl.fma` once,
- raises on reductions, scans and atomics in bf16 or fp8, which would still be wrong,
- checks every load, store and atomic against the tensors passed to the kernel, and those named by `reachable`.

Not modelled: the approximations of the hardware's exp and division, flush-to-zero, contraction into multiply-adds,
TF32, and two programs running at the same time; `shuffled_programs` at least varies their order.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter as shipped
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle

TORCH_DTYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
UNSIGNED = {
    1: (np.uint8, torch.uint8),
    2: (np.uint16, torch.uint16),
    4: (np.uint32, torch.uint32),
    8: (np.uint64, torch.uint64),
}
"""The unsigned integers of each size in bytes."""
BIT_PATTERN_TYPES = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
"""Types that the interpreter holds as unsigned integers."""

FLOAT_OPERATION = re.compile(
    r"create_(f(add|sub|mul|div|rem|ma|abs|cmp\w+)|precise_(divf|sqrt)|(min|max)(imum|num)f|clampf"
    r"|exp2?|log2?|r?sqrt|sin|cos|erf|floor|ceil)"
)

_installed = False
_regions: list[tuple[int, int]] = []
"""[first byte, one past the last) of every tensor of the running kernel."""
_reachable: list[torch.Tensor] = []
"""Tensors that kernels may use without being passed them."""


def install() -> None:
    """Correct the interpreter in this process. Raises RuntimeError if kernels would be compiled instead."""
    global _installed
    if not knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before the first import of triton")
    if _installed:
        return
    _installed = True
    np.seterr(all="ignore")  # Inf and NaN are results, as on the device
    _correct_conversions()
    _correct_fma()
    _correct_bf16_arithmetic()
    _correct_index()
    _refuse_what_stays_wrong()
    _check_addresses()


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Within this context the programs of every launch run in a random order."""
    builder = shipped.interpreter_builder
    original = builder.set_grid_idx
    order: list[int] = []

    def set_grid_idx(x, y, z):
        dims = builder.grid_dim
        if (x, y, z) == (0, 0, 0):
            order[:] = random.Random(seed).sample(range(int(np.prod(dims))), int(np.prod(dims)))
        original(*(int(i) for i in np.unravel_index(order[(x * dims[1] + y) * dims[2] + z], dims)))

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_idx


@contextlib.contextmanager
def reachable(tensors: Iterable[torch.Tensor]) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Within this context kernels may also use `tensors`, as through a table of addresses, each within its own extent.

    Gives a function that adds one more tensor, and returns it.
    """
    before = len(_reachable)
    _reachable.extend(tensors)

    def add(tensor: torch.Tensor) -> torch.Tensor:
        _reachable.append(tensor)
        return tensor

    try:
        yield add
    finally:
        del _reachable[before:]


# --------------------------------------------------------------------------------------------------------- conversions


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """`data`, in the interpreter's representation of `source`, rounded to that of `target`."""
    unsigned_numpy, _ = UNSIGNED[data.itemsize]
    values = torch.from_numpy(np.ascontiguousarray(data).view(unsigned_numpy).copy()).view(TORCH_DTYPES[source])
    if target.primitive_bitwidth == 8:  # cvt.satfinite: beyond the range lies the largest number, not Inf or NaN
        largest = torch.finfo(TORCH_DTYPES[target]).max
        values = values.double().clamp(-largest, largest)
    result = values.to(TORCH_DTYPES[target])
    return result.view(UNSIGNED[result.element_size()][1]).numpy()


def _correct_conversions() -> None:
    original_convert = shipped._convert_float
    original_cast = InterpreterBuilder.cast_impl

    def convert_float(data, source, target, rounding_mode):
        towards_zero = rounding_mode == shipped._ir.ROUNDING_MODE.RTZ
        if towards_zero or source not in TORCH_DTYPES or target not in TORCH_DTYPES:
            return original_convert(data, source, target, rounding_mode)
        return _convert(data, source, target)

    def cast(self, source, target_type):
        source_dtype, target = source.dtype.scalar, target_type.scalar
        if source_dtype == tl.bfloat16 and target not in (tl.float32, tl.bfloat16):
            return original_cast(self, _to_fp32(source), target_type)
        if target == tl.bfloat16 and source_dtype not in (tl.float32, tl.bfloat16):
            return _to_bf16(TensorHandle(source.data.astype(np.float32), tl.float32))
        return original_cast(self, source, target_type)

    shipped._convert_float = convert_float
    InterpreterBuilder.cast_impl = cast


def _to_fp32(handle):
    """A bf16 handle in fp32, anything else as it is."""
    if not isinstance(handle, TensorHandle) or handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _to_bf16(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(_convert(handle.data.astype(np.float32), tl.float32, tl.bfloat16), tl.bfloat16)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def _in_fp32(operation):
    """`operation` of the builder, with bf16 operands computed in fp32; comparisons keep their boolean result."""

    def corrected(self, *operands):
        widened = [_to_fp32(operand) for operand in operands]
        result = operation(self, *widened)
        had_bf16 = any(wide is not operand for wide, operand in zip(widened, operands, strict=True))
        return _to_bf16(result) if had_bf16 and result.data.dtype != np.bool_ else result

    return corrected


def _correct_fma() -> None:
    """In fp64 the product of two fp32 numbers is exact; that the sum is rounded to fp64 first moves only ties."""
    original_fma = InterpreterBuilder.create_fma

    def fma(self, x, y, z):
        if x.dtype.scalar != tl.float32:
            return original_fma(self, x, y, z)
        total = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(total.astype(np.float32), tl.float32)

    InterpreterBuilder.create_fma = fma


def _correct_bf16_arithmetic() -> None:
    for name in dir(InterpreterBuilder):
        if FLOAT_OPERATION.fullmatch(name):
            setattr(InterpreterBuilder, name, _in_fp32(getattr(InterpreterBuilder, name)))
    original_dot = InterpreterBuilder.create_dot

    def dot(self, a, b, acc, *options):
        return original_dot(self, _to_fp32(a), _to_fp32(b), acc, *options)

    InterpreterBuilder.create_dot = dot


def _correct_index() -> None:
    original_patch = shipped._patch_lang_tensor

    def patch(tensor, *scope):
        original_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    shipped._patch_lang_tensor = patch


def _refuse_what_stays_wrong() -> None:
    original_apply = ReduceScanOpInterface.apply

    def apply(self, operands):
        for operand in operands if isinstance(operands, tuple) else (operands,):
            if operand.dtype.scalar in BIT_PATTERN_TYPES:
                raise NotImplementedError(f"the interpreter cannot reduce {operand.dtype}; cast to tl.float32 first")
        return original_apply(self, operands)

    ReduceScanOpInterface.apply = apply


# ----------------------------------------------------------------------------------------------------------- addresses


def _check_addresses() -> None:
    original_load = InterpreterBuilder.create_masked_load
    original_store = InterpreterBuilder.create_masked_store
    original_rmw = InterpreterBuilder.create_atomic_rmw
    original_cas = InterpreterBuilder.create_atomic_cas
    original_init_args = GridExecutor._init_args_hst

    def load(self, pointers, mask, *rest, **options):
        _check("load", pointers, mask)
        return original_load(self, pointers, mask, *rest, **options)

    def store(self, pointers, value, mask, *rest, **options):
        _check("store", pointers, mask)
        return original_store(self, pointers, value, mask, *rest, **options)

    def atomic_rmw(self, operation, pointers, value, mask, *rest):
        if value.dtype.scalar in BIT_PATTERN_TYPES:
            raise NotImplementedError(f"the interpreter has no {value.dtype} atomics")
        _check("atomic", pointers, mask)
        return original_rmw(self, operation, pointers, value, mask, *rest)

    def atomic_cas(self, pointers, *rest):
        _check("atomic", pointers, None)
        return original_cas(self, pointers, *rest)

    def init_args(self, args, kwargs):
        host_args, host_kwargs = original_init_args(self, args, kwargs)
        _regions[:] = [_extent(tensor) for tensor in _tensors([*host_args, *host_kwargs.values(), *_reachable])]
        return host_args, host_kwargs

    InterpreterBuilder.create_masked_load = load
    InterpreterBuilder.create_masked_store = store
    InterpreterBuilder.create_atomic_rmw = atomic_rmw
    InterpreterBuilder.create_atomic_cas = atomic_cas
    GridExecutor._init_args_hst = init_args


def _tensors(args) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from _tensors(arg)
        arg = getattr(arg, "base", arg)  # a tensor descriptor
        if isinstance(arg, torch.Tensor) and arg.numel():
            yield arg


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check(kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
    """Raise IndexError unless every address that the mask lets through lies in one of the kernel's tensors."""
    element_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    mask_data = np.ones(1, dtype=bool) if mask is None else mask.data
    addresses, active = np.broadcast_arrays(pointers.data, mask_data)
    addresses = addresses[active.astype(bool)].astype(np.uint64)
    inside = np.zeros(addresses.shape, dtype=bool)
    for first, end in _regions:
        inside |= (addresses >= np.uint64(first)) & (addresses + np.uint64(element_bytes) <= np.uint64(end))
    if not inside.all():
        program = shipped.interpreter_builder.grid_idx
        outside = (~inside).sum()
        raise IndexError(f"{kind}: {outside} of {inside.size} addresses lie outside every tensor, in program {program}")
