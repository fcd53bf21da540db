"""Run the real launchers on CPU tensors and compile every launch for a GPU that is not there; nothing is executed.

    python tests/gpuless/compile_only.py cuda 90 report.json

Triton asks its active driver for the device, its limits and a launcher. The driver here answers for the wanted target
and its launcher does nothing, so grids, heuristics, pruning and autotuning run as they would on that GPU, every config
that survives pruning is compiled, and the machine code can be inspected. A process can hold one target only.

Every op has a function here that calls its launchers, and is named in OPS: that is all a new one needs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import torch
import triton
from cuda_tools import inspect_cubin
from optim_args import CODED, Args, make
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from pyops.kernels import (
    fp8_linear,
    int4_linear,
    int8_linear,
    int8_weight_linear,
    matmul,
    optim,
    optim_norm,
    optim_numbers,
    quantize,
    sparse_conv2d,
)
from pyops.ops import SparseWeight
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.optim_rules import RULES

# Shared memory that one program may use, and multiprocessors: A100, H100, B200.
DEVICE_LIMITS = {80: (166912, 108), 90: (232448, 132), 100: (232448, 148)}


class _Device:
    """What Triton asks of a device."""

    def __init__(self, arch: int):
        self.max_shared_mem, self.multiprocessors = DEVICE_LIMITS[arch]

    def get_device_properties(self, device):
        return {
            "max_shared_mem": self.max_shared_mem,
            "multiprocessor_count": self.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def load_binary(self, name, binary, shared_bytes, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module):
        pass


class _NoLaunch:
    """A launcher that checks the grid against the limits of CUDA and drops the launch."""

    def __init__(self, source, metadata):
        pass

    def __call__(self, grid_x, grid_y, grid_z, stream, function, *args):
        for size, limit in ((grid_x, 2**31), (grid_y, 2**16), (grid_z, 2**16)):
            assert 0 < size < limit, (grid_x, grid_y, grid_z)


class CompileOnlyDriver(DriverBase):
    """The driver of a device that accepts every launch and does nothing."""

    def __init__(self, target: GPUTarget):
        self.target = target
        self.utils = _Device(target.arch)
        self.launcher_cls = _NoLaunch

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return "void*"

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return run_once

    def get_empty_cache_for_benchmark(self):
        return torch.empty(1)

    def clear_cache(self, cache):
        pass


def run_once(call, quantiles=None):
    """Stands in for an autotuner's `do_bench`: every config is run, none is timed."""
    call()
    return [0.0, 0.0, 0.0]


# -------------------------------------------------------------------------------------------------------------- report


def _jit_function(kernel):
    """The JITFunction inside autotuners and heuristics."""
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    return kernel


