"""The ops of optimizers on a CUDA device against their references on the CPU, and the classes against torch's."""

import contextlib

import pytest
import torch
from gpu_cases import DTYPES, cuda_graph, needs_cuda, needs_memory
from optim_args import CODED, Args, compare
from optim_args import make as make_args

import pyops.optim
from pyops import ops
from pyops.ops import optim_codec as codec
from pyops.ops.optim import PARAM_STREAM, STREAMS_PER_PARAM, optim_step_ref, optim_sum_squares_ref
from pyops.ops.optim_rules import RULES

pytestmark = needs_cuda

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = ((70001,), (0,), (1,), (7,), (3, 43), (2, 3, 256), (300, 1000))
FORMATS = {
    "fp32": {},
    "bf16": {"dtype": BF16, "state_dtype": BF16, "stochastic_rounding": True},
    "int8": {"dtype": BF16, "state_dtype": CODED, "stochastic_rounding": True},
}
EVERYTHING = {
    "weight_decay": 0.125,
    "maximize": 1.0,
    "l1": 0.0625,
    "masked": True,
    "averaged": True,
    "zero_grad": True,
    "multiplier": torch.tensor(0.375),
    "first": [0, 0, 2, 1, 3, 0, 0],
}


def to_gpu(args: Args, capturable: bool = False) -> Args:
    """A copy whose tensors are on the GPU; scalars only if they are to be counted there."""
    moved = args.clone().map(lambda t: t.cuda())
    if not capturable:
        moved.scalars = [t.cpu() for t in moved.scalars]
    return moved


def step(args: Args) -> Args:
    args.call(torch.ops.pyops.optim_step)
    return args


def check_step(args: Args, capturable: bool = False) -> None:
    """A step on the GPU is the reference's on the CPU: but for the last place, and some things rounded by chance."""
    actual = step(to_gpu(args, capturable))
    args.call(optim_step_ref)
    compare(actual, args, 8, 2e-3)


@contextlib.contextmanager
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_optim_rules(rule, kind):
    check_step(make_args(rule, SHAPES, **FORMATS[kind]))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rule", ["sgd", "adam_amsgrad", "rmsprop_centered_momentum", "lion", "lamb"])
def test_optim_with_everything(rule, kind):
    check_step(make_args(rule, SHAPES, **FORMATS[kind], **EVERYTHING))


def test_optim_mixed_dtypes_and_slices():
    dtypes = [FP32, BF16, torch.float16, torch.float64, BF16, FP32]
    states = [FP32, CODED, BF16, torch.float64, CODED, CODED]
    shapes = [(1000,), (333, 200), (5, 7), (129,), (64, 1030), (17, 144)]
    for rule in ("adam", "sgd_momentum"):
        check_step(make_args(rule, shapes, dtypes, states, stochastic_rounding=True))
    args = make_args("adam", ((40, 30), (40, 30), (2, 3, 4, 5)), FP32)
    args.grads[0] = args.grads[0].T.contiguous().T
    args.params[1] = args.params[1].repeat_interleave(2, dim=1)[:, ::2]
    for tensors in (args.params, args.grads, args.states):
        tensors[:] = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    check_step(args)


@pytest.mark.parametrize("rule", RULES)
def test_optim_scalars_on_the_device(rule):
    args = make_args(rule, SHAPES, steps=[1, 0, 5, 5, 99, 7, 3], weight_decay=0.1, decoupled=1.0)
    args.lr, args.found_inf, args.multiplier = torch.tensor(0.0625), torch.zeros(1), torch.tensor(0.5)
    check_step(args, capturable=True)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_optim_found_inf_leaves_everything(rule, capturable):
    args = make_args(rule, SHAPES, BF16, CODED, stochastic_rounding=True, **EVERYTHING)
    for value in (1.0, float("nan")):
        args.found_inf = torch.tensor(value)
        compare(step(to_gpu(args, capturable)), args)


@pytest.mark.parametrize("rule", ["sgd_momentum", "adam", "nadam", "lamb"])
def test_optim_does_not_wait_for_the_device(rule):
    args = make_args(rule, SHAPES, BF16, CODED, steps=[1, 0, 5, 5, 99, 7, 3], averaged=True, masked=True)
    on_host, on_device = to_gpu(args), to_gpu(args, capturable=True)
    on_device.lr, on_device.found_inf = torch.tensor(0.1).cuda(), torch.zeros(()).cuda()
    for case in (on_host, on_device):
        step(case)  # compiles
        case.grads = [g.clone() for g in case.grads]  # elsewhere, so that the table is made anew
        case.multiplier = torch.ones((), device="cuda")
        ops.optim_sum_squares(case.grads)
        step(case)
        with no_synchronization():
            case.grads = [g.clone() for g in case.grads]
            ops.optim_sum_squares(case.grads)
            step(case)
            step(case)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rule", ["sgd_momentum", "adam", "nadam", "lamb"])
