"""What the compiler makes of every Triton kernel for real GPU targets: resources, instructions, width of accesses."""

import importlib.util
import json

import pytest
from subprocesses import HERE, run_python

from pyops.ops.optim_rules import RULES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TARGETS = [80, 90, 100]
FIRST_FP8 = 89
"""Older devices have no e4m3: the launcher of fp8_linear compiles nothing there."""
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}


# What one target needs is compiled once, also where several processes share the tests.
@pytest.fixture(
    scope="module",
    params=[pytest.param(arch, id=f"sm_{arch}", marks=pytest.mark.xdist_group(f"sm_{arch}")) for arch in TARGETS],
)
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


def quantizations(report: dict, code: str) -> list[dict]:
    """The variants of the row quantization that make these codes."""
    found = [row for row in of_kernel(report, "_quantize_kernel") if row["types"]["c_ptr"] == code]
    assert found, f"no quantization to {code} was compiled"
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


@pytest.mark.parametrize("op", ["int4_linear", "int8_linear", "int8_weight_linear", "fp8_linear", "sparse_conv2d"])
def test_every_config_is_compiled(target, op):
    arch, report = target
    if op == "fp8_linear" and arch < FIRST_FP8:
        assert not any("fp8" in row["kernel"] for row in report["rows"])
        return
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
    for row in quantizations(report, "*i8"):
        if row["constants"]["BLOCK_K"] >= 256:
            assert_wide(row)


def test_quantization_rounds_twice(target):
    """No multiply-add may replace the product and the rounding; ptxas could only fuse what PTX leaves adjacent."""
    _, report = target
    for row in quantizations(report, "*i8"):
        assert "fma." not in row["ptx"], describe(row)
        assert "div.rn.f32" in row["ptx"], describe(row)
        # The division itself is a Newton iteration of FFMAs: a few in all, none for each of a thread's 32 elements.
        # With smooth there is one for each of them.
        if row["constants"].get("smooth_ptr", "given") is None:
            assert sum(n for opcode, n in row["opcodes"].items() if opcode.startswith("FFMA")) < 40, describe(row)


def test_reduction_moves_16_bytes_at_a_time(target):
    _, report = target
    for row in of_kernel(report, "_reduce_kernel"):
        assert_wide(row)


# -------------------------------------------------------------------------------------------------------- int4_linear


def x_bytes(row: dict) -> int:
    """Bytes of an element of x, or of the dequantized weight."""
    return {"*i8": 1, "*bf16": 2, "*fp16": 2, "*fp32": 4}[row["types"].get("x_ptr") or row["types"]["out_ptr"]]


def test_int4_matmul_runs_on_tensor_cores(target):
    """The weights are the left operand, 64 or more: wgmma, or tcgen05, which has no integers. fp32 takes FMAs."""
    arch, report = target
    dtypes = set()
    for row in of_kernel(report, "_int4_linear_kernel"):
        dtypes.add(row["types"]["x_ptr"])
        if x_bytes(row) == 4:
            assert "mma" not in row["ptx"], describe(row)
            assert has(row, "FFMA"), describe(row)
        elif x_bytes(row) == 2:
            assert has(row, {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]), (row["opcodes"], describe(row))
        else:
            assert has(row, "IGMMA" if arch == 90 else "IMMA"), (row["opcodes"], describe(row))
    assert dtypes == {"*i8", "*bf16", "*fp16", "*fp32"}


