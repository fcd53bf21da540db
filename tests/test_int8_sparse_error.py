"""How far `pyops::int8_sparse_conv2d` may be from the float convolution: half a step of x's and of w's rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import FLOATS, randn, sparse_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyops import ops
from pyops.ops.sparse_weight import PATTERNS

pytestmark = pytest.mark.usefixtures("poison")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_error_bound(data):
    """|Δy| ≤ s_x/2 · Σ|w| + s_w/2 · Σ|x| + s_x s_w/4 · K, the largest sums that any output has, and one rounding."""

    def draw(label, *choices):
        return data.draw(st.sampled_from(choices), label=label)

    groups, pattern, dtype = draw("groups", 1, 2), draw("pattern", *PATTERNS), draw("dtype", *FLOATS)
    O, Cg, k = groups * draw("O/groups", 1, 5, 18), draw("C/groups", 1, 4, 7), draw("kernel", 1, 3)
    seed, keep = draw("seed", *range(30)), draw("kept", 0.05, 0.4, 1.0)
    weight = sparse_weight(O, Cg, k, k, keep=keep, seed=seed, pattern=pattern, groups=groups)
    x = randn(draw("N", 1, 3), groups * Cg, 9, 11, dtype=dtype, seed=seed, scale=draw("scale", 1e-3, 1.0, 100.0))
    options = {"stride": draw("stride", 1, 2), "padding": draw("padding", 0, 1), "dilation": draw("dilation", 1, 2)}
    q, s_w = ops.quantize_sparse(weight)
    y = ops.int8_sparse_conv2d(x, q, s_w, **options)
    wide, w = x.double(), weight.to_dense().double()
    exact = F.conv2d(wide, w, groups=groups, **options)
    s_x = wide.abs().amax((1, 2, 3)).view(-1, 1, 1, 1) / 127
    s_w = s_w.double().view(1, -1, 1, 1)
    kept = weight.mask().double()
    of_x = F.conv2d(torch.ones_like(wide), w.abs(), groups=groups, **options)
    of_w = F.conv2d(wide.abs(), kept, groups=groups, **options)
    allowed = s_x / 2 * of_x + s_w / 2 * of_w + s_x * s_w / 4 * kept.sum((1, 2, 3)).view(1, -1, 1, 1)
    rounding = 2 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    excess = (y.double() - exact).abs() - 1.001 * allowed - rounding
    assert excess.max() <= 0, f"{excess.max():.3g} beyond the bound"
