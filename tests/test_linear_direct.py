"""The way of the linear layers to their kernels past the dispatcher: what it must not miss, lose or confuse."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from cases import needs_native, randn
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyops import ops
from pyops.nn import Int4Linear, Int8Linear

KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int4": lambda linear: Int4Linear.from_float(linear, group_size=32),
    "int4 symmetric": lambda linear: Int4Linear.from_float(linear, symmetric=True),
    "int4 float": lambda linear: Int4Linear.from_float(linear, group_size=-1, compute="float"),
    "int8": Int8Linear.from_float,
    "int8 static": lambda linear: Int8Linear.from_float(linear, mode="static", input_scale=0.03),
    "int8 smooth": lambda linear: Int8Linear.from_float(linear, smooth=torch.linspace(0.5, 2, linear.in_features)),
    "int8 weight-only": lambda linear: Int8Linear.from_float(linear, mode="weight_only"),
}


@pytest.fixture(params=KINDS)
def layer(request):
    return KINDS[request.param](nn.Linear(70, 45)).eval().requires_grad_(False)


def by_op(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same through the dispatcher: a residual takes that way, and one of -0.0 changes nothing."""
    return layer(x, torch.full((*x.shape[:-1], layer.out_features), -0.0, dtype=x.dtype))


def check(layer: nn.Module, x: torch.Tensor) -> None:
    assert torch.equal(layer(x), by_op(layer, x))


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


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (33, 70), (0, 70), (2, 0, 70)])
def test_same_as_by_the_dispatcher(layer, shape, dtype, poison):
    x = randn(*shape).to(dtype)
    y = layer(x)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((*shape[:-1], 45), dtype, True)
    assert torch.equal(y, by_op(layer, x))


@needs_native
def test_a_plain_call_is_not_dispatched(layer):
    """Else all that stands here would show nothing."""
    calls = []
    x = randn(3, 70)
    layer(x)
    native = layer._native
    layer._native = lambda *args: calls.append(1) or native(*args)
    with torch.no_grad():
        layer(x)
        assert calls == [1]
        assert native is not None


ODD = {
    "wrapper": Wrapper,
    "negative bit": torch._neg_view,
    "all zero": lambda t: torch._efficientzerotensor(t.shape),
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("odd", ODD)
def test_x_that_is_not_its_memory(layer, odd):
    x = ODD[odd](randn(3, 70))
    plain = x.inner if isinstance(x, Wrapper) else x.clone()
    y = layer(x)
    assert torch.equal(y.inner if isinstance(y, Wrapper) else y, layer(plain))


@pytest.mark.parametrize("odd", [name for name in ODD if name != "wrapper"])
def test_a_bias_that_is_not_its_memory(layer, odd):
    x, bias = randn(3, 70), ODD[odd](randn(45))
    layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    expected = layer(x)
    del layer.bias
    layer.bias = bias
    assert torch.equal(layer(x), expected)


def test_tensors_that_change_between_calls(layer):
    x = randn(3, 70)
    check(layer, x)
    layer.bias = nn.Parameter(randn(45), requires_grad=False)
    check(layer, x)
    layer.bias.data = randn(45).bfloat16()
    check(layer, x)
    layer.bias.data.zero_()
    check(layer, x)
    layer.bias = None
    check(layer, x)
    layer.load_state_dict(type(layer).state_dict(layer))
    check(layer, x)
    layer.share_memory()
    check(layer, x)
    layer.weight = torch.zeros_like(layer.weight)
    check(layer, x)


def test_settings_that_change_between_calls(layer):
    x = randn(3, 70)
    before = layer(x)
    layer.activation = "relu"
    assert torch.equal(layer(x), before.relu())
    check(layer, x)


def test_the_compute_changes_between_calls():
    layer, x = KINDS["int4"](nn.Linear(70, 45)).requires_grad_(False), randn(3, 70)
    before = layer(x)
    layer.compute = "float"
    check(layer, x)
    assert not torch.equal(layer(x), before)


def test_half_and_back(layer):
    x = randn(3, 70)
    layer(x)
    layer.half()
    check(layer, x)
    layer.float()
    check(layer, x)


def test_a_state_of_other_weights(layer):
    x = randn(3, 70)
    layer(x)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    other.requires_grad_(False)
    expected = other(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), expected)


