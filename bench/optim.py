"""Cases of the optimizers: one step, in place, over all parameters of a model.

What is checked is several steps: from the same parameters every peer takes `check_steps` of them on the same gradients,
and the update of a sample of the parameters is compared with that of plain torch in float64. Timed are further steps on
the gradients of the last one. Where the step zeroes them they are filled again before each call, outside the time:
moments of gradients that stay zero become denormal numbers, which no training has.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyops.bench import optim_paper
from pyops.bench.case import Case, Inputs, Op, Pass
from pyops.bench.optim_shapes import BERT6, RESNET50, Shapes, parameters

HYPER: dict[str, dict[str, object]] = {
    "sgd": {"lr": 1e-3, "momentum": 0.9},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
    "nadam": {"lr": 1e-3},
    "radam": {"lr": 1e-3},
    "adamax": {"lr": 1e-3},
    "rmsprop": {"lr": 1e-3},
    "adagrad": {"lr": 1e-3},
    "adadelta": {},
    "adafactor": {"lr": 3e-3, "eps": (2.0**-23, 1e-3)},  # by default it depends on the dtype, and the oracle is float64
    "lion": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2},
    "lamb": {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 1e-2},
}
CLASSES = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "nadam": "NAdam",
    "radam": "RAdam",
    "adamax": "Adamax",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "lamb": "LAMB",
}
WHOLE_TENSOR = ("adafactor", "lamb")
"""Rules that need sums over a tensor: their oracle cannot look at a sample alone."""

LOSS_SCALE, EMA_DECAY = 2.0**16, 0.999
"""Of the cases with `loop`."""
GROWTH = -2.0
"""From one step to the next the gradients grow by so much: a power of two, so that this rounds nothing."""

# Bytes a parameter, arrays read, arrays updated. A gradient is read, a parameter and a state are updated.
ONE_STATE = ((20, 1, 2),)
TWO_STATES = ((28, 1, 3),)
STREAMS: dict[str, tuple[tuple[float, int, int], ...]] = {
    **dict.fromkeys(("sgd", "adagrad", "rmsprop", "lion"), ONE_STATE),
    **dict.fromkeys(("adamw", "nadam", "radam", "adamax", "adadelta"), TWO_STATES),
    "lamb": ((24, 2, 2), (16, 2, 1)),  # both moments and the two norms; the step, its direction computed again
    "adafactor": ((8, 2, 0), (4, 1, 0), (12, 1, 1)),  # sums of g² and p²; the norm of the update; the step
}
LOOP_STREAMS = ((4, 1, 0), (40, 0, 5))  # the norm; the step, with the average updated and the gradient zeroed
# Arrays of several widths; their ceiling is that of equal ones in the same mixture.
BF16_STATE = ((20, 1, 3),)
INT8_STATE = ((16 + 2 * 2 * 4 / 128, 1, 3),)  # a scale for each 128 elements
ALL_BF16 = ((14, 1, 3),)


@dataclass(frozen=True)
class OptimCase(Case):
    """A rule, the parameters that it acts on and what is done around it."""

    rule: str = "adamw"
    shapes: Shapes = ()
    dtype: torch.dtype = torch.float32
    """Of parameters and gradients."""
    state_dtype: str = "float32"
    """Of our states; a peer that has no such choice keeps its own."""
    loop: bool = False
    """Unscale, clip, step, average and zero the gradients."""
    check_steps: int = 3

    @property
    def max_norm(self) -> float:
        """To which the gradients are clipped: not in the first step, but in all later ones."""
        return 1.5 * math.sqrt(self.dims["parameters"])


def _case(
    name: str,
    group: str,
    label: str,
    shapes: Shapes,
    source: str,
    target: float,
    rule: str = "adamw",
    streams: Iterable[tuple[float, int, int]] | None = None,
    **options,
) -> OptimCase:
    count = parameters(shapes)
    options.setdefault("ours_min_sqnr_db", 100.0)  # the rounding of fp32 parameters leaves 120
    passes = tuple(Pass(each * count, reads, updates) for each, reads, updates in streams or STREAMS[rule])
    return OptimCase(
        name=name,
        group=group,
        label=label,
        dims={"tensors": len(shapes), "parameters": count},
        ops=count,
        bytes=sum(part.bytes for part in passes),
        source=source,
        cold=False,
        passes=passes,
        target=target,
        rule=rule,
        shapes=shapes,
        **options,
    )


def _sizes(low: int, high: int) -> Shapes:
    """1,000 vectors of low … high elements, uniform."""
    draw = random.Random(1)
    return tuple((draw.randint(low, high),) for _ in range(1000))


LARGE, TINY, SMALL = ((2048, 2048),) * 8, _sizes(64, 4096), _sizes(1024, 65536)
LARGE_NAME, TINY_NAME, SMALL_NAME, LOOP_NAME = "8 × 4.2 M", "64–4,096", "1–64 k", "AMP+clip+EMA+zero"
LARGE_SOURCE, SMALL_SOURCE = "8 matrices of 2048×2048, fp32", "1,000 vectors of 1,024 to 65,536 elements"
LOOP = {"loop": True, "streams": LOOP_STREAMS}


def _large(rule: str, target: float, **options) -> OptimCase:
    return _case(f"large/{rule}", LARGE_NAME, CLASSES[rule], LARGE, LARGE_SOURCE, target, rule, **options)


def _narrow(name: str, label: str, target: float, streams: Iterable[tuple[float, int, int]], **options) -> OptimCase:
    """AdamW with narrow state, measured against fused AdamW in fp32."""
    fused = ("torch-fused",)
    return _case(name, "AdamW state", label, LARGE, LARGE_SOURCE, target, streams=streams, against=fused, **options)


CASES = (
    *(_large(rule, 1.0) for rule in ("sgd", "adamw", "adagrad")),
    _large("rmsprop", 2.5),
    _large("nadam", 3.0),
    _large("radam", 3.0, check_steps=7),  # the variance of v counts from the sixth step on
    *(_large(rule, 3.0) for rule in ("adadelta", "adamax")),
    # A sign that rounding turns costs 2·lr in one element: 56 dB left of a sample of 200,000.
    _large("lion", 3.0, min_sqnr_db=45.0, ours_min_sqnr_db=45.0),
    # torch sums squares of 4.2 M elements in fp32: 80 to 85 dB. Their steps are small beside the rounding of p.
    *(_large(rule, 3.0, min_sqnr_db=60.0, ours_min_sqnr_db=90.0) for rule in ("lamb", "adafactor")),
    _case("small-64-4096", "1,000 tensors", TINY_NAME, TINY, "1,000 vectors of 64 to 4,096 elements", 4.0),
    _case("small-1k-64k", "1,000 tensors", SMALL_NAME, SMALL, SMALL_SOURCE, 1.3),
    _case("resnet50", "models", "ResNet-50", RESNET50, "ResNet-50, 161 tensors", 1.1),
    _case("bert6", "models", "BERT-6", BERT6, "BERT-base with 6 layers, 103 tensors", 1.1),
    _case("amp+clip+ema+zero/large", LOOP_NAME, LARGE_NAME, LARGE, LARGE_SOURCE, 1.6, **LOOP),
    _case("amp+clip+ema+zero/small-1k-64k", LOOP_NAME, SMALL_NAME, SMALL, SMALL_SOURCE, 2.5, **LOOP),
    _narrow("adamw-bf16-state", "bf16", 1.25, BF16_STATE, state_dtype="bfloat16", ours_min_sqnr_db=45.0),
    _narrow("adamw-int8-state", "int8", 1.4, INT8_STATE, state_dtype="int8", min_sqnr_db=30.0, ours_min_sqnr_db=30.0),
    # Rounding a parameter of 0.02 to bf16 leaves so much of an update of 0.003.
    _case(
        "bf16-stochastic",
        "all bf16",
        "AdamW",
        LARGE,
        "8 matrices of 2048×2048, all in bf16",
        1.0,
        streams=ALL_BF16,
        dtype=torch.bfloat16,
        state_dtype="bfloat16",
        min_sqnr_db=25.0,
        ours_min_sqnr_db=25.0,
    ),
)

# ---------------------------------------------------------------------------------------------------- inputs and oracle

SAMPLES = 200_000


def make_inputs(case: OptimCase, device: torch.device) -> Inputs:
    """p ~ N(0, 0.02²), as models start; g ~ N(0, 1). Every process makes the same."""
    generator = torch.Generator().manual_seed(1)
    params, grads = (
        [torch.randn(shape, generator=generator).mul_(std).to(device, case.dtype) for shape in case.shapes]
        for std in (0.02, 1.0)
    )
    return {"case": case, "params": params, "grads": grads}


def advance_gradient_(g: Tensor) -> None:
    """The gradient of the next step: another for each element, and exact, so that the oracle can know it."""
    g.copy_(g.flatten().roll(1).mul_(GROWTH).view_as(g))


def _gradient(g: Tensor, step: int) -> Tensor:
    """The gradient g after `step` times `advance_gradient_`."""
    return g.flatten().roll(step).mul_(GROWTH**step).view_as(g)


def _picked(numel: int, tensor: int, tensors: int) -> Tensor:
    """Which elements of a tensor are compared: a share of `SAMPLES`, with its first and last ones."""
    share = max(SAMPLES // tensors, 2)
    if numel <= share:
        return torch.arange(numel)
    picked = torch.randint(numel, (share,), generator=torch.Generator().manual_seed(tensor))
    picked[0], picked[-1] = 0, numel - 1
    return picked


def sample(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of `tensors` that are compared, in float64."""
    parts = [t.detach().flatten()[_picked(t.numel(), i, len(tensors)).to(t.device)] for i, t in enumerate(tensors)]
    return torch.cat(parts).double()


