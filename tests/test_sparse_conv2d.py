"""The ops `pyops::sparse_conv2d`, `_dx`, `_dw`: every kernel against a float64 oracle, with every option."""

from __future__ import annotations

import dataclasses
import math

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import randn, sparse_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyops import backend, ops
from pyops.ops import SparseWeight
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.sparse_checks import check_padding
from pyops.ops.sparse_conv2d import output_size, sparse_conv2d_dw_ref, sparse_conv2d_dx_ref
from pyops.ops.sparse_packed import MOST_SHAPES
from pyops.ops.sparse_weight import PATTERNS

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "width first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels of a wider one": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]],
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}
"""Each gives the same values with other strides."""


KERNELS = ("generic", "avx2", "avx512")
ISAS = [name for name in backend.native.available_cpu_isas() if name in KERNELS] if backend.native else ["ref"]
"""Those that have kernels of their own here."""
EACH_ISA = pytest.mark.parametrize("isa", ISAS, indirect=True)


def plain(x, w, bias, residual, stride, padding, dilation, groups, activation):
    """Plain PyTorch in the dtype of its arguments."""
    top, bottom, left, right = padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), w, bias, stride, 0, dilation, groups)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def assert_close_to_oracle(y, x, weight, bias, residual, *window, activation="none"):
    """At most twice the error of plain PyTorch, rounded once, and eps · √K of the largest sum of magnitudes.

    Its bf16 convolution is not asked: for some shapes it multiplies memory that it never wrote by zero.
    """
    w = weight.to_dense().detach()
    double = [None if t is None else t.double() for t in (x, w, bias, residual)]
    groups = weight.groups
    exact = plain(*double, *window, groups, activation)
    magnitude = plain(*(None if t is None else t.abs() for t in double), *window, groups, "none")
    wide = torch.promote_types(x.dtype, torch.float32)
    narrow = [None if t is None else t.to(x.dtype).to(wide) for t in (x, w, bias, residual)]
    dense = plain(*narrow, *window, groups, activation).to(x.dtype)
    assert (y.shape, y.dtype) == (exact.shape, x.dtype)
    if y.numel():
        K = math.prod(weight.shape[1:])
        eps = torch.finfo(x.dtype).eps
        allowed = 2 * (dense.double() - exact).abs().max() + eps * math.sqrt(max(K, 1)) * magnitude.max()
        error = (y.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def has_format_of(y, x):
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# ------------------------------------------------------------------------------------------- every option together


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_problem(data):
    def draw(low, high, label):
        return data.draw(st.integers(low, high), label=label)

    groups = data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="groups")
    Og, Cg, R, S = draw(1, 20, "O/groups"), draw(1, 9, "C/groups"), draw(1, 4, "R"), draw(1, 4, "S")
    stride, dilation = ((draw(1, 3, name), draw(1, 3, name)) for name in ("stride", "dilation"))
    padding = tuple(draw(0, 3, side) for side in ("top", "bottom", "left", "right"))
    H = draw(max(1, dilation[0] * (R - 1) + 1 - padding[0] - padding[1]), 14, "H")
    W = draw(max(1, dilation[1] * (S - 1) + 1 - padding[2] - padding[3]), 20, "W")
    N = draw(0, 3, "N")
    dtype = data.draw(st.sampled_from(DTYPES))
    values_dtype = data.draw(st.sampled_from([dtype, torch.float32]), label="dtype of values")
    pattern = data.draw(st.sampled_from(list(PATTERNS)))
    keep = data.draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]), label="kept")
    activation = data.draw(st.sampled_from(cases.ACTIVATION_NAMES))
    seed = draw(0, 999, "seed")

    weight = sparse_weight(
        groups * Og, Cg, R, S, keep=keep, seed=seed, dtype=values_dtype, pattern=pattern, groups=groups
    )
    x = randn(N, groups * Cg, H, W, dtype=dtype, seed=seed)
    x = FORMATS[data.draw(st.sampled_from(list(FORMATS)))](x)
    shape = output_size(x.shape, weight.shape, stride, padding, dilation)
    bias = residual = None
    if data.draw(st.booleans(), label="bias"):
        bias = randn(groups * Og, dtype=data.draw(st.sampled_from([dtype, torch.float32])), seed=seed)
    if data.draw(st.booleans(), label="residual"):
        residual = FORMATS[data.draw(st.sampled_from(list(FORMATS)))](randn(*shape, dtype=dtype, seed=seed + 1))
    window = (stride, padding, dilation)
    y = ops.sparse_conv2d(
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=residual,
        activation=activation,
    )
    assert has_format_of(y, x)
    assert_close_to_oracle(y, x, weight, bias, residual, *window, activation=activation)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_gradient(data):
    """x, values, bias and residual against autograd through the dense convolution, in float64 and fp32."""
    groups = data.draw(st.sampled_from([1, 2]))
    O, Cg, R, S = groups * data.draw(st.integers(1, 9)), *(data.draw(st.integers(1, 4)) for _ in range(3))
    stride, dilation = ((data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))) for _ in range(2))
    padding = tuple(data.draw(st.integers(0, 2)) for _ in range(4))
    H, W = (d * (k - 1) + 1 + data.draw(st.integers(0, 5)) for d, k in zip(dilation, (R, S), strict=True))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    pattern = data.draw(st.sampled_from(list(PATTERNS)))
    activation = data.draw(st.sampled_from(cases.ACTIVATION_NAMES))
    weight = sparse_weight(O, Cg, R, S, dtype=dtype, pattern=pattern, groups=groups)
    weight.values.requires_grad_()
    dense = weight.to_dense().detach().requires_grad_()
    x = FORMATS[data.draw(st.sampled_from(["contiguous", "channels_last"]))](randn(2, groups * Cg, H, W, dtype=dtype))
    shape = output_size(x.shape, weight.shape, stride, padding, dilation)
    grad = randn(*shape, dtype=dtype, seed=9)
    leaves = [x, randn(O, dtype=dtype), randn(*shape, dtype=dtype, seed=4)]
    ours, theirs = ([t.detach().clone().requires_grad_() for t in leaves] for _ in range(2))
    x, bias, residual = ours
    options = {"stride": stride, "padding": padding, "dilation": dilation, "activation": activation}
    y = ops.sparse_conv2d(x, weight, bias, residual=residual, **options)
    y.backward(grad)
    x, bias, residual = theirs
    plain(x, dense, bias, residual, stride, padding, dilation, groups, activation).backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)
    kept = SparseWeight.from_dense(dense.grad, weight.mask(), pattern=pattern, groups=groups)
    torch.testing.assert_close(weight.values.grad, kept.values, rtol=1e-5, atol=1e-4)
    assert torch.equal(weight.values.grad != 0, (weight.values.grad != 0) & (kept.values != 0)), "fill-in has none"


