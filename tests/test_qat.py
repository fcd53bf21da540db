"""Quantization-aware training: the same rounding as the kernels, gradients, the life of a prepared model."""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
from pathlib import Path

import cases
import pytest
import torch
from cases import FLOATS, randn
from test_swap import by_name, snapshot, unchanged
from torch import nn
from torch.nn.utils import parametrize, prune

import pyops
from pyops.nn import Fp8Linear, Int4Linear, Int8Linear, QatLinear
from pyops.ops.fake_quantize import straight_through
from pyops.quantize import LinearConfig

CONFIGS = (
    pyops.Int8Dynamic(),
    pyops.Int4Weight(group_size=32),
    pyops.Int4Weight(group_size=64, symmetric=True, compute="float"),
    pyops.Int4Weight(group_size=-1, compute="int8"),
    pyops.Int8Weight(),
    pyops.Int8Static([randn(8, 20)], smooth=0.5),
    pyops.Fp8Dynamic("row"),
    pyops.Fp8Dynamic("block"),
)
STATIC = CONFIGS[5]
DYNAMIC = tuple(config for config in CONFIGS if config is not STATIC)
K, N = 70, 33
"""The last group is shorter than the others."""


@pytest.fixture(params=CONFIGS, ids=repr)
def config(request):
    return request.param


@pytest.fixture(params=DYNAMIC, ids=repr)
def dynamic(request):
    return request.param


def layer(config, dtype=torch.float32, k=K, n=N, bias=True):
    torch.manual_seed(0)
    # A scale that some values of randn saturate.
    buffers = {"input_scale": torch.tensor(2.0 / 127), "smooth": randn(k).abs() + 0.5} if config is STATIC else None
    return QatLinear.from_float(nn.Linear(k, n, bias, dtype=dtype), config, buffers)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Sequential(nn.Linear(40, 40), nn.GELU()), nn.Linear(40, 3))


def step(model, x, optimizer):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def dequantized(quantized):
    """The weight of a quantized layer in float64."""
    if isinstance(quantized, Fp8Linear):
        return pyops.ops.dequantize_fp8(quantized.weight, quantized.weight_scale).double()
    if isinstance(quantized, Int8Linear):
        return quantized.weight.double() * quantized.weight_scale.double()[:, None]
    tensors = (quantized.weight, quantized.weight_scale, quantized.weight_zero)
    return pyops.ops.dequantize_int4(*tensors, quantized.in_features, quantized.group_size).double()


# ------------------------------------------------------------------------------------------- the same rounding


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, K), (K,), (2, 3, K), (0, K)])
def test_converted_equals_fake_quantized(config, dtype, shape):
    """The same integers and scales, so that only the sums in fp32 and one rounding to the dtype differ."""
    qat, x = layer(config, dtype), randn(*shape, dtype=dtype)
    x_hat, w_hat = (t.detach().double() for t in config.fake_quantize(qat, x))
    converted = config.convert(qat)
    eps = torch.finfo(torch.float32).eps
    assert ((dequantized(converted) - w_hat).abs() <= eps / 2 * w_hat.abs()).all()
    exact = x_hat @ w_hat.T + qat.bias.double()
    bound = 8 * eps * (x_hat.abs() @ w_hat.abs().T + qat.bias.double().abs())
    bound += torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    for y in (qat(x), converted(x)):
        assert y.dtype is dtype
        assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_stay_what_they_are_in_a_cast_model(dtype):
    qat = layer(STATIC)
    before = {name: qat._buffers[name].clone() for name in ("input_scale", "smooth")}
    qat.to(dtype)
    assert qat.weight.dtype is dtype
    assert all(torch.equal(qat._buffers[name], t) and t.dtype is torch.float32 for name, t in before.items())
    assert qat.to("meta").input_scale.is_meta
    assert [name for name, _ in qat.named_buffers()] == ["input_scale", "smooth"]


@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 0), (1, 1), (31, 2), (257, 65)])
def test_sizes(config, k, n):
    qat, x = layer(config, k=k, n=n, bias=False), randn(3, k)
    torch.testing.assert_close(qat(x), config.convert(qat)(x), atol=1e-5, rtol=1e-5)


def test_a_whole_model_converts_to_what_it_computes(config):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0, batch_first=True), 2).eval()
    x, reference = randn(2, 7, 32), copy.deepcopy(model)
    if config is STATIC:
        config = dataclasses.replace(config, calibration=[x])
    rows = by_name(pyops.prepare_qat_(model, config))
    assert "inference kernel is switched off" in rows["layers.0.linear1"].reason
    assert not rows["layers.0.self_attn.out_proj"].swapped
    with torch.no_grad():
        prepared = model(x)
        assert (prepared - reference(x)).abs().max() > 1e-4, "it rounds, in eval mode too"
        rows = by_name(pyops.convert_(model))
        assert {row.choice for row in rows.values()} == {config.choice}
        # A sum that differs in the last bit can move a later layer's input over a rounding step.
        assert (model(x) - prepared).abs().max() < 0.02 * (prepared - reference(x)).abs().max() + 0.02


