"""What all optimizers share: a class beside this one adds the names of its hyper-parameters, and their defaults.

A step collects the tensors of each group and device into a `Call` (collect.py), finds the global norm of the gradients
where that is asked for (scaling.py), and hands every call to the op `pyops::optim_step` (work.py; pyops/ops/optim.py),
which does the rest in one pass. On the CPU the calls are kept as a table of pointers while nothing moves (table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops import optim_codec as codec
from pyops.ops.optim import optim_step_op
from pyops.ops.optim_rules import COMMON, Rule
from pyops.optim import checkpoint, ema
from pyops.optim.collect import Call, Collector
from pyops.optim.masks import Masks
from pyops.optim.options import StepOptions, check_implementation, check_number, parse
from pyops.optim.scaling import scaling
from pyops.optim.state import check_param
from pyops.optim.table import Table
from pyops.optim.work import Calls, Work


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: a `torch.optim.Optimizer` whose step is one pass over memory.

    A subclass names its `rules`, says in `_rule` which of them a group follows, and passes defaults whose keys are
    those of torch.optim; they hold every hyper-parameter of the rule by its name (`betas` holds beta1 and beta2).

    `step` has the signature and the effects of torch's. It reads `grad_scale` and `found_inf`, which
    `torch.amp.GradScaler` sets: a step with Inf or NaN is skipped, and gradients stay scaled in memory. `grad_norm` is
    the global norm of the last step's unscaled gradients, fp32 [], or None where neither `max_grad_norm` nor
    `error_if_nonfinite` is set. Of DTensor parameters (FSDP2) each rank steps its shard.
    """

    rules: ClassVar[tuple[Rule, ...]]
    """Every rule of this class: their states are those that a checkpoint may hold."""
    decoupled: ClassVar[bool] = False
    """Where groups do not say: True if weight decay acts on the parameter and not on the gradient."""
    tables: ClassVar[type[Table]] = Table
    """What keeps the calls from step to step."""
    takes_sparse: ClassVar[bool] = False
    takes_complex: ClassVar[bool] = True
    sparse_hint: ClassVar[str] = ""
    """What to use instead, for the error about sparse gradients."""
    _step_supports_amp_scaling = True  # GradScaler reads it

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: StepOptions) -> None:
        check_implementation(defaults)
        self.options, l1, masks = parse(type(self).__name__, options)
        self.grad_norm: Tensor | None = None
        self._masks = Masks(masks)
        self._table: Table | None = None
        super().__init__(params, {**defaults, "l1": l1} if l1 else defaults)  # without l1, the keys are torch's

    def _rule(self, group: dict[str, Any]) -> Rule:
        return self.rules[0]

    def _initial(self, name: str, p: Tensor) -> complex:
        """The value with which a state or scalar of p starts."""
        return 1.0 if name == "mu_product" else 0.0

    def _run(self, call: Call, multiplier: Tensor | None, found_inf: Tensor | None, key: int) -> None:
        """Have the op step the parameters of `call`."""
        o = self.options
        hyper, lr = self._hyper(call)
        optim_step_op(
            *(call.rule.name, call.params, call.grads, call.states, call.scalars, hyper, call.scales, call.ema),
            *(call.masks, call.first, lr, multiplier, found_inf, o.zero_grad, o.stochastic_rounding, key, call.stream),
        )

    def _sparse_step(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """The step of a parameter whose gradient is sparse, with the sign and scale of g already applied."""
        raise NotImplementedError

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Parameters that the options do not fit raise ValueError, and the group is not added."""
        if isinstance(param_group, dict):
            check_number("l1", param_group.get("l1", 0.0))
            if self.options.random:
                param_group.setdefault("rounding_step", 0)  # for checkpoints, which load what they find here
        super().add_param_group(param_group)
        try:
            for p in param_group["params"]:
                check_param(p, self.options.state_dtype)
        except ValueError:
            self.param_groups.pop()
            raise

    # ------------------------------------------------------------------------------------------------------- the step

    @torch._disable_dynamo  # a compiled training step breaks its graph here, as at the steps of torch.optim
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned here.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        if "capturable" in self.defaults:
            self._check_capture()
        collector = Collector(self)
        try:
            work = self._work(collector)
            given = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            multiplier, found_inf, self.grad_norm = scaling(work, self.options, *given)
            skip = self._skips(work.calls, found_inf, collector)
        except BaseException:
            self._take_back(collector)
            raise
        if skip:
            self._take_back(collector)
        else:
            work.step(self, multiplier, found_inf, self._next_key())
        # The op leaves the gradients of a step that it skips; on a device the host does not know whether it did.
        unknown = found_inf is not None and found_inf.device.type != "cpu"
        if self.options.zero_grad and (skip or unknown):
            for p in (p for call in work.calls for p in call.originals):
                p.grad.zero_()

    def _work(self, collector: Collector) -> Work:
        """Every parameter that has a gradient, with all that belongs to it: as in the last step, or collected anew."""
        if self._table is None or not self._table.holds(self):
            self._table = None
            self._masks.refresh()
            calls = collector.calls()
            self._table = self.tables.of(self, calls)
            return self._table or Calls(calls)
        return self._table

    def _take_back(self, collector: Collector) -> None:
        """Leave no state of a step that does not happen."""
        if collector.made:
            self._table = None
            collector.unmake()

    def _check_capture(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()  # its name before torch 2.12

    def _skips(self, calls: list[Call], found_inf: Tensor | None, collector: Collector) -> bool:
        """True if the step is known not to happen. On a device the op finds out, without the host waiting for it."""
        if found_inf is None:
            return False
        on_host = found_inf.device.type == "cpu" or bool(collector.made) or any(call.sparse for call in calls)
        return on_host and found_inf.item() != 0

    def _next_key(self) -> int:
        """32 random bits for this step; the count of steps is kept in all groups, if any bits are drawn."""
        if not self.options.random:
            return 0
        count = max(group.get("rounding_step", 0) for group in self.param_groups) + 1
        for group in self.param_groups:
            group["rounding_step"] = count
        seed = self.options.seed
        return codec.mix(codec.mix(codec.mix(seed >> 32) ^ (seed & codec.MASK32)) ^ (count & codec.MASK32))

    def _hyper(self, call: Call) -> tuple[list[float], Tensor | None]:
        """The op's `hyper` and `lr`. A learning rate on a device stays there."""
        group = call.group
        lr, on_device = group["lr"], None
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            lr, on_device = 0.0, lr.detach().reshape(()).to(call.device)
        values = {
            **group,
            "lr": lr,
            "decoupled": group.get("decoupled_weight_decay", self.decoupled),
            "maximize": group.get("maximize", False),
            "l1": group.get("l1", 0.0),
            "ema_decay": self.options.ema_decay or 0.0,
        }
        if "betas" in group:
            values["beta1"], values["beta2"] = group["betas"]
        return [number(values[name]) for name in (*COMMON, *call.rule.hyper)], on_device

    # ------------------------------------------------------------------------------------ averages, checkpoints, copies

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within `with optimizer.averaged_parameters():` the parameters hold their averages (see `ema_decay`).

        They are put back at the end, after an exception, too. Raises RuntimeError if there are no averages.
        """
        with ema.averaged_parameters(self):
            yield

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of this class or of its namesake in torch.optim.

        States keep their precision: they are held in the format that `state_dtype` says, whatever the dtypes of the
        checkpoint and of the parameters. A checkpoint that does not fit raises ValueError and changes nothing.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        with torch.no_grad():
            state, groups = checkpoint.read(self, state_dict)
        self._masks.unsettle()
        self.__setstate__({"state": state, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @torch.no_grad()
    def torch_state_dict(self) -> dict[str, Any]:
        """`state_dict()` in exactly torch.optim's form: 8-bit and bf16 states as fp32, and no keys of pyops."""
        return checkpoint.torch_form(self.state_dict())

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: as torch, and the options."""
        return {**super().__getstate__(), "options": self.options, "_masks": self._masks, "grad_norm": self.grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch; groups of older versions get the defaults of newer keys."""
        defaults = dict(state.get("defaults") or self.defaults)
        super().__setstate__(state)
        self.defaults = defaults  # torch adds "differentiable", which some classes do not have
        self._table = None
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)


def number(value: float | Tensor) -> float:
    """`value` as a float."""
    return float(value.item() if isinstance(value, Tensor) else value)
