"""Samples of how long a call takes.

Warm: the same layer again and again; its weights are in the cache if they fit. Cold: equal layers with weights of their
own in turn, as in a network, so many that their weights exceed the caches (bounded by `MAX_LAYERS`). Rotation rather
than reading a big buffer between calls: that would also evict the library's own code and let its threads fall asleep,
which no network does.

A sample is a batch of calls long enough for the clock (20 µs on CPU, a CUDA graph on a GPU), divided by their number.
A call that uses something up (a step that zeroes its gradients) is a sample of its own, restored in between outside the
time. Nothing is dropped; the reader takes medians and percentiles.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

SAMPLE_NS = 20_000
WARM_UP_NS = 3_000_000
"""Calls before the first sample of a turn: threads wake up, the clock and the branch predictor settle."""
MAX_LAYERS = 64
GPU_GRAPH_CALLS = 32


def layers_for(weight_bytes: int, cold_bytes: int) -> int:
    """How many layers together hold `cold_bytes` of weights; at least 2, so that no call follows on its own."""
    return max(2, min(MAX_LAYERS, math.ceil(cold_bytes / max(weight_bytes, 1))))


def samples_ms(
    calls: Sequence[Call], budget_ms: float, device: torch.device, prepare: Sequence[Call] | None = None
) -> list[float]:
    """Milliseconds a call, sampled for about `budget_ms`, going round `calls`; at least two samples.

    `prepare` has a function for each call, which runs before it and is not timed; on a GPU that raises ValueError.
    """
    if device.type != "cuda":
        return _cpu_samples(calls, budget_ms, prepare)
    if prepare:
        raise ValueError("calls that need preparing cannot be timed as one CUDA graph")
    return _cuda_samples(calls, budget_ms)


def quick_ms(call: Call, device: torch.device, budget_ms: float = 10.0) -> float:
    """A rough median, to choose between variants."""
    samples = sorted(samples_ms([call], budget_ms, device))
    return samples[len(samples) // 2]


def _cpu_samples(calls: Sequence[Call], budget_ms: float, prepare: Sequence[Call] | None) -> list[float]:
    clock = time.perf_counter_ns
    turn = itertools.cycle(calls)
    prepare_next = itertools.cycle(prepare or [lambda: None])
    start = clock()
    warm_up_calls = 0
    while warm_up_calls < 2 or clock() - start < WARM_UP_NS:
        next(prepare_next)()
        next(turn)()
        warm_up_calls += 1
    batch = 1 if prepare else max(1, math.ceil(SAMPLE_NS * warm_up_calls / (clock() - start)))
    samples: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = clock() + int(budget_ms * 1e6)
        while len(samples) < 2 or clock() < deadline:
            todo = list(itertools.islice(turn, batch))
            next(prepare_next)()
            before = clock()
            for call in todo:
                call()
            samples.append((clock() - before) / batch / 1e6)
    finally:
        if collecting:
            gc.enable()
    return samples


def _cuda_samples(calls: Sequence[Call], budget_ms: float) -> list[float]:
    """One CUDA graph that goes round the calls, replayed between events: launch overhead of the host is not timed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()  # compile and autotune before capture
    torch.cuda.synchronize()
    count = math.ceil(GPU_GRAPH_CALLS / len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), count):
            call()
    graph.replay()
    torch.cuda.synchronize()
    samples: list[float] = []
    deadline = time.perf_counter() + budget_ms / 1e3
    while len(samples) < 2 or time.perf_counter() < deadline:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / count)
    return samples