def test_optim_in_a_cuda_graph(rule, kind):
    """Steps, lr and gradients change between replays; the tables are uploaded by the graph."""
    args = make_args(rule, SHAPES, **FORMATS[kind], steps=2, averaged=True)
    args.lr, args.found_inf = torch.tensor(0.1), torch.zeros(())
    captured = to_gpu(args, capturable=True)
    graph, _ = cuda_graph(lambda: step(captured), lambda: step(captured.clone()))
    for lr, found_inf in ((0.1, 0.0), (0.05, 0.0), (0.2, 1.0), (0.025, 0.0)):
        grads = [torch.randn(g.shape).to(g.dtype) for g in args.grads]
        for case in (args, captured):
            case.lr.fill_(lr)
            case.found_inf.fill_(found_inf)
            for g, value in zip(case.grads, grads, strict=True):
                g.copy_(value)
        junk = [torch.full((10000,), float("nan"), device="cuda") for _ in range(50)]
        graph.replay()
        del junk
        expected = args.clone()
        expected.call(optim_step_ref)
        compare(captured, expected, 16, 4e-3)
        args = captured.clone().map(lambda t: t.cpu())  # what was rounded by chance does not add up


@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_optim_is_deterministic(rule):
    args = make_args(rule, ((3000, 1000), (777,)), BF16, CODED, stochastic_rounding=True)
    first = step(to_gpu(args))
    for _ in range(3):
        compare(step(to_gpu(args)), first.map(lambda t: t.cpu()))


def test_optim_beyond_four_billion_elements():
    needs_memory(24)
    n, tail = 2**32 + 1000, 3000
    p, g = torch.zeros(n, dtype=BF16, device="cuda"), torch.zeros(n, dtype=BF16, device="cuda")
    p[-tail:].normal_()
    g[-tail:].normal_()
    before = p[-tail:].float().cpu()
    args = Args("sgd", [p], [g], hyper=[0.25, 0, 0, 0, 0, 0, 0, 0, 0], stochastic_rounding=True, key=7, stream=0)
    step(args)
    i = torch.arange(n - tail, n)
    own = codec.word_key(7, PARAM_STREAM) ^ codec.mix(i >> 32)
    x = ((i & codec.MASK32) * 0x9E3779B1 + own) & codec.MASK32
    x = ((x ^ (x >> 15)) * 0x85EBCA77) & codec.MASK32
    x = x ^ (x >> 16)
    assert PARAM_STREAM < STREAMS_PER_PARAM
    bits = x & 0xFFFF if PARAM_STREAM % 2 else x >> 16
    assert torch.equal(p[-tail:].cpu(), codec.round_to_bf16(before - 0.25 * g[-tail:].float().cpu(), bits))
    assert not p[:-tail].any()


def test_optim_sum_squares():
    g = torch.Generator().manual_seed(0)
    shapes = ((0,), (1,), (7,), (3, 700), (70001,), (1000, 1000))
    tensors = [torch.randn(s, generator=g).to(d) for s in shapes for d in (*DTYPES, torch.float64)]
    tensors += [torch.randn(20, 30).T, torch.randn(20, 30)[:, ::2], torch.randn(1, 9).expand(4, 9)]
    moved = [t.cuda() for t in tensors]
    moved += [moved[-1].T, moved[5][1:]]
    total = ops.optim_sum_squares(moved)
    assert total.is_cuda
    torch.testing.assert_close(total.cpu(), optim_sum_squares_ref([t.cpu() for t in moved]), rtol=1e-12, atol=0)
    assert all(torch.equal(ops.optim_sum_squares(moved), total) for _ in range(5))
    assert ops.optim_sum_squares([torch.full((10**6,), 3e38, device="cuda")]).item() == pytest.approx(9e82, rel=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_optimizer_classes(capturable):
    torch.manual_seed(0)
    for name, options in (("AdamW", {"capturable": capturable}), ("SGD", {"momentum": 0.9}), ("RMSprop", {})):
        theirs = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10)).cuda()
        ours = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10)).cuda()
        ours.load_state_dict(theirs.state_dict())
        optimizers = [
            getattr(module, name)(model.parameters(), lr=0.01, **options)
            for module, model in ((pyops.optim, ours), (torch.optim, theirs))
        ]
        for _ in range(5):
            x = torch.randn(32, 300, device="cuda")
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