def test_scale_overflow_and_nan_are_seen(config):
    qat = layer(config)
    with torch.no_grad():
        qat.weight[2, 3] = torch.nan
    assert qat(randn(4, K))[:, 2].isnan().all()
    x = randn(4, K)
    x[1, 0] = torch.inf
    y = layer(pyops.Int8Dynamic())(x)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_go_straight_through(dynamic, dtype):
    """Those of a float layer at the rounded values."""
    config = dynamic
    qat, x, grad = layer(config, dtype), randn(2, 5, K, dtype=dtype).requires_grad_(), randn(2, 5, N, dtype=dtype)
    qat(x).backward(grad)
    x_hat, w_hat = (t.detach().requires_grad_() for t in config.fake_quantize(qat, x))
    bias = qat.bias.detach().float().requires_grad_()
    nn.functional.linear(x_hat, w_hat, bias).backward(grad.float())
    for got, expected in ((x.grad, x_hat.grad), (qat.weight.grad, w_hat.grad), (qat.bias.grad, bias.grad)):
        assert got.dtype is dtype
        torch.testing.assert_close(got, expected.to(dtype))
        assert (got != 0).all(), "nothing lies outside of a range that follows the values"


def test_gradients_of_a_static_layer():
    """Zero for an input that saturates; smoothing is part of the layer."""
    qat, x, grad = layer(STATIC), randn(20, K).requires_grad_(), randn(20, N)
    qat(x).backward(grad)
    x_hat, w_hat = (t.detach().requires_grad_() for t in STATIC.fake_quantize(qat, x))
    nn.functional.linear(x_hat, w_hat).backward(grad)
    inside = (x / qat.smooth).abs() <= 127.5 * qat.input_scale
    assert 0.5 < inside.float().mean() < 1
    torch.testing.assert_close(x.grad, torch.where(inside, x_hat.grad / qat.smooth, 0.0))
    torch.testing.assert_close(qat.weight.grad, w_hat.grad * qat.smooth)
    converted, at = STATIC.convert(qat), x.detach().clone().requires_grad_()
    converted(at).backward(grad)
    torch.testing.assert_close(at.grad, x.grad)


def test_straight_through_is_exact_and_masks():
    x = randn(50, scale=1e4).requires_grad_()
    rounded, inside = randn(50, seed=1, scale=1e-4), x.detach() > 0
    y = straight_through(x, rounded, inside)
    assert torch.equal(y, rounded)
    y.sum().backward()
    assert torch.equal(x.grad, inside.float())


def test_frozen_parts_get_no_gradient(config):
    qat = layer(config)
    qat.weight.requires_grad_(False)
    qat(randn(3, K)).sum().backward()
    assert qat.weight.grad is None
    assert qat.bias.grad is not None
    with torch.no_grad():
        assert not qat(randn(3, K)).requires_grad


def test_autocast(config):
    """As the quantized layer: y in x's dtype, computed as without."""
    qat, x = layer(config), randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        y, narrow = qat(x), qat(x.bfloat16())
    assert torch.equal(y, qat(x))
    assert narrow.dtype is torch.bfloat16
    assert torch.equal(narrow, qat(x.bfloat16()))


# ------------------------------------------------------------------------------------------- the life of a model


def test_parameters_optimizer_and_checkpoints_stay(dynamic):
    config = dynamic
    model, x = mlp(), randn(6, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, x, optimizer)
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    rows = by_name(pyops.prepare_qat_(model, config))
    assert [row.choice for row in rows.values()] == [f"qat_{config.choice}"] * 3
    assert all(row.bytes_after == row.bytes_before for row in rows.values())
    assert all(type(model.get_submodule(name)) is QatLinear for name in rows)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    before = model[0].weight.detach().clone()
    step(model, x, optimizer)
    assert not torch.equal(model[0].weight, before)
    bias = model[0].bias
    pyops.convert_(model)
    assert model[0].bias is bias
    assert type(model[0]) is config.module


def test_deepcopy_pickle_and_compile(config, tmp_path, fresh_compiler):
    model, x = mlp(), randn(6, 20)
    pyops.prepare_qat_(model, config)
    y = model(x)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(x), y)
        assert other[0].weight is not model[0].weight
        assert other[0].config == config
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z = compiled(x)
    z.sum().backward()
    gradient, model[0].weight.grad = model[0].weight.grad, None
    y.sum().backward()
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(gradient, model[0].weight.grad)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=repr)
def test_fused_code_rounds_alike(config, fresh_compiler):
    """torch's compiler leaves roundings between fp32 and bf16 out where it fuses them."""
    model, x = mlp(), randn(6, 20)
    pyops.prepare_qat_(model, config)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5, rtol=1e-5)


