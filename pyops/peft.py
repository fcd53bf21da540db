"""LoRA of PEFT (https://github.com/huggingface/peft) on quantized linear layers: `pyops.peft.register(config)`.

    y = base(x) + (α/r) · B · A · dropout(x)    base: an Int4Linear, Int8Linear …, frozen; A [r, K], B [N, r] trained

The gradient of x goes through the quantized base, so that layers below are trained too. PEFT knows layers by their
types; `register` tells a `LoraConfig` about ours, through PEFT's own extension point for custom layers. Needs PEFT 0.21
or newer, which pyops does not install.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyops.nn.linear import QuantLinear

try:
    from peft import LoraConfig
    from peft.tuners import lora
except ImportError as error:
    raise ImportError("pyops.peft needs PEFT 0.21 or newer: pip install peft") from error

INITS = (True, False, "gaussian")
"""Initial values of A and B that do not ask for the float weight."""


def register(config: LoraConfig) -> LoraConfig:
    """Let this config put adapters on quantized linear layers too; returns it.

        config = pyops.peft.register(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        model = peft.get_peft_model(model, config)

    `target_modules` are names; PEFT's "all-linear" looks for nn.Linear only. Adapters are saved as always; what is
    registered is not, so that loading takes the config as well: `PeftModel.from_pretrained(model, path,
    config=pyops.peft.register(LoraConfig.from_pretrained(path)))`. Raises TypeError if `config` is no LoraConfig.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


class LoraQuantLinear(lora.Linear):
    """PEFT's LoRA layer around a quantized linear layer, made by `peft.get_peft_model`.

    Raises ValueError for variants and initial values that need the float weight (DoRA, PiSSA, LoftQ …), and for
    merging: the sum of the weight and the adapter would have to be rounded again.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """LoRA itself."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, or change one."""
        if config.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} needs the float weight, which a quantized layer does "
                f"not have; allowed: {', '.join(map(repr, INITS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused."""
        raise ValueError(
            "an adapter is not merged into a quantized weight, which would be rounded again: keep it beside the base "
            "(unload() takes it off), or merge it into the float model and quantize that"
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # PEFT's own warns of a type that it does not know

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        # Adapters take that dtype: never the one of the quantized weight, which may be e4m3, a floating dtype.
        device = next(base_layer.buffers()).device
        return device, None if base_layer.bias is None else base_layer.bias.dtype
