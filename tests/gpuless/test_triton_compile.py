"""What the compiler makes of every Triton kernel for real GPU targets: resources, instructions, width of accesses."""

import importlib.util
import json

import pytest
from subprocesses import HERE, run_python

from pyops.ops.optim_rules import RULES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TARGETS = [80, 90, 100]
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}


@pytest.fixture(scope="module", params=TARGETS, ids=lambda arch: f"sm_{arch}")
def target(request, tmp_path_factory):
    """(architecture, report of compile_only.py for it)."""
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    report = folder / "report.json"
    result = run_python(
        str(HERE / "compile_only.py"), "cuda", str(request.param), str(report), TRITON_CACHE_DIR=str(folder / "cache")
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return request.param, json.loads(report.read_text())


def of_kernel(report: dict, name: str) -> list[dict]:
    found = [row for row in report["rows"] if row["kernel"] == name]
    assert found, f"{name} was not compiled"
    return found


def describe(row: dict) -> str:
    return f"{row['kernel']} {row['constants']} {row['types']} warps={row['warps']} stages={row['stages']}"


def has(row: dict, prefix: str) -> bool:
    return any(opcode.startswith(prefix) for opcode in row["opcodes"])


def assert_wide(row: dict) -> None:
    """16-byte loads and stores."""
    assert has(row, "LDG.E.128"), describe(row)
    assert has(row, "STG.E.128"), describe(row)


def test_no_spills(target):
    _, report = target
    for row in report["rows"]:
        assert row["stack_bytes"] == row["local_bytes"] == 0, (row["registers"], row["stack_bytes"], describe(row))


def test_shared_memory_fits(target):
    arch, report = target
    for row in report["rows"]:
        assert row["shared_bytes"] <= SHARED_LIMIT[arch], describe(row)


@pytest.mark.parametrize("op", ["int8_linear", "sparse_conv2d"])
def test_every_config_is_compiled(target, op):
    _, report = target
    rows = of_kernel(report, f"_{op}_kernel")
    for config in report[f"{op}_configs"]:
        settings = [{name: {**row["constants"], **row}[name] for name in config} for row in rows]
        assert config in settings, config


def test_int8_matmul_runs_on_tensor_cores(target):
    """Hopper's wgmma wants 64 rows; smaller tiles, and Triton on every other target, use mma.sync."""
    arch, report = target
    for row in of_kernel(report, "_int8_linear_kernel"):
        wgmma = arch == 90 and row["constants"]["BLOCK_M"] >= 64
        assert has(row, "IGMMA" if wgmma else "IMMA"), describe(row)


def test_int8_matmul_moves_16_bytes_at_a_time(target):
    _, report = target
    for row in of_kernel(report, "_int8_linear_kernel"):
        copies = {opcode for opcode in row["opcodes"] if opcode.startswith("LDGSTS")}
        assert copies, describe(row)
        assert all("128" in opcode for opcode in copies), (copies, describe(row))
        tile = row["constants"]["BLOCK_M"] * row["constants"]["BLOCK_N"]
        out_bytes = {"*i32": 4, "*fp32": 4, "*bf16": 2, "*fp16": 2}[row["types"]["out_ptr"]]
        aligned = ["tt.divisibility", 16] in row["attributes"].get("N", [])
        if aligned and tile * out_bytes // (32 * row["warps"]) >= 16:
            assert has(row, "STG.E.128"), describe(row)


def test_quantization_moves_16_bytes_at_a_time(target):
    _, report = target
    for row in of_kernel(report, "_quantize_rows_kernel"):
        if row["constants"]["BLOCK_K"] >= 256:
            assert_wide(row)


def test_quantization_rounds_twice(target):
    """No multiply-add may replace the product and the rounding; ptxas could only fuse what PTX leaves adjacent."""
    _, report = target
    for row in of_kernel(report, "_quantize_rows_kernel"):
        assert "fma." not in row["ptx"], describe(row)
        assert "div.rn.f32" in row["ptx"], describe(row)
        # The division itself is a Newton iteration of FFMAs: a few in all, none for each of a thread's 32 elements.
        assert sum(n for opcode, n in row["opcodes"].items() if opcode.startswith("FFMA")) < 40, describe(row)


def test_reduction_moves_16_bytes_at_a_time(target):
    _, report = target
    for row in of_kernel(report, "_reduce_kernel"):
        assert_wide(row)


# ------------------------------------------------------------------------------------------------------ sparse_conv2d


def test_sparse_conv2d_runs_on_tensor_cores(target):
    """wgmma and Blackwell's tcgen05 want 64 rows; smaller tiles, and Ampere, use mma.sync. Exact fp32 needs FMAs."""
    arch, report = target
    for row in of_kernel(report, "_sparse_conv2d_kernel"):
        exact = row["types"]["x_ptr"] == "*fp32" and row["constants"]["PRECISION"] == "ieee"
        large = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
        expected = "FFMA" if exact else large if row["constants"]["BLOCK_M"] >= 64 else "HMMA"
        assert has(row, expected), (row["opcodes"], describe(row))


def test_sparse_conv2d_gathers_16_bytes_at_a_time(target):
    """Asynchronously, and as many steps ahead as there are stages: the list that they depend on is read before."""
    _, report = target
    for row in of_kernel(report, "_sparse_conv2d_kernel"):
        c = row["constants"]
        element_bytes = 4 if row["types"]["x_ptr"] == "*fp32" else 2
        assert c["UNIT"] == 16 // element_bytes, describe(row)
        copies = {opcode: n for opcode, n in row["opcodes"].items() if opcode.startswith("LDGSTS")}
        narrow = sum(n for opcode, n in copies.items() if "128" not in opcode)
        weights = c["BLOCK_K"] * c["NB"] * element_bytes // (32 * row["warps"])  # bytes a thread of each stage
        assert narrow == 0 or weights < 16, (copies, describe(row))
        assert sum(copies.values()) > narrow, describe(row)
        stage_bytes = (c["BLOCK_M"] + c["NB"]) * c["BLOCK_K"] * element_bytes
        assert row["shared_bytes"] >= (row["stages"] - 1) * stage_bytes, describe(row)


def test_sparse_conv2d_stores_16_bytes_at_a_time(target):
    """Where channels are neighbours in y and start on 16 elements."""
    _, report = target
    wide = 0
    for row in of_kernel(report, "_sparse_conv2d_kernel"):
        c = row["constants"]
        aligned = ["tt.divisibility", 16] in row["attributes"].get("N_CHANNELS", [])
        out_bytes = {"*bf16": 2, "*fp16": 2, "*fp32": 4}[row["types"]["y_ptr"]]
        if c["CHANNELS_LAST"] and aligned and c["BLOCK_M"] * c["NB"] * out_bytes // (32 * row["warps"]) >= 16:
            assert has(row, "STG.E.128"), (row["opcodes"], describe(row))
            wide += 1
    assert wide


# -------------------------------------------------------------------------------------------------------------- optim


def variant(row: dict) -> dict:
    """What `_optim_step_kernel` was compiled for."""
    return row["constants"]["V"]


def test_every_rule_is_compiled(target):
    arch, report = target
    rules = {row["constants"]["UPDATE"] for row in of_kernel(report, "_optim_step_kernel")}
    assert rules == set(RULES) if arch == 90 else rules >= {"adam", "lamb"}


def test_optimizer_steps_move_16_bytes_at_a_time(target):
    """Narrow are only addresses, numbers, scales, 8-bit states, and the edge: an element a thread of each operand."""
    _, report = target
    for row in of_kernel(report, "_optim_step_kernel"):
        if not variant(row)["aligned"]:
            continue
        dtypes = [dtype for dtype in variant(row)["dtypes"] if dtype is not None]
        assert has(row, "LDG.E.128"), describe(row)
        assert has(row, "STG.E.128") or variant(row)["norms"], describe(row)
        numbers = sum(place >= 0 for place in variant(row)["in_table"])
        scales = sum(dtype is not None for dtype in variant(row)["dtypes"][5:8])
        others = numbers + scales + 3  # multiplier, found_inf, the ratio of norms
        narrow = {width: row["opcodes"].get(f"LDG.E{width}", 0) for width in ("", ".U16", ".U8", ".S8")}
        assert narrow[".U16"] <= dtypes.count("bf16"), (narrow, describe(row))
        assert narrow[".U8"] + narrow[".S8"] <= dtypes.count("int8") + dtypes.count("uint8"), (narrow, describe(row))
        assert narrow[""] <= dtypes.count("fp32") + others, (narrow, describe(row))
        stores = {width: row["opcodes"].get(f"STG.E{width}", 0) for width in ("", ".U16", ".U8")}
        assert sum(stores.values()) <= len(dtypes) + scales, (stores, describe(row))


def test_optimizer_steps_round_as_their_reference(target):
    """Of multiply-adds there is one an element, that of g² in Adam; 8 elements a thread, and one of the edge if any."""
    _, report = target
    for row in of_kernel(report, "_optim_step_kernel"):
        rule, ptx = row["constants"]["UPDATE"], row["ptx"]
        if rule == "sgd":
            assert "fma." not in ptx, describe(row)
        if rule == "adam":
            elements = 8 if variant(row)["sliced"] else 9
            assert ptx.count("fma.rn.f32") + ptx.count("fma.rn.f32x2") == elements, describe(row)  # Blackwell has pairs
            assert ptx.count("sqrt.rn.f32") == elements, describe(row)
            assert ptx.count("div.rn.f32") >= elements, describe(row)
            assert "div.full" not in ptx, describe(row)


def test_sums_have_an_order(target):
    _, report = target
    for name in ("_sum_squares_kernel", "_add_up_kernel", "_trust_ratio_kernel"):
        for row in of_kernel(report, name):
            assert not has(row, "ATOM"), describe(row)
            assert not has(row, "RED."), describe(row)
            if row["constants"].get("ALIGNED"):
                assert has(row, "LDG.E.128"), describe(row)
