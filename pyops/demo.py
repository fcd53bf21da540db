"""`python -m pyops demo`: a pruned and quantized network on real digits, from training to a faster model, in one run.

The network is 1→32→64 channels of 3x3, a max-pool and 9216→128→10. It is trained with `pyops.optim.AdamW`, pruned in
blocks of output channels, fine-tuned with its masks kept, and given to `pyops.Auto`. Accuracy, latency and memory are
compared with PyTorch in eager mode and with torch.compile. The data are scikit-learn's 1 797 scanned digits, enlarged
to 28x28.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyops import optim, prune
from pyops.auto import Auto
from pyops.swap import swap_

SIDE, SPARSITY = 28, 0.9
STEPS = (0.5, 0.75, SPARSITY)
"""The network is pruned in steps, and trained after each."""


@dataclasses.dataclass
class Digits:
    """Images [samples, 1, side, side] in [0, 1] and their labels, split for training and testing."""

    x_train: torch.Tensor
    x_test: torch.Tensor
    y_train: torch.Tensor
    y_test: torch.Tensor


@dataclasses.dataclass
class Performance:
    """One call of a model, without gradients."""

    p50_ms: float
    p95_ms: float
    per_second: float
    """Samples."""
    peak_mib: float | None
    """Its tensors, and what a call takes beside them at most; None where the system does not tell."""


def digits(side: int) -> Digits:
    """scikit-learn's digits, enlarged to `side` x `side` pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    return Digits(*train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels))


def cnn() -> nn.Sequential:
    """The network of the demo; takes images [samples, 1, 28, 28]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def train(
    model: nn.Module,
    data: Digits,
    epochs: int,
    title: str,
    optimizer: torch.optim.Optimizer | None = None,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy,
    after_epoch: Callable[[int], bool | None] = lambda epoch: None,
    batch: int = 64,
) -> list[float]:
    """The mean loss of each epoch. `after_epoch(epoch)` may say True, to stop. Default optimizer: the fused AdamW."""
    from tqdm import tqdm

    optimizer = optimizer or optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    means = []
    model.train()
    for epoch in tqdm(range(epochs), desc=title, unit="epoch", disable=None):
        losses = []
        for chosen in torch.randperm(len(data.x_train)).split(batch):
            optimizer.zero_grad()
            loss = loss_of(model(data.x_train[chosen]), data.y_train[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean().item())
        if after_epoch(epoch):
            break
    model.eval()
    return means


@torch.inference_mode()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the test images that are recognized."""
    return (model(data.x_test).argmax(1) == data.y_test).float().mean().item()


@torch.inference_mode()
def performance(
    models: dict[str, Callable[[Any], Any]], x: torch.Tensor, seconds: float = 1.0
) -> dict[str, Performance]:
    """Of each model on x; they take turns, so that a noisy moment hits all of them."""
    for model in models.values():
        for _ in range(3):
            model(x)
    samples: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds * len(models)
    while time.perf_counter() < end or min(map(len, samples.values())) < 20:
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            samples[name].append((time.perf_counter() - start) * 1e3)
    found = {}
    for name, times in samples.items():
        p50, p95 = torch.tensor(times).quantile(torch.tensor([0.5, 0.95])).tolist()
        found[name] = Performance(p50, p95, len(x) / p50 * 1e3, peak_mib(models[name], x))
    return found


@torch.inference_mode()
def peak_mib(model: Callable[[Any], Any], x: torch.Tensor) -> float | None:
    """The tensors that a module holds and what a call takes beside them at most, in MiB; None where not on Linux."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    held = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())
    try:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left would hide what this one takes
        before = _status_kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        model(x)
        peak = _status_kib("VmHWM")
    except OSError:
        return None
    return held / 2**20 + max(0, peak - before) / 1024


def _status_kib(name: str) -> int:
    return int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def weight_mib(model: nn.Module) -> float:
    """The parameters and buffers that the model holds, in MiB."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / 2**20


