"""Train a network on real handwritten digits with torch.optim and with pyops.optim, and compare the curves.

    python examples/optim.py [--epochs 12] [--seeds 5] [--out demo_output]

Every variant starts from the same weights and sees the same batches: AdamW of torch in fp32, then the fused one in
fp32, with bf16 state, with 8-bit state, and with bf16 parameters rounded stochastically (beside torch's bf16
parameters). Prints the final loss over seeds and the bytes of state, and writes optim_convergence.png and .json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from digits import Digits, digits, mlp
from torch import nn
from tqdm import tqdm

import pyops

SIZES = (784, 256, 128, 10)
LR = 1e-3


@dataclass(frozen=True)
class Variant:
    """An optimizer, and the dtype of the parameters that it trains."""

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32


VARIANTS = {
    "torch fp32": Variant(lambda ps: torch.optim.AdamW(ps, lr=LR)),
    "pyops fp32": Variant(lambda ps: pyops.optim.AdamW(ps, lr=LR)),
    "pyops bf16 state": Variant(lambda ps: pyops.optim.AdamW(ps, lr=LR, state_dtype="bfloat16")),
    "pyops int8 state": Variant(lambda ps: pyops.optim.AdamW(ps, lr=LR, state_dtype="int8")),
    "torch bf16 parameters": Variant(lambda ps: torch.optim.AdamW(ps, lr=LR), torch.bfloat16),
    "pyops bf16 parameters, stochastic rounding": Variant(
        lambda ps: pyops.optim.AdamW(ps, lr=LR, stochastic_rounding=True), torch.bfloat16
    ),
}


@dataclass
class Run:
    """What one training left behind."""

    curve: list[float]
    """Loss over the whole training set after each epoch."""
    accuracy: float
    """On the test images."""
    state_bytes: float
    """Bytes of optimizer state for each parameter."""


def train(variant: Variant, data: Digits, epochs: int, seed: int) -> Run:
    """Cross-entropy in batches of 64; weights and batches depend on the seed alone."""
    torch.manual_seed(seed)
    model = mlp(*SIZES).to(variant.dtype)
    params = list(model.parameters())
    optimizer = variant.make(params)
    x, x_test = data.x_train.to(variant.dtype), data.x_test.to(variant.dtype)
    curve = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]).float(), data.y_train[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            curve.append(nn.functional.cross_entropy(model(x).float(), data.y_train).item())
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == data.y_test).float().mean().item()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    return Run(curve, accuracy, state / sum(p.numel() for p in params))


def plot(runs: dict[str, list[Run]], path: pathlib.Path) -> None:
    """Mean loss of each variant over epochs; the band is the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    colours = ("#222222", "#1f7a5c", "#2171b5", "#8e44ad", "#c0392b", "#e67e22")
    for (name, group), colour in zip(runs.items(), colours, strict=True):
        curves = torch.tensor([run.curve for run in group])
        epochs = range(1, curves.shape[1] + 1)
        dash = "--" if name.startswith("torch") else "-"
        axes.plot(epochs, curves.mean(0), dash, color=colour, label=name, linewidth=1.6)
        axes.fill_between(epochs, curves.amin(0), curves.amax(0), color=colour, alpha=0.1, linewidth=0)
    axes.set(xlabel="epoch", ylabel="training loss (log)", yscale="log")
    axes.set_title(f"AdamW on real digits, {'-'.join(map(str, SIZES))}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo_output"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = digits(28)
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    with tqdm(total=len(VARIANTS) * args.seeds, desc="training", unit="run") as bar:
        for seed in range(args.seeds):
            for name, variant in VARIANTS.items():
                runs[name].append(train(variant, data, args.epochs, seed))
                bar.update()

    print(f"{'AdamW':<44}{'final loss, median (range)':>36}{'accuracy':>10}{'state B/param':>15}")
    for name, group in runs.items():
        losses = [run.curve[-1] for run in group]
        spread = f"{statistics.median(losses):.2e} ({min(losses):.2e} … {max(losses):.2e})"
        accuracy = statistics.mean(run.accuracy for run in group)
        print(f"{name:<44}{spread:>36}{accuracy:>10.2%}{group[0].state_bytes:>15.2f}")
    document = {
        "network": SIZES,
        "lr": LR,
        "runs": {name: [vars(run) for run in group] for name, group in runs.items()},
    }
    path = args.out / "optim_convergence.json"
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    plot(runs, path.with_suffix(".png"))
    print(f"\nplot: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
