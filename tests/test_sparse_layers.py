"""The sparse layers against torch's with the masked weight, for drawn configurations of all options together."""

from __future__ import annotations

import io

import cases
import pytest
import safetensors.torch
import torch
from cases import randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sparse_conv2d import FORMATS
from test_sparse_module import PADDING_MODES, close, make, same
from torch import nn

from pyops.nn import Int8SparseConv2d, SparseConv1d, SparseConv2d
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.sparse_weight import PATTERNS

pytestmark = pytest.mark.usefixtures("poison")


def masked(dense: nn.Module, keep: float, two_of_four: bool, seed: int) -> torch.Tensor:
    """Sets weight and bias; drops weights, whole channels among them. Returns the mask."""
    mask = randn(*dense.weight.shape, seed=seed).sigmoid() < keep
    if two_of_four:
        mask &= (torch.arange(mask.shape[1]) % 4 < 2).view(-1, *(1,) * (mask.dim() - 2))
    if seed % 3 == 0:
        mask[: seed % 7] = False
    with torch.no_grad():
        dense.weight.copy_(randn(*mask.shape, seed=seed) * mask)
        if dense.bias is not None:
            dense.bias.copy_(randn(len(dense.bias), seed=seed))
    return mask


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layer(data):
    """Results, and the gradients of x, weight and bias, against torch in fp64."""

    def draw(label, *choices):
        return data.draw(st.sampled_from(choices), label=label)

    dims, mode, seed = draw("dims", 1, 2, 2), draw("padding_mode", *PADDING_MODES), draw("seed", *range(40))
    groups, pattern = draw("groups", 1, 1, 2, 3), draw("pattern", *PATTERNS)
    C, O = groups * draw("C/groups", 1, 3, 8), groups * draw("O/groups", 1, 5, 17)
    kernel, dilation, stride = (
        tuple(draw(name, *choices) for _ in range(dims))
        for name, choices in (("kernel", (1, 2, 3, 5)), ("dilation", (1, 1, 2, 3)), ("stride", (1, 1, 2, 3)))
    )
    padding = draw("padding", 0, 2, "pair", "same", "valid")
    if padding == "same":
        stride = (1,) * dims
    elif padding == "pair":
        padding = (3, 1)[:dims]
    options = {"stride": stride, "dilation": dilation, "groups": groups, "padding_mode": mode, "padding": padding}
    dtype, activation = draw("dtype", torch.float32, torch.bfloat16), draw("activation", *cases.ACTIVATION_NAMES)
    kinds = (nn.Conv1d, SparseConv1d) if dims == 1 else (nn.Conv2d, SparseConv2d)
    dense = kinds[0](C, O, kernel, bias=draw("bias", True, False), **options)
    mask = masked(dense, draw("kept", 0.0, 0.05, 0.4, 1.0), pattern == "2:4", seed)
    dense.to(dtype)
    layer = kinds[1].from_dense(dense, pattern=pattern, mask=mask, activation=activation)
    assert torch.equal(layer.sparse_weight.mask().view(mask.shape), mask)
    N, sizes = draw("N", 0, 1, 3), tuple(draw("size", 13, 16, 19) for _ in range(dims))
    x = randn(N, C, *sizes, dtype=dtype, seed=seed)
    if dims == 2:
        x = FORMATS[draw("format", *FORMATS)](x)
    reference = dense.double()
    wide = x.double().requires_grad_()
    z = reference(wide)
    residual = randn(*z.shape, dtype=dtype, seed=1) if draw("residual", True, False) else None
    expected = ACTIVATIONS[activation](z if residual is None else z + residual.double())

    x = x.detach().requires_grad_()
    y = layer(x, residual)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    if not N:
        return
    eps, K, exact = torch.finfo(dtype).eps, mask[0].numel(), torch.finfo(torch.float32).eps

    def near(a, b, terms, rough=False):
        """A sum of so many terms in fp32, rounded once; `rough`: of terms that were rounded themselves."""
        largest = (1 + b.abs().max()) * (1 + terms**0.5)
        allowed = 1.01 * eps * b.abs() + 4 * (eps if rough else exact) * largest
        assert ((a.double() - b).abs() <= allowed).all(), (a.double() - b).abs().max() / allowed.max()

    near(y.detach(), expected.detach(), K)
    if dtype == torch.bfloat16 and activation in ("relu6", "hardswish"):
        return  # before 6 and 3, what is rounded may lie behind the bend, as in torch
    grad = randn(*z.shape, dtype=dtype, seed=2)
    y.backward(grad)
    expected.backward(grad.double())
    rough = activation != "none"  # its derivative is rounded to x's dtype
    near(x.grad, wide.grad, O * K / mask.shape[1], rough or mode != "zeros")  # torch's padding sums in x's dtype
    pixels = z.numel() / O
    assert torch.equal(layer.weight, dense.weight.to(dtype))
    kept = layer.values.grad if layer.block_mask is None else layer.values.grad[~layer.block_mask]
    assert layer.block_mask is None or not kept.any(), "what the mask drops has no gradient"
    with torch.no_grad():
        layer.values.copy_(layer.values.grad)
    near(layer.weight, reference.weight.grad * mask, pixels, rough)
    if dense.bias is not None:
        near(layer.bias.grad, reference.bias.grad, pixels, rough)


@pytest.mark.parametrize("there", PATTERNS)
@pytest.mark.parametrize("here", PATTERNS)
def test_files_load_across_patterns(here, there, tmp_path):
    source, x = make(there), randn(2, 12, 6, 6)
    safetensors.torch.save_model(source, str(tmp_path / "layer.safetensors"))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    for state in (safetensors.torch.load_file(tmp_path / "layer.safetensors"), torch.load(file, weights_only=True)):
        layer = SparseConv2d(12, 10, 3, pattern=here)
        layer.load_state_dict(state)
        assert same(layer.state_dict(), source.state_dict())
        close(layer(x), source(x))


def test_int8_layers_in_files_and_exported(tmp_path, fresh_compiler):
    layer = Int8SparseConv2d.from_sparse(make())
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = Int8SparseConv2d(12, 10, 3)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    exported = torch.export.export(layer, (randn(3, 12, 6, 6),), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    for N in (2, 5):
        x = randn(N, 12, 6, 6)
        assert torch.equal(other(x), layer(x))
        close(exported(x), layer(x))
