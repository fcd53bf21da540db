"""Sparse layers and checkpoints: what is saved, what is loaded from every kind of pruned layer, what is refused."""

from __future__ import annotations

import copy
import io
import random

import pytest
import safetensors.torch
import torch
from cases import randn
from test_sparse_module import close, make, pruned, same
from test_sparse_weight import int32, is_structure, mutate
from torch import nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrize, prune

from pyops.nn import SparseConv1d, SparseConv2d, SparseLinear
from pyops.ops import SparseWeight
from pyops.ops.sparse_weight import PATTERNS

pytestmark = pytest.mark.usefixtures("poison")
X = randn(2, 12, 6, 6)


def new(pattern="unstructured", **options):
    return SparseConv2d(12, 10, 3, pattern=pattern, **options)


# ------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("pattern", PATTERNS)
def test_state_dict_is_canonical_and_round_trips(pattern, tmp_path):
    layer = make(pattern)
    state = layer.state_dict()
    B, rows = layer.values.shape[0], layer.crow_indices.numel()
    expected = {
        "values": ((B, *PATTERNS[pattern]), torch.float32),
        "bias": ((10,), torch.float32),
        "crow_indices": ((rows,), torch.int32),
        "col_indices": ((B,), torch.int32),
    }
    if layer.block != (1, 1):
        expected["block_mask"] = ((B, *PATTERNS[pattern]), torch.bool)
    assert {key: (tuple(t.shape), t.dtype) for key, t in state.items()} == expected
    safetensors.torch.save_file(state, tmp_path / "layer.safetensors")
    other = new(pattern)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    assert same(other.state_dict(), state)
    assert other.pattern == pattern
    assert torch.equal(other(X), layer(X))
    file = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == ["0." + key for key in expected]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("there", PATTERNS)
@pytest.mark.parametrize("here", PATTERNS)
def test_a_layer_adopts_the_structure_of_the_checkpoint(here, there, assign):
    layer, source = new(here), make(there)
    held = layer.values
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert same(layer.state_dict(), source.state_dict())
    assert layer.block == source.block
    assert (layer.values is held) == (not assign)
    if there == here:
        assert layer.pattern == here
    elif there == "2:4":
        assert layer.pattern == "unstructured"
    elif there == "unstructured":
        assert layer.pattern == "unstructured", "2:4 is not what these are"
    layer.sparse_weight.validate()
    close(layer(X), source(X))
    layer(X).sum().backward()
    assert layer.values.grad.shape == layer.values.shape


def test_load_keeps_the_memory_where_sizes_agree():
    layer = make()
    held = {name: t.data_ptr() for name, t in (*layer.named_buffers(), *layer.named_parameters())}
    layer.load_state_dict(make().state_dict())
    assert held == {name: t.data_ptr() for name, t in (*layer.named_buffers(), *layer.named_parameters())}


def test_load_casts_the_values():
    layer = new(dtype=torch.bfloat16)
    layer.load_state_dict(make().state_dict())
    assert layer.values.dtype == torch.bfloat16
    assert torch.equal(layer.weight, make().weight.bfloat16())


# ------------------------------------------------------------------------------------------- dense checkpoints


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def parametrized():
    dense, mask = pruned(), pruned().weight_mask
    prune.remove(dense, "weight")
    with torch.no_grad():
        dense.weight.add_(1 - mask)  # what the mask hides
    return parametrize.register_parametrization(dense, "weight", Masked(mask))


def baked(buffer=None):
    dense, mask = pruned(), pruned().weight_mask
    prune.remove(dense, "weight")
    if buffer:
        with torch.no_grad():
            dense.weight[0] = 0
        dense.register_buffer(buffer, mask > 0)
    return dense


def bias_pruned():
    dense = pruned()
    prune.l1_unstructured(dense, "bias", amount=0.5)
    return dense


