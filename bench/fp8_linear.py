"""Cases of fp8_linear: y = dequant(quantize(x) · w_qᵀ) + bias in e4m3, activations quantized inside the timed call.

For GPUs: no CPU multiplies e4m3.
"""

from __future__ import annotations

import torch

from pyops.bench.case import Case, Inputs, Op
from pyops.bench.int8_linear import make_inputs, oracle

SHAPES = {  # (N, K): the layer it is
    (4096, 4096): "Llama-2-7B q/k/v/o projections, Mistral-7B q/o",
    (6144, 4096): "Llama-3-8B q, k and v in one",
    (4096, 14336): "Llama-3-8B and Mistral-7B down projection",
    (8192, 8192): "Llama-2-70B q/o projections",
    (3072, 768): "BERT-base, GPT-2 and ViT-B/16 MLP, first layer",
}
ROWS = (1, 16, 128, 1024, 8192)  # one decoded token, a batch of them, prompts


def _case(N: int, K: int, M: int, granularity: str, source: str) -> Case:
    return Case(
        name=f"{N}x{K}/{granularity}/M{M}",
        group=f"{N}×{K}, by {granularity}",
        label=f"M={M}",
        dims={"M": M, "N": N, "K": K, "by_block": int(granularity == "block")},
        ops=2 * M * N * K,
        bytes=N * K + 2 * M * K + 2 * M * N,
        source=source,
        devices=("cuda",),
        ours_min_sqnr_db=25.0,
        default=N == K or (granularity == "row" and M < 8192),
    )


def make_fp8_inputs(case: Case, device: torch.device) -> Inputs:
    """As for int8_linear, the case itself, and the bias in the dtype of x, as a model in bf16 has it."""
    inputs = make_inputs(case, device)
    return {**inputs, "bias": inputs["bias"].to(inputs["x"].dtype), "case": case}


def fp8_oracle(inputs: Inputs) -> torch.Tensor:
    """The linear layer in fp32."""
    return oracle({**inputs, "bias": inputs["bias"].float()})


OP = Op(
    name="fp8_linear",
    title="fp8 linear (e4m3), dynamic quantization included",
    cases=tuple(
        _case(N, K, M, granularity, source)
        for granularity in ("row", "block")
        for (N, K), source in SHAPES.items()
        for M in ROWS
    ),
    make_inputs=make_fp8_inputs,
    oracle=fp8_oracle,
    # e4m3 on both sides leaves about 28.5 dB of normal data.
    min_sqnr_db=25.0,
    baseline="torch-bf16",
    peak="fp8_gflops",
)
