"""How an op is put into PyTorch's dispatcher: one call of `register` for each op.

The reference serves every device (`CompositeExplicitAutograd`), the compiled extension registers itself for `CPU` when
it loads, Triton serves `CUDA` and is imported at its first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from pyops import backend

library = torch.library.Library("pyops", "FRAGMENT")
names: list[str] = []
"""Every op registered here, in order."""


def register(
    schema: str,
    reference: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    triton: bool = False,
    native: bool = False,
    file: str | None = None,
) -> torch._ops.OpOverload:
    """Define `pyops::<schema>` with its reference, fake kernel and autograd formula; returns the op.

    `triton` says that `pyops.kernels.<file>` has a launcher of the op's name and arguments, `native` that
    `pyops.ops.<file>_native` has one which calls the compiled extension; `file` is the op's name unless given. (Most
    CPU kernels register themselves when the extension loads. Lists of a thousand tensors are better read in Python.)
    """
    name = schema.split("(", 1)[0]
    qualified = f"pyops::{name}"
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)
    if native and backend.native is not None:
        library.impl(name, _lazy_launcher(f"pyops.ops.{file or name}_native", name), "CPU")
    _register_devices(name, triton, file or name)
    names.append(name)
    return getattr(torch.ops.pyops, name).default


def refuse_tangents(what: str, *tensors: torch.Tensor | None) -> None:
    """Raise NotImplementedError if one of them carries a tangent, which PyTorch would lose without a word."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{what} has no forward-mode derivative (jvp); use backward")


def past_autograd(
    op: torch._ops.OpOverload, setup_context: Callable, backward: Callable, differentiable: tuple[int, ...]
) -> Callable:
    """A function that calls `op`, for arguments that are known to be right, past the dispatcher's autograd layer.

    Where none of the `differentiable` arguments wants a gradient, that layer is skipped; where one does, the formula is
    the one registered with the op, without the dispatcher's way to it: a third of its cost for a small layer.
    """

    formula = torch.autograd.function.once_differentiable(backward)
    # Looked up once: an attribute of an attribute costs as much as what it then answers.
    compiling, transforming = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
    below_autograd, grad_enabled = torch._C._AutoDispatchBelowAutograd, torch.is_grad_enabled
    inference = torch.is_inference_mode_enabled

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                y = op(*args)
            setup_context(ctx, args, y)
            return y

        backward = staticmethod(formula)

    def dispatch(*args):
        if compiling():
            return op(*args)
        if forward_ad._current_level >= 0:
            refuse_tangents(op._opname, *(args[i] for i in differentiable))
        if transforming() or inference():  # inference mode is below autograd by itself
            return op(*args)
        if grad_enabled():
            for i in differentiable:
                if args[i] is not None and args[i].requires_grad:
                    return _Function.apply(*args)
        with below_autograd():
            return op(*args)

    return dispatch


def _register_devices(name: str, triton: bool, file: str) -> None:
    if triton and backend.triton_installed() and backend.forced in (None, "triton"):
        launch = _lazy_launcher(f"pyops.kernels.{file}", name)
        library.impl(name, launch, "CUDA")
        if backend.forced == "triton" and backend.triton_interpreted():
            library.impl(name, launch, "CPU")
    if backend.forced in ("cpp", "triton", "cuda"):
        for key in ("CPU", "CUDA"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pyops::{name}", key):
                library.impl(name, _refuse(name, key.lower()), key)


def _lazy_launcher(module: str, name: str) -> Callable:
    launcher: Callable | None = None

    def launch(*args):
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(module), name)
        return launcher(*args)

    return launch


def _refuse(name: str, device: str) -> Callable:
    def refuse(*args):
        raise NotImplementedError(
            f"{name}: PYOPS_BACKEND={backend.forced} has no kernel for {device} tensors; unset it or move the tensors"
        )

    return refuse
