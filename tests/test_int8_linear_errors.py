"""What `pyops.ops.int8_linear` and its helpers refuse, and how they say so."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import randint, randn

from pyops import ops


def problem(M, N, K):
    return randn(M, K), randint(-127, 127, N, K), torch.ones(N)


def bad(**changes):
    x, q_w, w_scale = problem(3, 5, 7)
    arguments = {"x": x, "w_q": q_w, "w_scale": w_scale, "bias": randn(5), "residual": randn(3, 5), **changes}
    return arguments


BAD = {
    "x is a list": (TypeError, r"x must be a tensor, got list", {"x": [1.0]}),
    "x is int": (TypeError, r"x has dtype torch\.int64; allowed", {"x": torch.ones(3, 7, dtype=torch.int64)}),
    "x is fp64": (TypeError, r"x has dtype torch\.float64", {"x": torch.ones(3, 7, dtype=torch.float64)}),
    "x is 0-dim": (ValueError, r"x must be \[\.\.\., K\]", {"x": torch.ones(())}),
    "x has another K": (ValueError, r"w_q is \(5, 7\); x with K=8 and w_scale with N=5", {"x": torch.ones(3, 8)}),
    "x is on meta": (ValueError, r"is on cpu, x on meta", {"x": torch.ones(3, 7, device="meta")}),
    "w_q is float": (TypeError, r"w_q has dtype torch\.float32", {"w_q": torch.ones(5, 7)}),
    "w_q is None": (TypeError, r"w_q must be a tensor, got NoneType", {"w_q": None}),
    "w_q is 1-D": (ValueError, r"w_q", {"w_q": torch.ones(7, dtype=torch.int8)}),
    "w_q is transposed": (ValueError, r"w_q is \(7, 5\)", {"w_q": torch.ones(7, 5, dtype=torch.int8)}),
    "packed w_q of another size": (
        ValueError,
        r"packed w_q is \(2, 17, 128\).* need \(1, 17, 128\)",
        {"w_q": ops.pack_int8(torch.ones(33, 7, dtype=torch.int8))},
    ),
    "w_scale is bf16": (
        TypeError,
        r"w_scale has dtype torch\.bfloat16",
        {"w_scale": torch.ones(5, dtype=torch.bfloat16)},
    ),
    "w_scale is 2-D": (ValueError, r"w_scale must be \[N\]", {"w_scale": torch.ones(5, 1)}),
    "w_scale is short": (ValueError, r"w_scale with N=4", {"w_scale": torch.ones(4)}),
    **cases.BAD_EPILOGUES,
    "x_scale of two": (ValueError, r"x_scale has 2 elements; expected 1 or 3", {"x_scale": torch.ones(2)}),
    "x_scale is int": (TypeError, r"x_scale has dtype torch\.int64", {"x_scale": torch.tensor(1)}),
    "x_scale is zero": (ValueError, r"x_scale is 0\.0; it must be finite", {"x_scale": 0.0}),
    "x_scale is negative": (ValueError, r"x_scale is -1\.0", {"x_scale": torch.tensor([1.0, -1.0, 1.0])}),
    "x_scale is NaN": (ValueError, r"x_scale is nan", {"x_scale": float("nan")}),
    "x is a list beside a number": (TypeError, r"x must be a tensor", {"x": [1.0], "x_scale": 1.0}),
    "x_scale is text": (TypeError, r"x_scale must be a tensor, got str", {"x_scale": "1"}),
    "smooth is short": (ValueError, r"smooth is \(6,\); x with K=7 needs \(7,\)", {"smooth": torch.ones(6)}),
    "smooth is bf16": (
        TypeError,
        r"smooth has dtype torch\.bfloat16",
        {"smooth": torch.ones(7, dtype=torch.bfloat16)},
    ),
    "smooth holds a zero": (ValueError, r"smooth is 0\.0; it must be finite", {"smooth": torch.arange(7.0)}),
    "smooth holds Inf": (ValueError, r"smooth is inf", {"smooth": torch.full((7,), torch.inf)}),
    "smooth is on meta": (ValueError, r"smooth is on meta", {"smooth": torch.ones(7, device="meta")}),
    "K would overflow": (
        ValueError,
        r"x has K=132105; allowed: up to 132104",
        {"x": torch.ones(3, 132105), "w_q": torch.ones(5, 132105, dtype=torch.int8)},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    error, message, changes = BAD[name]
    with pytest.raises(error, match=message):
        ops.int8_linear(**bad(**changes))


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        ([1.0], TypeError, "w must be a floating-point tensor, got list"),
        (torch.ones(2, 2, dtype=torch.int8), TypeError, r"got torch\.int8"),
        (torch.ones(4), ValueError, r"w must be \[N, K\]"),
        (torch.tensor([[1.0, torch.nan]]), ValueError, "NaN or Inf"),
        (torch.tensor([[1.0, torch.inf]]), ValueError, "NaN or Inf"),
    ],
    ids=str,
)
def test_bad_weights_to_quantize(w, error, message):
    with pytest.raises(error, match=message):
        ops.quantize_int8(w)


@pytest.mark.parametrize("q_w", [torch.ones(2, 2), torch.ones(2, dtype=torch.int8), None], ids=["float", "1-D", "None"])
def test_bad_weights_to_pack(q_w):
    with pytest.raises((TypeError, ValueError), match="w_q"):
        ops.pack_int8(q_w)


@cases.needs_native
def test_the_kernel_checks_too():
    """Callers of torch.ops meet the kernel's own checks: the stable ABI brings them as RuntimeError."""
    x, q_w, w_scale = problem(3, 5, 7)
    for arguments in ((x, q_w[:, :6], w_scale), (x, q_w, w_scale.double()), (x.double(), q_w, w_scale)):
        with pytest.raises(RuntimeError, match="int8_linear"):
            torch.ops.pyops.int8_linear(*arguments)


def test_unpack_refuses_another_shape():
    with pytest.raises(ValueError, match=r"packed is \(2, 33, 128\); N=40 and K=500 need"):
        ops.unpack_int8(ops.pack_int8(torch.ones(33, 70, dtype=torch.int8)), 40, 500)


def test_kernel_refuses_tensors_of_other_devices():
    """The op itself, past the checks of the public function: no pointer of another device reaches a kernel."""
    x, q_w, w_scale = problem(3, 5, 7)
    with pytest.raises(RuntimeError):
        torch.ops.pyops.int8_linear(x, q_w, w_scale, torch.ones(5, device="meta")).sum().item()
