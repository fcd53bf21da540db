"""Cases of int8_linear: y = act(quantize(x) · w_qᵀ · scales + bias), activations quantized inside the timed call."""

from __future__ import annotations

import torch

from pyops.bench.case import Case, Inputs, Op
from pyops.ops.int8_linear import int8_linear_ref, quantize_int8

SHAPES = {  # (N, K): the layer it is
    (4096, 4096): "Llama-2-7B q/k/v/o projections, Mistral-7B q/o",
    (11008, 4096): "Llama-2-7B gate and up projections",
    (3072, 768): "BERT-base, GPT-2 and ViT-B/16 MLP, first layer",
    (768, 3072): "BERT-base, GPT-2 and ViT-B/16 MLP, second layer",
    (1000, 1280): "MobileNetV2 and EfficientNet-B0/Lite0 classifier",
}
ROWS = (1, 8, 64, 512)  # one decoded token, a few of them, a short prompt or batch, BERT's full length


def _case(N: int, K: int, M: int, source: str, **options) -> Case:
    return Case(
        name=f"{N}x{K}/M{M}",
        group=f"{N}×{K}",
        label=f"M={M}",
        dims={"M": M, "N": N, "K": K},
        ops=2 * M * N * K,
        bytes=N * K + 4 * M * K + 4 * M * N,
        source=source,
        **options,
    )


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """x ~ N(0, 1), w ~ N(0, 1/K): y has unit variance. fp32 on CPU, bf16 activations on CUDA. Weights ignore M."""
    M, N, K = case.dims["M"], case.dims["N"], case.dims["K"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights, rows = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    return {
        "w": torch.randn(N, K, generator=weights).mul_(K**-0.5).to(device),
        "bias": torch.randn(N, generator=weights).to(device),
        "x": torch.randn(M, K, generator=rows).to(device, dtype),
    }


def oracle(inputs: Inputs) -> torch.Tensor:
    """The linear layer in fp32."""
    return torch.nn.functional.linear(inputs["x"].float(), inputs["w"], inputs["bias"])


def reference(inputs: Inputs) -> torch.Tensor:
    """The contract in plain PyTorch."""
    return int8_linear_ref(inputs["x"], *quantize_int8(inputs["w"]), inputs["bias"])


OP = Op(
    name="int8_linear",
    title="int8 linear, dynamic quantization included",
    cases=(
        *(_case(N, K, M, source) for (N, K), source in SHAPES.items() for M in ROWS),
        # So little arithmetic that what is timed is the way from nn.Module to the kernel.
        _case(64, 64, 1, "call overhead of the module", cold=False, ours="pyops-module", counted=False),
    ),
    make_inputs=make_inputs,
    oracle=oracle,
    # Two int8 roundings of normal data leave about 38 dB, per-tensor weights and 7-bit activations (FBGEMM) about 32.
    min_sqnr_db=25.0,
    reference=reference,
    # The integers agree exactly; the fp32 epilogue may contract a·b + c into one rounding.
    max_error_eps=4.0,
    baseline="torch-fp32",
    peak="int8_gops",
)