# ------------------------------------------------------------------------------------------- one thing at a time


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@EACH_ISA
def test_model_sized(isa, pattern, dtype):
    """More than one tile of every kernel in each direction."""
    for channels_last in (False, True):
        for R, stride in ((3, 1), (3, 2), (1, 1)):
            weight = sparse_weight(72, 40, R, R, keep=0.1, pattern=pattern, dtype=dtype)
            x = randn(2, 40, 17, 35, dtype=dtype)
            x = FORMATS["channels_last"](x) if channels_last else x
            bias, padding = randn(72), (R // 2,) * 4
            y = ops.sparse_conv2d(x, weight, bias, stride=stride, padding=R // 2, activation="relu")
            window = ((stride, stride), padding, (1, 1))
            assert_close_to_oracle(y, x, weight, bias, None, *window, activation="relu")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH_ISA
def test_strides_do_not_matter(isa, form, dtype):
    weight, x = sparse_weight(33, 10, 3, 3, dtype=dtype), randn(2, 10, 9, 11, dtype=dtype)
    residual = randn(2, 33, 9, 11, dtype=dtype)
    changed = FORMATS[form](x)
    y = ops.sparse_conv2d(changed, weight, padding=1, residual=FORMATS[form](residual))
    assert has_format_of(y, changed)
    same = FORMATS["channels_last"](x) if form == "channels_last" else x
    assert torch.equal(y, ops.sparse_conv2d(same, weight, padding=1, residual=residual))


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "2:4"])
@EACH_ISA
def test_depthwise(isa, pattern):
    weight = sparse_weight(24, 1, 3, 3, pattern=pattern, groups=24)
    x = randn(2, 24, 9, 9)
    y = ops.sparse_conv2d(x, weight, padding=1)
    assert_close_to_oracle(y, x, weight, None, None, (1, 1), (1,) * 4, (1, 1))


