"""kernels/optim*.py against their contract; run by test_triton_interpreter.py.

torch's root is not always the nearest (MKL), so that values behind one may differ in the last place, and what is
rounded stochastically by a step, here and there. All else has to be the same bits.
"""

import interpreter
import optim_args
import pytest
import torch
import triton
import triton.language as tl
from optim_args import CODED, compare, make
from triton.runtime.errors import InterpreterError

import pyops.optim
from pyops import ops
from pyops.kernels import optim as kernels
from pyops.kernels import optim_codec, optim_norm, optim_numbers, optim_plans, optim_tables
from pyops.kernels.optim_rules import UPDATES
from pyops.ops import optim_codec as codec
from pyops.ops.optim import FIRST_EMA, FIRST_STATE, optim_step_ref, optim_sum_squares_ref
from pyops.ops.optim_rules import RULES

interpreter.install()
torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and large integers

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WITHOUT_ROOTS = ("sgd", "sgd_momentum", "adamax", "lion")
SHAPES = ((4100,), (0,), (1,), (7,), (3, 43), (2, 3, 256))
EVERYTHING = {
    "weight_decay": 0.125,
    "maximize": 1.0,
    "l1": 0.0625,
    "multiplier": torch.tensor(0.375),
    "zero_grad": True,
    "masked": True,
    "averaged": True,
    "first": [0, 0, FIRST_EMA, FIRST_STATE, FIRST_EMA | FIRST_STATE, 0],
}


@pytest.fixture(autouse=True)
def empty_caches():
    kernels._plans.clear()
    optim_norm._plans.clear()


@pytest.fixture
def few_programs(monkeypatch):
    """A program for each tensor, which goes through it in a loop."""
    monkeypatch.setattr(optim_tables, "PROGRAMS", 1)
    monkeypatch.setattr(optim_tables, "multiprocessors", lambda index: 1)


class OnDevice(torch.Tensor):
    """A tensor that the host must not read, nor what is computed from it."""

    def item(self):
        raise AssertionError("the host reads a tensor of the device")

    tolist = __bool__ = __float__ = __int__ = item


@pytest.fixture(autouse=True)
def device(monkeypatch):
    for module in (kernels, optim_numbers):
        monkeypatch.setattr(module, "on_host", lambda t: not isinstance(t, OnDevice))


def on_device(args):
    """`args` with scalars, lr, multiplier and found_inf where the host cannot read them."""
    args.scalars = [t.as_subclass(OnDevice) for t in args.scalars]
    for name in ("lr", "multiplier", "found_inf"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).as_subclass(OnDevice))
    return args


def reaching(tensors, op, *args):
    """op(*args), whose kernels may reach `tensors` and what stands in for them."""
    original = optim_plans._stand_in
    with interpreter.reachable(tensors) as add:
        optim_plans._stand_in = lambda *a: add(original(*a))
        try:
            return op(*args)
        finally:
            optim_plans._stand_in = original


def step(args):
    """`args` after a step of the kernels."""
    reaching(args.tensors(), args.call, kernels.optim_step)
    return args


def check(args, exact=None):
    """A step of the kernels is one of the reference."""
    expected = args.clone()
    step(args)
    expected.call(optim_step_ref)
    exact = args.rule in WITHOUT_ROOTS if exact is None else exact
    compare(args, expected, *((0, 0) if exact else (4, 2e-3)))


# --------------------------------------------------------------------------------------------------------------- rules


def test_every_rule_is_there():
    assert list(UPDATES) == list(RULES)
    assert max(len(rule.states) for rule in RULES.values()) == optim_tables.STATES


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, kind, options):
    dtypes = {
        "fp32": {},
        "bf16": {"dtype": BF16, "state_dtype": BF16, "stochastic_rounding": True},
        "int8": {"dtype": FP32 if options else BF16, "state_dtype": CODED},
    }
    shapes = ((1100,), *SHAPES[1:]) if options else SHAPES
    check(make(rule, shapes, **dtypes[kind], **options))


@pytest.mark.parametrize("rule", ["adam", "lamb", "sgd_momentum"])
def test_loops_over_tiles(rule, few_programs):
    check(make(rule, ((5000,), (3, 1100)), BF16, [FP32, CODED], stochastic_rounding=True))
    assert len(kernels._plans) == 1
    (plan,) = kernels._plans._kept.values()
    assert all(launch.table.programs <= 2 for part in plan.parts for launch in part.launches)


