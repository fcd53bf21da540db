"""LoRA of PEFT on quantized linear layers: gradients, what is trained, saved and refused; it converges on real data."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cases import FLOATS, randn
from linear_cases import FROM_FLOAT
from torch import nn

import pyops

peft = pytest.importorskip("peft")
from pyops.peft import LoraQuantLinear, register  # noqa: E402

TARGETS = ["0", "2"]


@pytest.fixture(params=FROM_FLOAT, ids=lambda kind: kind.name)
def kind(request):
    return request.param


def base(kind, dtype=torch.float32):
    return nn.Sequential(kind.make(40, 70), nn.Tanh(), kind.make(10, 40)).to(dtype)


def adapted(model, **options):
    """With adapters that change something: B is not 0."""
    torch.manual_seed(1)
    config = register(peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **options}))
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients(kind, dtype):
    """Those of the base plus those of the low-rank product; nothing else has a gradient."""
    quantized, x = base(kind, dtype), randn(5, 70, dtype=dtype).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted(quantized, lora_alpha=8)
    layer = model.base_model.model[0]
    assert type(layer) is LoraQuantLinear
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    y = layer(x)
    assert y.dtype is dtype
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    alone = x.detach().clone().requires_grad_()
    expected = (layer.base_layer(alone).float() + 2 * (alone.to(a.dtype) @ a.T @ b.T)).to(dtype)
    torch.testing.assert_close(y, expected, atol=2e-2 if dtype is not torch.float32 else 1e-5, rtol=1e-2)
    grad = randn(5, 40, dtype=dtype)
    y.backward(grad)
    expected.backward(grad)
    tolerance = {"atol": 0.1, "rtol": 0.05} if dtype is not torch.float32 else {}
    torch.testing.assert_close(x.grad, alone.grad, **tolerance)
    model.zero_grad()
    model(x).float().square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, name


def test_adapters_start_at_the_base_and_come_off(kind):
    x, quantized = randn(5, 70), base(kind)
    y = quantized(x)
    model = adapted(quantized, init_lora_weights=True)
    assert torch.equal(model(x), y), "B is 0"
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.fill_(0.1)
    assert not torch.equal(model(x), y)
    with model.disable_adapter():
        assert torch.equal(model(x), y)
    assert torch.equal(model.unload()(x), y)


def test_adapters_are_saved_and_loaded(kind, tmp_path):
    x, model = randn(5, 70), adapted(base(kind))
    model.save_pretrained(tmp_path)
    config = register(peft.LoraConfig.from_pretrained(tmp_path))
    other = peft.PeftModel.from_pretrained(base(kind), tmp_path, config=config)
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="is not supported"):
        peft.PeftModel.from_pretrained(base(kind), tmp_path)


def test_what_needs_the_float_weight_is_refused(kind):
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "orthogonal"}):
        with pytest.raises(ValueError, match=r"float weight|unsupported variant"):
            adapted(base(kind), **options)
    for call in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(ValueError, match="not merged into a quantized weight"):
            getattr(adapted(base(kind)), call)()
    with pytest.raises(TypeError, match=r"config must be a peft.LoraConfig, got dict"):
        register({})


def test_without_peft_there_is_a_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "pyops.peft")
    with pytest.raises(ImportError, match="pip install peft"):
        import pyops.peft  # noqa: F401


def test_every_block_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[1] / "docs" / "qat.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    torch.manual_seed(0)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()


def test_int4_with_adapters_learns_a_new_task(monkeypatch, threads):
    """Digits turned by 90°, which the frozen network does not know."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    from lora_int4 import CONFIG, SIZES, accuracy, digits, mlp, on_their_side, train, with_adapters

    threads(1)
    torch.manual_seed(0)
    upright = digits(8)
    turned = on_their_side(upright)
    model = mlp(*SIZES)
    train(model, upright, 10, "upright")
    pyops.swap_(model, CONFIG)
    assert accuracy(model, upright) > 0.94
    assert accuracy(model, turned) < 0.3
    frozen = [b.clone() for b in model.buffers()] + [model[0].bias.clone()]
    losses = train(with_adapters(model, 8), turned, 15, "adapters")
    assert losses[-1] < 0.1 * losses[0]
    assert accuracy(model, turned) > 0.9
    layers = [model[i].base_layer for i in (0, 2, 4)]
    after = [b for layer in layers for b in layer.buffers()] + [layers[0].bias]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))