def test_on_meta(dynamic):
    with torch.device("meta"):
        model = mlp()
    pyops.prepare_qat_(model, dynamic)
    assert model(torch.empty(5, 20, device="meta")).shape == (5, 3)
    pyops.convert_(model)
    assert type(model[0]) is dynamic.module


def test_a_compiled_layer_is_not_called_instead(fresh_compiler):
    model = nn.Sequential(nn.Linear(20, 20))
    model[0].compile(backend="eager")
    x = randn(3, 20)
    before = model(x)
    pyops.prepare_qat_(model, pyops.Int4Weight())
    assert not torch.equal(model(x), before)


def test_hooks_and_flags_stay():
    model, calls = mlp(), []
    first = model[0].register_forward_hook(lambda module, args, y: calls.append(type(module).__name__))
    model[0].register_full_backward_hook(lambda module, grads, outs: calls.append("back"))
    model[3].eval()
    pyops.prepare_qat_(model, pyops.Int8Dynamic())
    assert (model[0].training, model[3].training) == (True, False)
    model(randn(2, 20).requires_grad_()).sum().backward()
    pyops.convert_(model)
    model(randn(2, 20).requires_grad_()).sum().backward()
    assert calls == ["QatLinear", "back", "Int8Linear", "back"]
    first.remove()
    model(randn(2, 20))
    assert len(calls) == 4


def test_pruning_goes_on_with_its_mask(config):
    model, x = mlp(), randn(6, 20)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pyops.prepare_qat_(model, config)
    mask, before = model[0].weight_mask.bool(), model[0].weight_orig.detach().clone()
    step(model, x, optimizer)
    moved = model[0].weight_orig != before
    assert moved.any()
    assert not moved[~mask].any()
    y = model(x)
    rows = by_name(pyops.convert_(model))
    assert "the weight was pruned, now baked in" in rows["0"].reason
    assert (dequantized(model[0])[~mask] == 0).all()
    torch.testing.assert_close(model(x), y, atol=0.05, rtol=0)


def test_static_scales_are_state_and_batches_are_not_kept():
    model, float_state = nn.ModuleDict({"used": nn.Linear(20, 20), "never": nn.Linear(20, 20)}), mlp().state_dict()
    model.forward = lambda x: model["used"](x)
    config = dataclasses.replace(STATIC, calibration=iter([randn(8, 20)]))
    rows = by_name(pyops.prepare_qat_(model, config))
    assert rows["never"].reason == "not called in calibration"
    assert (type(model["used"]), type(model["never"])) == (QatLinear, nn.Linear)
    assert model["used"].config.calibration == ()
    state = model["used"].state_dict()
    assert state.keys() == {"weight", "bias", "input_scale", "smooth"}
    assert "buffers dropped" not in str(pyops.convert_(model))
    assert all(torch.equal(model["used"].state_dict()[name], state[name]) for name in ("input_scale", "smooth"))
    model = mlp()
    pyops.prepare_qat_(model, STATIC)
    keys = model.load_state_dict(float_state, strict=False)
    assert not keys.unexpected_keys
    with pytest.raises(ValueError, match="buffers have no 'input_scale', which Int8Static"):
        QatLinear.from_float(nn.Linear(3, 3), STATIC)


