"""Cases of sparse_resnet50: a pruned ResNet-50 as a whole, from the image to its logits.

The weights are random and the statistics of the batch normalizations are those of the pruned model, so that no layer's
signal fades. All peers run the same model; nothing but the pruning costs accuracy, and that is not looked at here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import nn

from pyops.bench.case import Case, Inputs, Op

SIDE = 224
MULTIPLY_ADDS = 4_089_184_256
"""Of one image in all convolutions and the classifier."""
PARAMETERS = 25_502_912
"""Their weights."""


@dataclass(frozen=True)
class ModelCase(Case):
    """A batch and how the model is pruned."""

    pattern: str = "unstructured"


def _case(pattern: str, percent: int, batch: int, target: float, against: str, **options) -> ModelCase:
    kept = (100 - percent) / 100
    return ModelCase(
        name=f"b{batch}/{pattern}-{percent}",
        group=f"batch {batch}",
        label=f"{pattern} {percent} %",
        dims={"N": batch, "side": SIDE, "sparsity_percent": percent},
        ops=2 * MULTIPLY_ADDS * batch * kept,
        bytes=4 * (PARAMETERS * kept + batch * 3 * SIDE * SIDE),  # what lies between the layers may stay in a cache
        source="ResNetForImageClassification(ResNetConfig(num_labels=1000)), every weight pruned",
        cold=False,
        target=target,
        against=(against,),
        ours_min_sqnr_db=40.0,
        pattern=pattern,
        **options,
    )


def _pruned(case: ModelCase) -> nn.Module:
    """The model in eval mode, its masks as `pyops.prune` leaves them."""
    from pyops import prune

    transformers = importlib.import_module("transformers")
    with torch.device("meta"):  # its own initialization would take seconds in each process
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.momentum = None  # the mean over all batches, of which there is one
    model.classifier[-1].bias.data.zero_()
    sparsity = case.dims["sparsity_percent"] / 100
    if case.pattern == "oc_block16":
        prune.oc_block(model, sparsity, 16)
    else:
        prune.magnitude(model, sparsity)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, SIDE, SIDE, generator=generator))
    return model.eval()


def make_inputs(case: ModelCase, device: torch.device) -> Inputs:
    """The model and images x ~ N(0, 1), fp32. Their tensors are ordinary ones, also under inference mode."""
    with torch.inference_mode(False):
        x = torch.randn(case.dims["N"], 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
        return {"case": case, "model": _pruned(case).to(device), "x": x.to(device)}


def oracle(inputs: Inputs) -> torch.Tensor:
    """The logits of the unfolded model in float64; it is used up."""
    with torch.no_grad():
        return inputs["model"].double()(inputs["x"].double()).logits


OP = Op(
    name="sparse_resnet50",
    title="pruned ResNet-50",
    cases=(
        _case("unstructured", 90, 1, 3.0, "torch-eager"),
        _case("oc_block16", 90, 1, 3.0, "torch-eager"),
        _case("unstructured", 90, 8, 3.0, "torch-eager", default=False),
        _case("oc_block16", 90, 8, 3.0, "torch-eager", default=False),
        # Where sparse does not pay, every layer stays dense: the time of the folded model, give or take noise.
        _case("unstructured", 30, 1, 0.97, "torch-folded"),
    ),
    make_inputs=make_inputs,
    oracle=oracle,
    min_sqnr_db=40.0,  # on a GPU convolutions are TF32
    baseline="torch-eager",
    peak="fp32_gflops",
    ops_unit="useful GFLOP/s",
    cache_titles={"warm": "images one after another"},
)
