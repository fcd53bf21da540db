"""The way from the layers to the CPU kernels past the dispatcher: who may take it, and what it must not lose."""

from __future__ import annotations

import threading

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Recorder, randn, sparse_weight
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from pyops import ops
from pyops.nn import Int8SparseConv2d, SparseConv2d
from pyops.ops.sparse_conv2d_native import direct


class Wrapper(torch.Tensor):
    """A tensor that holds another and has no memory of its own, as DTensor does."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        return func(*unwrapped[0], **unwrapped[1])


ODD = {
    "wrapper": Wrapper,
    "negative bit": torch._neg_view,
    "all zero": lambda t: torch._efficientzerotensor(t.shape),
    "strided": lambda t: t.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("which", ["bias", "residual", "x"])
@pytest.mark.parametrize("odd", ODD)
def test_tensors_that_are_not_their_memory(which, odd):
    weight = sparse_weight(6, 4, 3, 3)
    given = {"x": randn(2, 4, 8, 9), "bias": randn(6), "residual": randn(2, 6, 6, 7)}
    given[which] = ODD[odd](given[which])
    plain = {name: t.inner if isinstance(t, Wrapper) else t.clone() for name, t in given.items()}
    expected = F.conv2d(plain["x"], weight.to_dense(), plain["bias"]) + plain["residual"]
    with torch.no_grad():
        y = ops.sparse_conv2d(given["x"], weight, given["bias"], residual=given["residual"])
    y = y.inner if isinstance(y, Wrapper) else y
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_default_device_is_not_where_the_result_goes():
    weight, x = sparse_weight(6, 4, 3, 3), randn(2, 4, 8, 9)
    expected = ops.sparse_conv2d(x, weight)
    with torch.device("meta"):
        y = ops.sparse_conv2d(x, weight)
    assert y.device.type == "cpu"
    assert torch.equal(y, expected)


def test_dispatch_modes_and_traces_see_the_op():
    weight, x = sparse_weight(6, 4, 3, 3), randn(2, 4, 8, 9)
    ops.sparse_conv2d(x, weight)
    with Recorder() as recorder:
        ops.sparse_conv2d(x, weight)
    assert "pyops.sparse_conv2d.default" in recorder.seen
    graph = make_fx(lambda t: ops.sparse_conv2d(t, weight))(x)
    weight.values.zero_()
    assert not graph(x).any(), "the weight's values of the time of tracing are not in the graph"


@pytest.mark.parametrize("layer", [SparseConv2d, Int8SparseConv2d])
def test_tangents_are_refused(layer):
    layer, x = layer(4, 6, 3), randn(1, 4, 5, 5)
    with forward_ad.dual_level():
        layer(x)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            layer(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))


def test_values_in_shared_memory_are_read_at_every_call():
    """Another process may write to them, which leaves no trace here."""
    layer, x = SparseConv2d(4, 6, 3), randn(1, 4, 5, 5)
    layer.share_memory()
    with torch.no_grad():
        layer(x)
        layer.values.data.mul_(2)
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)


def test_values_written_by_numpy_after_clear_packed():
    layer, x = SparseConv2d(4, 6, 3, bias=False), randn(1, 4, 5, 5)
    with torch.no_grad():
        assert layer(x).any()
        layer.values.detach().numpy()[:] = 0
        layer.clear_packed()
        assert not layer(x).any()


@cases.needs_native
def test_training_keeps_the_packed_structure_over_an_evaluation():
    layer, x = SparseConv2d(4, 6, 3), randn(1, 4, 5, 5)
    layer(x)
    (kept,) = layer._packed.trained.by_shape.values()
    with torch.no_grad():
        layer(x)
        assert layer._packed.forward.by_shape
    layer(x)
    assert next(iter(layer._packed.trained.by_shape.values())) is kept
    assert not layer._packed.forward.by_shape, "a step may follow that leaves no trace"


@cases.needs_native
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (8, 4, 1, 3), (8, 2, 3, 3)], ids=str)
def test_the_packed_form_of_another_weight_is_refused(shape):
    """Where the sizes of x and y would fit, too."""
    weight, x = sparse_weight(8, 4, 3, 3), randn(1, 4, 7, 7)
    w = (weight.values, weight.crow_indices, weight.col_indices, weight.shape, weight.block)
    packed = torch.ops.pyops.sparse_conv2d_pack(*w, (1, 1), (0,) * 4, (1, 1), 1, x.shape, False)
    options = (None, None, shape, (1, 1), (0,) * 4, (1, 1), "none", packed)
    with pytest.raises(RuntimeError, match="not the packed form of this weight"):
        direct(x, *options)
    assert direct(x, None, None, weight.shape, *options[3:]) is not None


def test_threads_share_a_layer():
    layer = SparseConv2d(8, 16, 3, padding=1, pattern="oc_block4")
    images = [randn(1, 8, 5 + i, 7, seed=i) for i in range(6)]
    expected = [F.conv2d(x, layer.weight, layer.bias, padding=1).detach() for x in images]
    wrong = []

    def work(first: int) -> None:
        for i in range(60):
            x, y = images[(first + i) % 6], expected[(first + i) % 6]
            with torch.set_grad_enabled(i % 3 == 0):
                if not torch.allclose(layer(x), y, rtol=1e-4, atol=1e-5):
                    wrong.append((first, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "change", [lambda x: x.to_sparse(), lambda x: torch.nested.nested_tensor([x[0]])], ids=["sparse", "nested"]
)
def test_layouts_that_are_refused(change):
    with pytest.raises(TypeError, match="x must be a dense tensor"):
        SparseConv2d(4, 6, 3)(change(randn(1, 4, 5, 5)))


def test_a_layer_elsewhere():
    with pytest.raises(ValueError, match="x is on cpu, the layer's weight on meta"):
        SparseConv2d(4, 6, 3, bias=False, device="meta")(randn(1, 4, 5, 5))


@pytest.mark.parametrize("options", [{"stride": 2**21}, {"dilation": 2**22}], ids=str)
def test_windows_beyond_the_kernels(options):
    """As the dense convolution takes them."""
    weight, x = sparse_weight(6, 4), randn(1, 4, 5, 5)
    torch.testing.assert_close(ops.sparse_conv2d(x, weight, **options), F.conv2d(x, weight.to_dense(), **options))
