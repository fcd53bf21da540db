"""Cases of sparse_conv2d: every distinct convolution of ResNet-50 and VGG16, pruned in several patterns.

Dense convolution takes the same time whatever the weight holds, so the cases of one shape and batch are `shared`: the
dense peers are timed once for all of them, their turns interleaved with those of every sparsity. Those of the int8
cases are dense fp32 too: what is asked is what pruning and quantizing gain together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pyops.bench.case import Case, Family, Inputs, Op
from pyops.ops.sparse_weight import PATTERNS, block_columns, block_rows, scatter_blocks

Shape = tuple[int, int, int, int, int]
"""C, O, the side of the kernel, the stride, the side of the image; padding keeps the size."""

RESNET50: tuple[Shape, ...] = (
    (3, 64, 7, 2, 224),
    # The first stage, in blocks of 1×1, 3×3 and 1×1.
    (64, 64, 1, 1, 56),
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (256, 64, 1, 1, 56),
    # The second, whose first block halves the image in its 3×3.
    (256, 128, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (128, 512, 1, 1, 28),
    (256, 512, 1, 2, 56),
    (512, 128, 1, 1, 28),
    (128, 128, 3, 1, 28),
    # The third.
    (512, 256, 1, 1, 28),
    (256, 256, 3, 2, 28),
    (256, 1024, 1, 1, 14),
    (512, 1024, 1, 2, 28),
    (1024, 256, 1, 1, 14),
    (256, 256, 3, 1, 14),
    # The fourth.
    (1024, 512, 1, 1, 14),
    (512, 512, 3, 2, 14),
    (512, 2048, 1, 1, 7),
    (1024, 2048, 1, 2, 14),
    (2048, 512, 1, 1, 7),
    (512, 512, 3, 1, 7),
)
VGG16: tuple[Shape, ...] = (
    (3, 64, 3, 1, 224),
    (64, 64, 3, 1, 224),
    (64, 128, 3, 1, 112),
    (128, 128, 3, 1, 112),
    (128, 256, 3, 1, 56),
    (256, 256, 3, 1, 56),
    (256, 512, 3, 1, 28),
    (512, 512, 3, 1, 28),
    (512, 512, 3, 1, 14),
)
MODELS = {"resnet50": ("ResNet-50", RESNET50), "vgg16": ("VGG16", VGG16)}


@dataclass(frozen=True)
class Pruning:
    """A pattern and how many percent of the weight it removes; the target is that over all its cases."""

    pattern: str
    percent: int
    target: float | None = None
    device: str = "cpu"
    large_batch: bool = False
    """By default also at the larger batch, for ResNet-50."""
    int8: bool = False
    """Ours multiplies int8 values and quantizes the image at each call; the dense peers stay fp32."""

    @property
    def line(self) -> str:
        """The curve that it is a point of."""
        return self.pattern + " int8" * self.int8

    @property
    def family(self) -> str:
        """As a key and a label."""
        return f"{self.line} {self.percent} %"


PRUNINGS = (
    Pruning("unstructured", 30, 1.0),
    Pruning("unstructured", 50, 1.6),
    Pruning("unstructured", 60, 1.9),
    Pruning("unstructured", 70, 2.4),
    Pruning("unstructured", 80, 3.3),
    Pruning("unstructured", 90, 5.2, large_batch=True),
    Pruning("unstructured", 95, 7.5),
    Pruning("oc_block16", 50, 1.9),
    Pruning("oc_block16", 75, 3.4),
    Pruning("oc_block16", 90, 7.5, large_batch=True),
    Pruning("unstructured", 90, 10.0, int8=True),
    Pruning("ic_block4", 90, 10.0, int8=True),
    Pruning("block32", 50, device="cuda", large_batch=True),
    Pruning("block32", 75, device="cuda", large_batch=True),
    Pruning("block32", 90, device="cuda", large_batch=True),
    Pruning("block64", 90, device="cuda", large_batch=True),
)


@dataclass(frozen=True)
class ConvCase(Case):
    """A shape, a batch and a pruning of the weight."""

    pattern: str = "unstructured"
    int8: bool = False


def _case(model: str, shape: Shape, batch: int, pruning: Pruning) -> ConvCase:
    C, O, R, stride, side = shape
    source, _ = MODELS[model]
    out = -(-side // stride)
    kept = O * C * R * R * (100 - pruning.percent) / 100
    conv = f"{C}-{O}-{R}x{R}" + f"s{stride}" * (stride > 1) + f"@{side}"
    together = f"{model}/{conv}/b{batch}"
    dims = {"N": batch, "C": C, "H": side, "W": side, "O": O, "R": R, "S": R, "stride": stride}
    return ConvCase(
        name=f"{together}/{pruning.line.replace(' ', '-')}-{pruning.percent}",
        group=together,
        label=pruning.family,
        dims=dims | {"pad": (R - 1) // 2, "sparsity_percent": pruning.percent},
        ops=2 * kept * batch * out * out,  # of products with kept weights
        bytes=4 * (batch * C * side * side + batch * O * out * out) + (1 if pruning.int8 else 4) * kept,
        source=source,
        cold=False,
        family=pruning.family,
        shared=f"{together}/{pruning.device}",
        devices=(pruning.device,),
        default=batch == BATCHES[0] or (pruning.large_batch and model == "resnet50"),
        # Two int8 roundings of normal data leave about 38 dB.
        ours_min_sqnr_db=30.0 if pruning.int8 else 100.0 if pruning.device == "cpu" else 45.0,
        peak="int8_gops" if pruning.int8 else None,
        pattern=pruning.pattern,
        int8=pruning.int8,
    )


BATCHES = (1, 8)
CASES = tuple(
    _case(model, shape, batch, pruning)
    for model, (_, shapes) in MODELS.items()
    for shape in shapes
    for batch in BATCHES
    for pruning in PRUNINGS
    if pruning.device == "cpu" or min(shape[:2]) >= PATTERNS[pruning.pattern][0]  # a stem is smaller than a block
)


def keep_mask(case: ConvCase) -> torch.Tensor:
    """bool [O, C, R, S]: so many blocks of the pattern, at random, as the largest of normal weights are."""
    dims = case.dims
    shape, block = (dims["O"], dims["C"], dims["R"], dims["S"]), PATTERNS[case.pattern]
    rows, columns = block_rows(shape, block, 1), block_columns(shape, block)
    scores = torch.rand(rows * columns, generator=torch.Generator().manual_seed(3))
    kept = scores.topk(round(rows * columns * (100 - dims["sparsity_percent"]) / 100), sorted=False).indices.sort()[0]
    crow = F.pad(torch.bincount(kept // columns, minlength=rows).cumsum(0), (1, 0))
    return scatter_blocks(torch.ones(kept.numel(), *block), crow, kept % columns, shape, block, 1) != 0


@functools.lru_cache(maxsize=1)  # the cases that are run together have the same image
def _image(N: int, C: int, H: int, W: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(2)).to(device, dtype)


def make_inputs(case: ConvCase, device: torch.device) -> Inputs:
    """x ~ N(0, 1), the weight, its zeros written out, such that y has unit variance. fp32 on CPU, bf16 on CUDA."""
    dims = case.dims
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(1)
    kept_inputs = max(1.0, dims["C"] * dims["R"] * dims["S"] * (100 - dims["sparsity_percent"]) / 100)
    w = torch.randn(dims["O"], dims["C"], dims["R"], dims["S"], generator=generator).mul_(kept_inputs**-0.5)
    return {
        "case": case,
        "w": (w * keep_mask(case)).to(device, dtype),
        "bias": torch.randn(dims["O"], generator=generator).to(device, dtype),
        "x": _image(dims["N"], dims["C"], dims["H"], dims["W"], device, dtype),
    }


def oracle(inputs: Inputs) -> torch.Tensor:
    """The dense convolution in fp32, on the CPU: there is no TF32."""
    x, w, bias = (inputs[name].float().cpu() for name in ("x", "w", "bias"))
    dims = inputs["case"].dims
    return F.conv2d(x, w, bias, dims["stride"], dims["pad"])


OP = Op(
    name="sparse_conv2d",
    title="convolution with a pruned weight",
    cases=CASES,
    make_inputs=make_inputs,
    oracle=oracle,
    min_sqnr_db=45.0,  # bf16 leaves about 50
    baseline="torch-nchw",
    peak="fp32_gflops",
    ops_unit="useful GFLOP/s",
    families={p.family: Family(p.line, p.percent, p.target) for p in PRUNINGS},
    family_axis="weights pruned, %",
)