@pytest.mark.parametrize("pattern", PATTERNS)
@EACH_ISA
def test_dead_channels_and_whole_zero_weights(isa, pattern):
    x, bias = randn(2, 12, 7, 7), randn(20)
    w = randn(20, 12, 3, 3)
    if pattern == "2:4":
        w[:, 2:4] = w[:, 6:8] = w[:, 10:] = 0
    for dead in (
        (slice(0, 9), slice(0, 0)),
        (slice(0, 0), slice(3, 8)),
        (slice(4, 20), slice(0, 11)),
        (slice(0, 20),) * 2,
    ):
        sparse = w.clone()
        sparse[dead[0]] = 0
        sparse[:, dead[1]] = 0
        weight = SparseWeight.from_dense(sparse, pattern=pattern)
        y = ops.sparse_conv2d(x, weight, bias, padding=1)
        assert_close_to_oracle(y, x, weight, bias, None, (1, 1), (1,) * 4, (1, 1))
        torch.testing.assert_close(y[:, dead[0]], bias[dead[0], None, None].expand_as(y[:, dead[0]]))


@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (2, 0, 5, 5), (0, 0, 5, 5)], ids=str)
@EACH_ISA
def test_empty(isa, shape):
    weight = sparse_weight(9, shape[1], 3, 3)
    bias = randn(9)
    for requires_grad in (False, True):
        x = randn(*shape).requires_grad_(requires_grad)
        y = ops.sparse_conv2d(x, weight, bias, activation="relu")
        assert torch.equal(y, bias.relu()[:, None, None].expand(shape[0], 9, 3, 3))
        if requires_grad:
            y.sum().backward()
            assert x.grad.shape == x.shape


@EACH_ISA
def test_no_output_channels(isa):
    y = ops.sparse_conv2d(randn(2, 3, 5, 5), sparse_weight(0, 3, 3, 3), padding=1)
    assert y.shape == (2, 0, 5, 5)


@EACH_ISA
def test_nan_weights_and_images_spread_as_in_torch(isa):
    weight, x = sparse_weight(5, 3, 3, 3, keep=1.0), randn(2, 3, 6, 6)
    x[1, 2, 3, 3] = torch.nan
    y = ops.sparse_conv2d(x, weight, padding=1)
    assert torch.equal(y.isnan(), F.conv2d(x, weight.to_dense(), padding=1).isnan())
    weight.values[0] = torch.inf
    y = ops.sparse_conv2d(randn(2, 3, 6, 6), weight, padding=1)
    assert not y[:, 0].isfinite().all()
    assert y[:, 1:].isfinite().all()


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5), (4, 1)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)], ids=str)
def test_padding_by_name(kernel, dilation):
    weight, x = sparse_weight(5, 3, *kernel), randn(2, 3, 13, 14)
    for name in ("same", "valid"):
        y = ops.sparse_conv2d(x, weight, padding=name, dilation=dilation)
        torch.testing.assert_close(y, F.conv2d(x, weight.to_dense(), padding=name, dilation=dilation))
    assert check_padding((1, 2), (3, 3), (1, 1), (1, 1)) == (1, 1, 2, 2)
    assert check_padding([1, 2, 3, 4], (3, 3), (1, 1), (1, 1)) == (1, 2, 3, 4)


