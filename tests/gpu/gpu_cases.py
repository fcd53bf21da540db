"""What the tests on a GPU share: dtypes, shapes of linear layers, their inputs, CUDA graphs."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from pyops import ops

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Decode, prefill, tall, wide, ragged in every direction, and K beyond what one program quantizes in registers.
SHAPES = [
    (1, 4096, 4096),
    (1, 1, 1),
    (7, 1000, 513),
    (16, 3072, 768),
    (33, 129, 2050),
    (64, 4096, 4096),
    (65, 515, 1024),
    (512, 768, 3072),
    (1000, 2304, 64),
    (2049, 255, 144),
    (3, 64, 65536),
]


def make_int8(M, N, K, dtype=torch.bfloat16, seed=0):
    """x, q_w, w_scale, bias, residual on the CPU, of a layer with outputs of order one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).to(dtype)
    q_w, w_scale = ops.quantize_int8(torch.randn(N, K, generator=g) / max(K, 1) ** 0.5)
    return x, q_w, w_scale, torch.randn(N, generator=g), torch.randn(M, N, generator=g).to(dtype)


def views(x):
    """Of x [48, 64]: in batches, transposed, expanded, every third row, one row and none."""
    batches = x.view(6, 8, 64)
    return batches, batches.transpose(0, 1), x[:, :1].expand(-1, 64), x[::3], x[0], x[:0]


def on_gpu(*tensors):
    """The tensors among the arguments on the GPU, the rest as it is."""
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in tensors]


def needs_memory(gib: int) -> None:
    """Skip the test that calls it where less GPU memory is free."""
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


def needs_two_devices() -> None:
    """Skip the test that calls it where there is one device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


Result = TypeVar("Result")


def cuda_graph(
    run: Callable[[], Result], warm_up: Callable[[], object] | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `run` and what that returned; first `warm_up`, else `run`, compiles and tunes on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (warm_up or run)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
