"""kernels/sparse_conv2d.py against convolutions in float64; run by test_triton_interpreter.py."""

from __future__ import annotations

import dataclasses

import interpreter
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pyops import ops
from pyops.kernels import sparse_conv2d as kernels
from pyops.ops import SparseWeight
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.sparse_conv2d import sparse_conv2d_dx_ref, sparse_conv2d_ref
from pyops.ops.sparse_packed import is_channels_last
from pyops.ops.sparse_weight import PATTERNS

interpreter.install()
torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and large integers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def one_config(monkeypatch):
    """Tuning has nothing to choose, and a small image is one tile; test_every_config takes the others."""
    monkeypatch.setattr(kernels._sparse_conv2d_kernel, "configs", kernels.CONFIGS[2:3])
    monkeypatch.setattr(kernels._sparse_conv2d_kernel, "cache", {})


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution; O and C are of all groups, padding is (top, bottom, left, right)."""

    N: int = 2
    C: int = 32
    H: int = 6
    W: int = 5
    O: int = 32
    R: int = 3
    S: int = 3
    pattern: str = "block16"
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    density: float = 0.4
    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def window(self):
        return self.stride, self.padding, self.dilation, self.groups

    def weight(self, seed: int = 0) -> SparseWeight:
        g = torch.Generator().manual_seed(seed)
        bo, bc = PATTERNS[self.pattern]
        shape = (self.O, self.C // self.groups, self.R, self.S)
        per_group = self.O // self.groups
        keep = torch.rand(self.groups, -(-per_group // bo), -(-shape[1] // bc), self.R, self.S, generator=g)
        keep = (keep < self.density).repeat_interleave(bo, 1)[:, :per_group].repeat_interleave(bc, 2)[:, :, : shape[1]]
        w = torch.randn(shape, generator=g) / max(shape[1] * self.R * self.S * self.density, 1) ** 0.5
        return SparseWeight.from_dense(w.to(self.dtype), keep.reshape(shape), pattern=self.pattern, groups=self.groups)

    def x(self, seed: int = 0) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(self.N, self.C, self.H, self.W, generator=g).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def fields(weight: SparseWeight) -> tuple:
    return weight.values, weight.crow_indices, weight.col_indices, weight.shape, weight.block


def padded(x: torch.Tensor, padding) -> torch.Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom))


def exact_forward(case: Case, x, weight, bias=None, residual=None, activation="none") -> torch.Tensor:
    z = padded(x.double(), case.padding)
    z = F.conv2d(z, weight.to_dense().double(), bias, case.stride, 0, case.dilation, case.groups)
    return ACTIVATIONS[activation](z if residual is None else z + residual.double())


def exact_dx(case: Case, grad, weight) -> torch.Tensor:
    leaf = torch.zeros(case.N, case.C, case.H, case.W, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(
        padded(leaf, case.padding), weight.to_dense().double(), None, case.stride, 0, case.dilation, case.groups
    )
    return torch.autograd.grad(y, leaf, grad.double())[0]


def check(actual: torch.Tensor, exact: torch.Tensor, like: torch.Tensor) -> None:
    """One rounding to `like`'s dtype of sums in fp32, in `like`'s memory format."""
    assert actual.shape == exact.shape
    assert actual.dtype == like.dtype
    assert is_channels_last(actual) == is_channels_last(like) or 1 in actual.shape
    assert actual.is_contiguous() or is_channels_last(actual)
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=eps if actual.dtype != torch.float32 else 4e-6, atol=4e-6)


def forward(case: Case, x, weight, bias=None, residual=None, activation="none") -> torch.Tensor:
    return kernels.sparse_conv2d(x, *fields(weight), bias, residual, *case.window, activation)


def dx(case: Case, grad, weight) -> torch.Tensor:
    return kernels.sparse_conv2d_dx(grad, *fields(weight), (case.N, case.C, case.H, case.W), *case.window)


def check_case(case: Case, seed: int = 0, activation: str = "silu") -> None:
    """Forward without and with an epilogue, and the gradient of x."""
    x, weight = case.x(seed), case.weight(seed)
    exact = exact_forward(case, x, weight)
    check(forward(case, x, weight), exact, x)
    g = torch.Generator().manual_seed(seed + 2)
    bias = torch.randn(case.O, generator=g)
    residual = torch.randn(exact.shape, generator=g).to(x.dtype)
    expected = exact_forward(case, x, weight, bias.double(), residual, activation)
    check(forward(case, x, weight, bias, residual, activation), expected, x)
    grad = torch.randn(exact.shape, generator=g).to(x.dtype)
    if case.channels_last:
        grad = grad.contiguous(memory_format=torch.channels_last)
    check(dx(case, grad, weight), exact_dx(case, grad, weight), grad)


CASES = {
    "1x1": Case(R=1, S=1, padding=(0, 0, 0, 0)),
    "1x1 stride 2": Case(R=1, S=1, stride=(2, 2), padding=(0, 0, 0, 0), channels_last=True),
    "1x1 of 32": Case(C=70, O=40, R=1, S=1, pattern="block32", padding=(0, 0, 0, 0), channels_last=True),
    "1x1 of 64": Case(C=128, O=130, R=1, S=1, pattern="block64", padding=(0, 0, 0, 0)),
    "3x3": Case(channels_last=True),
    "3x3 ragged": Case(N=3, C=23, O=37, H=7, W=3),
    "3x3 channels of 8": Case(C=24, O=40, channels_last=True),
    "3x3 of 32": Case(C=33, O=64, pattern="block32", channels_last=True),
    "3x3 of 64": Case(C=64, O=65, pattern="block64"),
    "no padding": Case(padding=(0, 0, 0, 0), H=8, W=7),
    "stride 2": Case(stride=(2, 2), H=9, W=8, channels_last=True),
    "stride beyond kernel": Case(stride=(4, 5), H=13, W=12),
    "stride beyond image": Case(stride=(7, 3)),
    "uneven": Case(R=1, S=4, stride=(2, 3), padding=(2, 0, 1, 3), dilation=(3, 2), H=7, W=11),
    "dilated": Case(dilation=(2, 3), padding=(2, 2, 3, 3)),
    "dilated stride": Case(dilation=(2, 3), stride=(2, 3), padding=(0, 3, 5, 1)),
    "padding beyond kernel": Case(padding=(4, 5, 6, 3), stride=(2, 1), H=2, W=1),
    "large kernel": Case(R=7, S=5, padding=(3, 3, 2, 2), density=0.1),
    "groups": Case(C=48, O=60, groups=3, channels_last=True),
    "groups of 32": Case(C=64, O=72, groups=2, pattern="block32", stride=(2, 1)),
    "many groups": Case(C=12, O=18, groups=6),
    "one pixel": Case(N=1, H=1, W=1),
    "a row": Case(N=1, H=1, W=300, R=1, padding=(0, 0, 1, 1), channels_last=True),
    "a batch of pixels": Case(N=70, H=1, W=1, R=1, S=1, padding=(0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_convolution(name):
    check_case(CASES[name])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["1x1 of 32", "3x3 ragged", "3x3 of 64", "stride 2", "uneven", "groups"])
def test_narrow_dtypes(name, dtype):
    check_case(dataclasses.replace(CASES[name], dtype=dtype))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_window(data):
    draw = data.draw
    small, pair = st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))
    R, S, groups, dilation = draw(small), draw(small), draw(small), draw(pair)
    case = Case(
        N=draw(st.integers(1, 3)),
        C=groups * draw(st.integers(1, 20)),
        O=groups * draw(st.integers(1, 20)),
        H=dilation[0] * (R - 1) + draw(st.integers(1, 4)),
        W=dilation[1] * (S - 1) + draw(st.integers(1, 4)),
        R=R,
        S=S,
        pattern=draw(st.sampled_from(["block16", "block32", "block64"])),
        stride=draw(pair),
        padding=draw(st.tuples(*[st.integers(0, 3)] * 4)),
        dilation=dilation,
        groups=groups,
        density=draw(st.sampled_from([0.1, 0.5, 1.0])),
        channels_last=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    check_case(case, draw(st.integers(0, 9)))


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
@pytest.mark.parametrize("pattern", ["block16", "block32", "block64"])
def test_every_config(config, pattern, monkeypatch):
    monkeypatch.setattr(kernels._sparse_conv2d_kernel, "configs", [config])
    case = Case(C=40, O=70, H=9, W=6, stride=(2, 1), pattern=pattern, channels_last=True, dtype=torch.float16)
    check_case(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_pruning_leaves_configs_that_fit(block, channels_last, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_shared_bytes", lambda index: 101376)  # of a consumer GPU
    for M in (1, 16, 17, 50, 64, 300, 65536):
        for precision in ("ieee", "tf32"):
            left = kernels._prune(
                kernels.CONFIGS,
                {"x_ptr": torch.empty(0, dtype=dtype), "M_BUCKET": 1 << (M - 1).bit_length(), "N_CHANNELS": 64},
                NB=block,
                BLOCK_K=kernels._block_k(block, dtype.itemsize, precision),
                CHANNELS_LAST=channels_last,
                PRECISION=precision,
            )
            assert left, (M, precision)


def test_autotuner_runs_through_all_configs(monkeypatch):
    tuner, ran = kernels._sparse_conv2d_kernel, []

    def run(call, quantiles):
        call()
        ran.append(1)
        return [0.0, 0.0, 0.0]

    monkeypatch.setattr(tuner, "configs", kernels.CONFIGS)
    monkeypatch.setattr(tuner, "do_bench", run)
    check_case(Case(N=1, C=16, H=17, W=16, R=1, S=1, padding=(0, 0, 0, 0)))
    assert len(ran) >= 4


def test_rows_without_blocks():
    case = Case(O=80, density=0.05, stride=(2, 2))
    weight = case.weight()
    assert (weight.crow_indices.diff() == 0).any()
    check_case(case)
    check_case(dataclasses.replace(case, density=0.0))


@pytest.mark.parametrize("case", [Case(N=0), Case(O=0), Case(C=0), Case(H=0, padding=(2, 1, 1, 1))], ids=str)
@pytest.mark.parametrize("pattern", ["block16", "oc_block8"])
def test_empty(case, pattern):
    case = dataclasses.replace(case, pattern=pattern)
    x, weight, bias = case.x(), case.weight(), torch.randn(case.O)
    expected = sparse_conv2d_ref(x, *fields(weight), bias, None, *case.window, "silu")
    torch.testing.assert_close(forward(case, x, weight, bias, None, "silu"), expected)
    grad = torch.randn(expected.shape)
    torch.testing.assert_close(
        dx(case, grad, weight), sparse_conv2d_dx_ref(grad, *fields(weight), x.shape, *case.window)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check_case(Case(N=1, O=20, dtype=torch.bfloat16), activation=activation)


def test_strides():
    case = Case(padding=(1, 0, 2, 1))
    weight, wide = case.weight(), torch.randn(4, 40, 12, 10)
    views = {
        "slice": wide[1:3, 3:35, ::2, 5:],
        "channels_last slice": wide.contiguous(memory_format=torch.channels_last)[::2, 8:, 6:, 1::2],
        "transposed": wide[:2, 4:36, :5, :6].transpose(2, 3),
        "batch last": torch.randn(32, 6, 5, 2).permute(3, 0, 1, 2),
        "one image": wide[:1, 8:, :6, :5].expand(2, -1, -1, -1),
        "one pixel": torch.randn(2, 32, 1, 1).expand(-1, -1, 6, 5),
        "channels aligned, rows not": torch.randn(2, 6, 165).as_strided((2, 32, 6, 5), (990, 1, 165, 33)),
    }
    for name, x in views.items():
        residual = torch.randn(*exact_forward(case, x, weight).shape[2:], 2, 32).permute(2, 3, 0, 1)
        y = forward(case, x, weight, None, residual, "relu")
        check(y, exact_forward(case, x, weight, None, residual, "relu"), y)
        assert is_channels_last(y) == is_channels_last(x), name
    grad = torch.randn(4, 32, 12, 10)[::2, :, :6, ::2][:, :, :, :5]
    case = Case()
    actual = dx(case, grad, weight)
    check(actual, exact_dx(case, grad, weight), actual)


def test_values_of_another_dtype_and_layout():
    case = Case(dtype=torch.bfloat16)
    weight, x = case.weight(), case.x()
    wider = dataclasses.replace(weight, values=weight.values.float().transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(forward(case, x, wider), forward(case, x, weight))
    doubled = dataclasses.replace(weight, values=weight.values.double())
    check(forward(case, x, doubled), exact_forward(case, x, weight), x)


def test_what_no_block_reads_stays_out():
    case = Case(C=64, O=96, pattern="block32", dtype=torch.float16)
    weight, x = case.weight(), case.x()
    keep = weight.col_indices >= 9  # the last 32 channels; steps that are not full read the first, for nothing
    keep[-1] = False
    rows = torch.repeat_interleave(torch.arange(len(weight.crow_indices) - 1), weight.crow_indices.diff())[keep]
    crow = F.pad(torch.bincount(rows, minlength=1).cumsum(0), (1, 0)).to(torch.int32)
    assert (crow.diff() % 2).any()
    last = SparseWeight(weight.values[keep], crow, weight.col_indices[keep], weight.shape, weight.block)
    expected = forward(case, x, last)
    x[:, :32] = float("nan")
    assert torch.equal(forward(case, x, last), expected)
    x[0, 35, 2, 2] = float("inf")
    y = forward(case, x, last)
    assert not y[0].isfinite().all()
    assert torch.equal(y[1], expected[1])


@pytest.mark.parametrize("name", ["3x3 ragged", "stride 2"])
def test_order_of_programs_does_not_change_a_bit(name):
    case = CASES[name]
    x, weight = case.x(), case.weight()
    y = forward(case, x, weight)
    gradient = dx(case, y, weight)
    for seed in range(2):
        with interpreter.shuffled_programs(seed):
            assert torch.equal(forward(case, x, weight), y)
            assert torch.equal(dx(case, y, weight), gradient)


@pytest.mark.parametrize("name", ["3x3", "stride 2", "uneven", "dilated stride", "groups"])
def test_the_transposed_list_holds_every_block_once(name):
    case = CASES[name]
    weight = case.weight()
    values, crow, col = kernels._transpose(*fields(weight), case.stride, case.dilation, case.groups)
    assert values.is_contiguous()
    assert crow.dtype == col.dtype == torch.int32
    assert crow[-1] == len(col) == len(weight.values)
    assert (crow.diff() >= 0).all()
    assert values.flatten().sort()[0].equal(weight.values.flatten().sort()[0])
    sums = torch.zeros(case.R * case.S, 16, 16)
    per_tap = sums.index_add(0, weight.col_indices % (case.R * case.S), weight.values)
    torch.testing.assert_close(sums.index_add(0, col % (case.R * case.S), values.transpose(1, 2)), per_tap)


FINE = ["unstructured", "2:4", "oc_block4", "oc_block8", "oc_block16", "ic_block4"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", FINE)
def test_fine_patterns_run_dense(pattern, dtype):
    case = Case(C=12, O=20, pattern=pattern, stride=(2, 1), padding=(1, 1, 2, 2), density=0.3, channels_last=True)
    if pattern == "2:4":
        mask = torch.tensor([1, 0, 0, 1] * 3, dtype=torch.bool)[:, None, None].expand(20, 12, 3, 3)
        weight = SparseWeight.from_dense(torch.randn(20, 12, 3, 3).to(dtype), mask, pattern=pattern)
    else:
        weight = dataclasses.replace(case, dtype=dtype).weight()
    x = case.x().to(dtype)
    assert kernels._select(x, weight.values, weight.shape, 60) == "dense"
    bias, residual = torch.randn(20), torch.randn(2, 20, 3, 7).to(dtype)
    y = forward(case, x, weight, bias, residual, "gelu")
    exact = exact_forward(case, x, weight, bias.double(), residual, "gelu")
    assert is_channels_last(y)
    eps = max(torch.finfo(dtype).eps, 4e-6)  # the convolution is rounded before the epilogue, as torch's own is
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=4 * eps)
    gradient = dx(case, residual.contiguous(memory_format=torch.channels_last), weight)
    assert is_channels_last(gradient)
    torch.testing.assert_close(gradient.double(), exact_dx(case, residual, weight), rtol=2 * eps, atol=4 * eps)


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 2, 2), (0, 1, 3, 2)], ids=str)
def test_dense_in_fp64_and_any_padding(padding):
    case = Case(C=12, O=20, padding=padding, stride=(1, 2), groups=2, dtype=torch.float64)
    x, weight = case.x(), case.weight()
    y = forward(case, x, weight)
    torch.testing.assert_close(y, exact_forward(case, x, weight), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx(case, y, weight), exact_dx(case, y, weight), rtol=1e-12, atol=1e-12)


def test_select():
    x, shape = torch.empty(0, dtype=torch.bfloat16), (64, 64, 3, 3)
    for block, choice in (((16, 16), "triton"), ((64, 64), "triton"), ((16, 1), "dense"), ((1, 4), "dense")):
        assert kernels._select(x, torch.empty(1, *block), shape, 1000) == choice
    values = torch.empty(1, 16, 16)
    assert kernels._select(x, values, shape, 2**31 - 1) == "dense"
    assert kernels._select(x, values, (64, 0, 3, 3), 1000) == "dense"
    assert kernels._select(x.double(), values, shape, 1000) == "dense"
    assert kernels._select(x, values.double(), shape, 1000) == "dense"


def test_through_the_dispatcher(monkeypatch):
    case = Case(stride=(2, 2), channels_last=True, dtype=torch.bfloat16)
    x, weight, bias = case.x().requires_grad_(), case.weight(), torch.randn(case.O)
    launched, launch = [], kernels._launch

    def count(*args, **kwargs):
        launched.append(1)
        launch(*args, **kwargs)

    monkeypatch.setattr(kernels, "_launch", count)
    y = ops.sparse_conv2d(x, weight, bias, stride=2, padding=1)
    check(y.detach(), exact_forward(case, x.detach(), weight, bias.double()), x.detach())
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    check(gradient, exact_dx(case, torch.ones_like(y), weight), x.detach())
    assert len(launched) == 2
    rows = torch.randn(3, 7, 32)
    weight = Case(O=40, R=1, S=1).weight()
    y = ops.sparse_linear(rows, weight, activation="relu")
    torch.testing.assert_close(y, (rows @ weight.to_dense()[:, :, 0, 0].T).relu(), rtol=1e-5, atol=1e-5)
    assert len(launched) == 3
