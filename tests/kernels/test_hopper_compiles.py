"""Kernels compiled for sm_90 where there is no GPU: what the machine code must and must not hold.

A product that spills, or whose tensor-core instructions the assembler has put one behind the other, is right and slow:
no test of results would tell.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from kernels.fp8 import gemm_gluon, quantize, quantize_gluon, wgrad_gluon  # noqa: E402
from kernels.fp8.hopper import TILES, WGRAD_STAGES, _layout  # noqa: E402
from kernels.fused import attention, attention_kernels, latent, router  # noqa: E402
from kernels.fused.layout import BLOCK, SCAN, STEP, _count, _place, _scan  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = 232448  # bytes that a block may have on sm_90
TARGET = GPUTarget("cuda", 90, 32)


def described(dtype: str, rows: int, columns: int) -> str:
    bits = {"fp8e4nv": 8, "bf16": 16, "fp32": 32}[dtype]
    return f"tensordesc<{dtype}{[rows, columns]},{_layout(bits)!r}>"


class Compiled:
    """A kernel's machine code: how often instructions occur, what it needs."""

    def __init__(self, kernel, types: dict[str, str], constants: dict, **options: int) -> None:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        # As the launcher specialises them: pointers and sizes are multiples of 16 at real shapes.
        aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name][0] in "*i"}
        known = {(at,): constants[name] for at, name in enumerate(names) if name in constants}
        source = GluonASTSource if kernel.is_gluon() else ASTSource
        made = triton.compile(
            source(fn=kernel, signature=signature, constexprs=known, attrs=aligned), target=TARGET, options=options
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            self.code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True).stdout
            usage = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
            said = subprocess.run(usage, capture_output=True, text=True).stdout
        self.registers = int(re.search(r"REG:(\d+)", said)[1])
        self.stack = int(re.search(r"STACK:(\d+)", said)[1])
        self.shared = made.metadata.shared

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.code))

    def check(self, spilled: int = 0) -> None:
        assert self.stack <= spilled, "registers are spilled"
        assert self.shared <= SHARED_MEMORY


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("width", "stages"), [tile[:2] for tile in TILES])
def test_the_product_multiplies_in_float8_and_waits_once_a_product(width: int, stages: int, grouped: bool):
    unit = 64 if width == 192 else 128
    types = {
        "x_desc": described("fp8e4nv", 64, 128),
        "w_desc": described("fp8e4nv", unit, 128),
        "y_desc": described("bf16", 64, unit),
        "s_desc": described("fp32", 1, 64),
        **{"w_scales_ptr": "*fp32", "expert_ptr": "*i32", "count_ptr": "*i32"},
    }
    constants = {"TAIL": width - 128, "UNIT": unit, "STAGES": stages, "GROUP": 16, "GROUPED": grouped, "DEPTH": 128}
    made = Compiled(gemm_gluon.gemm, types, constants, num_warps=4)
    made.check()
    products = 2 * (1 if width == 128 else 2)  # of two warpgroups
    assert made.count("QGMMA") == 4 * products, "a product of 128 is four instructions"
    # A wait before a product's sum is read, and an empty one between the halves: more means one behind the other.
    assert made.count(r"WARPGROUP\.DEPBAR\.LE") <= products + 2