def test_single_image():
    weight, x, residual = sparse_weight(5, 3, 3, 3), randn(3, 6, 7), randn(5, 4, 5)
    y = ops.sparse_conv2d(x, weight, residual=residual)
    assert torch.equal(y, ops.sparse_conv2d(x[None], weight, residual=residual[None])[0])


# ------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH_ISA
def test_linear(isa, dtype, pattern):
    for M, N, K in (*cases.SHAPES[:12], *cases.EMPTY_SHAPES):
        weight = sparse_weight(N, K, pattern=pattern, dtype=dtype)
        x, bias, residual = randn(M, K, dtype=dtype), randn(N), randn(M, N, dtype=dtype)
        y = ops.sparse_linear(x, weight, bias, residual=residual, activation="silu")
        assert y.is_contiguous()
        image, r = x[:, :, None, None], residual[:, :, None, None]
        window = ((1, 1), (0,) * 4, (1, 1))
        if M and N and K:
            assert_close_to_oracle(y[:, :, None, None], image, weight, bias, r, *window, activation="silu")
        else:
            torch.testing.assert_close(y, F.silu(bias + residual.float()).to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("leading", cases.LEADING, ids=str)
def test_leading_dimensions(leading):
    weight, x, residual = sparse_weight(19, 37), randn(*leading, 37), randn(*leading, 19)
    y = ops.sparse_linear(x, weight, residual=residual)
    flat = ops.sparse_linear(x.reshape(-1, 37), weight, residual=residual.reshape(-1, 19))
    torch.testing.assert_close(y, flat.reshape(*leading, 19))


@pytest.mark.parametrize("layout", [*cases.LAYOUTS, *cases.EXPANDED])
@EACH_ISA
def test_linear_strides(isa, layout):
    x = {**cases.LAYOUTS, **cases.EXPANDED}[layout](randn(18, 70))
    weight = sparse_weight(33, 70, pattern="oc_block8")
    torch.testing.assert_close(ops.sparse_linear(x, weight), x @ weight.to_dense().view(33, 70).T)


# ------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("pattern", ["unstructured", "oc_block4", "ic_block4"])
def test_gradcheck(pattern, activation, threads):
    """First and second derivatives, groups, stride, dilation and lopsided padding at once."""
    threads(1)
    made = sparse_weight(6, 2, 2, 2, pattern=pattern, groups=2, dtype=torch.float64)
    x, bias = randn(2, 4, 3, 4, dtype=torch.float64), randn(6, dtype=torch.float64)
    options = {"stride": (1, 2), "padding": (1, 0, 2, 1), "dilation": (2, 1), "activation": activation}

    def f(x, values, bias, residual):
        if made.block_mask is not None:
            values = values * made.block_mask
        existing = SparseWeight.from_dense(
            torch.ones(made.shape, dtype=torch.float64), made.mask(), pattern=pattern, groups=2
        )
        weight = dataclasses.replace(made, values=values * (existing.values != 0))
        return ops.sparse_conv2d(x, weight, bias, residual=residual, **options)

    residual = torch.randn_like(f(x, made.values, bias, None))
    arguments = [t.requires_grad_() for t in (x, made.values, bias, residual)]
    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments, fast_mode=True)


@pytest.mark.parametrize("name", ["sparse_conv2d_dx", "sparse_conv2d_dw"])
def test_gradients_of_the_backward_ops(name, threads):
    threads(1)
    for sample in cases.OP_SAMPLES[name](False):
        a, b = (t.double().requires_grad_() for t in sample[:2])
        op = getattr(torch.ops.pyops, name)
        assert torch.autograd.gradcheck(lambda *ab, op=op, rest=sample[2:]: op(*ab, *rest), (a, b), fast_mode=True)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@EACH_ISA
