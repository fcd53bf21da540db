"""What multiplies every gradient of a step: clipping by the global norm, and unscaling under a GradScaler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyops.optim.collect import Call
from pyops.optim.options import Options
from pyops.optim.work import Work


def scaling(
    work: Work, options: Options, grad_scale: Any, found_inf: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(multiplier, found_inf, norm), [] each or None.

    multiplier = min(max_grad_norm/(norm + 1e-6), 1)/grad_scale in fp64, where norm is the global one of the gradients
    divided by grad_scale; found_inf is not 0 if the step is to be skipped. Raises RuntimeError if the norm is not
    finite, that was to be checked, and there is no found_inf to say it in.
    """
    scale, found_inf = _scalar(grad_scale), _scalar(found_inf)
    multiplier = None if scale is None else scale.double().reciprocal()
    check = options.error_if_nonfinite
    if check is None:
        check = options.max_grad_norm is not None and not _capturing(work.calls)
    if not work.calls or (options.max_grad_norm is None and not check):
        return multiplier, found_inf, None
    norm = work.sum_squares().sqrt_()
    if multiplier is not None:
        multiplier = multiplier.to(norm.device)
        norm = norm * multiplier
    if check and found_inf is not None:
        found_inf = found_inf + norm.isfinite().logical_not().to(found_inf.device)
    elif check and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of the gradients is {norm.item()}, so that they cannot be clipped; nothing was changed. "
            "To step regardless, pass error_if_nonfinite=False"
        )
    if options.max_grad_norm is not None:
        clip = (options.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)
        multiplier = clip if multiplier is None else multiplier * clip
    return multiplier, found_inf, norm.float()


def _scalar(value: Any) -> Tensor | None:
    return None if value is None else torch.as_tensor(value).detach().reshape(())


def _capturing(calls: list[Call]) -> bool:
    """True while a CUDA graph is captured: nothing can be read from the device then."""
    return any(call.device.type == "cuda" for call in calls) and torch.cuda.is_current_stream_capturing()
