"""Cases of int8_weight_linear: y = act(x · (s_w · q_w)ᵀ + bias), x as it is; shapes and rows are int8_linear's."""

from __future__ import annotations

import torch

from pyops.bench import int8_linear
from pyops.bench.case import Inputs, Op
from pyops.ops.int8_linear import quantize_int8
from pyops.ops.int8_weight_linear import int8_weight_linear_ref


def reference(inputs: Inputs) -> torch.Tensor:
    """The contract in plain PyTorch."""
    return int8_weight_linear_ref(inputs["x"], *quantize_int8(inputs["w"]), inputs["bias"])


OP = Op(
    name="int8_weight_linear",
    title="int8 weight-only linear, activations as they are",
    cases=tuple(case for case in int8_linear.OP.cases if case.counted),
    make_inputs=int8_linear.make_inputs,
    oracle=int8_linear.oracle,
    # One int8 rounding of normal weights leaves about 44 dB; what quantizes activations too is another op.
    min_sqnr_db=35.0,
    reference=reference,
    max_error_eps=8.0,  # fp32 sums in another order; on a GPU bf16
    baseline="torch-fp32",
    peak="int8_gops",  # nothing multiplies floats faster: AMX does two int8 products in the time of one of bf16
)
