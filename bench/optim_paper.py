"""Lion and LAMB, which torch.optim lacks, as their papers have them, in plain torch: a tensor at a time, or foreach.

Chen et al. 2023, arXiv:2302.06675 (Lion), You et al. 2020, arXiv:1904.00962 (LAMB, with bias correction). Written to be
fast as far as such operations allow: no copy that can be avoided, scalars folded together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class _Paper(torch.optim.Optimizer):
    names: tuple[str, ...]
    """States of a parameter."""

    def __init__(self, params: list[Tensor], *, foreach: bool, **hyper: object) -> None:
        super().__init__(params, hyper)
        self._foreach, self._steps = foreach, 0

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        self._steps += 1
        for group in self.param_groups:
            params = group["params"]
            for p in params:
                if not self.state[p]:
                    self.state[p].update({name: torch.zeros_like(p) for name in self.names})
            states = [[self.state[p][name] for p in params] for name in self.names]
            grads = [p.grad for p in params]
            if self._foreach:
                self._all(params, grads, *states, group)
            else:
                for p, g, *own in zip(params, grads, *states, strict=True):
                    self._one(p, g, *own, group)


class Lion(_Paper):
    """p ← p - lr·(sign(β₁m + (1-β₁)g) + weight_decay·p);   m ← β₂m + (1-β₂)g."""

    names = ("exp_avg",)

    def _one(self, p: Tensor, g: Tensor, m: Tensor, h: dict) -> None:
        beta1, beta2 = h["betas"]
        p.mul_(1 - h["lr"] * h["weight_decay"])
        p.add_(m.lerp(g, 1 - beta1).sign_(), alpha=-h["lr"])
        m.lerp_(g, 1 - beta2)

    def _all(self, p: list[Tensor], g: list[Tensor], m: list[Tensor], h: dict) -> None:
        beta1, beta2 = h["betas"]
        torch._foreach_mul_(p, 1 - h["lr"] * h["weight_decay"])
        u = torch._foreach_lerp(m, g, 1 - beta1)
        torch._foreach_sign_(u)
        torch._foreach_add_(p, u, alpha=-h["lr"])
        torch._foreach_lerp_(m, g, 1 - beta2)


class LAMB(_Paper):
    """m, v as in Adam;   u = m̂/(√v̂ + ε) + weight_decay·p;   p ← p - lr·‖p‖/‖u‖·u, the ratio 1 where a norm is 0."""

    names = ("exp_avg", "exp_avg_sq")

    def _corrections(self, h: dict) -> tuple[float, float]:
        """1 - β₁ᵗ and √(1 - β₂ᵗ)."""
        beta1, beta2 = h["betas"]
        return 1 - beta1**self._steps, math.sqrt(1 - beta2**self._steps)

    def _one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, h: dict) -> None:
        beta1, beta2 = h["betas"]
        c1, c2 = self._corrections(h)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        u = v.sqrt().mul_(c1 / c2).add_(c1 * h["eps"])
        torch.div(m, u, out=u).add_(p, alpha=h["weight_decay"])
        p.add_(u, alpha=-h["lr"] * self._ratio(float(p.norm()), float(u.norm())))

    def _all(self, p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], h: dict) -> None:
        beta1, beta2 = h["betas"]
        c1, c2 = self._corrections(h)
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_mul_(root, c1 / c2)
        torch._foreach_add_(root, c1 * h["eps"])
        u = torch._foreach_div(m, root)
        del root
        torch._foreach_add_(u, p, alpha=h["weight_decay"])
        norms = (torch.stack(torch._foreach_norm(tensors)).tolist() for tensors in (p, u))
        torch._foreach_mul_(u, [-h["lr"] * self._ratio(*pair) for pair in zip(*norms, strict=True)])
        torch._foreach_add_(p, u)

    @staticmethod
    def _ratio(p_norm: float, u_norm: float) -> float:
        return p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
