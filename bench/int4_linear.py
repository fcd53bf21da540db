"""Cases of int4_linear: y = act(x · dequant(w_q)ᵀ + bias), weights in groups along K, x as each peer takes it."""

from __future__ import annotations

import torch

from pyops.bench.case import Case, Inputs, Op
from pyops.bench.int8_linear import ROWS, SHAPES, make_inputs, oracle
from pyops.ops.int4_linear import int4_linear_ref, resolve_compute
from pyops.ops.int4_quantize import quantize_int4
from pyops.ops.int4_weight import group_count

DEFAULT_GROUP = 128


def _case(N: int, K: int, M: int, G: int, source: str) -> Case:
    groups = N * group_count(K, G)
    return Case(
        name=f"{N}x{K}/g{G}/M{M}",
        group=f"{N}×{K}, G={G}",
        label=f"M={M}",
        dims={"M": M, "N": N, "K": K, "G": G},
        ops=2 * M * N * K,
        bytes=N * K // 2 + 3 * groups + 4 * M * K + 4 * M * N,  # scales of 16 bits, zero points of 8
        source=source,
        target=1.1,
        default=G == DEFAULT_GROUP,
    )


def quantized(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The weight as our quantizer makes it, with zero points: all peers that can take its codes get the same."""
    return quantize_int4(inputs["w"], inputs["case"].dims["G"])


def reference(inputs: Inputs) -> torch.Tensor:
    """The contract in plain PyTorch, with the compute that "auto" is on this device."""
    x, G, N = inputs["x"], inputs["case"].dims["G"], inputs["w"].shape[0]
    compute = resolve_compute("auto", x.device)
    return int4_linear_ref(x, *quantized(inputs), inputs["bias"], None, "none", G, N, None, compute)


OP = Op(
    name="int4_linear",
    title="int4 linear, weights in groups",
    cases=tuple(
        _case(N, K, M, G, source) for G in (DEFAULT_GROUP, 32) for (N, K), source in SHAPES.items() for M in ROWS
    ),
    make_inputs=lambda case, device: {**make_inputs(case, device), "case": case},
    oracle=oracle,
    # Rounding to nearest in groups of 128 leaves about 20 dB of normal weights.
    min_sqnr_db=15.0,
    reference=reference,
    max_error_eps=8.0,  # the fp32 sum over groups; on a GPU weights rounded to bf16
    baseline="torch-fp32",
    peak="int8_gops",
)