@pytest.mark.parametrize(("dtype", "grouped"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_the_product_for_weight_gradients_too(dtype: str, grouped: bool):
    types = {
        "y_desc": described("fp8e4nv", 64, 128),
        "x_desc": described("fp8e4nv", 128, 128),
        "ys_desc": described("fp32", 1, 64),
        "xs_desc": described("fp32", 1, 128),
        **{"w_ptr": f"*{dtype}", "ends_ptr": "*i32"},
    }
    made = Compiled(wgrad_gluon.wgrad, types, {"STAGES": WGRAD_STAGES, "GROUP": 8, "GROUPED": grouped}, num_warps=4)
    made.check()
    assert made.count("QGMMA") == 8
    assert made.count(r"WARPGROUP\.DEPBAR\.LE") == 2


def test_quantisation_writes_whole_words_and_transposes_nothing():
    for kind in (quantize.COPY, quantize.NORM, quantize.SWIGLU):
        made = quantising(
            quantize_gluon.quantize,
            {"KIND": kind.value, "GATHER": kind.value == 0, "GATED": kind.value > 0, "ALONG": True, "ACROSS": True},
        )
        made.check()
        assert made.count("LDS") < 16, "codes go through shared memory"


def test_the_gradient_of_swiglu_is_quantised_by_two_programs_a_processor():
    made = quantising(quantize_gluon.swiglu_backward_quantize, {"GATED": True})
    made.check(spilled=256)  # 0 with Triton 3.6; twice the programs pay for it
    assert made.shared <= SHARED_MEMORY // 2


def quantising(kernel, constants: dict) -> Compiled:
    types = {
        **{"x_ptr": "*bf16", "gate_up_ptr": "*bf16", "gates_ptr": "*fp32", "source_ptr": "*i32"},
        **{"codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "across_ptr": "*fp8e4nv"},
        **{"across_scales_ptr": "*fp32", "grad_gates_ptr": "*fp32"},
    }
    constants |= {"INDEX": gl.int32, "POWER_OF_TWO": False, "R": quantize.ACROSS["R"]}
    options = {"num_warps": quantize.ACROSS["num_warps"], "maxnreg": quantize.REGISTERS}
    made = Compiled(kernel, types, constants, **options)
    assert made.count(r"STG\.E\.128") >= 4, "a thread's codes of a column are one store"
    return made


@pytest.mark.parametrize(("experts", "k", "groups", "limited", "v3"), [(64, 6, 1, 1, False), (256, 8, 8, 4, True)])
def test_routing_reads_whole_words_and_meets_no_other_warp(experts: int, k: int, groups: int, limited: int, v3: bool):
    names = "logits", "bias", "gates", "scores", "grad_gates", "grad_scores", "grad"
    types = {**{f"{name}_ptr": "*fp32" for name in names}, "indices_ptr": "*i64", "scale": "fp32"}
    both = {"E": experts, "K": k, "SIGMOID": v3, "RENORMALISED": v3, "R": router._rows(experts)}
    choice = {"GROUPS": groups, "LIMITED": limited, "TOP": 2 if v3 else 1, "G": groups, "S": experts // groups}
    forward = Compiled(router._route, types, both | choice, num_warps=1)
    backward = Compiled(router._route_backward, types, both | {"C": experts, "SCORED": True}, num_warps=1)
    for made in (forward, backward):
        made.check()
        assert made.count(r"LDG\.E\.128") >= 4


@pytest.mark.parametrize(("experts", "k", "tile"), [(64, 6, 1), (256, 8, 128)])
def test_the_layout_of_rows_leaves_room_for_other_programs(experts: int, k: int, tile: int):
    wide = {f"{name}_ptr": "*i64" for name in ("expert", "load", "pair", "source", "row", "tile")}
    types = wide | {f"{name}_ptr": "*i32" for name in ("rank", "count", "before", "ends")} | {"real_ptr": "*fp32"}
    block = {"E": experts, "X": experts, "B": BLOCK}
    scan = {"E": experts, "C": SCAN["C"], "X": SCAN["X"]}
    for kernel, constants, warps in (
        (_count, block | {"C": STEP}, 4),
        (_scan, scan, SCAN["num_warps"]),
        (_place, block | {"K": k, "TILE": tile}, 4),
    ):
        made = Compiled(kernel, types, constants, num_warps=warps)
        made.check()
        assert made.registers <= 128


@pytest.mark.parametrize(("width", "group"), [(192, 1), (128, 1), (128, 4), (64, 1)])
@pytest.mark.parametrize("name", ["forward", "backward_queries", "backward_keys"])
def test_attention_multiplies_from_shared_memory_and_lets_products_overlap(name: str, width: int, group: int):
    tile = {
        "forward": attention.FORWARD,
        "backward_queries": attention.BACKWARD_QUERIES,
        "backward_keys": attention.BACKWARD_KEYS,
    }[name][width]
    first, rest = {192: (128, 64), 128: (128, 0), 64: (64, 0)}[width]
    constants = {"D": first, "E": rest, "V": first, "M": tile.queries, "N": tile.keys}
    constants |= {"GROUP": group, "STAGES": tile.stages}
    types = {"scale": "fp32", "lse_ptr": "*fp32", "start_ptr": "*fp32", "spans_ptr": "*i32"}
    types |= {"start_desc": f"tensordesc<fp32[1, 1, {tile.queries}]>"}
    types |= dict.fromkeys(("y_ptr", "grad_q_ptr", "grad_k_ptr", "grad_v_ptr"), "*bf16")
    for operand in ("q", "k", "v", "y", "grad"):
        rows = tile.keys if operand in "kv" else tile.queries
        types[f"{operand}_desc"] = f"tensordesc<bf16[1, 1, {rows}, {first}]>"
        types[f"{operand}_rest_desc"] = f"tensordesc<bf16[1, 1, {rows}, {rest}]>"
    if not rest:
        constants |= {"q_rest_desc": None, "k_rest_desc": None}
    made = Compiled(getattr(attention_kernels, name), types, constants, num_warps=tile.warps)
    made.check()
    assert made.count("HGMMA") >= 24
    # Two loops, and a wait for each product whose result is read at once: more means one instruction behind the other.
    products = {"forward": 2, "backward_queries": 3, "backward_keys": 4}[name]
    assert made.count(r"WARPGROUP\.DEPBAR\.LE") <= 2 * (products + bool(rest))


@pytest.mark.parametrize(("rank", "rope"), [(256, 32), (512, 64)])
@pytest.mark.parametrize("splits", [1, 8])
def test_decoding_copies_the_next_slots_while_it_multiplies(rank: int, rope: int, splits: int):
    types = {f"{name}_ptr": "*bf16" for name in ("q", "q_rope", "cache", "y")}
    types |= {"position_ptr": "*i64", "part_ptr": "*fp32", "log_sum_ptr": "*fp32", "scale": "fp32"}
    constants = {"LATENT": rank, "ROPE": rope, "H": latent.HEADS, "C": rank, "R": rope}
    constants |= {"S": latent.tile(rank), "SPLITS": splits}
    made = Compiled(latent._attend, types, constants)
    made.check()
    assert made.count("HMMA") >= 32
    assert made.count("LDGSTS") >= 32