@pytest.mark.parametrize("decoupled", [0.0, 1.0])
def test_weight_decay(decoupled):
    check(make("sgd_momentum", weight_decay=0.25, decoupled=decoupled, maximize=decoupled))
    check(make("adam", weight_decay=0.25, decoupled=decoupled, l1=0.5))


def test_values_that_are_not_finite():
    inf, nan = float("inf"), float("nan")
    for rule in RULES:
        args = make(rule, ((6,), (130,)), BF16, [FP32, CODED], l1=0.25, averaged=True, stochastic_rounding=True)
        args.grads[0][:4] = torch.tensor([nan, inf, -inf, 0.0], dtype=BF16)
        args.grads[1][5], args.params[1][129] = inf, nan
        check(args)


def test_fp16_overflows_to_infinity():
    args = make("sgd", ((130,),), FP16, lr=2.0**18)
    check(args)
    assert args.params[0].isinf().any()


# -------------------------------------------------------------------------------------------------------------- dtypes


def test_mixed_dtypes_take_a_launch_each(monkeypatch):
    launched = []
    original = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *args: (launched.append(args[1].dtypes), original(*args)))
    dtypes = [FP32, BF16, FP16, FP64, BF16, FP32]
    states = [FP32, CODED, BF16, FP64, CODED, FP32]
    args = make("adam", [(129,)] * 6, dtypes, states, averaged=True, stochastic_rounding=True, steps=[1, 2, 3, 4, 5, 1])
    args.grads[5] = args.grads[5].to(BF16)
    check(args)
    assert len(launched) == len(set(launched)) == 4  # the fp64 one goes by the reference


def test_averages_of_other_dtypes():
    args = make("sgd_momentum", [(130,)] * 2, averaged=True)
    args.ema[0] = args.ema[0].double()
    check(args)


@pytest.mark.parametrize("shape", [(5, 200), (3, 64), (4, 16, 9), (2, 130), (1, 300), (40, 1), (0, 130), (3, 0), ()])
def test_slices_that_are_no_multiples_of_a_block(shape):
    check(make("sgd_momentum", (shape, (2, 1000)), BF16, CODED, stochastic_rounding=True))
    check(make("adam_amsgrad", ((2, 144), shape), FP32, CODED, **{**EVERYTHING, "first": []}))


def test_slices_in_loops(few_programs):
    check(make("sgd_momentum", ((33, 200), (5, 1030)), FP32, CODED))
    check(make("lamb", ((33, 200), (5, 1030)), FP32, CODED))


def test_unaligned_tensors():
    args = make("adam", ((1030,), (520,), (2, 3, 43)), FP32, [FP32, CODED, FP32], masked=True)

    def shifted(t):
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) if t.numel() else t

    check(args.map(lambda t: t if t.dim() == 0 else shifted(t)))
    assert {launch.aligned for plan in kernels._plans._kept.values() for launch in plan.parts[0].launches} == {False}


# ------------------------------------------------------------------------------------------------ numbers and scalars


@pytest.mark.parametrize("rule", RULES)
def test_scalars_on_the_device(rule):
    """As a capturable step has them."""
    same = make(rule, steps=5, weight_decay=0.25, l1=0.125, averaged=True)
    apart = make(rule, steps=[0, 1, 999], weight_decay=0.25, decoupled=1.0, averaged=True, first=[3, 0, 2])
    for args in (same, apart):
        args.lr, args.found_inf, args.multiplier = torch.tensor([0.0625]), torch.zeros(1), torch.tensor(0.5).double()
        expected = args.clone()
        step(on_device(args))
        expected.call(optim_step_ref)
        compare(args, expected, 4)


@pytest.mark.parametrize("given", ["scalars", "lr", "found_inf", "multiplier"])
def test_only_one_of_them_on_the_device(given):
    args = make("nadam", steps=[3, 3, 4], weight_decay=0.25)
    args.lr, args.found_inf, args.multiplier = torch.tensor(0.0625), torch.zeros(()), torch.tensor(0.5)
    expected = args.clone()
    hidden = on_device(args.clone())
    setattr(args, given, getattr(hidden, given))
    if given == "found_inf":  # whether the host counts a step is in it: the one thing that is read
        with pytest.raises(AssertionError, match="the host reads"):
            step(args)
        return
    step(args)
    expected.call(optim_step_ref)
    compare(args, expected, 4)


@pytest.mark.parametrize("rule", ["sgd", "adam", "nadam", "radam"])
def test_steps_on_the_host(rule):
    for steps in (0, [1, 1, 9]):
        args = make(rule, steps=steps, lr=torch.tensor(0.0625) if steps else 0.0625)
        check(args, exact=False)


