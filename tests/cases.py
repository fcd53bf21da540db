"""Data for the tests of every op: shapes, dtypes, layouts of memory, samples for opcheck."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyops import backend, ops
from pyops.ops import optim_codec
from pyops.ops.adafactor import state_shapes
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.optim_rules import RULES

needs_native = pytest.mark.skipif(backend.native is None, reason=f"no compiled kernels: {backend.native_missing}")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATION_NAMES = tuple(ACTIVATIONS)


def without_address(argument: object) -> str:
    """A name for a test: the same in every process, as those that share the tests must agree on them."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(argument))


SHAPES = (
    # M, N, K
    (1, 1, 1),
    (1, 64, 64),
    (1, 225, 96),  # eight panels, of which a kernel may read three side by side, and what is left
    (1, 33, 257),
    (2, 3, 5),
    (2, 70, 515),  # more than three times 64 of K, which a kernel may read in three parts, and what is left
    (3, 33, 31),
    (3, 133, 70),
    (4, 32, 128),  # the last M that int8's AMX leaves to VNNI
    (5, 31, 65),
    (7, 127, 129),
    (13, 17, 61),
    (14, 16, 64),
    (15, 48, 63),
    (16, 96, 192),
    (17, 97, 191),
    (31, 65, 257),
    (33, 64, 100),
    (64, 13, 1024),
    (129, 40, 67),
)
"""1, primes, and one less, exact and one more than every tile of a kernel."""

ROW_COUNTS = (2, 3, 4, 5, 13, 14, 15, 17, 40, 130, 700)
"""Rows on both sides of every choice that a CPU kernel makes by their number."""


def end_process_group() -> None:
    """Destroy the default group when nothing else holds it: one that is left to DDP's reference cycle may abort."""
    gc.collect()
    torch.distributed.destroy_process_group()