def test_any_backward_op(isa, data):
    """dx and dw of any problem against the references in float64, dx with and without a packed form."""

    def draw(label, *choices):
        return data.draw(st.sampled_from(choices), label=label)

    groups, Og, Cg = draw("groups", 1, 1, 2, 3), draw("O/groups", 1, 5, 16, 40), draw("C/groups", 1, 3, 8, 20)
    kernel = [draw("kernel", 1, 1, 2, 3, 5) for _ in range(2)]
    stride, dilation = ([draw(name, 1, 1, 2, 3) for _ in range(2)] for name in ("stride", "dilation"))
    padding = [draw("padding", 0, 0, 1, 2, 5) for _ in range(4)]
    N, H, W = draw("N", 0, 1, 2, 5), draw("H", 13, 14, 21), draw("W", 13, 16, 35)
    dtype, form = draw("dtype", torch.float32, torch.bfloat16), draw("form", "contiguous", "channels_last")
    options = {"pattern": draw("pattern", *PATTERNS), "keep": draw("kept", 0.0, 0.02, 0.3, 1.0), "groups": groups}
    weight = sparse_weight(groups * Og, Cg, *kernel, dtype=draw("dtype of values", dtype, torch.float32), **options)
    x = FORMATS[draw("form of x", *FORMATS)](randn(N, groups * Cg, H, W, dtype=dtype))
    shape = output_size(x.shape, weight.shape, stride, padding, dilation)
    grad = FORMATS[form](randn(*shape, dtype=dtype, seed=1))
    structure = (weight.crow_indices, weight.col_indices, list(weight.shape), list(weight.block))
    window, eps = (stride, padding, dilation, groups), torch.finfo(dtype).eps

    def close(a, exact, magnitude, K):
        assert (a.shape, a.stride()) == (exact.shape, exact.stride())
        rounding = eps * exact.abs() if a.dtype == dtype else 0
        bound = magnitude.max() if a.numel() else 0
        assert ((a.double() - exact).abs() <= rounding + torch.finfo(torch.float32).eps * math.sqrt(K) * bound).all()

    exact, magnitude = (
        sparse_conv2d_dx_ref(f(grad.double()), f(weight.values.double()), *structure, x.shape, *window)
        for f in (lambda t: t, torch.abs)
    )
    packed = [None]
    if backend.native is not None:
        arguments = (weight.values, *structure, *window, x.shape, form == "channels_last")
        packed.append(torch.ops.pyops.sparse_conv2d_pack_dx(*arguments))
    for p in packed:
        dx = torch.ops.pyops.sparse_conv2d_dx(grad, weight.values, *structure, x.shape, *window, p)
        close(dx, exact, magnitude, Og * math.prod(kernel))
    exact, magnitude = (
        sparse_conv2d_dw_ref(f(grad.double()), f(x.double()), *structure, *window) for f in (lambda t: t, torch.abs)
    )
    dw = torch.ops.pyops.sparse_conv2d_dw(grad, x, *structure, *window)
    assert dw.dtype == torch.float32
    close(dw, exact, magnitude, max(1, N * shape[2] * shape[3]))


def test_only_what_needs_it_gets_a_gradient():
    weight, x = sparse_weight(5, 3, 3, 3), randn(2, 3, 6, 6)
    assert not ops.sparse_conv2d(x, weight).requires_grad
    x.requires_grad_()
    ops.sparse_conv2d(x, weight, randn(5)).sum().backward()
    assert weight.values.grad is None
    weight.values.requires_grad_()
    with torch.no_grad():
        assert not ops.sparse_conv2d(x, weight).requires_grad