def test_int4_weights_are_copied_16_bytes_at_a_time(target):
    """Asynchronously; narrower only where a thread's share of a tile is no 16 bytes."""
    _, report = target
    for row in of_kernel(report, "_int4_linear_kernel"):
        c, threads = row["constants"], 32 * row["warps"]
        copies = {opcode: n for opcode, n in row["opcodes"].items() if opcode.startswith("LDGSTS")}
        tiles = (c["BLOCK_N"] * c["BLOCK_K"] // 2, c["BLOCK_M"] * c["BLOCK_K"] * x_bytes(row))
        assert copies, describe(row)
        if min(tiles) >= 16 * threads:
            assert all("128" in opcode for opcode in copies), (copies, describe(row))
        elif max(tiles) >= 16 * threads:
            assert any("128" in opcode for opcode in copies), (copies, describe(row))


def test_int4_weights_become_floats_without_conversions(target):
    """What is converted are the divisors of the program's number, and in int8 the sums."""
    _, report = target
    for row in of_kernel(report, "_int4_linear_kernel") + of_kernel(report, "_dequantize_kernel"):
        if x_bytes(row) > 1:
            conversions = sum(n for opcode, n in row["opcodes"].items() if opcode.startswith("I2F"))
            assert conversions <= 4, (row["opcodes"], describe(row))


def test_dequantization_moves_16_bytes_at_a_time(target):
    _, report = target
    for row in of_kernel(report, "_dequantize_kernel"):
        assert has(row, "STG.E.128"), describe(row)
        if row["constants"]["BLOCK_K"] == 256:
            assert has(row, "LDG.E.128"), describe(row)


# -------------------------------------------------------------------------------------------------- int8_weight_linear


def test_int8_weights_meet_x_on_tensor_cores(target):
    """In x's dtype, as the left operand; fp32 takes FMAs."""
    arch, report = target
    dtypes = set()
    for row in of_kernel(report, "_int8_weight_linear_kernel"):
        dtypes.add(row["types"]["x_ptr"])
        if x_bytes(row) == 4:
            assert "mma" not in row["ptx"], describe(row)
            assert has(row, "FFMA"), describe(row)
        else:
            assert has(row, {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]), (row["opcodes"], describe(row))
    assert dtypes == {"*bf16", "*fp16", "*fp32"}


def test_int8_weights_are_copied_16_bytes_at_a_time(target):
    """Asynchronously; narrower only where a thread's share of a tile of x is no 16 bytes."""
    _, report = target
    for row in of_kernel(report, "_int8_weight_linear_kernel"):
        c = row["constants"]
        copies = {opcode: n for opcode, n in row["opcodes"].items() if opcode.startswith("LDGSTS")}
        assert any("128" in opcode for opcode in copies), (copies, describe(row))
        if min(c["BLOCK_N"], c["BLOCK_M"] * x_bytes(row)) * c["BLOCK_K"] >= 16 * 32 * row["warps"]:
            assert all("128" in opcode for opcode in copies), (copies, describe(row))


def test_widening_moves_16_bytes_at_a_time(target):
    _, report = target
    for row in of_kernel(report, "_dequantize_rows_kernel"):
        assert_wide(row)


# --------------------------------------------------------------------------------------------------------- fp8_linear


@pytest.fixture
def fp8_target(target):
    if target[0] < FIRST_FP8:
        pytest.skip("no e4m3 there: test_every_config_is_compiled shows that nothing is compiled")
    return target


def accumulators(row: dict) -> int:
    """Of one thread."""
    return row["constants"]["BLOCK_M"] * row["constants"]["BLOCK_N"] // (32 * row["warps"])


def test_fp8_matmul_runs_on_tensor_cores(fp8_target):
    """From 64 rows on wgmma and tcgen05 take e4m3; below, mma.sync takes it as fp16, which holds e4m3 exactly."""
    arch, report = fp8_target
    for row in of_kernel(report, "_fp8_linear_kernel"):
        large = {90: "QGMMA", 100: "UTCQMMA"}[arch]
        expected = large if row["constants"]["BLOCK_M"] >= 64 else "HMMA.16816.F32"
        assert has(row, expected), (row["opcodes"], describe(row))


def test_fp8_sums_are_on_two_levels(fp8_target):
    """On Hopper every 128 of K leave the tensor core, to be added in fp32: no instruction there sums across a step."""
    arch, report = fp8_target
    if arch != 90:
        pytest.skip("other tensor cores sum in fp32")
    for row in of_kernel(report, "_fp8_linear_kernel"):
        c = row["constants"]
        if c["BLOCK_M"] < 64:
            continue
        count = {kind: sum(n for op, n in row["opcodes"].items() if op.startswith(kind)) for kind in ("FADD", "FFMA")}
        epilogue = accumulators(row) if c["SPLIT_K"] == 1 else 0  # the residual; the bias is an FFMA with the scale
        if c["BY_BLOCK"]:
            assert count["FFMA"] >= accumulators(row), describe(row)
        else:
            assert count["FADD"] >= accumulators(row) + epilogue, describe(row)


def test_fp8_matmul_moves_16_bytes_at_a_time(fp8_target):
    _, report = fp8_target
    for row in of_kernel(report, "_fp8_linear_kernel"):
        copies = {opcode for opcode in row["opcodes"] if opcode.startswith("LDGSTS")}
        assert copies, describe(row)
        assert all("128" in opcode for opcode in copies), (copies, describe(row))
        out_bytes = {"*fp32": 4, "*bf16": 2, "*fp16": 2}[row["types"]["out_ptr"]]
        aligned = ["tt.divisibility", 16] in row["attributes"].get("N", [])
        if aligned and accumulators(row) * out_bytes >= 16:
            assert has(row, "STG.E.128"), describe(row)


def test_fp8_quantization(fp8_target):
    """Wide accesses; divisions as IEEE rounds them, no multiply-add, and the device's own rounding to e4m3."""
    _, report = fp8_target
    for row in quantizations(report, "*fp8e4nv"):
        k_is_even = ["tt.divisibility", 16] in row["attributes"].get("K", [])
        if row["constants"]["BLOCK_K"] >= 128 and k_is_even:
            assert_wide(row)
        assert "fma." not in row["ptx"], describe(row)
        assert "div.rn.f32" in row["ptx"], describe(row)
        assert "cvt.rn.satfinite.e4m3x2.f32" in row["ptx"], describe(row)


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