def test_copies_and_pickles(layer):
    x = randn(3, 70)
    expected = layer(x)
    for made in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(made(x), expected)
    assert torch.equal(layer(x), expected)


def test_functional_call_takes_the_given_bias(layer):
    x, bias = randn(3, 70), randn(45)
    layer(x)
    y = torch.func.functional_call(layer, {"bias": bias}, (x,))
    layer.bias = nn.Parameter(bias, requires_grad=False)
    assert torch.equal(y, layer(x))


def test_modes_traces_and_the_profiler_see_the_op(layer):
    x = randn(3, 70)
    name = "int8_weight_linear" if getattr(layer, "mode", "") == "weight_only" else type(layer).__name__[:4].lower()
    layer(x)
    with Recorder() as recorder:
        layer(x)
    assert any(f"pyops.{name}" in seen for seen in recorder.seen)
    with FunctionRecorder() as recorder:
        layer(x)
    assert any(f"pyops.{name}" in seen for seen in recorder.seen)
    with torch.profiler.profile() as profile:
        layer(x)
    assert any(event.key.startswith(f"pyops::{name}") for event in profile.key_averages())
    graph = make_fx(layer)(x)
    assert any(f"pyops.{name}" in str(node.target) for node in graph.graph.nodes)
    other = randn(3, 70)
    assert torch.equal(torch.jit.trace(layer, (x,))(other), layer(other))


def test_gradients_are_not_lost(layer):
    x = randn(3, 70).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any()
    layer.requires_grad_(True)
    assert layer(x.detach()).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        layer(forward_ad.make_dual(x, x))


def test_transforms_see_the_op(layer):
    x = randn(4, 3, 70)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_a_default_device_is_not_where_the_result_goes(layer):
    x = randn(3, 70)
    expected = layer(x)
    with torch.device("meta"):
        y = layer(x)
    assert torch.equal(y, expected)


@needs_native
def test_bad_input_is_named(layer):
    layer(randn(3, 70))
    with pytest.raises(ValueError, match="K=71"):
        layer(randn(3, 71))
    with pytest.raises(TypeError, match="x"):
        layer(randn(3, 70).double())
    with pytest.raises(TypeError, match="x"):
        layer([1.0] * 70)
    with pytest.raises((TypeError, ValueError), match="x"):
        layer(torch.tensor(1.0))
    layer.bias = nn.Parameter(randn(44))
    with pytest.raises((RuntimeError, ValueError), match="bias"):
        layer(randn(3, 70))


@needs_native
def test_sizes_that_do_not_fit_the_weight_are_refused(layer):
    layer(randn(3, 70))
    layer.in_features = 6400
    with pytest.raises((RuntimeError, ValueError)):
        layer(randn(3, 6400))
    layer.in_features, layer.out_features = 70, 4500
    layer.bias = None
    if isinstance(layer, Int8Linear):  # whose op knows N from the scales
        assert layer(randn(3, 70)).shape == (3, 45)
    else:
        with pytest.raises(RuntimeError, match="out_features"):
            layer(randn(3, 70))


def test_nothing_is_kept_alive(layer):
    layer(randn(3, 70))
    bias, layer.bias = torch.utils.weak.WeakTensorKeyDictionary({layer.bias: 1}), None
    assert len(bias) == 0


def test_threads_share_a_layer(layer):
    xs = [randn(1 + i, 70) for i in range(8)]
    expected = [layer(x) for x in xs]
    wrong = []

    def run(x, y):
        wrong.extend(1 for _ in range(50) if not torch.equal(layer(x), y))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_op_itself_is_as_before():
    w, s = ops.quantize_int8(randn(45, 70))
    with Recorder() as recorder:
        ops.int8_linear(randn(3, 70), ops.pack_int8(w), s)
    assert "pyops.int8_linear.default" in recorder.seen