def assert_rows_are_those_alone(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """Of `run`, x [M, K] → y [M, N]: a row of y has the same bits whichever rows come with it."""
    alone = torch.cat([run(row) for row in x.split(1)])
    for M in (M for M in ROW_COUNTS if len(x) >= M):
        assert torch.equal(run(x[:M]), alone[:M]), M


def assert_compiles_in_full(f: Callable[[torch.Tensor], torch.Tensor], K: int, requires_grad: bool) -> None:
    """Of `f`, x [M, K] → y: one graph for every M, the same result and gradient."""
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for M in (5, 9):
        x = randn(M, K).requires_grad_(requires_grad)
        assert torch.equal(compiled(x), f(x))
        if requires_grad:
            a, b = (torch.autograd.grad(g(x).sum(), x)[0] for g in (compiled, f))
            torch.testing.assert_close(a, b)


def of_every_isa(run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `run` returns under each instruction set of this machine, by its name; needs the compiled kernels."""
    before = backend.native.cpu_isa()
    results = {}
    try:
        for name in backend.native.available_cpu_isas():
            backend.native.force_cpu_isa(name)
            results[name] = run()
    finally:
        backend.native.force_cpu_isa(before)
    return results


EMPTY_SHAPES = ((0, 5, 7), (3, 0, 7), (3, 5, 0), (40, 65, 0), (0, 0, 0))
LONG_SHAPES = ((1, 33, 65536), (3, 5, 40001), (18, 32, 65536))


def _junk(x: torch.Tensor) -> torch.Tensor:
    """What must not be read: NaN, or 77 where there is none."""
    return torch.full_like(x, torch.nan if x.is_floating_point() else 77)


# Each takes a tensor [M, K] and returns one with the same values and other strides.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.T.contiguous().T,
    "columns of a wider one": lambda x: torch.cat([x, _junk(x[:, :1])], dim=1)[:, :-1],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "storage offset": lambda x: torch.cat([_junk(x)[0, :1], x.reshape(-1)])[1:].view(x.shape),
    "last row of a stack": lambda x: torch.stack([_junk(x), x])[1],
}
EXPANDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expanded rows": lambda x: x[:1].expand(x.shape),
    "expanded columns": lambda x: x[:, :1].expand(x.shape),
    "expanded scalar": lambda x: x[:1, :1].expand(x.shape),
}
"""Strides of zero: the values are the first row's, or column's."""

LEADING = ((), (4,), (2, 3), (2, 1, 3), (1, 2, 1, 2), (0, 3))
"""Shapes before K."""


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal values that do not depend on the state of torch's generator."""
    generator = torch.Generator().manual_seed(seed + 1000003 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def randint(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8, seed: int = 0) -> torch.Tensor:
    """Integers from low to high, both included."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


BAD_EPILOGUES: dict[str, tuple[type[Exception], str, dict[str, object]]] = {
    "bias is short": (ValueError, r"bias is \(4,\); expected \(5,\)", {"bias": torch.ones(4)}),
    "bias is int": (TypeError, r"bias has dtype torch\.int32", {"bias": torch.ones(5, dtype=torch.int32)}),
    "residual would broadcast": (
        ValueError,
        r"residual is \(1, 5\); expected \(3, 5\)",
        {"residual": torch.ones(1, 5)},
    ),
    "residual in another dtype": (
        TypeError,
        r"residual has dtype torch\.float16, x torch\.float32",
        {"residual": torch.ones(3, 5, dtype=torch.float16)},
    ),
    "unknown activation": (ValueError, r"activation='swish' is not one of none, relu", {"activation": "swish"}),
    "activation is None": (ValueError, r"activation=None", {"activation": None}),
}
"""What every linear layer refuses beside x [3, K] fp32 and 5 outputs: the error, its message, the arguments."""


# ------------------------------------------------------------------------------------------- samples of every op


def _int8_linear_samples(requires_grad: bool) -> list[tuple]:
    samples = []
    for packed in (False, True):
        for dtype, activation in ((torch.float32, "gelu"), (torch.bfloat16, "none"), (torch.float16, "silu")):
            q_w, scale = ops.quantize_int8(randn(33, 70))
            x = randn(2, 3, 70, dtype=dtype).requires_grad_(requires_grad)
            bias = randn(33).requires_grad_(requires_grad)
            residual = randn(2, 3, 33, dtype=dtype).requires_grad_(requires_grad)
            weight = ops.pack_int8(q_w) if packed else q_w
            samples.append((x, weight, scale))
            samples.append((x, weight, scale, bias, residual, activation))
            samples.append((x, weight, scale, None, None, activation, torch.tensor(0.02)))
            samples.append((x, weight, scale, bias, None, activation, torch.tensor(0.02), randn(70).abs() + 0.1))
    return samples


def _int8_weight_linear_samples(requires_grad: bool) -> list[tuple]:
    return [sample[:6] for sample in _int8_linear_samples(requires_grad) if len(sample) <= 6]


def _optim_step_samples(requires_grad: bool) -> list[tuple]:
    """Every rule on two tensors, plain; Adam also with everything around it. No step is differentiable."""
    samples = []
    for name, rule in RULES.items():
        for full in (False, True) if name == "adam" else (False,):
            dtype = torch.bfloat16 if full else torch.float32
            shapes = ((3, 130), (7,))
            params, grads = ([randn(*shape, dtype=dtype, seed=seed) for shape in shapes] for seed in (0, 1))
            states, scales = [], []
            for shape in shapes:
                for state in rule.states:
                    codes = torch.uint8 if state in rule.unsigned else torch.int8
                    states.append(torch.zeros(shape, dtype=codes if full else torch.float32))
                    scales += [torch.zeros(optim_codec.scale_shape(shape))] if full else []
            scalars = [torch.ones(()) for _ in shapes for _ in rule.scalars]
            hyper = [0.01, 0.1, 1.0, 0.0, 0.001 * full, 0.9, *[0.5] * len(rule.hyper)]
            ema = [p.float() for p in params] if full else []
            masks = [randn(*shape, seed=2) > 0 for shape in shapes] if full else []
            more = (torch.tensor(0.02), torch.tensor(0.5), torch.zeros(())) if full else (None, None, None)
            first = [1, 2] if full else []
            samples.append(
                (name, params, grads, states, scalars, hyper, scales, ema, masks, first, *more, full, full, 5, 0)
            )
    return samples


def _adafactor_step_samples(requires_grad: bool) -> list[tuple]:
    """A matrix, a batch of matrices and a vector, plain and with everything around the step."""
    samples = []
    shapes = ((33, 65), (5, 3, 3), (7,))
    for full in (False, True):
        dtype = torch.bfloat16 if full else torch.float32
        params, grads = ([randn(*shape, dtype=dtype, seed=seed) for shape in shapes] for seed in (0, 1))
        states = [torch.zeros(size) for shape in shapes for size in state_shapes(shape).values()]
        steps = [torch.zeros(()) for _ in shapes]
        hyper = [0.01, 0.1, 1.0, 0.0, 0.001 * full, 0.9, -0.8, 1e-3, 1.0]
        ema = [p.float() for p in params] if full else []
        masks = [randn(*shape, seed=2) > 0 for shape in shapes] if full else []
        more = (torch.tensor(0.02), torch.tensor(0.5), torch.zeros(())) if full else (None, None, None)
        first = [2, 0, 0] if full else []
        samples.append(
            (params, grads, states, steps, hyper, 1e-6 if full else None, ema, masks, first, *more, full, full, 5, 0)
        )
    return samples


def _optim_sum_squares_samples(requires_grad: bool) -> list[tuple]:
    return [([randn(3, 5), randn(7, dtype=torch.bfloat16), torch.empty(0), torch.tensor(2.0)],), ([randn(9).double()],)]


def _sparse_conv2d_samples(requires_grad: bool) -> list[tuple]:
    """Blocks of each kind, in groups, strided and dilated, with and without epilogue, NCHW and channels_last."""
    samples = []
    for i, (pattern, groups) in enumerate((("unstructured", 2), ("oc_block4", 2), ("ic_block4", 1), ("block16", 1))):
        dtype = torch.bfloat16 if i == 1 else torch.float32
        weight = sparse_weight(10, 6 // groups, 3, 2, pattern=pattern, groups=groups, dtype=dtype)
        x = randn(2, 6, 7, 8, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if i % 2 else x
        x.requires_grad_(requires_grad)
        values = weight.values.requires_grad_(requires_grad)
        head = (x, values, weight.crow_indices, weight.col_indices, list(weight.shape), list(weight.block))
        window = ([1, 2], [1, 0, 2, 1], [2, 1], groups)
        y = torch.ops.pyops.sparse_conv2d(*head, None, None, *window).shape
        bias = randn(10).requires_grad_(requires_grad)
        residual = randn(*y, dtype=dtype).requires_grad_(requires_grad)
        samples.append((*head, None, None, *window))
        samples.append((*head, bias, residual, *window, ACTIVATION_NAMES[i + 1]))
    return samples


def _int4_dequantize_samples(requires_grad: bool) -> list[tuple]:
    samples = []
    for (N, K, G, symmetric), dtype in zip(
        ((33, 70, 32, False), (32, 130, -1, True), (5, 200, 128, False)), FLOATS, strict=True
    ):
        w = ops.pack_int4(*ops.quantize_int4(randn(N, K), G, symmetric=symmetric, scale_dtype=dtype), K, G)
        samples.append((*w, G, N, K, dtype))
    return samples


def _int8_dequantize_samples(requires_grad: bool) -> list[tuple]:
    return [
        (ops.pack_int8(randint(-128, 127, N, K)), randn(N), K, dtype)
        for (N, K), dtype in zip(((33, 70), (32, 64), (5, 129)), FLOATS, strict=True)
    ]


def _int4_linear_samples(requires_grad: bool) -> list[tuple]:
    samples = []
    for G, compute, activation, symmetric in ((32, "int8", "gelu", False), (-1, "float", "none", True)):
        w = ops.quantize_int4(randn(33, 70), G, symmetric=symmetric)
        x, bias, residual = (randn(*shape).requires_grad_(requires_grad) for shape in ((2, 5, 70), (33,), (2, 5, 33)))
        order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).int() if symmetric else None
        rest = (bias, residual, activation, G, 33, order, compute)
        samples += [(x, *w, *rest), (x, *ops.pack_int4(*w, 70, G), *rest)]
    return samples


def _fp8_linear_samples(requires_grad: bool) -> list[tuple]:
    samples = []
    for i, granularity in enumerate(("row", "block")):
        for dtype, activation in ((torch.float32, "gelu"), (torch.bfloat16, "none")):
            codes, scale = ops.quantize_fp8(randn(33, 140), granularity)
            w = codes.view(torch.uint8), scale  # opcheck compares its arguments, which torch cannot in float8
            x, residual = (randn(*s, dtype=dtype).requires_grad_(requires_grad) for s in ((2, 5, 140), (2, 5, 33)))
            bias = randn(33).requires_grad_(requires_grad)
            samples += [(x, *w), (x, *w, bias, residual, activation)]
        samples += [(x, *w, None, None, "silu", torch.tensor(0.02))] if i == 0 else []
    return samples


def _int8_sparse_conv2d_samples(requires_grad: bool) -> list[tuple]:
    """Quads that end within a group and not, strided and dilated, with and without epilogue, dynamic and static."""
    samples = []
    for i, (C, groups) in enumerate(((8, 1), (6, 2), (10, 2))):
        dtype = FLOATS[i]
        weight, scale = ops.quantize_sparse(sparse_weight(10, C // groups, 3, 2, groups=groups))
        x = randn(2, C, 7, 8, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if i % 2 else x
        x.requires_grad_(requires_grad)
        head = (x, weight.values, scale, weight.crow_indices, weight.col_indices, list(weight.shape))
        window = ([1, 2], [1, 0, 2, 1], [2, 1], groups)
        y = torch.ops.pyops.int8_sparse_conv2d(*head, None, None, *window).shape
        bias = randn(10).requires_grad_(requires_grad)
        residual = randn(*y, dtype=dtype).requires_grad_(requires_grad)
        samples.append((*head, None, None, *window))
        samples.append((*head, bias, residual, *window, ACTIVATION_NAMES[i + 1]))
        samples.append((*head, bias, None, *window, "none", torch.tensor([0.01, 0.02])))
    return samples


def _sparse_conv2d_dx_samples(requires_grad: bool) -> list[tuple]:
    samples = []
    for x, values, *structure, _, _, stride, padding, dilation, groups in _sparse_conv2d_samples(requires_grad)[::2]:
        window = (stride, padding, dilation, groups)
        y = torch.ops.pyops.sparse_conv2d(x, values, *structure, None, None, *window)
        grad = randn(*y.shape, dtype=y.dtype).requires_grad_(requires_grad)
        samples.append((grad, values, *structure, list(x.shape), *window))
    return samples


def _sparse_conv2d_dw_samples(requires_grad: bool) -> list[tuple]:
    samples = []
    for grad, _, *structure, x_shape, stride, padding, dilation, groups in _sparse_conv2d_dx_samples(requires_grad):
        x = randn(*x_shape, dtype=grad.dtype).requires_grad_(requires_grad)
        samples.append((grad, x, *structure, stride, padding, dilation, groups))
    return samples


def sparse_weight(
    O: int, Cg: int, R: int = 1, S: int = 1, *, keep: float = 0.4, seed: int = 0, dtype=torch.float32, **options
) -> ops.SparseWeight:
    """A weight that keeps about this fraction of its positions, in the pattern given."""
    w = randn(O, Cg, R, S, seed=seed, dtype=dtype, scale=(keep * Cg * R * S + 1) ** -0.5)
    mask = randn(O, Cg, R, S, seed=seed + 1).sigmoid() < keep
    if options.get("pattern") == "2:4":
        mask &= torch.arange(Cg)[None, :, None, None] % 4 < 2
    return ops.SparseWeight.from_dense(w, mask, **options)


def _fake_int4_samples(requires_grad: bool) -> list[tuple]:
    return [
        (randn(33, 70), 32, False, torch.bfloat16),
        (randn(5, 64, dtype=torch.bfloat16), 64, True, torch.float16),
        (randn(3, 7), -1, False, torch.float32),
    ]


OP_SAMPLES: dict[str, Callable[[bool], list[tuple]]] = {
    "adafactor_step": _adafactor_step_samples,
    "fake_int4": _fake_int4_samples,
    "fp8_linear": _fp8_linear_samples,
    "int4_dequantize": _int4_dequantize_samples,
    "int4_linear": _int4_linear_samples,
    "int8_linear": _int8_linear_samples,
    "int8_dequantize": _int8_dequantize_samples,
    "int8_sparse_conv2d": _int8_sparse_conv2d_samples,
    "int8_weight_linear": _int8_weight_linear_samples,
    "optim_step": _optim_step_samples,
    "optim_sum_squares": _optim_sum_squares_samples,
    "sparse_conv2d": _sparse_conv2d_samples,
    "sparse_conv2d_dw": _sparse_conv2d_dw_samples,
    "sparse_conv2d_dx": _sparse_conv2d_dx_samples,
}
"""For each op: positional arguments to call it with. A new op has to appear here."""

# (M, N, K) that a CPU matmul cuts: two blocks of rows; more blocks than a wave holds; K in slices of 1024 and a rest;
# results of 4 MiB and more in whole cache lines and not.
BLOCKED = [(700, 64, 2048), (9000, 48, 70), (1040, 1040, 640), (600, 40, 40000), (520, 2064, 1100)]


class Recorder(TorchDispatchMode):
    """The ops that were dispatched while it was on, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
