"""What `pyops.ops.int4_linear` refuses, and how it says so."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import randn

from pyops import ops
from pyops.ops.int4_weight import pack_nibbles


def bad(**changes):
    arguments = {
        "x": randn(3, 70),
        "w_q": pack_nibbles(torch.ones(5, 70)),
        "w_scale": torch.ones(5, 3),
        "w_zero": torch.ones(5, 3, dtype=torch.uint8),
        "bias": randn(5),
        "residual": randn(3, 5),
        "group_size": 32,
        **changes,
    }
    return arguments


def packed(N=5, K=70, G=32):
    w_q, w_scale, _ = ops.quantize_int4(randn(N, K), G)
    return dict(zip(("w_q", "w_scale", "w_zero"), ops.pack_int4(w_q, w_scale, None, K, G), strict=True))


BYTES = torch.ones(5, 35, dtype=torch.uint8)
BAD = {
    "x is a list": (TypeError, r"x must be a tensor, got list", {"x": [1.0]}),
    "x is fp64": (TypeError, r"x has dtype torch\.float64; allowed", {"x": torch.ones(3, 70, dtype=torch.float64)}),
    "x is 0-dim": (ValueError, r"x must be \[\.\.\., K\]", {"x": torch.ones(())}),
    "x has another K": (ValueError, r"w_q is \(5, 35\); K=72 needs \[N, 36\]", {"x": torch.ones(3, 72)}),
    "x is on meta": (ValueError, r"bias is on cpu, x on meta", {"x": torch.ones(3, 70, device="meta")}),
    "w_q is int8": (TypeError, r"w_q has dtype torch\.int8; allowed: torch\.uint8", {"w_q": BYTES.to(torch.int8)}),
    "w_q is None": (TypeError, r"w_q must be a tensor, got NoneType", {"w_q": None}),
    "w_q holds one value in a byte": (ValueError, r"w_q is \(5, 70\)", {"w_q": BYTES.repeat(1, 2)}),
    "w_q is 1-D": (ValueError, r"w_q is \(35,\)", {"w_q": BYTES[0]}),
    "w_scale is fp64": (TypeError, r"w_scale has dtype torch\.float64", {"w_scale": torch.ones(5, 3).double()}),
    "w_scale has too few groups": (
        ValueError,
        r"w_scale is \(5, 2\); N=5, K=70 and group_size=32 need \(5, 3\)",
        {"w_scale": torch.ones(5, 2)},
    ),
    "w_zero is int32": (
        TypeError,
        r"w_zero has dtype torch\.int32; allowed: torch\.uint8",
        {"w_zero": torch.ones(5, 3, dtype=torch.int32)},
    ),
    "w_zero is for other groups": (ValueError, r"w_zero is \(5, 1\)", {"w_zero": BYTES[:, :1]}),
    "w_zero is on meta": (ValueError, r"w_zero is on meta, w_q on cpu", {"w_zero": BYTES[:, :3].to("meta")}),
    "group_size is 48": (ValueError, r"group_size is 48; allowed: 32, a multiple of 64, or -1", {"group_size": 48}),
    "group_size is 0": (ValueError, r"group_size is 0; allowed", {"group_size": 0}),
    "group_size is a float": (TypeError, r"group_size must be an int, got float", {"group_size": 32.0}),
    **cases.BAD_EPILOGUES,
    "unknown compute": (ValueError, r"compute='fp8' is not one of auto, int8, float", {"compute": "fp8"}),
    "order is int64": (TypeError, r"order must be an int32 tensor, got torch\.int64", {"order": torch.arange(70)}),
    "order is short": (ValueError, r"order is \(69,\); x with K=70", {"order": torch.arange(69).int()}),
    "order repeats": (ValueError, r"order is no permutation", {"order": torch.zeros(70, dtype=torch.int32)}),
    "order is out of range": (ValueError, r"order is no permutation", {"order": torch.arange(1, 71).int()}),
    "out_features is another N": (ValueError, r"out_features is 6, w_q has 5 rows", {"out_features": 6}),
    "packed without out_features": (TypeError, r"out_features must be given for a packed w_q", packed()),
    "packed for another N": (
        ValueError,
        r"packed w_q is \(1, 17, 128\); N=33, K=70 and group_size=32 need \(2, 17, 128\)",
        {**packed(), "out_features": 33},
    ),
    "packed for another group_size": (
        ValueError,
        r"packed w_scale is \(1, 4, 32\).* need \(1, 2, 32\)",
        {**packed(), "out_features": 5, "group_size": 64},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    error, message, changes = BAD[name]
    with pytest.raises(error, match=message):
        ops.int4_linear(**bad(**changes))


@cases.needs_native
def test_the_op_itself_checks_what_it_would_read_beyond():
    """Called past the public function, as an exported program does."""
    w = ops.pack_int4(*ops.quantize_int4(randn(33, 70), 32), 70, 32)
    op = torch.ops.pyops.int4_linear.default
    good = [randn(3, 70), *w, None, None, "none", 32, 33, None, "int8"]
    assert op(*good).shape == (3, 33)
    for at, value in (
        (0, randn(3, 200)),
        (1, w[0][:1]),
        (2, w[1][:, :2]),
        (3, w[2][:1]),
        (4, randn(32)),
        (5, randn(2, 33)),
        (7, 64),
        (7, 0),
        (8, 65),
        (9, torch.arange(60).int()),
        (9, torch.full((70,), 70, dtype=torch.int32)),
        (10, "fp8"),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            op(*good[:at], value, *good[at + 1 :])


def test_quantize_int4_refuses():
    for error, message, arguments in (
        (TypeError, "w must be a floating-point tensor, got list", ([1.0],)),
        (TypeError, r"w must be a floating-point tensor, got torch\.int8", (torch.ones(2, 3, dtype=torch.int8),)),
        (ValueError, r"w must be \[N, K\], got shape \(3,\)", (torch.ones(3),)),
        (ValueError, "w holds NaN or Inf", (torch.tensor([[1.0, torch.nan]]),)),
        (ValueError, "group_size is 100", (torch.ones(2, 3), 100)),
    ):
        with pytest.raises(error, match=message):
            ops.quantize_int4(*arguments)
    with pytest.raises(ValueError, match="method='gptq' is not one of rtn, mse"):
        ops.quantize_int4(torch.ones(2, 3), method="gptq")
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        ops.quantize_int4(torch.full((2, 3), 1e9), scale_dtype=torch.float16)