def test_through_the_dispatcher_and_past_it():
    """`dispatch` leaves the dispatcher's autograd layer out; results and gradients are the same."""
    weight, x = sparse_weight(5, 3, 3, 3), randn(2, 3, 6, 6)
    grads = []
    for direct in (False, True):
        leaf, values = x.clone().requires_grad_(), weight.values.detach().clone().requires_grad_()
        structure = (weight.crow_indices, weight.col_indices, list(weight.shape), list(weight.block))
        if direct:
            y = torch.ops.pyops.sparse_conv2d(leaf, values, *structure, activation="gelu")
        else:
            y = ops.sparse_conv2d(leaf, dataclasses.replace(weight, values=values), activation="gelu")
        y.square().sum().backward()
        grads.append((y.detach(), leaf.grad, values.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_vmap():
    weight, x = sparse_weight(5, 3, 3, 3), randn(4, 2, 3, 6, 6)
    y = torch.func.vmap(lambda image: ops.sparse_conv2d(image, weight))(x)
    torch.testing.assert_close(y, torch.stack([ops.sparse_conv2d(image, weight) for image in x]))


def test_compiled_with_a_dynamic_batch(fresh_compiler):
    weight = sparse_weight(5, 3, 3, 3, pattern="oc_block4")

    @torch.compile(fullgraph=True, dynamic=True)
    def f(x):
        return ops.sparse_conv2d(x, weight, padding=1, activation="relu") + 1

    for N in (2, 3, 7):
        for form in ("contiguous", "channels_last"):
            x = FORMATS[form](randn(N, 3, 6, 7))
            torch.testing.assert_close(f(x), ops.sparse_conv2d(x, weight, padding=1, activation="relu") + 1)


# ------------------------------------------------------------------------------------------- determinism and packing


@cases.needs_native  # the reference is as deterministic as torch's convolution, which is not over numbers of threads
@pytest.mark.parametrize("pattern", PATTERNS)
@EACH_ISA
def test_threads_and_repeats_give_the_same_bits(isa, threads, pattern):
    """Of the result and of its gradients."""
    weight, x = sparse_weight(64, 32, 3, 3, pattern=pattern, keep=0.2), randn(3, 32, 14, 14).requires_grad_()
    weight.values.requires_grad_()
    for stride in (1, 2):
        first = None
        for n in (1, 1, 2, 2, 3):
            threads(n)
            y = ops.sparse_conv2d(x, weight, padding=1, stride=stride)
            results = (y, *torch.autograd.grad(y, (x, weight.values), torch.ones_like(y)))
            first = first or results
            assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@cases.needs_native
@pytest.mark.parametrize("change", ["values in place", "another x", "nothing", "grad mode", "inference tensors"])
def test_packed_weight_is_kept_and_renewed(change):
    weight, x = sparse_weight(16, 8, 3, 3), randn(2, 8, 9, 9)
    ops.sparse_conv2d(x, weight)
    before = dict(weight.packed.forward.by_shape)
    assert len(before) == 1
    if change == "values in place":
        weight.values.mul_(2)
    elif change == "another x":
        x = randn(2, 8, 12, 9)
    elif change == "grad mode":
        weight.values.requires_grad_()
    elif change == "inference tensors":
        with torch.inference_mode():
            weight = dataclasses.replace(weight, values=weight.values.clone())
    y = ops.sparse_conv2d(x, weight)
    assert_close_to_oracle(y.detach(), x, weight, None, None, (1, 1), (0,) * 4, (1, 1))
    blobs = weight.packed.trained if change == "grad mode" else weight.packed.forward
    held = blobs.by_shape
    kept = [blob for blob in held.values() if any(blob is b for b in before.values())]
    assert len(kept) == (change in ("nothing", "another x"))
    assert len(held) == {"another x": 2, "inference tensors": 0}.get(change, 1)
    if change == "grad mode":  # the structure alone, which no step changes
        assert not any(t.data_ptr() == weight.values.data_ptr() for t in blobs._state[2])
        assert not weight.packed.forward.by_shape, "a step may follow"


@cases.needs_native
@pytest.mark.parametrize("pattern", ["unstructured", "oc_block16"])
@pytest.mark.parametrize("R", [1, 3])
def test_more_shapes_than_are_packed_for(pattern, R):
    """The packed form for one shape serves another, forward and backward, in either memory format."""
    weight = sparse_weight(32, 8, R, R, pattern=pattern)
    weight.values.requires_grad_()
    for i in range(MOST_SHAPES + 3):
        for channels_last in (False, True):
            x = randn(1 + i % 2, 8, 5 + 3 * i, 40 - 5 * i)
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            x.requires_grad_()
            y = ops.sparse_conv2d(x, weight, padding=R // 2, stride=2)
            assert_close_to_oracle(y.detach(), x.detach(), weight, None, None, (2, 2), (R // 2,) * 4, (1, 1))
            dx = torch.autograd.grad(y.square().sum(), x)[0]
            again = x.detach().clone().requires_grad_()
            F.conv2d(again, weight.to_dense().detach(), padding=R // 2, stride=2).square().sum().backward()
            torch.testing.assert_close(dx, again.grad, rtol=1e-4, atol=1e-4)
            assert len(weight.packed.forward.by_shape) <= MOST_SHAPES
            assert len(weight.packed.dx.by_shape) <= MOST_SHAPES


@cases.needs_native
def test_packed_form_for_dx_outlives_a_step():
    weight, x = sparse_weight(16, 8, 3, 3), randn(2, 8, 9, 9).requires_grad_()
    weight.values.requires_grad_()
    ops.sparse_conv2d(x.detach(), weight).sum().backward()
    assert not weight.packed.dx.by_shape, "nobody asks for the gradient of x"
    held, gradients = None, []
    for _ in range(2):
        x.grad = None
        ops.sparse_conv2d(x, weight, activation="silu").sum().backward()
        (blob,) = weight.packed.dx.by_shape.values()
        assert held is None or blob is held
        held = blob
        gradients.append(x.grad)
        weight.values.data.mul_(2)
    dense = weight.to_dense().detach() / 2
    again = x.detach().clone().requires_grad_()
    F.silu(F.conv2d(again, dense)).sum().backward()
    torch.testing.assert_close(gradients[1], again.grad)
    assert not torch.equal(*gradients)


@cases.needs_native
def test_packed_and_unpacked_give_the_same_bits():
    weight, x = sparse_weight(24, 8, 3, 3, pattern="oc_block8"), randn(2, 8, 9, 9)
    structure = (weight.values, weight.crow_indices, weight.col_indices, weight.shape, weight.block)
    assert torch.equal(ops.sparse_conv2d(x, weight), torch.ops.pyops.sparse_conv2d(x, *structure))


# ------------------------------------------------------------------------------------------- errors


def bad(**changes):
    x, weight = randn(2, 6, 5, 5), sparse_weight(4, 3, 3, 3, groups=2)
    return {"x": x, "weight": weight, "bias": randn(4), "residual": randn(2, 4, 3, 3), **changes}


BAD = {
    "x is a list": (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    "x is int": (TypeError, r"x has dtype torch\.int64; allowed", {"x": torch.ones(2, 6, 5, 5).long()}),
    "x is 2-D": (ValueError, r"x must be \[N, C, H, W\] or \[C, H, W\], got shape \(6, 5\)", {"x": torch.ones(6, 5)}),
    "x has other channels": (ValueError, "x has 5 channels; weight .* with groups=2 needs 6", {"x": randn(2, 5, 5, 5)}),
    "x is small": (ValueError, "x has height 2 with its padding; the kernel reaches over 3", {"x": randn(2, 6, 2, 5)}),
    "x is narrow": (ValueError, "x has width 1", {"x": randn(2, 6, 3, 1)}),
    "x is on meta": (ValueError, r"weight\.values is on cpu, x on meta", {"x": torch.ones(2, 6, 5, 5, device="meta")}),
    "weight is dense": (TypeError, "weight must be a SparseWeight, got Tensor", {"weight": randn(4, 3, 3, 3)}),
    "bias is short": (ValueError, r"bias is \(3,\); expected \(4,\)", {"bias": randn(3)}),
    "bias is int": (TypeError, r"bias has dtype torch\.int64", {"bias": torch.ones(4).long()}),
    "residual would broadcast": (
        ValueError,
        r"residual is .* expected \(2, 4, 3, 3\)",
        {"residual": randn(1, 4, 3, 3)},
    ),
    "residual in bf16": (TypeError, r"residual has dtype torch\.bfloat16", {"residual": randn(2, 4, 3, 3).bfloat16()}),
    "activation": (ValueError, "activation='swish' is not one of none", {"activation": "swish"}),
    "groups": (ValueError, "groups is 1; the weight was made for groups=2", {"groups": 1}),
    "stride 0": (ValueError, "stride is 0; the least allowed is 1", {"stride": 0}),
    "stride of three": (ValueError, r"stride is \(1, 1, 1\); expected one number or 2", {"stride": (1, 1, 1)}),
    "stride is float": (TypeError, r"stride is 1\.0; expected an integer", {"stride": 1.0}),
    "stride is bool": (TypeError, "stride is True", {"stride": True}),
    "dilation -1": (ValueError, "dilation is -1", {"dilation": -1}),
    "padding -1": (ValueError, r"padding is \(0, 0, -1, 0\); the least allowed is 0", {"padding": (0, 0, -1, 0)}),
    "padding of three": (ValueError, "padding is", {"padding": (0, 0, 0)}),
    "padding by another name": (ValueError, "padding='full' is not one of same, valid", {"padding": "full"}),
    "same with stride": (ValueError, r'padding="same" needs stride=1, got \(2, 2\)', {"padding": "same", "stride": 2}),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    error, message, changes = BAD[name]
    with pytest.raises(error, match=message):
        ops.sparse_conv2d(**bad(**changes))


BAD_LINEAR = {
    "x has another K": (ValueError, r"x is \(3, 8\); weight .* needs \[\.\.\., 7\]", {"x": randn(3, 8)}),
    "x is 0-dim": (ValueError, "x is ", {"x": torch.ones(())}),
    "weight of a convolution": (
        ValueError,
        r"a linear layer needs \[N, K, 1, 1\]",
        {"weight": sparse_weight(5, 7, 3, 3)},
    ),
    "weight in groups": (ValueError, "weight has groups=5", {"weight": sparse_weight(5, 7, groups=5)}),
    "bias": (ValueError, r"bias is \(4,\); expected \(5,\)", {"bias": randn(4)}),
    "residual": (ValueError, r"residual is \(1, 5\); expected \(3, 5\)", {"residual": randn(1, 5)}),
}


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_linear_errors(name):
    error, message, changes = BAD_LINEAR[name]
    with pytest.raises(error, match=message):
        ops.sparse_linear(**{"x": randn(3, 7), "weight": sparse_weight(5, 7), **changes})


def test_malformed_structure_never_reaches_a_kernel():
    """Through the bare op, past the Python checks: the reference and the native kernel raise, and do not crash."""
    weight, x = sparse_weight(5, 3, 3, 3), randn(2, 3, 6, 6)
    for crow, col in (
        (weight.crow_indices, weight.col_indices + 10**6),
        (weight.crow_indices, -weight.col_indices - 1),
        (weight.crow_indices * 1000, weight.col_indices),
        (weight.crow_indices[:-1], weight.col_indices),
        (weight.crow_indices, weight.col_indices[:-1]),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            torch.ops.pyops.sparse_conv2d(x, weight.values, crow, col, weight.shape, weight.block)
        structure, window = (crow, col, weight.shape, weight.block), ((1, 1), (0,) * 4, (1, 1), 1)
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            torch.ops.pyops.sparse_conv2d_dx(randn(2, 5, 4, 4), weight.values, *structure, x.shape, *window)
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            torch.ops.pyops.sparse_conv2d_dw(randn(2, 5, 4, 4), x, *structure, *window)
