"""Writes the files beside it: small layers, packed by the libraries whose formats pyops reads.

    python make.py gptqmodel | autogptq | autoawq | compressed-tensors-0.9

Each needs that library importable (sources on PYTHONPATH will do, nothing of theirs that is compiled is used):
GPTQModel 7.7.0, auto_gptq 0.7.1 (of it the file qlinear_cuda.py, as AUTOGPTQ_FILE), AutoAWQ 0.2.9, compressed-tensors
0.9.4.

The integers are chosen first, the float weight s · (q − z) is exact, and the library packs that. A file holds for each
case its layer `<case>.<tensor>` and `<case>.expected`, the weight in fp32; the metadata holds the configs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent


def chosen(N, K, G, bits=4, symmetric=False, act_order=False, lowest_zero=0, seed=0):
    """(linear, scale [N, groups], zero [N, groups], g_idx [K]) with weights that quantize without loss."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-K // G)
    top = 2**bits - 1
    q = torch.randint(0, top + 1, (N, K), generator=generator)
    z = torch.randint(lowest_zero, top + 1, (N, groups), generator=generator)
    z = torch.full_like(z, 2 ** (bits - 1)) if symmetric else z
    # Of 6 bits: exact in fp16, and so is s · (q − z) of 4 bits.
    s = torch.randint(33, 64, (N, groups), generator=generator) * 2.0**-12
    g_idx = torch.arange(K) // G
    if act_order:
        g_idx = g_idx[torch.randperm(K, generator=generator)]
    linear = nn.Linear(K, N, bias=True)
    linear.weight.data = (q - z[:, g_idx]).float() * s[:, g_idx]
    linear.bias.data = torch.randint(-8, 8, (N,), generator=generator) / 16
    return linear.requires_grad_(False), s, z.float(), g_idx.to(torch.int32)


def save(name, cases):
    tensors, configs = {}, {}
    for case, (state, expected, config) in cases.items():
        tensors |= {f"{case}.{key}": t.detach().clone().contiguous() for key, t in state.items()}
        tensors[f"{case}.expected"] = expected.detach().float().clone().contiguous()
        configs[case] = json.dumps(config)
    save_file(tensors, HERE / f"{name}.safetensors", metadata=configs)
    print(name, {key: tuple(t.shape) for key, t in tensors.items()})


def gptqmodel():
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    cases = {}
    for case, version, options in (
        ("v2_asymmetric", 2, {"N": 24, "K": 96, "G": 32}),
        ("v2_act_order", 2, {"N": 16, "K": 128, "G": 64, "act_order": True}),
        ("v2_symmetric", 2, {"N": 16, "K": 64, "G": 64, "symmetric": True}),
        ("v1_asymmetric", 1, {"N": 24, "K": 96, "G": 32}),  # with z = 0, which borrows from its neighbour
        ("v1_symmetric_act_order", 1, {"N": 16, "K": 128, "G": 32, "symmetric": True, "act_order": True}),
        ("v1_one_group", 1, {"N": 16, "K": 72, "G": 72}),
        ("v1_8_bits", 1, {"N": 16, "K": 72, "G": 72, "bits": 8, "symmetric": True}),
        ("v2_odd_sizes", 2, {"N": 13, "K": 68, "G": 32}),
    ):
        linear, s, z, g_idx = chosen(**options)
        bits, K, G = options.get("bits", 4), options["K"], options["G"]
        sym, act_order = options.get("symmetric", False), options.get("act_order", False)
        layer = TorchLinear(
            bits=bits,
            group_size=-1 if G == K else G,
            sym=sym,
            desc_act=act_order,
            in_features=K,
            out_features=options["N"],
            bias=True,
            format=FORMAT.GPTQ_V2,
        )
        layer.pack_original(linear, s, z, g_idx)
        layer.post_init()
        if options["N"] % 8 == 0 and K % 8 == 0:  # else its own dequantization does not hold the padding apart
            got = layer.dequantize_weight().T.float()
            assert torch.equal(got, linear.weight.half().float()), case
        config = QuantizeConfig(bits=bits, group_size=-1 if G == K else G, sym=sym, desc_act=act_order)
        if version == 1:
            convert_gptq_v2_to_v1_format_module(layer, config)
        config.format = FORMAT.GPTQ if version == 1 else FORMAT.GPTQ_V2
        told = json.loads(json.dumps(config.to_dict(), default=str))
        told["meta"] = {"quantizer": ["gptqmodel:7.7.0"], "mse": 0.0, "act_group_aware": True}
        state = {key: layer.state_dict()[key] for key in ("qweight", "qzeros", "scales", "g_idx", "bias")}
        cases[case] = (state, linear.weight, told)
    save("gptqmodel", cases)


