"""Who runs the pruned ResNet-50: plain PyTorch, the same with folded normalizations, and ours."""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pyops.bench.case import Inputs
from pyops.bench.peers import Instance, Peer

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class _Model(Peer):
    module, package, devices = "transformers", "transformers", ("cpu", "cuda")
    fold = True

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {name: lambda form=form: self._instance(inputs, form) for name, form in FORMATS.items()}

    def _instance(self, inputs: Inputs, memory_format: torch.memory_format) -> Instance:
        import copy

        import pyops

        with torch.inference_mode(False), torch.no_grad():
            x = inputs["x"].to(memory_format=memory_format)
            model = copy.deepcopy(inputs["model"]).to(memory_format=memory_format)
            if self.fold:
                pyops.fold_batch_norm_(model, x)
            note = self.finish(model, x)
        return Instance(lambda: model(x), lambda result: result.logits, note=lambda: note)

    def finish(self, model: nn.Module, x: torch.Tensor) -> str:
        """Make the model ready, in place; a remark about it."""
        import pyops

        pyops.prune.bake_(model)
        return ""


class Pyops(_Model):
    """Folded, then swapped: each layer sparse where that is faster, with the additions and activations behind it."""

    name, role = "pyops", "ours"
    runs = "pyops.fold_batch_norm_, pyops.swap_ with Sparse(fuse_residuals=True, cache=False); NCHW or channels_last"

    @classmethod
    def missing(cls, device: str) -> str | None:
        import pyops

        if not hasattr(pyops, "Sparse"):
            return "this build has no pyops.Sparse"
        return super().missing(device)

    def finish(self, model: nn.Module, x: torch.Tensor) -> str:
        import pyops

        before_mib = _reset_peak_mib()
        began = time.perf_counter()
        report = pyops.swap_(model, pyops.Sparse(fuse_residuals=True, cache=False), example_inputs=x)
        seconds = time.perf_counter() - began
        peak_mib = _peak_mib()
        pyops.prune.bake_(model)  # the layers that stayed dense
        sparse = sum(row.choice.startswith("sparse") for row in report.rows)
        grown = "" if before_mib is None or peak_mib is None else f", {peak_mib - before_mib:.0f} MiB more at its peak"
        return f"{sparse} of {len(report.rows)} layers sparse; swap_ took {seconds:.1f} s{grown}"


class TorchEager(_Model):
    """Plain PyTorch, its masks baked in."""

    name, role, fold = "torch-eager", "baseline", False
    runs = "the model as it is, fp32; NCHW or channels_last"


class TorchFolded(_Model):
    """Plain PyTorch without its normalizations."""

    name = "torch-folded"
    runs = "the model after pyops.fold_batch_norm_, dense, fp32; NCHW or channels_last"


def _status_mib(field: str) -> float | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) / 1024 if found else None
    return None


def _reset_peak_mib() -> float | None:
    """Let the peak of this process's memory start again from what it holds now; that, or None if it cannot."""
    with contextlib.suppress(AttributeError):  # glibc has it: what was freed would hide what is taken
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_mib("VmRSS")


def _peak_mib() -> float | None:
    return _status_mib("VmHWM")


PEERS: list[type[Peer]] = [Pyops, TorchEager, TorchFolded]