def test_scalars_on_both_sides():
    args = make("adam")
    args.scalars[1] = args.scalars[1].as_subclass(OnDevice)
    with pytest.raises(ValueError, match="scalars: 'step'"):
        step(args)


@pytest.mark.parametrize("rule", ["sgd", "adam", "lamb", "nadam"])
def test_found_inf_leaves_everything(rule):
    for hide in (on_device, lambda args: args):
        args = make(rule, SHAPES, [BF16, *[FP32] * 5], [CODED, *[BF16] * 5], **EVERYTHING, stochastic_rounding=True)
        for value in (1.0, float("nan")):
            args.found_inf = torch.tensor(value)
            compare(step(hide(args.clone())), args)
        args.found_inf = torch.zeros(())
        after = step(hide(args.clone()))
        assert not torch.equal(after.params[0], args.params[0])


def test_random_bits_follow_key_stream_and_index():
    base = make("sgd_momentum", ((300,), (300,)), BF16, BF16, stochastic_rounding=True)
    same_values = [t.clone() for t in (base.params[0], base.grads[0], base.states[0])]
    base.params[1], base.grads[1], base.states[1] = same_values
    args = step(base.clone())
    assert not torch.equal(args.params[0], args.params[1])
    assert not torch.equal(args.states[0], args.states[1])
    for key, stream in ((2**32 - 1, 0), (0, 2**31), (1, 2**29 - 1), (2**31, 7)):
        other = base.clone()
        other.key, other.stream = key, stream
        check(other)
        assert not torch.equal(other.params[0], args.params[0])


# ------------------------------------------------------------------------------------------------------------- layouts


def test_dense_orders_are_worked_on_in_place(monkeypatch):
    monkeypatch.setattr(optim_plans.torch, "empty_strided", None)
    args = make("adam", ((2, 3, 4, 5), (40, 30)), masked=True, averaged=True)
    orders = ((2, 3, 4, 5), (40, 30))
    for name in optim_args.TENSOR_LISTS:
        tensors = getattr(args, name)
        for i, t in enumerate(tensors):
            if t.shape == orders[0]:
                tensors[i] = t.contiguous(memory_format=torch.channels_last)
            elif t.shape == orders[1]:
                tensors[i] = t.T.contiguous().T
    monkeypatch.undo()
    check(args)
    assert len(kernels._plans) == 1


