"""kernels/int8_linear.py and kernels/epilogue.py against their contract; run by test_triton_interpreter.py."""

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from pyops.kernels import epilogue, quantize
from pyops.kernels import int8_linear as kernels
from pyops.ops import int8_linear, pack_int8
from pyops.ops.epilogue import ACTIVATIONS, epilogue_ref
from pyops.ops.int8_linear import int8_linear_ref, quantize_rows_ref

interpreter.install()
torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and large integers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def first_config(monkeypatch):
    """One config for each row tile, so that tuning has nothing to choose; test_every_config takes the others."""
    tuner = kernels._int8_linear_kernel
    seen, configs = set(), []
    for config in kernels.CONFIGS:
        if config.kwargs["BLOCK_M"] not in seen:
            seen.add(config.kwargs["BLOCK_M"])
            configs.append(config)
    monkeypatch.setattr(tuner, "configs", configs)
    monkeypatch.setattr(tuner, "cache", {})


def make(M, N, K, dtype=torch.float32, seed=0):
    """x, q_w, w_scale, bias, residual of a layer with outputs of order one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).to(dtype)
    q_w = torch.randint(-127, 128, (N, K), generator=g).to(torch.int8)
    w_scale = (torch.rand(N, generator=g) + 0.5) / (73 * max(K, 1) ** 0.5)
    return x, q_w, w_scale, torch.randn(N, generator=g), torch.randn(M, N, generator=g).to(dtype)


def check(y, x, q_w, w_scale, bias=None, residual=None, activation="none", x_scale=None):
    """y is the reference, but for the last place where exp, erf or a sum of three were rounded."""
    if x.shape[-1] and len(w_scale):
        expected = int8_linear_ref(x, q_w, w_scale, bias, residual, activation, x_scale)
    else:
        zeros = torch.zeros(*x.shape[:-1], w_scale.shape[0])
        expected = epilogue_ref(zeros, bias, residual, activation, x.dtype)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(y, expected, rtol=eps if x.dtype != torch.float32 else 1e-6, atol=2e-6, equal_nan=True)


def quantize_ieee(x: np.ndarray) -> np.ndarray:
    """The integers of the contract, written out in numpy: two roundings to fp32, then to the nearest even integer."""
    inverse = np.float32(127) / np.abs(x).max(axis=1, keepdims=True)
    return np.clip(np.rint(x * inverse), -127, 127).astype(np.int8)


# -------------------------------------------------------------------------------------------------------- quantization


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 7), (2, 16), (33, 129), (5, 2048), (1, 4099)])
def test_quantized_rows_are_exact(M, K, dtype):
    x = make(M, 1, K, dtype)[0]
    q, s = kernels.quantize_rows(x)
    q_ref, s_ref = quantize_rows_ref(x)
    assert torch.equal(q[:, :K], q_ref)
    assert torch.equal(s, s_ref)
    assert q.shape[1] % kernels.K_ALIGNMENT == 0
    assert not q[:, K:].any()


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_long_rows_are_read_in_pieces(static, smoothed, monkeypatch):
    """Twice with a dynamic scale; once with a static one, after which rows that are not finite are mended."""
    monkeypatch.setattr(quantize, "ROW_IN_REGISTERS", 64)
    monkeypatch.setattr(quantize, "QUANTIZE_TILE", 32)
    x = make(5, 1, 131)[0]
    x[1, 130], x[3, 2] = float("nan"), float("-inf")
    x[2, 0] = 3e38
    scale = torch.tensor([0.02]) if static else None
    smooth = torch.linspace(0.1, 3.0, 131).flip(0) if smoothed else None
    q, s = kernels.quantize_rows(x, scale, smooth)
    q_ref, s_ref = quantize_rows_ref(x, scale, smooth)
    assert torch.equal(q[:, :131], q_ref)
    assert not q[:, 131:].any()
    torch.testing.assert_close(s, s_ref, rtol=0, atol=0, equal_nan=True)


def test_row_longer_than_registers():
    x = make(1, 1, 20001)[0]
    q, s = kernels.quantize_rows(x)
    q_ref, s_ref = quantize_rows_ref(x)
    assert torch.equal(q[:, :20001], q_ref)
    assert torch.equal(s, s_ref)


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 0.49999997]])
    q, s = kernels.quantize_rows(x)
    assert q[0, :10].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126, 0]
    assert s.item() == 1.0


def test_division_and_product_round_separately():
    """Rows made of values at the edge between two integers, where a reciprocal or a multiply-add rounds differently."""
    rng = np.random.default_rng(0)
    amax = rng.uniform(0.5, 4.0, (64, 1)).astype(np.float32)
    inverse = np.float32(127) / amax
    edges = (np.arange(-126, 126, dtype=np.float32) + np.float32(0.5)) / inverse
    x = np.concatenate([amax, edges, np.nextafter(edges, 0), np.nextafter(edges, 9)], axis=1)
    expected = quantize_ieee(x)
    by_reciprocal = np.rint(x * (np.float32(1) / amax * np.float32(127))).astype(np.int8)
    rounded_once = np.rint(x.astype(np.float64) * inverse).astype(np.int8)
    assert (expected != by_reciprocal).any()
    assert (expected != rounded_once).any()
    q, _ = kernels.quantize_rows(torch.from_numpy(x))
    assert np.array_equal(q[:, : x.shape[1]].numpy(), expected)


@pytest.mark.parametrize("static", [False, True])
def test_rows_that_are_not_finite(static):
    x, q_w, w_scale, bias, _ = make(6, 20, 50)
    x[1, 7], x[2, 0], x[3, 49] = float("nan"), float("inf"), -float("inf")
    x[4], x[5] = 0.0, 2.0**-120
    scale = torch.tensor(0.02) if static else None
    q, s = kernels.quantize_rows(x, scale)
    assert s[1:4].isnan().all()
    assert s[[0, 4, 5]].isfinite().all()
    assert not q[1:].any()
    for activation in ACTIVATIONS:
        y = kernels.int8_linear(x, q_w, w_scale, bias, None, activation, scale)
        assert y[1:4].isnan().all(), activation
        assert y[[0, 4, 5]].isfinite().all(), activation
        check(y, x, q_w, w_scale, bias, None, activation, scale)


def test_smallest_magnitudes():
    x = torch.tensor([[2.0**-119, -(2.0**-120)], [2.0**-119 * (1 - 2**-24), 0.0], [1e-45, 0.0], [3.4e38, -1e38]])
    q, s = kernels.quantize_rows(x)
    q_ref, s_ref = quantize_rows_ref(x)
    assert torch.equal(q[:, :2], q_ref)
    assert torch.equal(s, s_ref)
    assert s[0] > 0
    assert s[1] == 0
    assert s[2] == 0


# -------------------------------------------------------------------------------------------------------------- matmul


SHAPES = [(1, 1, 1), (1, 97, 2048), (2, 33, 31), (7, 64, 129)]
SHAPES += [(17, 130, 48), (31, 5, 2051), (67, 40, 96), (131, 259, 80)]
SIZE = st.integers(0, 70)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_shapes(M, N, K, dtype):
    x, q_w, w_scale, bias, residual = make(M, N, K, dtype)
    check(kernels.int8_linear(x, q_w, w_scale), x, q_w, w_scale)
    y = kernels.int8_linear(x, q_w, w_scale, bias.to(dtype), residual, "relu")
    check(y, x, q_w, w_scale, bias.to(dtype), residual, "relu")


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(SIZE, SIZE, SIZE, st.sampled_from(DTYPES), st.sampled_from([*ACTIVATIONS]))
def test_any_shape(M, N, K, dtype, activation):
    x, q_w, w_scale, bias, residual = make(M, N, K, dtype, seed=M + N + K)
    y = kernels.int8_linear(x, q_w, w_scale, bias, residual, activation)
    check(y, x, q_w, w_scale, bias, residual, activation)


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_empty(shape):
    x, q_w, w_scale, bias, residual = make(*shape)
    for scale in (None, torch.tensor(0.1)):
        y = kernels.int8_linear(x, q_w, w_scale, bias, residual, "silu", scale)
        check(y, x, q_w, w_scale, bias, residual, "silu", scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("M", "K"), [(5, 2048), (70, 96)], ids=["split", "whole"])
def test_activations(M, K, activation):
    x, q_w, w_scale, bias, residual = make(M, 50, K)
    for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
        check(kernels.int8_linear(x, q_w, w_scale * 3, b, r, activation), x, q_w, w_scale * 3, b, r, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["one", "each"])
def test_static_scales(rows, dtype):
    x, q_w, w_scale, bias, residual = make(9, 40, 70, dtype)
    scale = torch.tensor(0.013) if rows == "one" else torch.linspace(0.005, 0.05, 9)
    y = kernels.int8_linear(x, q_w, w_scale, bias, residual, "none", scale)
    check(y, x, q_w, w_scale, bias, residual, "none", scale)
    q, _ = kernels.quantize_rows(x, scale)
    assert torch.equal(q[:, :70], quantize_rows_ref(x, scale)[0])
    assert q.abs().max() == 127  # the case saturates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_smoothed_rows_are_exact(static, dtype):
    x, q_w, w_scale, bias, residual = make(9, 40, 70, dtype)
    smooth = torch.randn(70, generator=torch.Generator().manual_seed(5)).exp()
    x[4, 69], x[5, 3] = float("nan"), float("inf")
    scale = torch.tensor(0.013) if static else None
    q, s = kernels.quantize_rows(x, scale, smooth)
    q_ref, s_ref = quantize_rows_ref(x, scale, smooth)
    assert torch.equal(q[:, :70], q_ref)
    torch.testing.assert_close(s, s_ref, rtol=0, atol=0, equal_nan=True)
    y = kernels.int8_linear(x, q_w, w_scale, bias, residual, "none", scale, smooth)
    expected = int8_linear_ref(x, q_w, w_scale, bias, residual, "none", scale, smooth)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(y, expected, rtol=eps, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::3],
        lambda x: x.T[:40],
        lambda x: x[:, 1:],
        lambda x: x[:1].expand(9, -1),
        lambda x: x.reshape(6, 8, 40),
        lambda x: x.reshape(6, 8, 40).transpose(0, 1),
        lambda x: x[0],
    ],
    ids=["columns", "rows", "transposed", "offset", "expanded", "3-D", "permuted", "1-D"],
)
def test_strides(view):
    x = view(make(48, 1, 40)[0])
    N, K = 21, x.shape[-1]
    _, q_w, w_scale, bias, _ = make(1, 2 * N, K)
    residual = torch.randn(N, *x.shape[:-1]).movedim(0, -1)
    args = x, q_w[::2], w_scale[::2], bias[::2], residual
    check(kernels.int8_linear(*args, "tanh"), *args, "tanh")


def test_packed_and_transposed_weights():
    x, q_w, w_scale, bias, _ = make(4, 50, 70)
    for weight in (pack_int8(q_w), q_w.T.contiguous().T):
        check(kernels.int8_linear(x, weight, w_scale, bias), x, q_w, w_scale, bias)
    x, q_w, w_scale, bias, _ = make(4, 50, 64)
    shifted = torch.zeros(50 * 64 + 1, dtype=torch.int8)[1:].view(50, 64).copy_(q_w)
    check(kernels.int8_linear(x, shifted, w_scale, bias), x, q_w, w_scale, bias)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_every_config(config, monkeypatch):
    monkeypatch.setattr(kernels._int8_linear_kernel, "configs", [config])
    for M, N, K in ((5, 300, 1100), (150, 70, 272)):
        x, q_w, w_scale, bias, residual = make(M, N, K)
        y = kernels.int8_linear(x, q_w, w_scale, bias, residual, "gelu")
        check(y, x, q_w, w_scale, bias, residual, "gelu")


@pytest.mark.parametrize("M", [1, 16, 17, 32, 33, 64, 65, 100, 5000])
def test_pruning_leaves_configs_that_fit(M):
    bucket = min(max(triton.next_power_of_2(M), 16), 4096)
    for N in (4096, 17):
        left = kernels._prune(kernels.CONFIGS, {"q_ptr": torch.empty(0), "M_BUCKET": bucket, "N": N})
        assert len(left) >= 2
        assert all(bucket <= 2 * config.kwargs["BLOCK_M"] or config.kwargs["BLOCK_M"] >= 64 for config in left)


def test_autotuner_runs_through_all_configs(monkeypatch):
    tuner, ran = kernels._int8_linear_kernel, []

    def run(call, quantiles):
        call()
        ran.append(1)
        return [0.0, 0.0, 0.0]

    monkeypatch.setattr(tuner, "configs", kernels.CONFIGS)
    monkeypatch.setattr(tuner, "do_bench", run)
    x, q_w, w_scale, bias, residual = make(20, 70, 90)
    check(kernels.int8_linear(x, q_w, w_scale, bias, residual), x, q_w, w_scale, bias, residual)
    assert len(ran) >= 2


def test_split_of_k_does_not_change_a_bit(monkeypatch):
    x, q_w, w_scale, bias, residual = make(19, 70, 2500)
    outputs = []
    for split in (1, 2, 4, 16):
        monkeypatch.setattr(kernels, "choose_split", lambda *_, split=split: split)
        outputs.append(kernels.int8_linear(x, q_w, w_scale, bias, residual, "silu"))
    assert all(torch.equal(outputs[0], y) for y in outputs[1:])


@pytest.mark.parametrize(("M", "N", "K"), [(10, 200, 1536), (600, 520, 64)])
def test_order_of_programs_does_not_change_a_bit(M, N, K):
    args = make(M, N, K)
    expected = kernels.int8_linear(*args, "gelu_tanh")
    for seed in range(2):
        with interpreter.shuffled_programs(seed):
            assert torch.equal(kernels.int8_linear(*args, "gelu_tanh"), expected)


def test_split_choice():
    assert kernels.choose_split(1, 4096, 4096, 132) == 4
    assert kernels.choose_split(64, 1024, 65536, 132) == 16
    assert kernels.choose_split(1, 65536, 4096, 132) == 1
    assert kernels.choose_split(1, 16, 100, 132) == 1
    assert kernels.choose_split(65, 16, 65536, 132) == 1


def test_through_the_dispatcher():
    x, q_w, w_scale, bias, residual = make(6, 40, 70, torch.bfloat16)
    y = int8_linear(x, q_w, w_scale, bias, residual=residual, activation="silu")
    assert torch.equal(y, kernels.int8_linear(x, q_w, w_scale, bias, residual, "silu"))
    check(y, x, q_w, w_scale, bias, residual, "silu")


# ------------------------------------------------------------------------------------------------------------ epilogue


@triton.jit
def _activate_kernel(z_ptr, y_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, epilogue.activate(z, ACTIVATION), mask=offs < n)


def _activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    y = torch.empty_like(z)
    _activate_kernel[(triton.cdiv(len(z), 1024),)](z, y, len(z), activation, BLOCK=1024)
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_as_exact_as_torch(activation):
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.linspace(-1, 1, 4000), torch.logspace(-30, 30, 500)])
    z = torch.cat([z, -z])
    z = z[z.abs() < 1e18]
    exact = ACTIVATIONS[activation](z.double())
    error = (_activate(z, activation) - exact).abs()
    torch_error = (ACTIVATIONS[activation](z) - exact).abs()
    ulp = exact.abs().clamp(min=1e-30) * torch.finfo(torch.float32).eps
    assert (error <= 2 * torch_error + 2 * ulp + 3e-7 * (z.abs() < 12)).all()
    if activation == "tanh":
        assert (error <= 2 * ulp).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_special_values(activation):
    inf = float("inf")
    y = _activate(torch.tensor([float("nan"), inf, 1e30, -1e30, 0.0, -0.0]), activation)
    bounded = {"relu6": 6.0, "sigmoid": 1.0, "tanh": 1.0}
    low = {"none": -1e30, "tanh": -1.0}
    at_zero = 0.5 if activation == "sigmoid" else 0.0
    assert y[0].isnan()
    assert y[1] == bounded.get(activation, inf)
    assert y[2] == pytest.approx(bounded.get(activation, 1e30))
    assert y[3] == pytest.approx(low.get(activation, 0.0))
    assert y[4] == at_zero
    assert y[5] == at_zero