def test_tied_and_shared_layers(dynamic):
    config = dynamic
    model = nn.ModuleDict({"embed": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    model["alias"] = model["head"]
    rows = by_name(pyops.prepare_qat_(model, config))
    assert list(rows) == ["head"]
    assert "the same layer as alias" in rows["head"].reason
    assert model["head"] is model["alias"]
    assert model["head"].weight is model["embed"].weight
    model["head"](model["embed"](torch.tensor([3, 4]))).sum().backward()
    assert (model["embed"].weight.grad != 0).any(1).all(), "as the head every row gets a gradient"
    assert "the tie is cut" in by_name(pyops.convert_(model))["head"].reason


def test_configs_can_be_mixed():
    model = mlp()
    pyops.prepare_qat_(model, pyops.Int8Dynamic(), lambda module, name: name == "3")
    rows = by_name(pyops.prepare_qat_(model, pyops.Int4Weight(), lambda module, name: name != "3"))
    assert rows["3"].reason == "filter_fn"
    model(randn(2, 20)).sum().backward()
    rows = by_name(pyops.convert_(model))
    assert {name: row.choice for name, row in rows.items()} == {
        "0": "int4_weight",
        "2.0": "int4_weight",
        "3": "int8_dynamic",
    }
    assert (type(model[0]), type(model[3])) == (Int4Linear, Int8Linear)


def test_other_layers_and_swap_are_told_why():
    class Own(nn.Linear):
        def forward(self, x):
            return x

    model = nn.ModuleDict({"own": Own(4, 4), "tanh": nn.Linear(4, 4), "fp64": nn.Linear(4, 4).double()})
    parametrize.register_parametrization(model["tanh"], "weight", nn.Tanh())
    model["plain"] = nn.Linear(4, 4)
    rows = by_name(pyops.prepare_qat_(model, pyops.Int8Dynamic()))
    assert rows["own"].reason == "Own has a forward of its own"
    assert rows["fp64"].reason == "torch.float64 is not supported"
    assert rows["tanh"].reason.startswith("weight parametrized by Tanh: torch.nn.utils.parametrize.remove_")
    assert rows["plain"].swapped
    swapped = by_name(pyops.swap_(model, pyops.Int8Dynamic()))
    assert "pyops.convert_" in swapped["plain"].reason
    assert not swapped["plain"].swapped


# ------------------------------------------------------------------------------------------- what is refused


def test_prepared_twice():
    model = mlp()
    pyops.prepare_qat_(model, pyops.Int8Dynamic(), lambda module, name: name == "3")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer '3': it is already prepared, for Int8Dynamic\(\): .*filter_fn"):
        pyops.prepare_qat_(model, pyops.Int4Weight())
    assert unchanged(model, before)


@pytest.mark.parametrize("when", ["prepare", "convert"])
def test_a_bad_weight_leaves_the_model_as_it_was(config, when):
    model = mlp()
    if when == "convert":
        pyops.prepare_qat_(model, config)
    with torch.no_grad():
        model[3].weight[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer '3': w holds NaN or Inf"):
        pyops.prepare_qat_(model, config) if when == "prepare" else pyops.convert_(model)
    assert unchanged(model, before)


@dataclasses.dataclass(frozen=True)
class Untrainable(LinearConfig):
    choice = "untrainable"
    module = Int8Linear


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyops.convert_(mlp()), ValueError, "model holds no layer that pyops.prepare_qat_ prepared"),
        (lambda: pyops.convert_(3), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda: pyops.convert_(layer(CONFIGS[0])), ValueError, r"model.config.convert\(model\)"),
        (lambda: pyops.prepare_qat_(3, CONFIGS[0]), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda: pyops.prepare_qat_(nn.Linear(2, 2), CONFIGS[0]), ValueError, r"QatLinear.from_float\(model, Int8Dyn"),
        (lambda: pyops.prepare_qat_(mlp(), pyops.Sparse()), TypeError, "config must be .* got Sparse"),
        (lambda: pyops.prepare_qat_(mlp(), pyops.Int8Dynamic), TypeError, r"write Int8Dynamic\(\)"),
        (lambda: pyops.prepare_qat_(mlp(), Untrainable()), ValueError, "it has no fake quantization"),
        (lambda: pyops.prepare_qat_(mlp(), pyops.Int4Weight(method="mse")), ValueError, "train with method='rtn'"),
        (lambda: pyops.prepare_qat_(mlp(), CONFIGS[0], "fc"), TypeError, "filter_fn must be callable"),
        (lambda: QatLinear.from_float(nn.ReLU(), CONFIGS[0]), TypeError, "linear must be a torch.nn.Linear, got ReLU"),
        (lambda: layer(CONFIGS[0])(randn(2, K).double()), TypeError, "x is torch.float64; allowed"),
        (lambda: layer(CONFIGS[0])(randn(2, K + 1)), ValueError, r"x is \(2, 71\); .* in_features, 70"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------- on real data


def test_int4_recovers_the_accuracy_of_fp32(monkeypatch, threads):
    """In the mean over seeds; rounded after training, these narrow networks lose more than a point."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    from qat_digits import compare, digits

    threads(1)
    data = digits(8)
    rows = [compare(data, seed, 60) for seed in range(6)]
    mean = {name: 100 * statistics.mean(row[name] for row in rows) for name in rows[0]}
    assert mean["rounded"] < mean["fp32"] - 0.5, mean
    assert mean["QAT, converted"] > mean["fp32"] - 0.5, mean
    assert all(abs(row["QAT, converted"] - row["QAT"]) <= 1 / 450 + 1e-9 for row in rows)


# ------------------------------------------------------------------------------------------- several processes


def ddp_worker(rank, path):
    os.environ |= {"MASTER_ADDR": "localhost"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = mlp()
    pyops.prepare_qat_(model, pyops.Int4Weight(group_size=32))
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(randn(8, 20).chunk(2)[rank]).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{path}/grads")
    del parallel
    cases.end_process_group()


def test_ddp(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    model = mlp()
    pyops.prepare_qat_(model, pyops.Int4Weight(group_size=32))
    model(randn(8, 20)).square().mean().backward()
    for grad, parameter in zip(torch.load(tmp_path / "grads"), model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
