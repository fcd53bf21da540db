"""transformers loads and saves quantized models itself, once this module is imported.

    import pyops.transformers
    model = AutoModelForCausalLM.from_pretrained("llama-int4")     # what pyops.save_quantized wrote
    model.save_pretrained("again")

The format is that of `pyops.save_quantized`. A model that `pyops.swap_` made is told to transformers by `mark_`. This
module is not imported with pyops: transformers takes a while.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyops.checkpoints import own
from pyops.checkpoints.errors import CheckpointError
from pyops.nn.conv1d import as_linear, is_linear
from pyops.nn.linear import QuantLinear

if not hasattr(HfQuantizer, "get_new_dtype"):  # without it scales would be rounded to the dtype of the model
    raise ImportError("pyops.transformers needs a newer transformers; 5.23 is known to work")


@register_quantization_config(own.NAME)
class PyopsConfig(QuantizationConfigMixin):
    """`quantization_config` in config.json: {"quant_method": "pyops", "version": 1, "layers": {name: options}}.

    Raises CheckpointError with everything in it that is not understood.
    """

    def __init__(self, **told: Any) -> None:
        self.quant_method = own.NAME
        self.version, self.layers = told.get("version"), told.get("layers")
        scheme, problems = own.parse({"quant_method": own.NAME} | told)
        if scheme is None:
            raise CheckpointError("quantization_config", problems)
        self._scheme = scheme

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return {"quant_method": self.quant_method, "version": self.version, "layers": dict(self.layers)}

    def options(self, name: str, base: str) -> own.Options | None:
        """Of the layer of that name, in the model that was saved or in its base model, called `base`."""
        for candidate in (name, f"{base}.{name}", name.removeprefix(f"{base}.")):
            found = self._scheme.of(candidate)
            if found is not None:
                return found
        return None


class _Carrier(nn.Module):
    """Stands for a layer while its canonical tensors are loaded."""

    def __init__(self, options: own.Options, module: nn.Module) -> None:
        super().__init__()
        linear = as_linear(module)
        self.options, self.sizes, self.dtype = options, (linear.in_features, linear.out_features), linear.weight.dtype
        self.register_parameter("bias", module.bias)
        layer = self.layer()
        for name, (shape, dtypes) in layer.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtypes[0], device="meta"))

    def layer(self) -> QuantLinear:
        """On meta, without a bias."""
        return self.options.cls(*self.sizes, False, "meta", self.dtype, **self.options.arguments)

    def made(self, name: str) -> QuantLinear:
        """The layer with what was loaded."""
        tensors = dict(self._buffers)
        missing = [f"{name}.{key} is missing" for key, t in tensors.items() if not _was_loaded(t)]
        if missing:
            raise CheckpointError("the checkpoint", missing)
        layer = self.layer()
        try:
            layer.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise CheckpointError("the checkpoint", [f"{name}: {error}"]) from error
        if self.bias is not None:
            layer.bias = self.bias
        return layer.train(self.training)


def _was_loaded(t: torch.Tensor) -> bool:
    return not t.is_meta and getattr(t, "_is_hf_initialized", False)  # what is missing transformers makes up


@register_quantizer(own.NAME)
class PyopsQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` ask; `mark_` makes one for a model that was swapped."""

    quantization_config: PyopsConfig

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Integers and scales stay as they are, whatever dtype the model is asked for."""
        if self._carried.intersection(converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        base = model.base_model_prefix
        self._carried: set[str] = set()
        found = [(name, module) for name, module in model.named_modules() if is_linear(module)]
        for name, module in found:
            options = self.quantization_config.options(name, base)
            if options is not None:
                carrier = _Carrier(options, module)
                model.set_submodule(name, carrier)
                self._carried |= {f"{name}.{key}" for key in carrier._buffers}
        if not self._carried:
            raise CheckpointError("quantization_config", [f"none of its layers is one of a {type(model).__name__}"])
        _cut_ties(model, self._carried)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        carriers = [(name, module) for name, module in model.named_modules() if isinstance(module, _Carrier)]
        for name, carrier in carriers:
            model.set_submodule(name, carrier.made(name))

    def is_serializable(self) -> bool:
        """`save_pretrained` writes what `from_pretrained` reads."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are frozen; adapters beside them, biases and everything else can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` takes the layers."""
        return True


def mark_(model: PreTrainedModel) -> PreTrainedModel:
    """Tell transformers what the quantized layers of a model are, so that `save_pretrained` writes a model to load.

    Call it after the last `pyops.swap_`. Without it, `save_pretrained` writes the tensors but not what they are, and
    `from_pretrained` would take them for float weights. Returns the model. Raises TypeError if it is no
    `PreTrainedModel`, ValueError if it has no quantized layer, or one that cannot be saved, as `save_quantized` does.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("model has no quantized layer")
    config = PyopsConfig(**own.describe(layers))
    model.config.quantization_config = config
    model.hf_quantizer = PyopsQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, own.NAME
    _cut_ties(model, {f"{name}.weight" for name in layers})
    return model


def _cut_ties(model: PreTrainedModel, quantized: set[str]) -> None:
    """A quantized weight is tied to nothing, and nobody shall try it."""
    ties = model.all_tied_weights_keys
    cut = {target for target, source in ties.items() if target in quantized or source in quantized}
    model.all_tied_weights_keys = {target: source for target, source in ties.items() if target not in cut}
    if cut:
        model.config.tie_word_embeddings = False
