"""Who else steps: PyTorch in its three implementations, the papers' rules in plain torch, torchao's 8-bit state."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyops.bench import optim_paper
from pyops.bench.case import Inputs
from pyops.bench.optim import (
    CLASSES,
    EMA_DECAY,
    HYPER,
    LOSS_SCALE,
    OptimCase,
    advance_gradient_,
    plain_optimizer,
    sample,
)
from pyops.bench.peers import Instance, Peer


@dataclass
class Stepper:
    """What is timed, and what it works on."""

    optimizer: torch.optim.Optimizer
    step: Callable[[], object]
    averages: Callable[[], list[Tensor]] = field(default=list)


class _Optimizer(Peer):
    devices = ("cpu", "cuda")

    def stepper(self, case: OptimCase, params: list[Tensor]) -> Stepper:
        """The optimizer of these parameters, whose gradients are set."""
        raise NotImplementedError

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {"": lambda: self._build(inputs)}

    def _build(self, inputs: Inputs) -> Instance:
        """Steps on the very tensors of `inputs`: there is no room for many copies."""
        case, grads = inputs["case"], inputs["grads"]
        params = [torch.nn.Parameter(p) for p in inputs["params"]]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        stepper = self.stepper(case, params)
        # What backward would leave: scaled, and there again after a step has zeroed it.
        source = [g * LOSS_SCALE for g in grads] if case.loop else grads

        def prepare() -> None:
            torch._foreach_copy_(grads, source)

        def check() -> Tensor:
            start = sample(params)
            for step in range(case.check_steps):
                if step:
                    for g in source:
                        advance_gradient_(g)
                if case.loop:
                    prepare()
                stepper.step()
            update = sample(params) - start
            if not case.loop:
                return update
            return torch.cat([update, sample(stepper.averages()) - start, sample(grads)])

        def note() -> str:
            held = sum(_bytes(value) for state in stepper.optimizer.state.values() for value in state.values())
            return f"{held / case.dims['parameters']:.2f} B of state a parameter"

        narrow = case.state_dtype != "float32"
        return Instance(
            stepper.step, check=check, prepare=prepare if case.loop else None, note=note if narrow else None
        )


def _bytes(value: object) -> int:
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes


# --------------------------------------------------------------------------------------------------------------- ours


class Pyops(_Optimizer):
    """The optimizers, as a user calls them."""

    name, role = "pyops", "ours"
    runs = "pyops.optim, one call for all that a case does"

    @classmethod
    def missing(cls, device: str) -> str | None:
        found = importlib.util.find_spec("pyops.optim")
        if found and hasattr(importlib.import_module("pyops.optim"), "AdamW"):
            return super().missing(device)
        return "this build has no pyops.optim"

    def stepper(self, case: OptimCase, params: list[Tensor]) -> Stepper:
        from pyops import optim

        options: dict[str, object] = {"state_dtype": case.state_dtype}
        if case.dtype == torch.bfloat16:
            options["stochastic_rounding"] = True
        if case.loop:
            options |= {"max_grad_norm": case.max_norm, "ema_decay": EMA_DECAY, "zero_grad": True}
        optimizer = getattr(optim, CLASSES[case.rule])(params, **HYPER[case.rule], **options)
        if not case.loop:
            return Stepper(optimizer, optimizer.step)
        device = params[0].device
        scale, found_inf = torch.tensor(LOSS_SCALE, device=device), torch.tensor(0.0, device=device)

        def step() -> None:
            optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # as a GradScaler hands them over
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf

        return Stepper(optimizer, step, lambda: [optimizer.state[p]["ema"] for p in params])


# -------------------------------------------------------------------------------------------------------------- torch


class _Torch(_Optimizer):
    implementation: tuple[str, bool]
    """Argument of the optimizer."""
    narrow = False
    """Also in cases of narrow state, where it keeps its own."""
    rules: Iterable[str]

    @classmethod
    def covers(cls, case: OptimCase) -> bool:
        return case.rule in cls.rules and (cls.narrow or case.state_dtype == "float32")

    def stepper(self, case: OptimCase, params: list[Tensor]) -> Stepper:
        name, value = self.implementation
        optimizer = plain_optimizer(case.rule, params, **{name: value})
        if not case.loop:
            return Stepper(optimizer, optimizer.step)
        grads, averages = [p.grad for p in params], [p.detach().clone() for p in params]
        device = params[0].device
        found_inf, inverse = torch.tensor(0.0, device=device), torch.tensor(1 / LOSS_SCALE, device=device)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
        values = [p.detach() for p in params]
        fresh = True

        def step() -> None:
            nonlocal fresh
            found_inf.zero_()
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inverse)
            torch.nn.utils.clip_grad_norm_(params, case.max_norm)
            if not found_inf.item():
                optimizer.step()
            if fresh:
                torch._foreach_copy_(averages, values)  # as AveragedModel starts
            else:
                average(averages, values, None)
            fresh = False
            optimizer.zero_grad(set_to_none=False)

        return Stepper(optimizer, step, lambda: averages)


TORCH_RULES = tuple(rule for rule, name in CLASSES.items() if not hasattr(optim_paper, name))
PAPER_RULES = tuple(rule for rule in CLASSES if rule not in TORCH_RULES)


class TorchFused(_Torch):
    """PyTorch's own kernels, a parallel region for each tensor."""

    name, narrow, rules = "torch-fused", True, ("sgd", "adamw", "adagrad")
    runs = "torch.optim, fused=True; around it GradScaler's unscaling, clip_grad_norm_, a foreach average, zero_grad"
    implementation = ("fused", True)


class TorchForeach(_Torch):
    """PyTorch, all tensors in one call of each operation."""

    name, runs, rules = "torch-foreach", "torch.optim, foreach=True; around it the same", TORCH_RULES
    implementation = ("foreach", True)


class TorchLoop(_Torch):
    """PyTorch's default on a CPU, a tensor at a time."""

    name, role, rules = "torch-loop", "baseline", TORCH_RULES
    runs = "torch.optim, foreach=False, the default on CPU; around it the same"
    implementation = ("foreach", False)


class PaperForeach(_Torch):
    """What torch.optim lacks, in torch._foreach operations."""

    name, runs, rules = "paper-foreach", "bench/optim_paper.py, torch._foreach operations", PAPER_RULES
    implementation = ("foreach", True)


class PaperLoop(_Torch):
    """What torch.optim lacks, a tensor at a time."""

    name, runs, rules = "paper-loop", "bench/optim_paper.py, a tensor at a time", PAPER_RULES
    implementation = ("foreach", False)


class TorchAO(_Optimizer):
    """The 8-bit state of PyTorch's quantization library, compiled by Inductor."""

    name, role, module, package = "torchao", "figure", "torchao", "torchao"
    devices = ("cpu",)
    runs = "torchao.optim.AdamW8bit, compiled"
    excluded = "narrow state is measured against fused fp32, which is faster"

    @classmethod
    def covers(cls, case: OptimCase) -> bool:
        return case.rule == "adamw" and case.state_dtype == "int8"

    def stepper(self, case: OptimCase, params: list[Tensor]) -> Stepper:
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit(params, **HYPER[case.rule])
        return Stepper(optimizer, optimizer.step)


PEERS: list[type[Peer]] = [Pyops, TorchFused, TorchForeach, TorchLoop, PaperForeach, PaperLoop, TorchAO]
