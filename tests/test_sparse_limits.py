"""What the sparse layers do at their limits: windows larger than the image, far-reaching taps, no channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import randn, sparse_weight
from torch import nn

from pyops import ops
from pyops.nn import Int8SparseConv2d, SparseConv1d, SparseConv2d, SparseLinear

LAYERS = {
    "SparseConv2d": (SparseConv2d, (2, 4, 5, 6)),
    "SparseConv1d": (SparseConv1d, (2, 4, 6)),
    "Int8SparseConv2d": (Int8SparseConv2d, (2, 4, 5, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 9}, r"x has (height 5|width 6) with its padding; the kernel reaches over 9"),
        ({"kernel_size": 9, "padding": 1}, r"x has (height 7|width 8) with its padding; the kernel reaches over 9"),
        ({"kernel_size": 3, "dilation": 10**6}, "the kernel reaches over 2000001"),
        ({"kernel_size": 3, "dilation": 2**40}, "the kernel reaches over 2199023255553"),
    ],
    ids=str,
)
def test_a_window_larger_than_the_image(kind, options, message):
    layer_type, shape = LAYERS[kind]
    layer = layer_type(4, 6, **options)
    for x in (randn(*shape), randn(*shape)[0], randn(*shape)[:0]):
        with pytest.raises(ValueError, match=message):
            layer(x)
    with pytest.raises(ValueError, match=message):
        layer(randn(*shape).requires_grad_())


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("C", "O"), [(0, 6), (4, 0), (0, 0)], ids=str)
def test_no_channels(C, O, kind, activation):
    """As torch's layers where these take it; of no input channels the sum is 0."""
    layer_type, shape = LAYERS[kind]
    layer = layer_type(C, O, 3, padding=1, activation=activation)
    x = randn(shape[0], C, *shape[2:]).requires_grad_()
    y = layer(x)
    assert y.shape == (shape[0], O, *shape[2:])
    if not C:
        bias = F.gelu(layer.bias) if activation == "gelu" else layer.bias
        torch.testing.assert_close(y, bias.view(-1, *(1,) * (x.dim() - 2)).expand_as(y))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(("K", "N"), [(0, 6), (4, 0), (0, 0)], ids=str)
def test_a_linear_layer_without_features(K, N):
    layer, dense = SparseLinear(K, N), nn.Linear(4, 6)
    assert torch.equal(layer(randn(3, K)), layer.bias.detach().expand(3, N))
    with pytest.raises(ValueError, match=r"x is \(3, 5\)"):
        SparseLinear.from_dense(dense)(randn(3, 5))


@pytest.mark.parametrize("sizes", [(5, 6), (6, 5), (-2, 6)], ids=str)
def test_channels_that_do_not_divide(sizes):
    with pytest.raises(ValueError, match=r"must be divisible by groups=2 and not negative"):
        SparseConv2d(*sizes, 3, groups=2)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dilation", [7, 24, 36, 44, 45, 46, 130])
def test_far_taps(dilation, form):
    """As in DeepLab: the image is hardly larger than the window."""
    size = 2 * dilation + 5
    weight = sparse_weight(5, 2, 3, 3, keep=0.7)
    x = randn(1, 2, size, size).contiguous(memory_format=form).requires_grad_()
    y = ops.sparse_conv2d(x, weight, dilation=dilation, padding=(dilation, 2))
    expected = F.conv2d(x, weight.to_dense(), dilation=dilation, padding=(dilation, 2))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", [64, 65])
def test_a_long_kernel(kernel):
    """The longest that the CPU kernels take, and the first that the reference takes for them."""
    weight, x = sparse_weight(3, 2, 1, kernel, keep=0.5), randn(2, 2, 1, 80).requires_grad_()
    weight.values.requires_grad_()
    y, dense = ops.sparse_conv2d(x, weight), weight.to_dense()
    expected = F.conv2d(x, dense)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for t in (x, weight.values):
        (grad,), (exact,) = (torch.autograd.grad(z.square().sum(), t, retain_graph=True) for z in (y, expected))
        torch.testing.assert_close(grad, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"dilation": 46}, {"kernel_size": (1, 65)}], ids=str)
def test_int8_beyond_the_kernels(options):
    """The reference computes what the CPU kernels do not take."""
    conv = nn.Conv2d(4, 6, **{"kernel_size": 3} | options)
    x = randn(1, 4, 100, 100)
    layer = Int8SparseConv2d.from_dense(conv)
    torch.testing.assert_close(layer(x), conv(x), rtol=0.05, atol=0.05)
