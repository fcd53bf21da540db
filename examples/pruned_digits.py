"""Prune a convolutional network on real handwritten digits, fine-tune it, and make the pruning pay.

    python examples/pruned_digits.py [--epochs 4] [--out demo_output]

The network is 1→32→64 channels of 3x3, a max-pool and 9216→128→10; the data are scikit-learn's 1 797 scanned digits,
enlarged to 28x28. It is pruned twice: as people do (`l1_unstructured`, 30 % of the convolutions and 40 % of the linear
layers), which runs dense because it does not pay, and in blocks of 16 output channels up to 90 %. Prints the reports of
the swaps, accuracy and latency side by side, and writes the plot.
"""

from __future__ import annotations

import argparse
import copy
import pathlib

import torch
from digits import Digits, accuracy, digits, latencies_us, train, weight_bytes
from torch import nn
from torch.nn.utils import prune

import pyops

SIDE = 28


def cnn() -> nn.Sequential:
    """The network; takes images [samples, 784]."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def prune_as_usual(model: nn.Module) -> None:
    """`torch.nn.utils.prune`: 30 % of the convolutions, 40 % of the linear layers, the smallest weights."""
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            prune.l1_unstructured(layer, "weight", 0.3)
        if isinstance(layer, nn.Linear):
            prune.l1_unstructured(layer, "weight", 0.4)


def prune_in_blocks(model: nn.Module, data: Digits, epochs: int) -> None:
    """Up to 90 % of the second convolution and the large linear layer, in three steps with training between them."""
    for sparsity in (0.5, 0.75, 0.9):
        pyops.prune.oc_block(model, sparsity, block=16, filter_fn=lambda layer, name: layer.weight.numel() > 10_000)
        train(model, data, epochs, f"at {sparsity:.0%} blocks")


def plot(rows: dict[str, dict[str, float]], path: pathlib.Path) -> None:
    """A group of bars for each batch: the dense network and the pruned ones after the swap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    names = list(next(iter(rows.values())))
    for i, name in enumerate(names):
        at = [j + 0.27 * (i - (len(names) - 1) / 2) for j in range(len(rows))]
        bars = axes.bar(at, [times[name] for times in rows.values()], 0.25, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set(ylabel="forward pass, µs (log)", yscale="log", title="A pruned digit network after pyops.swap_")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo_output"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    data, dense = digits(SIDE), cnn()
    train(dense, data, args.epochs, "the dense network")
    usual, blocks = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_as_usual(usual)
    train(usual, data, args.epochs, "at 30 and 40 %")
    prune_in_blocks(blocks, data, args.epochs)

    models = {"dense": dense.eval(), "30/40 % unstructured": usual.eval(), "90 % in blocks of 16": blocks.eval()}
    pruned_accuracy = {name: accuracy(model, data) for name, model in models.items()}
    for name, model in list(models.items())[1:]:
        print(f"\n== {name} ==")
        print(pyops.swap_(model, pyops.Sparse(), example_inputs=data.x_test[:1]))
        pyops.prune.bake_(model)  # what stayed dense: without the mask that it multiplies at every call

    times = {f"batch {n}": latencies_us(models, data.x_test[:n], seconds=1.0) for n in (1, 8)}
    print(f"\n{torch.get_num_threads()} threads; accuracy on {len(data.x_test)} test images; median forward pass")
    print(
        f"{'network':<24}{'pruned':>9}{'swapped':>9}{'bytes':>12}" + "".join(f"{batch + ', µs':>14}" for batch in times)
    )
    for name, model in models.items():
        figures = "".join(f"{row[name]:>14.0f}" for row in times.values())
        print(
            f"{name:<24}{pruned_accuracy[name]:>9.2%}{accuracy(model, data):>9.2%}{weight_bytes(model):>12,}{figures}"
        )
    path = args.out / "pruned_digits.png"
    plot(times, path)
    print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
