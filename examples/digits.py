"""Train a small network on real handwritten digits, swap its layers for int8 ones, and show what that did.

    python examples/digits.py [--epochs 15] [--out demo_output]

Prints accuracy before and after, the report of the swap and a latency table, and writes the plot of the latencies. The
data are scikit-learn's 1 797 scanned digits of 8x8 pixels; the larger network sees them enlarged to 28x28.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import pathlib
import time
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

import pyops


@dataclass
class Digits:
    """Images [samples, pixels] in [0, 1] and their labels, split for training and testing."""

    x_train: torch.Tensor
    x_test: torch.Tensor
    y_train: torch.Tensor
    y_test: torch.Tensor


def digits(side: int) -> Digits:
    """scikit-learn's digits, enlarged to `side` x `side` pixels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False).flatten(1)
    labels = torch.tensor(data.target)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return Digits(*parts)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(n_in, n_out)] + ([nn.ReLU()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


def train(
    model: nn.Module, data: Digits, epochs: int, title: str, lr: float = 2e-3, anneal: bool = False
) -> list[float]:
    """Cross-entropy, batches of 64 and the fused AdamW on all that can be trained; the mean loss of each epoch.

    `anneal`: the learning rate falls to 0 along a cosine.
    """
    optimizer = pyops.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs) if anneal else None
    means = []
    for _ in tqdm(range(epochs), desc=f"training {title}", unit="epoch"):
        losses = []
        for batch in torch.randperm(len(data.x_train)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.x_train[batch]), data.y_train[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if scheduler is not None:
            scheduler.step()
        means.append(torch.stack(losses).mean().item())
    return means


@torch.inference_mode()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the test images that are recognized."""
    return (model(data.x_test).argmax(1) == data.y_test).float().mean().item()


@torch.inference_mode()
def latencies_us(models: dict[str, nn.Module], x: torch.Tensor, seconds: float = 0.5) -> dict[str, float]:
    """Median time of a forward pass in µs. The models take turns, so that a noisy moment hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(5):
                model(x)
            samples[name].append((time.perf_counter() - start) / 5 * 1e6)
    return {name: torch.tensor(times).median().item() for name, times in samples.items()}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers that the model holds."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def plot(rows: list[tuple[str, int, float, float]], path: pathlib.Path) -> None:
    """Bars of the latency before and after, a group for each (network, batch)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for offset, column, label, color in ((-0.2, 2, "fp32 nn.Linear", "#9aa5b1"), (0.2, 3, "int8 pyops", "#1f7a5c")):
        bars = axes.bar(
            [i + offset for i in range(len(rows))], [r[column] for r in rows], 0.38, label=label, color=color
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.set_xticks(range(len(rows)), [f"{name}\nbatch {batch}" for name, batch, *_ in rows], fontsize=8)
    axes.set(ylabel="forward pass, µs (log)", yscale="log", title="Digit networks before and after pyops.swap_")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo_output"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    print(pyops.info())

    rows: list[tuple[str, int, float, float]] = []
    for side, sizes in ((8, (64, 64, 32, 10)), (28, (784, 256, 128, 10))):
        name = "-".join(map(str, sizes))
        data, dense = digits(side), mlp(*sizes)
        train(dense, data, args.epochs, name)
        dense.eval()
        swapped = copy.deepcopy(dense)
        report = pyops.swap_(swapped, pyops.Int8Dynamic(), example_inputs=data.x_test[:64])
        print(f"\n== {name} on {side}x{side} digits ==")
        print(report)
        before, after = accuracy(dense, data), accuracy(swapped, data)
        print(f"accuracy  {before:.2%} before, {after:.2%} after, on {len(data.x_test)} test images")
        print(f"weights   {weight_bytes(dense):,} bytes before, {weight_bytes(swapped):,} after")
        for batch in (1, 64, 450):
            times = latencies_us({"fp32": dense, "int8": swapped}, data.x_test[:batch])
            rows.append((name, batch, times["fp32"], times["int8"]))

    print(f"\nmedian time of a forward pass, {torch.get_num_threads()} threads")
    print(f"{'network':<16}{'batch':>6}{'fp32 µs':>10}{'int8 µs':>10}{'speedup':>9}")
    for name, batch, fp32, int8 in rows:
        print(f"{name:<16}{batch:>6}{fp32:>10.1f}{int8:>10.1f}{fp32 / int8:>8.2f}x")
    path = args.out / "digits_latency.png"
    plot(rows, path)
    print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