def plain_optimizer(rule: str, params: list[Tensor], **implementation: bool) -> torch.optim.Optimizer:
    """The rule of torch.optim, or of its paper where torch has none; `implementation` is foreach=… or fused=…"""
    module = optim_paper if hasattr(optim_paper, CLASSES[rule]) else torch.optim
    return getattr(module, CLASSES[rule])(params, **HYPER[rule], **implementation)


def oracle(inputs: Inputs) -> Tensor:
    """`sample` of the updates after `check_steps` steps, from plain torch, a tensor at a time, in float64.

    With `loop` those of the averages follow (from the parameters' start), and the gradients, which are zero.
    """
    case: OptimCase = inputs["case"]
    clip = [1.0] * case.check_steps
    if case.loop:
        norm = math.sqrt(sum(g.double().square().sum().item() for g in inputs["grads"]))
        clip = [min(1.0, case.max_norm / (norm * abs(GROWTH**step) + 1e-6)) for step in range(case.check_steps)]
    updates, averages = [], []
    for i, (p, g) in enumerate(zip(inputs["params"], inputs["grads"], strict=True)):
        picked = _picked(p.numel(), i, len(inputs["params"])).to(p.device)
        whole = case.rule in WHOLE_TENSOR
        start = p.flatten()[picked].double()
        value = torch.nn.Parameter(p.double() if whole else start.clone())
        optimizer, average = plain_optimizer(case.rule, [value], foreach=False), start
        for step in range(case.check_steps):
            grad = _gradient(g, step)
            value.grad = (grad if whole else grad.flatten()[picked]).double() * clip[step]
            optimizer.step()
            now = value.detach().flatten()[picked] if whole else value.detach()
            average = average.lerp(now, 1 - EMA_DECAY) if step else now.clone()
        updates.append(now - start)
        averages.append(average - start)
    if not case.loop:
        return torch.cat(updates)
    return torch.cat([*updates, *averages, torch.zeros(sum(u.numel() for u in updates), dtype=torch.float64)])


OP = Op(
    name="optim",
    title="optimizer steps",
    cases=CASES,
    make_inputs=make_inputs,
    oracle=oracle,
    min_sqnr_db=80.0,
    baseline="torch-loop",
    peak=None,
    inference=False,
    checks="the update's SQNR",
    ops_unit="Gparam/s",
    cache_titles={"warm": "one step after another"},
)
