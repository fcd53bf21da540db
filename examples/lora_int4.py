"""Fine-tune adapters (LoRA) on a network whose weights are int4, on real handwritten digits.

    python examples/lora_int4.py [--epochs 20] [--rank 8]

A network learns scikit-learn's 1 797 scanned digits. Then the scans come in on their side, turned by 90°, of which it
recognizes hardly one. Three ways on are compared: leave the int4 network as it is; train LoRA adapters of PEFT beside
its frozen int4 weights; train all of the fp32 network. Prints the loss of each epoch, the accuracy, and what is held
and trained.
"""

from __future__ import annotations

import argparse
import copy

import peft
import torch
from digits import Digits, accuracy, digits, mlp, train, weight_bytes
from torch import nn

import pyops
import pyops.peft

SIZES = (64, 256, 256, 10)
CONFIG = pyops.Int4Weight(group_size=64)


def on_their_side(data: Digits) -> Digits:
    """The same images, turned by 90°."""
    x_train, x_test = (x.unflatten(1, (8, 8)).rot90(1, (1, 2)).flatten(1) for x in (data.x_train, data.x_test))
    return Digits(x_train, x_test, data.y_train, data.y_test)


def with_adapters(model: nn.Module, rank: int) -> peft.PeftModel:
    """LoRA on every quantized layer of the model."""
    names = [name for name, module in model.named_modules() if isinstance(module, pyops.nn.Int4Linear)]
    return peft.get_peft_model(
        model, pyops.peft.register(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    )


def trained(model: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # layers this small only wait for the others
    upright = digits(8)
    turned = on_their_side(upright)
    dense = mlp(*SIZES)
    train(dense, upright, args.epochs, "upright")
    base = copy.deepcopy(dense)
    print(pyops.swap_(base, CONFIG))
    print(f"upright: fp32 {accuracy(dense, upright):.2%}, int4 {accuracy(base, upright):.2%}")

    adapted = with_adapters(copy.deepcopy(base), args.rank)
    curves = {"int4 + LoRA": train(adapted, turned, args.epochs, "LoRA", lr=1e-2, anneal=True)}
    curves["fp32, all"] = train(dense, turned, args.epochs, "all of fp32", anneal=True)
    print(f"\nmean loss of an epoch on the turned digits\nepoch {''.join(f'{name:>14}' for name in curves)}")
    for epoch, losses in enumerate(zip(*curves.values(), strict=True), 1):
        print(f"{epoch:<6}" + "".join(f"{value:>14.4f}" for value in losses))
    print(f"\n{'turned by 90°':<16}{'accuracy':>10}{'bytes held':>12}{'trained':>10}")
    for name, model in {"int4, frozen": base, "int4 + LoRA": adapted, "fp32, all": dense}.items():
        count = 0 if model is base else trained(model)
        print(f"{name:<16}{accuracy(model, turned):>10.2%}{weight_bytes(model):>12,}{count:>10,}")


if __name__ == "__main__":
    main()
