"""Update rules of the optimizers: each once as an equation and, in plain PyTorch, as the reference of its kernels.

All act elementwise on a parameter p, its gradient g and its states. `step` is t, counted from 1. What depends on t and
on the hyper-parameters alone is computed here in double precision, for every backend, by `Rule.coefficients`; a kernel
sees a few numbers c0, c1, … for each parameter, in the order in which `Rule.update` unpacks them.

Before a rule, p ← decay·p (decoupled weight decay, decay = 1 - lr·weight_decay) or g ← g + weight_decay·p (L2). After
it, p ← sign(p)·max(|p| - lr·l1, 0), the proximal step of an L1 penalty. LAMB has its own weight decay and scales by
norms of whole tensors. Adafactor, whose states have other shapes, is an op of its own (adafactor.py).

Sources: `torch.optim` (SGD, Adam, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta), Chen et al. 2023,
arXiv:2302.06675 (Lion), You et al. 2020, arXiv:1904.00962 (LAMB).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Number = float | Tensor
"""A float, or a tensor of float64 on a device where steps are counted without the host (`capturable`)."""
Hyper = dict[str, Number]
Update = Callable[[Tensor, Tensor, list[Tensor], tuple], Tensor]


@dataclass(frozen=True)
class Rule:
    """One update rule. Kernels know it by its name."""

    name: str
    states: tuple[str, ...]
    """Tensors of the parameter's shape, by the names that torch gives them."""
    hyper: tuple[str, ...]
    """Hyper-parameters beside those of every rule."""
    coefficients: Callable[[Hyper, dict[str, Number]], tuple]
    """(hyper-parameters, scalars of this step) → c0, c1, …"""
    update: Update
    """(p, g, states, coefficients) → the new p; changes the states in place. All in one dtype, fp32 or fp64."""
    unsigned: tuple[str, ...] = ()
    """States that are never negative: as 8-bit state they take all 256 values."""
    scalars: tuple[str, ...] = ("step",)
    """0-dim tensors that each parameter keeps."""
    advance: Callable[[Hyper, dict[str, Number]], dict[str, Number]] = lambda h, s: {"step": s["step"] + 1}
    """Scalars of the step before → scalars of this step."""
    first: Callable[[tuple], tuple] | None = None
    """Coefficients of a parameter whose state was made in this step, where they differ."""
    decays: bool = False
    """True if the weight decay is part of the update itself: none is applied before it."""
    whole_tensor: bool = False
    """True if the update needs sums over the tensor: it takes several passes."""
    shapes: Callable[[torch.Size], dict[str, tuple[int, ...]]] | None = None
    """Shape of a parameter → those of `states` that it has, with their shapes, where this is not all of them in the
    parameter's shape. Such states are small, and always held wide."""

    def shapes_of(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """The states of a parameter of `shape`, and their shapes."""
        return self.shapes(shape) if self.shapes else dict.fromkeys(self.states, shape)


COMMON = ("lr", "weight_decay", "decoupled", "maximize", "l1", "ema_decay")
"""Hyper-parameters of every rule, in front of its own; `decoupled` and `maximize` are 0 or 1."""


def _sqrt(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def _where(condition: bool | Tensor, x: Number, y: Number) -> Number:
    if isinstance(condition, Tensor):
        return torch.where(condition, x, y)
    return x if condition else y


def _lerp(state: Tensor, x: Tensor, weight: float) -> Tensor:
    return state.add_((x - state).mul_(weight))


def _decay_to_square(state: Tensor, g: Tensor, keep: float, add: float) -> Tensor:
    return state.mul_(keep).addcmul_(g, g, value=add)


# ----------------------------------------------------------------------------------------------------------------- SGD


def _sgd(p, g, states, c):
    """p ← p - lr·g."""
    (lr,) = c
    return p - lr * g


def _sgd_momentum(p, g, states, c):
    """b ← keep·b + add·g;   p ← p - lr·(of_g·g + of_b·b)."""
    lr, keep, add, of_g, of_b = c
    (b,) = states
    b.mul_(keep).add_(g * add)
    return p - lr * (of_g * g + of_b * b)


def _sgd_momentum_coefficients(h, s):
    nesterov = h["nesterov"] != 0
    of_g, of_b = (1.0, h["momentum"]) if nesterov else (0.0, 1.0)
    return h["lr"], h["momentum"], 1 - h["dampening"], of_g, of_b


SGD = Rule(
    "sgd", (), ("momentum", "dampening", "nesterov"), lambda h, s: (h["lr"],), _sgd, scalars=(), advance=lambda h, s: {}
)
SGD_MOMENTUM = Rule(
    "sgd_momentum",
    ("momentum_buffer",),
    ("momentum", "dampening", "nesterov"),
    _sgd_momentum_coefficients,
    _sgd_momentum,
    scalars=(),
    advance=lambda h, s: {},
    first=lambda c: (c[0], 0.0, 1.0, *c[3:]),  # b starts as g
)

# ---------------------------------------------------------------------------------------------------------------- Adam


def _adam_coefficients(h, s):
    t = s["step"]
    step_size = h["lr"] / (1 - h["beta1"] ** t)
    return 1 - h["beta1"], h["beta2"], 1 - h["beta2"], step_size, 1 / _sqrt(1 - h["beta2"] ** t), h["eps"]


def _adam(p, g, states, c):
    """m ← m + (1-β₁)(g-m);   v ← β₂v + (1-β₂)g²;   p ← p - lr/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε)."""
    w1, beta2, w2, step_size, root_correction, eps = c
    m, v = states
    _lerp(m, g, w1)
    _decay_to_square(v, g, beta2, w2)
    return p - step_size * m / (v.sqrt() * root_correction + eps)


def _adam_amsgrad(p, g, states, c):
    """As Adam, with the largest v so far in place of v."""
    w1, beta2, w2, step_size, root_correction, eps = c
    m, v, largest = states
    _lerp(m, g, w1)
    _decay_to_square(v, g, beta2, w2)
    torch.maximum(largest, v, out=largest)
    return p - step_size * m / (largest.sqrt() * root_correction + eps)


_MOMENTS = ("exp_avg", "exp_avg_sq")
_BETAS = ("beta1", "beta2", "eps")
ADAM = Rule("adam", _MOMENTS, _BETAS, _adam_coefficients, _adam, unsigned=("exp_avg_sq",))
ADAM_AMSGRAD = Rule(
    "adam_amsgrad",
    (*_MOMENTS, "max_exp_avg_sq"),
    _BETAS,
    _adam_coefficients,
    _adam_amsgrad,
    unsigned=("exp_avg_sq", "max_exp_avg_sq"),
)

# --------------------------------------------------------------------------------------------------------------- NAdam


def _nadam_mu(h, t):
    return h["beta1"] * (1 - 0.5 * 0.96 ** (t * h["momentum_decay"]))


def _nadam_advance(h, s):
    return {"step": s["step"] + 1, "mu_product": s["mu_product"] * _nadam_mu(h, s["step"] + 1)}


def _nadam_coefficients(h, s):
    t, product = s["step"], s["mu_product"]
    mu, mu_next = _nadam_mu(h, t), _nadam_mu(h, t + 1)
    of_g = h["lr"] * (1 - mu) / (1 - product)
    of_m = h["lr"] * mu_next / (1 - product * mu_next)
    return 1 - h["beta1"], h["beta2"], 1 - h["beta2"], of_g, of_m, 1 / (1 - h["beta2"] ** t), h["eps"]


def _nadam(p, g, states, c):
    """m, v as in Adam;   μₜ = β₁(1 - ½·0.96^(tψ)), P = Πμ up to t;
    p ← p - lr((1-μₜ)/(1-P)·g + μₜ₊₁/(1-P·μₜ₊₁)·m) / (√(v/(1-β₂ᵗ)) + ε)."""
    w1, beta2, w2, of_g, of_m, correction, eps = c
    m, v = states
    _lerp(m, g, w1)
    _decay_to_square(v, g, beta2, w2)
    return p - (of_g * g + of_m * m) / ((v * correction).sqrt() + eps)


NADAM = Rule(
    "nadam",
    _MOMENTS,
    (*_BETAS, "momentum_decay"),
    _nadam_coefficients,
    _nadam,
    unsigned=("exp_avg_sq",),
    scalars=("step", "mu_product"),
    advance=_nadam_advance,
)

# --------------------------------------------------------------------------------------------------------------- RAdam


def _radam_coefficients(h, s):
    t, beta2 = s["step"], h["beta2"]
    correction2 = 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / correction2
    adaptive = length > 5.0
    safe = _where(adaptive, length, 6.0 + 0 * length)
    most = longest if longest > 5.0 else 6.0  # below, no step is adaptive, and 4 and 2 would divide by zero
    ratio = (safe - 4) * (safe - 2) * most / ((most - 4) * (most - 2) * safe)
    factor = _where(adaptive, _sqrt(abs(ratio)) * _sqrt(correction2), 1.0 + 0 * length)
    step_size = h["lr"] / (1 - h["beta1"] ** t) * factor
    return 1 - h["beta1"], beta2, 1 - beta2, step_size, h["eps"], _where(adaptive, 1.0 + 0 * length, 0.0 * length)


def _radam(p, g, states, c):
    """m, v as in Adam;   p ← p - lr/(1-β₁ᵗ)·rₜ·√(1-β₂ᵗ)·m/(√v + ε) once the variance of v is tractable,
    before it p ← p - lr/(1-β₁ᵗ)·m."""
    w1, beta2, w2, step_size, eps, adaptive = c
    m, v = states
    _lerp(m, g, w1)
    _decay_to_square(v, g, beta2, w2)
    return p - torch.where(
        torch.as_tensor(adaptive, device=p.device) != 0, step_size * m / (v.sqrt() + eps), step_size * m
    )


RADAM = Rule("radam", _MOMENTS, _BETAS, _radam_coefficients, _radam, unsigned=("exp_avg_sq",))

# -------------------------------------------------------------------------------------------------------------- Adamax


def _adamax(p, g, states, c):
    """m as in Adam;   u ← max(β₂u, |g| + ε);   p ← p - lr/(1-β₁ᵗ) · m/u."""
    w1, beta2, step_size, eps = c
    m, u = states
    _lerp(m, g, w1)
    torch.maximum(u.mul_(beta2), g.abs().add_(eps), out=u)
    return p - step_size * m / u


ADAMAX = Rule(
    "adamax",
    ("exp_avg", "exp_inf"),
    _BETAS,
    lambda h, s: (1 - h["beta1"], h["beta2"], h["lr"] / (1 - h["beta1"] ** s["step"]), h["eps"]),
    _adamax,
    unsigned=("exp_inf",),
)

# ------------------------------------------------------------------------------------------------------------- RMSprop


def _rmsprop_root(g, v, mean, alpha, w, eps):
    _decay_to_square(v, g, alpha, w)
    if mean is None:
        return v.sqrt() + eps
    _lerp(mean, g, w)
    return (v - mean * mean).clamp_(min=0).sqrt_() + eps


def _rmsprop(p, g, states, c):
    """v ← αv + (1-α)g²;   p ← p - lr·g/(√v + ε)."""
    alpha, w, lr, eps, _ = c
    return p - lr * g / _rmsprop_root(g, states[0], None, alpha, w, eps)


def _rmsprop_momentum(p, g, states, c):
    """v ← αv + (1-α)g²;   b ← momentum·b + g/(√v + ε);   p ← p - lr·b."""
    alpha, w, lr, eps, momentum = c
    v, b = states
    b.mul_(momentum).add_(g / _rmsprop_root(g, v, None, alpha, w, eps))
    return p - lr * b


def _rmsprop_centered(p, g, states, c):
    """As RMSprop with √max(v - a², 0) for √v, where a ← a + (1-α)(g-a)."""
    alpha, w, lr, eps, _ = c
    v, a = states
    return p - lr * g / _rmsprop_root(g, v, a, alpha, w, eps)


def _rmsprop_centered_momentum(p, g, states, c):
    """Both."""
    alpha, w, lr, eps, momentum = c
    v, a, b = states
    b.mul_(momentum).add_(g / _rmsprop_root(g, v, a, alpha, w, eps))
    return p - lr * b


def _rmsprop_rule(suffix: str, more: tuple[str, ...], update: Update) -> Rule:
    return Rule(
        "rmsprop" + suffix,
        ("square_avg", *more),
        ("alpha", "eps", "momentum"),
        lambda h, s: (h["alpha"], 1 - h["alpha"], h["lr"], h["eps"], h["momentum"]),
        update,
        unsigned=("square_avg",),
    )


RMSPROP = _rmsprop_rule("", (), _rmsprop)
RMSPROP_MOMENTUM = _rmsprop_rule("_momentum", ("momentum_buffer",), _rmsprop_momentum)
RMSPROP_CENTERED = _rmsprop_rule("_centered", ("grad_avg",), _rmsprop_centered)
RMSPROP_CENTERED_MOMENTUM = _rmsprop_rule(
    "_centered_momentum", ("grad_avg", "momentum_buffer"), _rmsprop_centered_momentum
)

# --------------------------------------------------------------------------------------------------- Adagrad, Adadelta


def _adagrad(p, g, states, c):
    """v ← v + g²;   p ← p - lr/(1 + (t-1)·lr_decay) · g/(√v + ε)."""
    step_size, eps = c
    (v,) = states
    v.addcmul_(g, g)
    return p - step_size * g / (v.sqrt() + eps)


ADAGRAD = Rule(
    "adagrad",
    ("sum",),
    ("lr_decay", "eps"),
    lambda h, s: (h["lr"] / (1 + (s["step"] - 1) * h["lr_decay"]), h["eps"]),
    _adagrad,
    unsigned=("sum",),
)


def _adadelta(p, g, states, c):
    """v ← ρv + (1-ρ)g²;   δ = √(u + ε)/√(v + ε)·g;   u ← ρu + (1-ρ)δ²;   p ← p - lr·δ."""
    rho, w, lr, eps = c
    v, u = states
    _decay_to_square(v, g, rho, w)
    delta = (u + eps).sqrt_() / (v + eps).sqrt_() * g
    _decay_to_square(u, delta, rho, w)
    return p - lr * delta


ADADELTA = Rule(
    "adadelta",
    ("square_avg", "acc_delta"),
    ("rho", "eps"),
    lambda h, s: (h["rho"], 1 - h["rho"], h["lr"], h["eps"]),
    _adadelta,
    unsigned=("square_avg", "acc_delta"),
)

# ----------------------------------------------------------------------------------------------------------------- Lion


def _lion(p, g, states, c):
    """p ← p - lr·sign(β₁m + (1-β₁)g);   m ← β₂m + (1-β₂)g."""
    lr, beta1, w1, beta2, w2 = c
    (m,) = states
    d = beta1 * m + w1 * g
    p = p - lr * torch.where(d.isnan(), d, d.sign())  # torch's sign of NaN is 0
    m.mul_(beta2).add_(g * w2)
    return p


LION = Rule(
    "lion",
    ("exp_avg",),
    ("beta1", "beta2"),
    lambda h, s: (h["lr"], h["beta1"], 1 - h["beta1"], h["beta2"], 1 - h["beta2"]),
    _lion,
)

# ----------------------------------------------------------------------------------------------------------------- LAMB


def _lamb_coefficients(h, s):
    t = s["step"]
    correct = h["bias_correction"] != 0
    c1, c2 = (1 - h["beta1"] ** t, 1 - h["beta2"] ** t) if correct else (1.0, 1.0)
    wd = h["weight_decay"]
    return 1 - h["beta1"], h["beta2"], 1 - h["beta2"], 1 / c1, 1 / _sqrt(c2), h["eps"], h["lr"], wd


def lamb_direction(p, g, states, c):
    """m, v as in Adam;   u = m/(1-β₁ᵗ) / (√v/√(1-β₂ᵗ) + ε) + weight_decay·p."""
    w1, beta2, w2, correction1, root_correction2, eps, _, wd = c
    m, v = states
    _lerp(m, g, w1)
    _decay_to_square(v, g, beta2, w2)
    return m * correction1 / (v.sqrt() * root_correction2 + eps) + wd * p


def trust_ratio(p_norm: Tensor, u_norm: Tensor) -> Tensor:
    """‖p‖/‖u‖, 1 where either is zero."""
    return torch.where((p_norm > 0) & (u_norm > 0), p_norm / u_norm, torch.ones_like(p_norm))


def _lamb(p, g, states, c):
    """u as in `lamb_direction`;   p ← p - lr·‖p‖/‖u‖·u, over the whole tensor; the ratio is 1 where a norm is 0."""
    u = lamb_direction(p, g, states, c)
    ratio = trust_ratio(p.double().norm(), u.double().norm()).to(p.dtype)
    return p - c[6] * ratio * u


LAMB = Rule(
    "lamb",
    _MOMENTS,
    (*_BETAS, "bias_correction"),
    _lamb_coefficients,
    _lamb,
    unsigned=("exp_avg_sq",),
    decays=True,
    whole_tensor=True,
)

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        *(SGD, SGD_MOMENTUM, ADAM, ADAM_AMSGRAD, NADAM, RADAM, ADAMAX),
        *(RMSPROP, RMSPROP_MOMENTUM, RMSPROP_CENTERED, RMSPROP_CENTERED_MOMENTUM),
        *(ADAGRAD, ADADELTA, LION, LAMB),
    )
}
"""Every rule that acts through `optim_step`, by name."""
