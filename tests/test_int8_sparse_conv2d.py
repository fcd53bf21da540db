"""The op `pyops::int8_sparse_conv2d` and its layer: exact integers on every ISA, straight-through gradients, errors."""

from __future__ import annotations

import copy
import math
import pickle

import cases
import pytest
import torch
from cases import randn, sparse_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pyops import ops
from pyops.nn import Int8SparseConv2d, SparseConv2d
from pyops.ops import SparseWeight
from pyops.ops.int8_sparse_conv2d import int8_sparse_conv2d_ref
from pyops.ops.sparse_conv2d import output_size
from pyops.ops.sparse_weight import PATTERNS

pytestmark = pytest.mark.usefixtures("poison")
FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of a wider one": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]],
}
EPS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def reference(x, weight, scale, bias=None, residual=None, stride=(1, 1), padding=(0,) * 4, dilation=(1, 1), **options):
    structure = (weight.values, scale, weight.crow_indices, weight.col_indices, weight.shape)
    return int8_sparse_conv2d_ref(x, *structure, bias, residual, stride, padding, dilation, weight.groups, **options)


def assert_same(y, expected):
    """Equal up to the rounding of the epilogue; a wrong integer would be off by more."""
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    largest = expected.double().abs().nan_to_num().max() if y.numel() else 0
    torch.testing.assert_close(y, expected, rtol=EPS[y.dtype], atol=float(largest) * EPS[y.dtype], equal_nan=True)


# ------------------------------------------------------------------------------------------- every option together


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_problem(isa, data):
    def draw(low, high, label):
        return data.draw(st.integers(low, high), label=label)

    groups = data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="groups")
    Og, Cg, R, S = draw(1, 20, "O/groups"), draw(1, 18, "C/groups"), draw(1, 4, "R"), draw(1, 4, "S")
    stride, dilation = ((draw(1, 3, name), draw(1, 3, name)) for name in ("stride", "dilation"))
    padding = tuple(draw(0, 3, side) for side in ("top", "bottom", "left", "right"))
    H = draw(max(1, dilation[0] * (R - 1) + 1 - padding[0] - padding[1]), 14, "H")
    W = draw(max(1, dilation[1] * (S - 1) + 1 - padding[2] - padding[3]), 20, "W")
    N, seed = draw(0, 3, "N"), draw(0, 999, "seed")
    dtype = data.draw(st.sampled_from(cases.FLOATS))
    keep = data.draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]), label="kept")
    pattern = data.draw(st.sampled_from(list(PATTERNS)))
    activation = data.draw(st.sampled_from(cases.ACTIVATION_NAMES))
    scales = {"dynamic": None, "one": torch.tensor(0.01), "each": randn(N, seed=seed).abs() + 1e-3}
    x_scale = scales[data.draw(st.sampled_from(list(scales)), label="scale")]

    shape = (groups * Og, Cg, R, S)
    weight, scale = ops.quantize_sparse(sparse_weight(*shape, keep=keep, seed=seed, pattern=pattern, groups=groups))
    x = randn(N, groups * Cg, H, W, dtype=dtype, seed=seed)
    if N and data.draw(st.booleans(), label="not finite"):
        x[-1, 0, 0, 0] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    x = FORMATS[data.draw(st.sampled_from(list(FORMATS)))](x)
    bias = randn(groups * Og, seed=seed) if data.draw(st.booleans(), label="bias") else None
    residual = None
    if data.draw(st.booleans(), label="residual"):
        y_shape = output_size(x.shape, weight.shape, stride, padding, dilation)
        residual = FORMATS[data.draw(st.sampled_from(list(FORMATS)))](randn(*y_shape, dtype=dtype, seed=seed + 1))
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    options = {"residual": residual, "activation": activation, "x_scale": x_scale}
    y = ops.int8_sparse_conv2d(x, weight, scale, bias, **window, **options)
    assert_same(y, reference(x, weight, scale, bias, **window, **options))