def autogptq():
    spec = importlib.util.spec_from_file_location("qlinear_cuda", os.environ["AUTOGPTQ_FILE"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = {}
    for case, options in (
        # z = 0 is stored as −1 over the rest of its word, and read back in two ways: not of interest
        ("asymmetric", {"N": 32, "K": 96, "G": 32, "lowest_zero": 1}),
        ("act_order", {"N": 32, "K": 128, "G": 64, "lowest_zero": 1, "act_order": True}),
        ("symmetric_one_group", {"N": 32, "K": 64, "G": 64, "symmetric": True}),
        ("8_bits", {"N": 32, "K": 64, "G": 64, "symmetric": True, "bits": 8}),
    ):
        linear, s, z, g_idx = chosen(**options)
        bits, K, G = options.get("bits", 4), options["K"], options["G"]
        layer = module.QuantLinear(bits, -1 if G == K else G, K, options["N"], True, weight_dtype=torch.float32)
        layer.pack(linear, s, z, g_idx)
        config = {
            "bits": bits,
            "group_size": -1 if G == K else G,
            "damp_percent": 0.01,
            "static_groups": False,
            "desc_act": options.get("act_order", False),
            "sym": options.get("symmetric", False),
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "is_marlin_format": False,
            "quant_method": "gptq",
            "awq_gemm_checkpoint": False,
        }
        read = layer(torch.eye(K)).T - layer.bias[:, None]
        assert torch.equal(read, linear.weight), case
        cases[case] = (layer.state_dict(), linear.weight, config)
    save("autogptq", cases)


def autoawq():
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm

    cases = {}
    for version, G in (("gemm", 32), ("gemm", 64), ("gemm", 128), ("gemv", 32), ("gemv", 64), ("gemv", 128)):
        K = 2 * G if G > 32 else 96
        linear, s, z, _ = chosen(32, K, G)
        s = s.half()
        if version == "gemm":
            layer = WQLinear_GEMM.from_linear(linear, 4, G, False, s.T.contiguous(), z.T.contiguous())
            got = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, G)
            assert torch.equal(got.T.float(), linear.weight), (version, G)
        else:
            layer = WQLinear_GEMV.from_linear(linear, 4, G, False, s, z)
        config = AwqConfig(q_group_size=G, version=version)
        told = config.to_dict() if G == 32 else config.to_transformers_dict()
        cases[f"{version}_{G}"] = (layer.state_dict(), linear.weight, told)
    save("autoawq", cases)


def compressed_tensors_09():
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    cases = {}
    for case, options in (
        ("actorder_group", {"N": 16, "K": 128, "G": 32, "act_order": True}),
        ("actorder_group_symmetric", {"N": 16, "K": 128, "G": 64, "act_order": True, "symmetric": True}),
    ):
        linear, s, z, g_idx = chosen(**options)
        symmetric = options.get("symmetric", False)
        args = QuantizationArgs(
            num_bits=4, symmetric=symmetric, strategy="group", group_size=options["G"], actorder="group"
        )
        state = PackedQuantizationCompressor().compress_weight(linear.weight, s, args, (z - 8).to(torch.int8), g_idx)
        state |= {"weight_scale": s, "weight_g_idx": g_idx, "bias": linear.bias}
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json()), "input_activations": None}
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "version": "0.9.4",
            "config_groups": {"group_0": group},
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
        }
        cases[case] = (state, linear.weight, config)
    save("compressed_tensors_09", cases)


if __name__ == "__main__":
    makers = {"gptqmodel": gptqmodel, "autogptq": autogptq, "autoawq": autoawq}
    makers["compressed-tensors-0.9"] = compressed_tensors_09
    makers[sys.argv[1]]()