VIEWS = {
    "transposed": lambda t: t.T.contiguous().T,
    "columns": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "rows": lambda t: t.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize(
    ("view", "which"),
    [
        *((view, which) for view in VIEWS for which in ("params", "grads", "all")),
        *(("transposed", "states"), ("columns", "scales"), ("rows", "ema"), ("columns", "masks")),
    ],
)
def test_strides(view, which):
    names = optim_args.TENSOR_LISTS if which == "all" else (which,)
    for dtype, state_dtype in ((FP32, FP32), (BF16, BF16), (BF16, CODED)):
        args = make(
            "sgd_momentum", ((12, 300), (5, 7)), dtype, state_dtype, masked=True, averaged=True, zero_grad=True,
            stochastic_rounding=state_dtype != CODED,
        )  # fmt: skip
        for name in names:
            setattr(args, name, [VIEWS[view](t) if t.dim() == 2 else t for t in getattr(args, name)])
        check(args)


def test_expanded_gradients_and_masks_of_floats():
    args, expected = (make("sgd_momentum", ((12, 30), (7,), ()), masked=True) for _ in range(2))
    for changed in (args, expected):
        changed.grads[0] = changed.grads[0][:1].expand(12, 30)
        changed.masks = [mask.float() for mask in changed.masks]
    step(args)
    expected.call(optim_step_ref)
    compare(args, expected)


@pytest.mark.parametrize("name", ["grads", "states", "ema", "masks", "scales"])
def test_operands_that_do_not_fit_are_refused(name):
    args = make("sgd_momentum", ((300, 4), (40, 128)), FP32, CODED, masked=True, averaged=True)
    step(args.clone())
    for smaller in (lambda t: t[:-1], lambda t: t.flatten()[:1]):
        changed = args.clone()
        getattr(changed, name)[0] = smaller(getattr(changed, name)[0])
        with pytest.raises(ValueError, match=name):
            step(changed)


def test_plans_are_kept_and_bounded():
    args = make("adam")
    for _ in range(3):
        step(args)
    assert len(kernels._plans) == 1
    others = [torch.zeros(129) for _ in range(optim_tables.CACHED + 3)]
    for grad in others:
        args.grads[0] = grad
        step(args)
    assert len(kernels._plans) == optim_tables.CACHED
    check(args)


def test_a_tensor_in_place_of_another_is_seen():
    """The same address, but another shape, order or dtype."""
    storage = torch.zeros(4000)
    for view in (storage[:1000], storage[:999], storage[:600].view(20, 30), storage[:600].view(30, 20).T):
        args = make("sgd", (tuple(view.shape),))
        args.params[0] = view.copy_(args.params[0])
        check(args)
        before = storage.clone()
        step(args)
        assert torch.equal(storage[1000:], before[1000:])


# ---------------------------------------------------------------------------------------------------- address checks


@pytest.mark.parametrize("shape", [(1100,), (100,), (3, 200)])
def test_overrun_through_the_table_is_caught(shape, monkeypatch):
    args = make("adam", (shape, (256,)), FP32, CODED)
    # Views, so that what an overrun reaches is never another tensor that the allocator put next to them.
    args = args.map(lambda t: torch.zeros(2 * t.numel() + 300, dtype=t.dtype)[: t.numel()].view(t.shape).copy_(t))
    step(args.clone())
    original = optim_plans.make_table

    def one_too_many(rows, device):
        rows = [list(row) for row in rows]
        sliced = rows[0][optim_tables.SIZE.value] != rows[0][optim_tables.SLICE.value]
        rows[0][optim_tables.SIZE.value] += rows[0][optim_tables.SLICE.value] if sliced else 1
        rows[0][optim_tables.SLICE.value] += not sliced
        return original(rows, device)

    monkeypatch.setattr(optim_plans, "make_table", one_too_many)
    with pytest.raises(InterpreterError, match="addresses lie outside every tensor"):
        step(args)


def test_tensor_that_is_only_in_the_table_has_to_be_named():
    args = make("sgd", ((130,),))
    with pytest.raises(InterpreterError, match="load: 128 of 128"):
        args.call(kernels.optim_step)
    step(args)
    with pytest.raises(InterpreterError, match="load"):  # no longer
        args.call(kernels.optim_step)


@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_order_of_programs_does_not_change_a_bit(rule):
    args = make(rule, ((4100,), (3, 200)), BF16, [BF16, CODED], stochastic_rounding=True)
    expected = step(args.clone())
    for seed in range(2):
        with interpreter.shuffled_programs(seed):
            compare(step(args.clone()), expected)


# -------------------------------------------------------------------------------------------------------------- 8 bits


@triton.jit
def _random_bits_kernel(out_ptr, low, high, key, word, ODD: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    index = low.to(tl.uint32) + offs.to(tl.uint32)
    bits = optim_codec.random_bits(key.to(tl.uint32), word.to(tl.uint32), index, high.to(tl.uint32), ODD, COUNT)
    tl.store(out_ptr + offs, bits.to(tl.int32))


@triton.jit
def _codec_kernel(x_ptr, bits_ptr, codes_ptr, scale_ptr, y_ptr, narrow_ptr, UNSIGNED: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + offs)
    bits = tl.load(bits_ptr + offs).to(tl.uint32)
    codes, scale = optim_codec.quantize(x, bits, UNSIGNED)
    tl.store(codes_ptr + offs, codes)
    tl.store(scale_ptr + rows, scale)
    tl.store(y_ptr + offs, optim_codec.dequantize(codes, scale))
    tl.store(narrow_ptr + offs, optim_codec.round_to_bf16(x, bits & 0xFFFF))


@pytest.mark.parametrize("count", [16, codec.CUT_BITS])
@pytest.mark.parametrize("stream", [0, 1, 6, 8 * 77 + 3])
def test_random_bits(stream, count):
    out = torch.empty(256, dtype=torch.int32)
    for key in (0, 12345, 2**32 - 2):
        _random_bits_kernel[(1,)](out, 0, 0, kernels._int32(key), stream // 2, stream % 2, count, 256)
        assert torch.equal(out.long(), codec.random_bits(key, stream, 256, count=count))
        # The reference for one index beyond 2³², written out.
        _random_bits_kernel[(1,)](out, 5, 3, kernels._int32(key), stream // 2, stream % 2, count, 256)
        x = (5 * 0x9E3779B1 + (codec.word_key(key, stream) ^ codec.mix(3))) & codec.MASK32
        x = ((x ^ (x >> 15)) * 0x85EBCA77) & codec.MASK32
        x ^= x >> 16
        assert out[0] == (x & ((1 << count) - 1) if stream % 2 else x >> (32 - count))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codec(dtype):
    """Blocks from the smallest numbers to the largest, values on the grid, NaN, Inf and zeros."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 128, generator=g) * torch.logspace(-44, 37, 16)[:, None]
    x[0], x[1, 5], x[2, 6], x[3, ::2] = 0.0, float("nan"), float("-inf"), 0.0
    x[4] = codec.dequantize(torch.arange(128, dtype=dtype), x[4].abs().max().view(1))
    x[5, 1:] = x[5, 0] * 1e-6
    if dtype == torch.uint8:
        x = x.abs()
    most = 2**codec.CUT_BITS - 1
    for bits in (torch.randint(0, most + 1, x.shape, generator=g), torch.zeros_like(x), torch.full_like(x, most)):
        bits = bits.int()
        codes, scale, y = torch.empty(x.shape, dtype=dtype), torch.empty(16), torch.empty(x.shape)
        narrow = torch.empty(x.shape, dtype=BF16)
        _codec_kernel[(1,)](x, bits, codes, scale, y, narrow, UNSIGNED=dtype == torch.uint8, ROWS=16)
        expected_codes, expected_scale = codec.quantize(x, dtype, bits.view(-1))
        assert torch.equal(codes, expected_codes)
        torch.testing.assert_close(scale, expected_scale.view(-1), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(y, codec.dequantize(codes, expected_scale), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(narrow, codec.round_to_bf16(x, bits & 0xFFFF), rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------------------------------------- Σ x², the op


@pytest.mark.parametrize("few", [False, True])
def test_sum_squares(few, request):
    if few:
        request.getfixturevalue("few_programs")
    g = torch.Generator().manual_seed(0)
    shapes = ((0,), (1,), (7,), (129,), (3, 700), (20, 30), (5000,))
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes for dtype in (FP32, BF16, FP16, FP64)]
    tensors += [torch.randn(20, 30).T, torch.randn(20, 30)[:, ::2], torch.randn(1, 9).expand(4, 9), torch.zeros(9)[1:]]
    dense = [t if t.is_contiguous() else t.contiguous() for t in tensors]

    def of(tensors):
        return reaching([*tensors, *dense], optim_norm.optim_sum_squares, tensors)

    total = of(dense)
    assert total.dtype == FP64
    assert total.shape == ()
    torch.testing.assert_close(total, optim_sum_squares_ref(tensors), rtol=1e-12, atol=0)
    assert torch.equal(of(dense), total)
    with interpreter.shuffled_programs(1):
        assert torch.equal(of(dense), total)
    assert of([torch.zeros(0)]) == 0
    huge = torch.full((130,), 3e38)
    assert reaching([huge], optim_norm.optim_sum_squares, [huge]).item() == pytest.approx(130 * 9e76, rel=1e-6)
    bad = torch.tensor([1.0, float("nan")])
    assert reaching([bad], optim_norm.optim_sum_squares, [bad]).isnan()


def test_sum_squares_of_strided_tensors(monkeypatch):
    tensors = [torch.randn(20, 30).T, torch.randn(20, 30)[:, ::2], torch.randn(1, 9).expand(4, 9)]
    with interpreter.reachable(tensors) as add:
        contiguous = torch.Tensor.contiguous
        monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, **how: add(contiguous(t, **how)))
        total = optim_norm.optim_sum_squares(tensors)
    monkeypatch.undo()
    torch.testing.assert_close(total, optim_sum_squares_ref(tensors), rtol=1e-12, atol=0)


def test_through_the_dispatcher():
    args = make("adam", SHAPES, averaged=True)
    expected = step(args.clone())
    reaching(args.tensors(), args.call, torch.ops.pyops.optim_step)
    compare(args, expected)
    grads = args.grads
    assert reaching(grads, ops.optim_sum_squares, grads) == optim_sum_squares_ref(grads).item()


def test_optimizer(monkeypatch):
    """pyops.optim.AdamW with its norm, in place of torch's."""
    zeros_like = torch.zeros_like
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape)) for shape in ((33, 20), (7,))] for _ in range(2))
    optimizer = pyops.optim.AdamW(ours, lr=0.01, max_grad_norm=0.5)
    reference = torch.optim.AdamW(theirs, lr=0.01)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        reference.step()
        known = [t for p in ours for t in (p, p.grad)]
        with interpreter.reachable(known) as add, monkeypatch.context() as patch:
            patch.setattr(torch, "zeros_like", lambda *args, **options: add(zeros_like(*args, **options)))
            for state in optimizer.state.values():
                for t in state.values():
                    add(t)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