# ------------------------------------------------------------------------------------------- one thing at a time


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [(3, 1, 64), (3, 2, 36), (1, 1, 68), (7, 2, 3)], ids=str)
def test_integers_are_exact(isa, form, case):
    """Scales of 1 and whole numbers: the result is the sum itself. More than one tile of every kernel."""
    k, stride, C = case
    mask = randn(72, C, k, k).sigmoid() < 0.15
    values = cases.randint(-127, 127, 72, C, k, k) * mask
    weight = ops.quantize_sparse(SparseWeight.from_dense(values.float(), mask, pattern="ic_block4"))[0]
    x = FORMATS[form](cases.randint(-127, 127, 3, C, 17, 35).float())
    y = ops.int8_sparse_conv2d(x, weight, torch.ones(72), stride=stride, padding=k // 2, x_scale=1.0)
    exact = nn.functional.conv2d(x.double(), weight.to_dense().double(), None, stride, k // 2)
    assert torch.equal(y.double(), exact)


def test_largest_sums(isa):
    """All products at their largest, of one sign: whatever adds pairs of them in 16 bits would saturate."""
    for sign in (1, -1):
        weight = SparseWeight.from_dense(torch.full((20, 256, 3, 3), 127.0 * sign), pattern="ic_block4")
        weight, scale = ops.quantize_sparse(weight)
        y = ops.int8_sparse_conv2d(torch.full((1, 256, 6, 6), 5.0), weight, scale)
        torch.testing.assert_close(y, torch.full_like(y, sign * 127.0 * 5 * 256 * 9))


def test_an_image_that_is_not_finite_is_nan_alone(isa, threads):
    weight, scale = ops.quantize_sparse(sparse_weight(9, 8, 3, 3))
    for count in (1, 2):
        threads(count)
        for value in (torch.nan, torch.inf, -torch.inf):
            for form in ("contiguous", "channels_last"):
                for x_scale in (None, 0.02):
                    x = randn(4, 8, 7, 7)
                    good = ops.int8_sparse_conv2d(FORMATS[form](x), weight, scale, padding=1, x_scale=x_scale)
                    x[2, 7, 6, 6] = value
                    y = ops.int8_sparse_conv2d(FORMATS[form](x), weight, scale, padding=1, x_scale=x_scale)
                    assert y[2].isnan().all()
                    assert torch.equal(y[[0, 1, 3]], good[[0, 1, 3]])


@pytest.mark.parametrize("N", [1, 3, 8])
def test_threads_do_not_matter(isa, threads, N):
    for k, C in ((3, 64), (1, 256)):
        weight, scale = ops.quantize_sparse(sparse_weight(96, C, k, k, keep=0.1))
        for form in ("contiguous", "channels_last"):
            x = FORMATS[form](randn(N, C, 28, 28))
            results = []
            for count in (1, 2, 3):
                threads(count)
                results.append(ops.int8_sparse_conv2d(x, weight, scale, padding=k // 2, activation="silu"))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
            assert_same(results[0], reference(x, weight, scale, padding=(k // 2,) * 4, activation="silu"))


def test_small_images_quantize_to_zero(isa):
    weight, scale = ops.quantize_sparse(sparse_weight(5, 8))
    x = randn(3, 8, 4, 4)
    x[1] *= 1e-38
    x[2] = 0
    y = ops.int8_sparse_conv2d(x, weight, scale, randn(5))
    assert torch.equal(y[1:], randn(5)[:, None, None].expand(2, 5, 4, 4))


def test_single_image_and_cached_weight(isa):
    weight, scale = ops.quantize_sparse(sparse_weight(5, 8, 3, 3))
    x = randn(2, 8, 6, 6)
    for _ in range(2):
        y = ops.int8_sparse_conv2d(x, weight, scale)
        torch.testing.assert_close(ops.int8_sparse_conv2d(x[1], weight, scale), y[1])
    weight.values.neg_()
    torch.testing.assert_close(ops.int8_sparse_conv2d(x, weight, scale), -y)


@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (2, 0, 5, 5), (2, 6, 0, 5)], ids=str)
def test_empty(isa, shape):
    weight, scale = ops.quantize_sparse(sparse_weight(9, shape[1], 3, 3))
    for form in ("contiguous", "channels_last"):
        x = FORMATS[form](randn(*shape))
        y = ops.int8_sparse_conv2d(x, weight, scale, randn(9), padding=2, activation="relu")
        assert_same(y, reference(x, weight, scale, randn(9), padding=(2,) * 4, activation="relu"))


def test_quantize_sparse():
    for pattern in PATTERNS:
        float_weight = sparse_weight(12, 10, 3, 3, pattern=pattern, groups=2)
        weight, scale = ops.quantize_sparse(float_weight)
        assert weight.block == (1, 4)
        assert weight.values.dtype == torch.int8
        dense = float_weight.to_dense()
        assert torch.equal(weight.mask() & (dense != 0), dense != 0)
        error = (weight.to_dense() * scale[:, None, None, None] - dense).abs()
        assert (error <= scale[:, None, None, None] * 0.5001).all()


def test_straight_through_gradient(isa):
    weight, scale = ops.quantize_sparse(sparse_weight(12, 5, 3, 3, groups=2))
    dense = weight.to_dense() * scale[:, None, None, None]
    x, bias, residual = randn(2, 10, 8, 8), randn(12), randn(2, 12, 4, 4)
    for x_scale in (None, 0.01):
        ours = [t.clone().requires_grad_() for t in (x, bias, residual)]
        theirs = [t.clone().requires_grad_() for t in (x, bias, residual)]
        y = ops.int8_sparse_conv2d(
            ours[0], weight, scale, ours[1], stride=2, padding=1, residual=ours[2], x_scale=x_scale
        )
        grad = randn(*y.shape, seed=3)
        y.backward(grad)
        clamped = theirs[0] if x_scale is None else theirs[0].clamp(-1.275, 1.275)
        z = nn.functional.conv2d(clamped, dense, theirs[1], 2, 1, 1, 2) + theirs[2]
        z.backward(grad)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": None}, TypeError, "x must be"),
        ({"x": randn(2, 8, 5, 5).double()}, TypeError, "x has dtype"),
        ({"x": randn(2, 7, 5, 5)}, ValueError, "x has 7 channels"),
        ({"weight": None}, TypeError, "quantize_sparse"),
        ({"weight": sparse_weight(5, 8)}, TypeError, "int8"),
        ({"w_scale": torch.ones(4)}, ValueError, "w_scale"),
        ({"w_scale": torch.ones(5).double()}, TypeError, "w_scale"),
        ({"bias": randn(4)}, ValueError, "bias"),
        ({"residual": randn(2, 5, 5, 4)}, ValueError, "residual"),
        ({"activation": "swish"}, ValueError, "activation"),
        ({"x_scale": 0.0}, ValueError, "x_scale"),
        ({"x_scale": torch.ones(3)}, ValueError, "x_scale has 3"),
        ({"x_scale": torch.ones(1).double()}, TypeError, "x_scale"),
        ({"x_scale": "1"}, TypeError, "x_scale"),
        ({"stride": 0}, ValueError, "stride"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change, error, text):
    weight, scale = ops.quantize_sparse(sparse_weight(5, 8))
    arguments = {"x": randn(2, 8, 5, 5), "weight": weight, "w_scale": scale, **change}
    with pytest.raises(error, match=text):
        ops.int8_sparse_conv2d(**arguments)


def test_more_errors():
    weight, scale = ops.quantize_sparse(sparse_weight(1, 2**16, 2, 2, keep=0.001))
    with pytest.raises(ValueError, match="overflow"):
        ops.int8_sparse_conv2d(randn(1, 2**16, 2, 2), weight, scale)
    with pytest.raises(TypeError, match="SparseWeight"):
        ops.quantize_sparse(randn(3, 4))
    with pytest.raises(ValueError, match="NaN or Inf"):
        ops.quantize_sparse(SparseWeight.from_dense(torch.full((3, 4), torch.nan)))
    with pytest.raises(TypeError, match="floating-point"):
        ops.quantize_sparse(ops.quantize_sparse(sparse_weight(5, 8))[0])
    weight = sparse_weight(5, 8)
    with pytest.raises(TypeError, match="values"):
        SparseWeight(weight.values.to(torch.int8), weight.crow_indices, weight.col_indices, weight.shape)


@cases.needs_native
def test_foreign_packed_weights_are_refused():
    weight, scale = ops.quantize_sparse(sparse_weight(5, 8))
    other = sparse_weight(5, 2)
    window = ((1, 1), (0,) * 4, (1, 1), 1)
    x, wide = randn(2, 2, 5, 5), randn(2, 8, 5, 5)
    structure = (other.values, other.crow_indices, other.col_indices, other.shape, other.block)
    packed = torch.ops.pyops.sparse_conv2d_pack(*structure, *window, x.shape, False)
    structure = (weight.values, scale, weight.crow_indices, weight.col_indices, weight.shape)
    for blob in (packed, torch.zeros(4096, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="not the packed form"):
            torch.ops.pyops.int8_sparse_conv2d(wide, *structure, None, None, *window, "none", None, blob)


# ------------------------------------------------------------------------------------------- the layer


def pruned_conv() -> nn.Conv2d:
    conv = nn.Conv2d(10, 12, 3, 2, 1, groups=2)
    with torch.no_grad():
        conv.weight.copy_(randn(12, 5, 3, 3) * (randn(12, 5, 3, 3, seed=1) > 0.5))
    return conv


def test_layer_is_close_to_dense():
    conv, x = pruned_conv(), randn(2, 10, 9, 9)
    expected = conv(x)
    sparse = (SparseConv2d.from_dense(conv, pattern=pattern) for pattern in ("unstructured", "oc_block4"))
    for layer in (Int8SparseConv2d.from_dense(conv), *(Int8SparseConv2d.from_sparse(s) for s in sparse)):
        assert (layer(x) - expected).abs().max() < 0.02 * expected.abs().max()
        assert (layer.to_dense()(x) - expected).abs().max() < 0.02 * expected.abs().max()
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
    with pytest.raises(TypeError, match="SparseConv2d"):
        Int8SparseConv2d.from_sparse(conv)
    with pytest.raises(TypeError, match="x has dtype"):
        layer(x.double())


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_layer_padding_modes(mode):
    conv = nn.Conv2d(8, 6, 3, padding=1, padding_mode=mode)
    layer, x = Int8SparseConv2d.from_dense(conv, activation="relu"), randn(8, 6, 6)
    torch.testing.assert_close(layer(x), conv(x).relu(), rtol=0.05, atol=0.05)


def test_layer_state():
    layer, x = Int8SparseConv2d.from_dense(pruned_conv(), activation="relu"), randn(2, 10, 9, 9)
    y, state = layer(x), layer.state_dict()
    sizes = (10, 12, 3, 2, 1, 1, 2)
    new = Int8SparseConv2d(*sizes, activation="relu")
    assert new(x).shape == y.shape
    new.load_state_dict(state)
    meta = Int8SparseConv2d(*sizes, device="meta", activation="relu")
    meta.load_state_dict(state, assign=True)
    empty = Int8SparseConv2d(*sizes, device="meta", activation="relu").to_empty(device="cpu")
    empty.load_state_dict(state)
    for same in (new, meta, empty, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), y)
    layer.half()
    assert (layer.values.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (
        torch.int8,
        torch.float32,
        torch.float16,
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"col_indices": lambda t: t + 99}, "col_indices"),
        ({"crow_indices": lambda t: t[:-1]}, "crow_indices"),
        ({"values": lambda t: t.float()}, "float layer"),
        ({"values": lambda t: torch.full_like(t, 3)}, "beyond the last channel"),
        ({"weight_scale": lambda t: t * math.nan}, "NaN"),
        ({"weight_scale": None}, "comes without"),
        ({"bias": lambda t: t[:-1]}, "bias"),
    ],
    ids=cases.without_address,
)
def test_layer_refuses_malformed_state(change, text):
    layer, x = Int8SparseConv2d.from_dense(pruned_conv()), randn(2, 10, 9, 9)
    y, state = layer(x), layer.state_dict()
    for name, f in change.items():
        if f is None:
            del state[name]
        else:
            state[name] = f(state[name])
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), y)


def test_layer_compiles(fresh_compiler):
    layer, x = Int8SparseConv2d.from_dense(pruned_conv()), randn(2, 10, 9, 9)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
