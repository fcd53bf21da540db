"""Models whose weights take no memory until a checkpoint is loaded into them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Modules made inside have their parameters on meta, which takes no memory and no initialization.

    Buffers are real: what a model computes for itself and no checkpoint holds, such as the frequencies of rotary
    embeddings, is there. Holds for all threads while it is open.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # keep this very object: tied ones stay tied
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()
