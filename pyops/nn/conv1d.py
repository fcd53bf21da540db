"""transformers' `Conv1D` (GPT-2): a linear layer whose weight lies transposed, [in_features, out_features]."""

from __future__ import annotations

from torch import nn

from pyops.nn.effective import effective, trainable


def is_conv1d(module: nn.Module) -> bool:
    """True for that class, and subclasses of it; transformers need not be there."""
    return conv1d_class(module) is not None


def is_linear(module: nn.Module) -> bool:
    """True for an `nn.Linear` and a Conv1D, and subclasses of them."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def conv1d_class(module: nn.Module) -> type[nn.Module] | None:
    """That class, if `module` is one."""
    for cls in type(module).__mro__:
        if (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D"):
            return cls
    return None


def as_linear(module: nn.Module) -> nn.Module:
    """An `nn.Linear` that computes what a Conv1D does, on a view of its weight; any other module as it is."""
    if not is_conv1d(module):
        return module
    weight, bias = effective(module, "weight"), effective(module, "bias")
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=trainable(module, "weight"))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=trainable(module, "bias"))
    return linear.train(module.training)