def compiled_variants(kernel) -> list[dict]:
    """One row for each variant of `kernel` that this process compiled."""
    function = _jit_function(kernel)
    rows = []
    for compiled in function.device_caches[0][0].values():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            inspected = inspect_cubin(cubin.name)
        constants = {function.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
        rows.append(
            {
                "kernel": function.__name__,
                "constants": constants,
                "types": dict(compiled.src.signature),
                "attributes": {function.arg_names[path[0]]: value for path, value in compiled.src.attrs.items()},
                "warps": compiled.metadata.num_warps,
                "stages": compiled.metadata.num_stages,
                "shared_bytes": compiled.metadata.shared,
                "ptx": compiled.asm["ptx"],
                **inspected,
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------------------- cases


def compile_int8_linear() -> list:
    """Every config, then the largest with what costs registers: activations, fp32 outputs, ragged and strided edges."""
    tuner = int8_linear._int8_linear_kernel
    tuner.do_bench = run_once
    tuner.cache_results = False  # they are no timings

    def call(M, N, K, dtype=torch.bfloat16, activation="none", strided=False, x_scale=None):
        x, weight, w_scale = torch.zeros(M, K, dtype=dtype), torch.zeros(N, K, dtype=torch.int8), torch.ones(N)
        residual = torch.zeros(N, M, dtype=dtype).T if strided else torch.zeros(M, N, dtype=dtype)
        int8_linear.int8_linear(x, weight, w_scale, torch.zeros(N), residual, activation, x_scale)

    for M in (16, 32, 64, 1024):
        call(M, 4096, 4096)
    call(16, 65536, 4112, activation="gelu")  # no split, and K ends inside a step
    call(1024, 4097, 4096, activation="gelu")  # rows of y are not aligned

    tuner.configs = int8_linear.CONFIGS[-1:]
    call(1024, 4096, 4112, torch.float16, "silu", x_scale=torch.ones(1))
    for activation in ("none", "gelu", "tanh"):
        call(1024, 4096, 4096, torch.float32, activation)
    call(1024, 4096, 4096, activation="gelu")
    call(1024, 4096, 4096, strided=True)
    for activation in ACTIVATIONS:
        call(16, 4096, 4096, activation=activation)  # in the reduction, which compiles quickly
    for K in (8, 256, 4096, 16384, 20480):
        int8_linear.quantize_rows(torch.zeros(64, K, dtype=torch.bfloat16))
    int8_linear.quantize_rows(torch.zeros(64, 4096), torch.ones(64))
    int8_linear.quantize_rows(torch.zeros(64, 40960), torch.ones(1), torch.ones(40960))
    return [tuner, quantize._quantize_kernel, matmul._reduce_kernel]


def compile_int4_linear() -> list:
    """Every config in its dtype, then what costs registers: activations, odd N, fp32 scales, all groups, both zeros."""
    tuner = int4_linear._int4_linear_kernel
    tuner.do_bench = run_once
    tuner.cache_results = False
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def call(M, G, dtype, N=4096, K=4096, activation="none", symmetric=False, scale_dtype=bf16, compute="float"):
        x, weight = torch.zeros(M, K, dtype=dtype), torch.zeros(N, K // 2, dtype=torch.uint8)
        groups = -(-K // G) if G > 0 else 1
        scale = torch.ones(N, groups, dtype=scale_dtype)
        zero = None if symmetric else torch.zeros(N, groups, dtype=torch.uint8)
        residual = torch.zeros(N, M, dtype=dtype).T
        int4_linear.int4_linear(x, weight, scale, zero, torch.zeros(N), residual, activation, G, N, None, compute)

    for M in (16, 32, 128):
        call(M, 128, bf16)
    for M in (4, 16, 64):
        call(M, 128, fp32)
    for M in (16, 64):
        call(M, 32, bf16, compute="int8")

    tuner.configs = [config for config in int4_linear.CONFIGS if config.kwargs["BLOCK_K"] == 128][-1:]
    call(128, 128, bf16, N=4097, activation="gelu", compute="int8")
    call(128, 128, bf16, N=4097, K=4128, activation="gelu", scale_dtype=fp32)
    call(128, 32, fp16, symmetric=True, activation="tanh", scale_dtype=fp16)
    for G, dtype in ((32, fp16), (192, bf16)):
        call(300, G, dtype, N=1024, K=1536, scale_dtype=bf16 if G != 32 else fp32, activation="silu")
    if triton.runtime.driver.active.get_current_target().arch == 90:
        call(128, -1, bf16, symmetric=True, compute="int8")
        call(300, -1, fp32, N=1024, K=1536)
        tuner.configs = int4_linear.CONFIGS
        call(16, -1, bf16, N=65536, K=4128, activation="gelu")  # no split, and K ends inside a step
    return [tuner, int4_linear._dequantize_kernel, matmul._reduce_kernel]


def compile_int8_weight_linear() -> list:
    """Every config in its dtype, then what costs registers: activations, odd N, K that ends inside a step."""
    tuner = int8_weight_linear._int8_weight_linear_kernel
    tuner.do_bench = run_once
    tuner.cache_results = False
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def call(M, dtype, N=4096, K=4096, activation="none"):
        x, weight, residual = torch.zeros(M, K, dtype=dtype), torch.zeros(N, K, dtype=torch.int8), torch.zeros(N, M)
        int8_weight_linear.int8_weight_linear(
            x, weight, torch.ones(N), torch.zeros(N), residual.to(dtype).T, activation
        )

    for M in (16, 32, 128):
        call(M, bf16)
    for M in (4, 16, 64):
        call(M, fp32)
    for dtype in (bf16, fp32):
        call(300, dtype, N=256, K=1024)
    tuner.configs = int8_weight_linear.CONFIGS[-1:]
    call(128, fp16, N=4097, K=4112, activation="gelu")
    return [tuner, int8_weight_linear._dequantize_rows_kernel]


def compile_fp8_linear() -> list:
    """Every config by row and by block, then the largest with what costs registers; nothing where there is no e4m3."""
    tuner = fp8_linear._fp8_linear_kernel
    tuner.do_bench = run_once
    tuner.cache_results = False
    fp8_linear.SCALED_MM_M = 1 << 30  # no CPU has time for torch's stand-in of it

    def call(M, N, K, dtype=torch.bfloat16, activation="none", by_block=False, strided=False, x_scale=None):
        w_scale = torch.ones(-(-N // 128), -(-K // 128)) if by_block else torch.ones(N)
        residual = torch.zeros(N, M, dtype=dtype).T if strided else torch.zeros(M, N, dtype=dtype)
        weight = torch.zeros(N, K, dtype=torch.uint8)
        x = torch.zeros(M, K, dtype=dtype)
        fp8_linear.fp8_linear(x, weight, w_scale, torch.zeros(N), residual, activation, x_scale)

    if fp8_linear._capability(None) < fp8_linear.FIRST_FP8:
        call(16, 256, 256)
        assert not compiled_variants(tuner), "the device has no e4m3"
        return []
    for by_block in (False, True):
        for M in (16, 32, 64, 1024):
            call(M, 4096, 4096, by_block=by_block)
        call(16, 65536, 4112, activation="gelu", by_block=by_block)  # no split, and K ends inside a step
        call(1024, 4097, 4096, activation="gelu", by_block=by_block)  # rows of y are not aligned
    tuner.configs = fp8_linear.CONFIGS[-1:]
    for by_block in (False, True):
        for activation in ("none", "gelu", "tanh"):
            call(1024, 4096, 4096, torch.float32, activation, by_block)
        call(1024, 4096, 4112, torch.float16, "silu", by_block)
        call(1024, 4096, 4096, strided=True, by_block=by_block)
        for K in (8, 256, 4096, 16384, 20480):
            fp8_linear.quantize_x(torch.zeros(64, K, dtype=torch.bfloat16), by_block)
    fp8_linear.quantize_x(torch.zeros(64, 4096), False, torch.ones(64))
    return [tuner, quantize._quantize_kernel]


def compile_optim() -> list:
    """Every rule in fp32 (on one target); Adam in every format; what needs most registers; what cannot be wide."""
    bf16, fp32 = torch.bfloat16, torch.float32
    everything = {
        "weight_decay": 0.1,
        "maximize": 1.0,
        "l1": 0.1,
        "masked": True,
        "averaged": True,
        "zero_grad": True,
        "multiplier": torch.ones(()),
        "found_inf": torch.zeros(()),
        "stochastic_rounding": True,
    }

    def call(rule, dtype=fp32, state_dtype=fp32, shape=(5000,), change: Callable = lambda t: t, **options) -> None:
        args: Args = make(rule, (shape,), dtype, state_dtype, **options).map(change)
        args.call(optim.optim_step)

    arch = triton.runtime.driver.active.get_current_target().arch
    for rule in RULES if arch == 90 else ("sgd", "adam", "lamb"):
        call(rule)
    for dtype in (fp32, bf16):
        for state_dtype in (fp32, bf16, CODED):
            call("adam", dtype, state_dtype, weight_decay=0.1, decoupled=1.0, stochastic_rounding=True)
    call("adam", state_dtype=CODED, shape=(500, 144))
    call("adam", change=lambda t: t if t.numel() == 1 else torch.empty(t.numel() + 1, dtype=t.dtype)[1:])
    for state_dtype in (fp32, CODED):
        call("adam_amsgrad", bf16, state_dtype, **everything)
        call("rmsprop_centered_momentum", fp32, state_dtype, **everything)

    optim.on_host = optim_numbers.on_host = lambda t: False  # a capturable step
    call("adam", lr=torch.ones(()), found_inf=torch.zeros(()))
    for dtype in (fp32, bf16, torch.float64):
        for first in (0, 1):
            optim_norm.optim_sum_squares([torch.zeros(100000, dtype=dtype)[first:]])
    return [
        optim._optim_step_kernel, optim._trust_ratio_kernel, optim_norm._sum_squares_kernel, optim_norm._add_up_kernel
    ]  # fmt: skip


def compile_sparse_conv2d() -> list:
    """Every config, then the largest that suit, with what costs registers: small blocks, narrow edges, fp32."""
    tuner = sparse_conv2d._sparse_conv2d_kernel
    tuner.do_bench = run_once
    tuner.cache_results = False

    def call(block, size=32, C=128, O=128, R=3, stride=1, groups=1, dtype=torch.bfloat16, last=True, act="relu"):
        form = torch.channels_last if last else torch.contiguous_format
        weight = SparseWeight.from_dense(
            torch.ones(O, C // groups, R, R, dtype=dtype), pattern=f"block{block}", groups=groups
        )
        fields = weight.values, weight.crow_indices, weight.col_indices, weight.shape, weight.block
        window = (stride, stride), (R // 2,) * 4, (1, 1), groups
        x = torch.zeros(1, C, size, size, dtype=dtype).contiguous(memory_format=form)
        y = torch.zeros(1, O, -(-size // stride), -(-size // stride), dtype=dtype).contiguous(memory_format=form)
        if act == "dx":
            sparse_conv2d.sparse_conv2d_dx(y, *fields, x.shape, *window)
        else:
            sparse_conv2d.sparse_conv2d(x, *fields, torch.zeros(O), y, *window, act)

    call(64)
    call(64, size=7)

    tuner.configs = sparse_conv2d.CONFIGS[-1:]
    call(16)
    call(32, act="dx", stride=2)
    call(64, C=256, groups=2, R=1, dtype=torch.float16, act="silu")
    tuner.configs = sparse_conv2d.CONFIGS[-2:-1]  # half as many accumulators a thread, each stored by itself
    call(64, last=False, act="gelu")
    call(64, C=24, O=72, act="gelu")
    tuner.configs = sparse_conv2d.CONFIGS[2:3]  # what shared memory has room for in fp32
    call(16, dtype=torch.float32)
    call(64, dtype=torch.float32, act="dx")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    call(64, dtype=torch.float32)
    return [tuner]


OPS = (
    compile_int4_linear,
    compile_int8_linear,
    compile_int8_weight_linear,
    compile_fp8_linear,
    compile_optim,
    compile_sparse_conv2d,
)
"""Each compiles what its launchers launch, and returns the kernels to look at."""


def _to_json(value: object) -> object:
    """Of constants that are no numbers or strings."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.__name__ if isinstance(value, triton.runtime.JITFunction) else str(value)


def main(backend: str, arch: str, report_path: str) -> None:
    """Compile every case for one target; write the tuning table and a row for each compiled variant as JSON."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")
    triton.runtime.driver.set_active(CompileOnlyDriver(GPUTarget(backend, int(arch), 32)))
    configs = {
        f"{op.__name__.rsplit('.')[-1]}_configs": [
            {**config.kwargs, "warps": config.num_warps, "stages": config.num_stages} for config in op.CONFIGS
        ]
        for op in (int4_linear, int8_linear, int8_weight_linear, fp8_linear, sparse_conv2d)
    }
    rows = [row for compile_op in OPS for kernel in compile_op() for row in compiled_variants(kernel)]
    report = {**configs, "rows": rows}
    pathlib.Path(report_path).write_text(json.dumps(report, default=_to_json))


if __name__ == "__main__":
    main(*sys.argv[1:])
