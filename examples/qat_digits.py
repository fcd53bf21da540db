"""int4 after training against int4 in training, on real handwritten digits.

    python examples/qat_digits.py [--seeds 6] [--epochs 60]

The network is narrow, 64-16-16-16-10: of a wide one, rounding to int4 after training costs nothing measurable on these
data. Each is trained in fp32; then it is rounded as it is, and it is trained on for half as long, once with fake
quantization and once in fp32, which is what the recovery has to be held against. Prints the accuracy on scikit-learn's
450 held-out digits for each seed, and their mean.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from digits import Digits, accuracy, digits, mlp, train

import pyops

SIZES = (64, 16, 16, 16, 10)
CONFIG = pyops.Int4Weight(group_size=32)


def compare(data: Digits, seed: int, epochs: int, config: pyops.Config = CONFIG) -> dict[str, float]:
    """Accuracy of one network in each of the ways."""
    torch.manual_seed(seed)
    dense = mlp(*SIZES)
    train(dense, data, epochs, f"fp32, seed {seed}", lr=5e-3, anneal=True)
    rounded, prepared, longer = copy.deepcopy(dense), copy.deepcopy(dense), copy.deepcopy(dense)
    pyops.swap_(rounded, config)
    pyops.prepare_qat_(prepared, config)
    for model, title in ((prepared, "with fake quantization"), (longer, "on in fp32")):
        train(model, data, epochs // 2, title, lr=5e-3, anneal=True)
    found = {"fp32": dense, "rounded": rounded, "QAT": prepared, "fp32, on": longer}
    rates = {name: accuracy(model, data) for name, model in found.items()}
    pyops.convert_(prepared)
    rates["QAT, converted"] = accuracy(prepared, data)
    return rates


def main() -> None:
    """Run it for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)  # layers this small only wait for the others
    data = digits(8)
    rows = [compare(data, seed, args.epochs) for seed in range(args.seeds)]
    names = list(rows[0])
    print(f"\naccuracy in %, {CONFIG}\nseed  " + "".join(f"{name:>16}" for name in names))
    for seed, row in enumerate(rows):
        print(f"{seed:<6}" + "".join(f"{row[name]:>16.2%}" for name in names))
    print("mean  " + "".join(f"{statistics.mean(row[name] for row in rows):>16.2%}" for name in names))


if __name__ == "__main__":
    main()
