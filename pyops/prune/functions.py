"""Prune one layer or a whole model in one call.

Common to all functions:

Args:
    module: an `nn.Conv1d`, `nn.Conv2d` or `nn.Linear`, or a model: then all of those in it. The `out_proj` of
        `nn.MultiheadAttention` is left alone, since the attention reads its weight past the hook that masks it.
    name: of the parameter; layers of a model that have none (bias=False) are passed over.
    filter_fn: called as filter_fn(layer, qualified_name) for each name of each layer; False leaves it out.
    importance_scores: ranked in place of the weights, by their absolute value or norm: a tensor of the parameter's
        shape for a single layer, or as for `prune.global_unstructured` a dict {(layer, name): tensor}.
    scope: "layer" prunes each layer to the sparsity; "global" all together to it, each by how its scores compare.

A weight is [O, I, R, S] ([O, I, R] of Conv1d, [O, I] of Linear) where I is the number of input channels of one group:
blocks of input channels never reach over groups, blocks of output channels may.

Everything is checked and all masks are computed before the first layer is touched. The Parameter that an optimizer
holds stays the same object, now named weight_orig.

Raises:
    TypeError for arguments of a wrong type and modules that cannot be pruned, ValueError for values outside what is
    allowed, for weights that hold NaN, are parametrized or not initialized yet, and if there is no layer to prune.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pyops.nn.effective import effective
from pyops.prune.layers import FilterFn, Pruned, find_layers, install, mask_of
from pyops.prune.methods import NM, Channels, IcBlock, Magnitude, Method, OcBlock, check_scores

Scores = Tensor | Mapping[tuple[nn.Module, str], Tensor]
SCOPES = ("layer", "global")


def magnitude(
    module: nn.Module,
    sparsity: float,
    *,
    name: str = "weight",
    scope: str = "layer",
    filter_fn: FilterFn | None = None,
    importance_scores: Scores | None = None,
) -> list[Pruned]:
    """Zero the single weights of the smallest |w|, `sparsity` in [0, 1) of all; a row for each layer.

    Source: Han et al. 2015, arXiv:1506.02626. Arguments and errors: see `pyops.prune.functions`.
    """
    return _prune(module, Magnitude(sparsity), name, scope, filter_fn, importance_scores)


def n_m(
    module: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    name: str = "weight",
    filter_fn: FilterFn | None = None,
    importance_scores: Scores | None = None,
) -> list[Pruned]:
    """Keep the n largest |w| of each m consecutive input channels, for every (o, r, s); a row for each layer.

    A last group of fewer than m input channels keeps up to n too, so layers of up to n input channels a group
    (depthwise) stay whole. Source: Mishra et al. 2021, arXiv:2104.08378. Arguments and errors: see
    `pyops.prune.functions`.
    """
    return _prune(module, NM(n, m), name, "layer", filter_fn, importance_scores)


def oc_block(
    module: nn.Module,
    sparsity: float,
    block: int = 16,
    *,
    scope: str = "layer",
    norm: float = 2.0,
    name: str = "weight",
    filter_fn: FilterFn | None = None,
    importance_scores: Scores | None = None,
) -> list[Pruned]:
    """Zero blocks w[o : o + block, i, r, s] of `block` consecutive output channels; a row for each layer.

    They are ranked by their L2 norm (or another p-norm, inf included) a weight, (1/n · Σ |w|^p)^(1/p): the last block
    is shorter where O % block != 0. `sparsity` in [0, 1) counts the weights of zero blocks, to the nearest whole block.
    Arguments and errors: see `pyops.prune.functions`.
    """
    return _prune(module, OcBlock(sparsity, block, norm), name, scope, filter_fn, importance_scores)


def ic_block(
    module: nn.Module,
    sparsity: float,
    block: int = 4,
    *,
    scope: str = "layer",
    norm: float = 2.0,
    name: str = "weight",
    filter_fn: FilterFn | None = None,
    importance_scores: Scores | None = None,
) -> list[Pruned]:
    """Zero blocks w[o, i : i + block, r, s] of `block` consecutive input channels; a row for each layer.

    As `oc_block`, with the last block shorter where I % block != 0: four int8 products are one VNNI instruction.
    Arguments and errors: see `pyops.prune.functions`.
    """
    return _prune(module, IcBlock(sparsity, block, norm), name, scope, filter_fn, importance_scores)


def channels(
    module: nn.Module,
    sparsity: float,
    dim: int = 0,
    *,
    scope: str = "layer",
    norm: float = 2.0,
    name: str = "weight",
    filter_fn: FilterFn | None = None,
    importance_scores: Scores | None = None,
) -> list[Pruned]:
    """Zero whole output channels w[o] (dim 0) or input channels w[:, i] (dim 1); a row for each layer.

    They are ranked by their L2 norm (or another p-norm) a weight, which compares layers of any size under
    scope="global". The bias of a zeroed output channel stays. Source: Li et al. 2017, arXiv:1608.08710. Arguments and
    errors: see `pyops.prune.functions`.
    """
    return _prune(module, Channels(sparsity, dim, norm), name, scope, filter_fn, importance_scores)


def bake_(model: nn.Module) -> list[str]:
    """`torch.nn.utils.prune.remove` for every pruned parameter in `model`: plain tensors with zeros, no masks.

    Returns their qualified names, such as "conv1.weight"; an empty list if nothing is pruned. The Parameter objects
    stay the same, `weight_orig` is `weight` again.

    Raises:
        TypeError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    baked = []
    for fqn, module in model.named_modules():
        hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
        for hook in hooks:
            prune.remove(module, hook._tensor_name)
            baked.append(f"{fqn}.{hook._tensor_name}".lstrip("."))
    return baked


def _prune(
    module: nn.Module,
    method: Method,
    name: str,
    scope: str,
    filter_fn: FilterFn | None,
    importance_scores: Scores | None,
) -> list[Pruned]:
    if scope not in SCOPES:
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    layers = find_layers(module, name, filter_fn)
    with torch.inference_mode(False), torch.no_grad():
        weights = _ranked_tensors(layers, name, importance_scores)
        old = [mask_of(layer, name) for layer in layers]
        masks = method.compute_masks(weights, old, together=scope == "global")
    report = []
    for (layer, fqn), mask in zip(layers.items(), masks, strict=True):
        # A copy each: torch's own methods change the hook that they find, which must not be another layer's too.
        install(layer, name, copy.copy(method), mask)
        report.append(Pruned(fqn, int(mask.sum()), mask.numel()))
    return report


def _ranked_tensors(layers: dict[nn.Module, str], name: str, scores: Scores | None) -> list[Tensor]:
    weights = {layer: effective(layer, name) for layer in layers}
    if scores is None:
        return list(weights.values())
    if isinstance(scores, Tensor):
        if len(layers) > 1:
            raise TypeError(f"importance_scores is one tensor for {len(layers)} layers; give {{(layer, name): tensor}}")
        scores = {(layer, name): scores for layer in layers}
    if not isinstance(scores, Mapping):
        raise TypeError(f"importance_scores must be a tensor or a dict, got {type(scores).__name__}")
    unknown = [key for key in scores if key not in {(layer, name) for layer in layers}]
    if unknown:
        raise ValueError(f"importance_scores has a key that is no (layer, name) of what is pruned: {unknown[0]!r}")
    return [
        check_scores(scores[layer, name], weight, f"layer {layers[layer]!r}: ") if (layer, name) in scores else weight
        for layer, weight in weights.items()
    ]
