"""Who runs the two layers of a Llama: plain PyTorch, its and torchao's quantized layers in eager mode, and ours.

ONNX Runtime and OpenVINO are not among them: both need an export of the model with its cache first, which is another
program; how their layers compare stands in the benchmarks of the single layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from pyops.bench.case import Case, Inputs
from pyops.bench.llama_decoder import GROUP, fill_cache
from pyops.bench.peers import Instance, Peer


class _Model(Peer):
    module, package = "transformers", "transformers"
    dtype = torch.float32

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {"": lambda: self._instance(inputs)}

    def _instance(self, inputs: Inputs) -> Instance:
        tokens, cached = (inputs["case"].dims[name] for name in ("tokens", "cached"))
        with torch.inference_mode(False), torch.no_grad():
            # The inputs' own model, which nobody else gets: there is no room for two.
            model, x = inputs.pop("model").to(self.dtype), inputs["x"].to(self.dtype)
            if cached:
                cache = fill_cache(model, x[:, :cached])  # float, the same for all
            model = self.finish(model)
        if not cached:
            return Instance(lambda: model(inputs_embeds=x, use_cache=False), lambda result: result.last_hidden_state)
        last = x[:, cached:]

        def decode():
            y = model(inputs_embeds=last, past_key_values=cache)
            cache.crop(-tokens)
            return y

        return Instance(decode, lambda result: result.last_hidden_state)

    def finish(self, model: nn.Module) -> nn.Module:
        """Quantize it."""
        return model


class _Pyops(_Model):
    role = "ours"

    @classmethod
    def covers(cls, case: Case) -> bool:
        return case.ours == cls.name


class PyopsInt4(_Pyops):
    """int4 in groups, as `swap_` makes it."""

    name = "pyops-int4"
    runs = f"pyops.swap_ with Int4Weight(group_size={GROUP}), fp32 activations"

    def finish(self, model: nn.Module) -> nn.Module:
        import pyops

        pyops.swap_(model, pyops.Int4Weight(group_size=GROUP), one_by_one=True)
        return model


class PyopsInt8(_Pyops):
    """int8, activations quantized at each call."""

    name = "pyops-int8"
    runs = "pyops.swap_ with Int8Dynamic(), fp32 activations"

    def finish(self, model: nn.Module) -> nn.Module:
        import pyops

        pyops.swap_(model, pyops.Int8Dynamic(), one_by_one=True)
        return model


class TorchFp32(_Model):
    """Plain PyTorch."""

    name, role = "torch-fp32", "baseline"
    runs = "the model as it is, fp32"


class TorchBf16(_Model):
    """Plain PyTorch in bf16."""

    name, dtype = "torch-bf16", torch.bfloat16
    runs = "the model in bf16"


class TorchQuantizeDynamic(_Model):
    """PyTorch's old int8."""

    name = "torch-quantize_dynamic"
    runs = "torch.ao.quantization.quantize_dynamic(nn.Linear, qint8), fp32 activations between"

    def finish(self, model: nn.Module) -> nn.Module:
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of torchao, still what most programs call
            return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


class _Torchao(_Model):
    module, package = "torchao", "torchao"

    @classmethod
    def missing(cls, device: str) -> str | None:
        return super().missing(device) or _Model.missing.__func__(_Model, device)


class TorchaoInt8(_Torchao):
    """torchao's int8, activations quantized at each call."""

    name = "torchao-int8"
    runs = "torchao quantize_(Int8DynamicActivationInt8WeightConfig), eager"

    def finish(self, model: nn.Module) -> nn.Module:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return model


class TorchInt4Pack(_Model):
    """PyTorch's own int4 kernel, which torchao's int4 layers call on CPUs, without their wrapper."""

    name = "torch-int4pack"
    runs = "torch.ops.aten._weight_int4pack_mm_for_cpu in place of every nn.Linear, fp32"

    @classmethod
    def covers(cls, case: Case) -> bool:
        return case.dims["tokens"] == 1 or cls.dtype == torch.bfloat16  # minutes for 512 rows of fp32

    def finish(self, model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, _Int4PackLinear(child))
        return model


class TorchInt4PackBf16(TorchInt4Pack):
    """The same in bf16."""

    name, dtype = "torch-int4pack-bf16", torch.bfloat16
    runs = "torch.ops.aten._weight_int4pack_mm_for_cpu in place of every nn.Linear, bf16"


class _Int4PackLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        from pyops.ops.int4_quantize import quantize_int4
        from pyops.ops.int4_weight import unpack_nibbles

        w_q, scale, zero = quantize_int4(linear.weight, GROUP)
        s = scale.float().t()
        both = torch.stack([s, (8 - zero.t().float()) * s], dim=-1)  # it computes (q - 8) · s + z
        self.table = both.to(linear.weight.dtype).contiguous()
        codes = unpack_nibbles(w_q, linear.in_features).int()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.out_features = linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, x.shape[-1]), self.packed, GROUP, self.table)
        return y.view(*x.shape[:-1], self.out_features)


PEERS: list[type[Peer]] = [
    PyopsInt4,
    PyopsInt8,
    TorchFp32,
    TorchBf16,
    TorchQuantizeDynamic,
    TorchInt4Pack,
    TorchInt4PackBf16,
    TorchaoInt8,
]