DENSE = {
    "prune": pruned,
    "prune with the bias": bias_pruned,
    "parametrize": parametrized,
    "zeros": baked,
    "ASP": lambda: baked("__weight_mma_mask"),
    "SparseML": lambda: baked("mask"),
    "nncf": lambda: baked("binary_mask"),
}


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "2:4"])
@pytest.mark.parametrize("source", DENSE)
def test_dense_checkpoints(source, pattern):
    dense = DENSE[source]()
    model, reference = nn.Sequential(new(pattern)), nn.Sequential(dense)
    result = model.load_state_dict(reference.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    close(model(X), reference(X))
    expected = SparseConv2d.from_dense(dense, pattern=pattern)
    assert same(model[0].state_dict(), expected.state_dict())
    assert model[0].pattern == pattern


def test_masks_that_torch_does_not_save():
    """`FakeSparsity` leaves its mask out of the state_dict; what is there is the weight before pruning."""
    dense = nn.Conv2d(12, 10, 3)
    parametrize.register_parametrization(dense, "weight", FakeSparsity(pruned().weight_mask))
    with pytest.raises(RuntimeError, match=r"squash_mask\(\) before saving"):
        new().load_state_dict(dense.state_dict())
    close(SparseConv2d.from_dense(dense)(X), dense(X))


def test_dense_checkpoints_of_other_layers():
    for dense, layer in (
        (pruned(nn.Conv1d, 8, 6, 3, groups=2), SparseConv1d(8, 6, 3, groups=2)),
        (pruned(nn.Linear, 8, 6), SparseLinear(8, 6, pattern="oc_block4")),
    ):
        layer.load_state_dict(dense.state_dict())
        assert torch.equal(layer.weight, dense.weight)


def test_hooks_may_rename():
    layer, source = new(), make()

    def rename(module, state_dict, prefix, *rest):
        state_dict[prefix + "values"] = state_dict.pop(prefix + "kept")

    layer.register_load_state_dict_pre_hook(rename)
    state = source.state_dict()
    state["kept"] = state.pop("values")
    for _ in range(2):
        layer.load_state_dict(state)
        assert same(layer.state_dict(), source.state_dict())


# ------------------------------------------------------------------------------------------- what is refused

GOOD = make("oc_block4").state_dict()
NOT_DENSE = torch.ones(10, 12, 3, 3)


def changed(name, value):
    t = GOOD[name].clone()
    t.view(-1)[len(t) // 2 if t.dim() == 1 else 0] = value
    return t


BAD_STATES = {
    "no values": ({"values": None}, r"0\.crow_indices comes without 0\.values"),
    "no crow": ({"crow_indices": None}, r"0\.values comes without 0\.crow_indices"),
    "no col": ({"col_indices": None}, r"0\.values comes without 0\.col_indices"),
    "no bias": ({"bias": None}, r'Missing key\(s\).*"0\.bias"'),
    "nothing": (dict.fromkeys(GOOD), r'Missing.*"0\.values".*"0\.bias".*"0\.crow_indices", "0\.col_indices"\. $'),
    "one too many": ({"scale": NOT_DENSE}, r'Unexpected key\(s\).*"0\.scale"'),
    "a dense weight beside": ({"weight": NOT_DENSE}, r'Unexpected key\(s\).*"0\.weight"'),
    "a child's": ({"child.values": NOT_DENSE}, r'Unexpected key\(s\).*"0\.child\.values"'),
    "crow int64": ({"crow_indices": GOOD["crow_indices"].long()}, r"0\.crow_indices has dtype torch\.int64"),
    "crow short": ({"crow_indices": GOOD["crow_indices"][1:]}, r"0\.crow_indices has 3 elements; 3 block rows need 4"),
    "crow falls": ({"crow_indices": changed("crow_indices", -(2**31))}, r"0\.crow_indices decreases"),
    "crow overflows": ({"crow_indices": changed("crow_indices", 2**31 - 1)}, r"0\.crow_indices decreases"),
    "crow starts late": ({"crow_indices": GOOD["crow_indices"] + 1}, r"0\.crow_indices starts with 1"),
    "crow ends late": ({"crow_indices": GOOD["crow_indices"] * 2}, r"0\.crow_indices ends with"),
    "col negative": ({"col_indices": changed("col_indices", -1)}, r"0\.col_indices holds -1; allowed: 0 to 107"),
    "col beyond": ({"col_indices": changed("col_indices", 108)}, r"0\.col_indices holds 108"),
    "col unsorted": ({"col_indices": GOOD["col_indices"].flip(0)}, r"0\.col_indices is not strictly increasing"),
    "col short": ({"col_indices": GOOD["col_indices"][1:]}, r"0\.col_indices has \d+ elements"),
    "col float": ({"col_indices": GOOD["col_indices"].float()}, r"0\.col_indices has dtype torch\.float32"),
    "values int": ({"values": GOOD["values"].int()}, r"0\.values has dtype torch\.int32"),
    "values flat": (
        {"values": GOOD["values"].view(-1)},
        r"0\.values has shape .* expected \[B, bo, bc\] in blocks .*4x1",
    ),
    "another block": ({"values": GOOD["values"].mT}, r"0\.crow_indices has 4 elements; 10 block rows need 11"),
    "no such block": ({"values": GOOD["values"][:, :3]}, r"0\.values has shape .*, 3, 1\), expected"),
    "values where none are kept": ({"values": torch.ones_like(GOOD["values"])}, r"0\.values is not 0 at positions"),
    "mask int": ({"block_mask": GOOD["block_mask"].int()}, r"0\.block_mask must be a bool tensor"),
    "mask short": ({"block_mask": GOOD["block_mask"][1:]}, r"0\.block_mask is \("),
    "mask keeps padding": ({"block_mask": GOOD["block_mask"] | True}, r"0\.block_mask keeps positions beyond"),
    "short bias": ({"bias": torch.ones(9)}, r"size mismatch for 0\.bias: got \(9,\)"),
    "int bias": ({"bias": torch.ones(10).int()}, r"0\.bias has dtype torch\.int32"),
    "not a tensor": ({"col_indices": [1, 2]}, r"0\.col_indices must be a tensor, got list"),
    "dense of another shape": (
        {**dict.fromkeys(GOOD), "weight": NOT_DENSE[:5], "bias": GOOD["bias"]},
        r"size mismatch for 0\.weight: got \(5, 12, 3, 3\) from the checkpoint, the layer has \(10, 12, 3, 3\)\.$",
    ),
    "dense int": (
        {**dict.fromkeys(GOOD), "weight": NOT_DENSE.int(), "bias": GOOD["bias"]},
        r"0\.weight has dtype torch\.int32",
    ),
    "orig without mask": (
        {**dict.fromkeys(GOOD), "weight_orig": NOT_DENSE, "bias": GOOD["bias"]},
        r"0\.weight_orig comes without 0\.weight_mask",
    ),
    "mask of another shape": (
        {**dict.fromkeys(GOOD), "weight_orig": NOT_DENSE, "weight_mask": NOT_DENSE[:1], "bias": GOOD["bias"]},
        r"size mismatch for 0\.weight_mask",
    ),
    "parametrized by something else": (
        {**dict.fromkeys(GOOD), "parametrizations.weight.original": NOT_DENSE, "bias": GOOD["bias"]},
        r"0\.parametrizations\.weight\.original comes without 0\.parametrizations\.weight\.0\.mask",
    ),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_dict_is_refused_whole(name, assign):
    changes, message = BAD_STATES[name]
    model = nn.Sequential(new())
    before = copy.deepcopy(model.state_dict())
    state = {"0." + key: value for key, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign)
    if name not in ("no bias", "one too many", "a child's", "a dense weight beside"):  # torch loads what is right
        assert same(model.state_dict(), before)
        assert model[0].pattern == "unstructured"
    model[0].sparse_weight.validate()


def test_a_2_4_layer_refuses_what_is_not():
    layer = new("2:4")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r'weight: pattern="2:4" allows 2 of 4'):
        layer.load_state_dict(pruned(amount=0.1).state_dict())
    assert same(layer.state_dict(), before)


def test_load_without_strict():
    layer, source = new(), make()
    before = copy.deepcopy(layer.state_dict())
    result = layer.load_state_dict({"other": X}, strict=False)
    assert set(result.missing_keys) == {"values", "bias", "crow_indices", "col_indices"}
    assert result.unexpected_keys == ["other"]
    assert same(layer.state_dict(), before)
    state = source.state_dict()
    bias = state.pop("bias")
    layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.weight, source.weight)
    assert torch.equal(layer.bias, before["bias"])
    layer.load_state_dict({"bias": bias}, strict=False)
    assert torch.equal(layer.bias, bias)


def test_nan_is_a_value():
    layer, state = new(), make().state_dict()
    state["values"] = torch.full_like(state["values"], torch.nan)
    layer.load_state_dict(state)
    assert layer.values.isnan().all()


def test_mutated_checkpoints_load_whole_or_not_at_all():
    rng = random.Random(1)
    layer = new()
    good = (GOOD["crow_indices"].tolist(), GOOD["col_indices"].tolist())
    loaded = 0
    for _ in range(500):
        crow, col = list(good[0]), list(good[1])
        mutate(rng, rng.choice((crow, col)))
        state = {key: t for key, t in GOOD.items() if key != "block_mask"}
        state["values"] = GOOD["values"] * 0
        state |= {"crow_indices": int32(*crow), "col_indices": int32(*col)}
        before = layer.state_dict()
        expected = is_structure(len(GOOD["values"]), crow, col, layer.weight_shape, (4, 1), 1)
        try:
            layer.load_state_dict(state)
        except RuntimeError:
            assert not expected
            assert same(layer.state_dict(), before)
        else:
            assert expected
            loaded += 1
            layer(X)
    assert loaded


def test_distributed_checkpoint_state():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source, model = nn.Sequential(make("oc_block4")), nn.Sequential(new())
    set_model_state_dict(model, get_model_state_dict(source))
    assert same(model.state_dict(), source.state_dict())


def test_sparse_weight_of_a_layer_is_its_own_tensors():
    layer = make("oc_block4")
    weight = layer.sparse_weight
    assert isinstance(weight, SparseWeight)
    assert weight.values is layer.values
    assert (weight.pattern, weight.shape, weight.groups) == ("oc_block4", (10, 12, 3, 3), 1)