def table(rows: dict[str, tuple[Performance, float | None]], first: str) -> str:
    """Performance and accuracy of each model, and its speed over that of `first`."""
    lines = [f"{'':<24}{'p50 ms':>9}{'p95 ms':>9}{'samples/s':>11}{'peak MiB':>10}{'accuracy':>10}{'speed':>8}"]
    for name, (found, share) in rows.items():
        peak = "-" if found.peak_mib is None else f"{found.peak_mib:.1f}"
        right = "-" if share is None else f"{share:.2%}"
        speed = rows[first][0].p50_ms / found.p50_ms
        lines.append(
            f"{name:<24}{found.p50_ms:>9.3f}{found.p95_ms:>9.3f}{found.per_second:>11.0f}{peak:>10}{right:>10}"
            f"{speed:>7.2f}x"
        )
    return "\n".join(lines)


def prune_and_tune(model: nn.Module, data: Digits, epochs: int) -> None:
    """Blocks of 16 output channels of the second convolution and the large linear layer, up to 90 %, in steps."""
    for sparsity in STEPS:
        prune.oc_block(model, sparsity, block=16, filter_fn=lambda layer, name: layer.weight.numel() > 10_000)
        optimizer = optim.AdamW(model.parameters(), lr=1e-3, masks=model)
        train(model, data, epochs, f"fine-tuning at {sparsity:.0%}", optimizer)
    prune.bake_(model)


def plot(batches: dict[str, dict[str, tuple[Performance, float | None]]], path: Path) -> None:
    """Bars of the median latency, a group for each batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    names = list(next(iter(batches.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [j + width * (i - (len(names) - 1) / 2) for j in range(len(batches))]
        bars = axes.bar(at, [rows[name][0].p50_ms for rows in batches.values()], 0.93 * width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(range(len(batches)), list(batches))
    axes.set(ylabel="median latency, ms (log)", yscale="log", title="A digit network, as it was and after pyops.Auto")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def compiled(model: nn.Module) -> Iterator[tuple[str, Callable]]:
    """("torch.compile", the model compiled), or nothing where no compiler is found for it."""
    try:
        function = torch.compile(copy.deepcopy(model))
        with torch.inference_mode():
            function(torch.zeros(1, 1, SIDE, SIDE))
        yield "torch.compile", function
    except Exception as error:  # whatever its backend raises where it lacks a compiler
        print(f"torch.compile does not run here: {type(error).__name__}", file=sys.stderr)


def add_parser(commands: Any) -> None:
    """Add `demo` to the commands of the command line."""
    parser = commands.add_parser(
        "demo", help="train, prune, swap and compare a network on real digits", description=__doc__
    )
    parser.add_argument("--epochs", type=int, default=4, help="of training, and after each pruning; default: 4")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder; default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"pyops demo: {error}; pip install 'pyops-kernels[demo]'", file=sys.stderr)
        return 1
    if args.epochs < 1:
        print(f"pyops demo: --epochs is {args.epochs}; it must be at least 1", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data, dense = digits(SIDE), cnn()
    train(dense, data, args.epochs, "training the dense network")
    small = copy.deepcopy(dense)
    prune_and_tune(small, data, args.epochs)
    pruned = copy.deepcopy(small)

    report = swap_(small, Auto(), example_inputs=data.x_test[:1])
    print(report)
    models = {"dense, eager": dense, **dict(compiled(dense)), "pruned, eager": pruned, "pruned, pyops.Auto": small}
    shares = {name: accuracy(model, data) for name, model in models.items()}
    batches = {}
    for count in (1, 8, 64):
        found = performance(models, data.x_test[:count])
        batches[f"batch {count}"] = rows = {name: (found[name], shares[name]) for name in models}
        print(f"\nbatch {count}, {torch.get_num_threads()} threads\n{table(rows, 'dense, eager')}")
    print(f"\nweights {weight_mib(dense):.2f} -> {weight_mib(small):.2f} MiB")
    print(f"report: {report.save_html(args.out / 'report.html')}")
    plot(batches, args.out / "demo.png")
    print(f"plot:   {args.out / 'demo.png'}")
    return 0
