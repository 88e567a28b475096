"""Compile every kernel to machine code for a GPU that need not be there: `compile_kernels.py [all]`.

Prints one line per kernel and architecture: registers spilled are a bug report of their own.
"""

import itertools
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bise.kernels.triton import EXACT, attention, fused, matmul

MATMUL = {
    "x": "*bf16", "codes": "*u8", "scale": "*fp16", "minimum": "*fp16", "level_table": "*fp32",
    "out": "*fp32", "slots": "*i32", "experts": "*i32", "num_slots": "i32", "num_rows": "i32",
    "num_columns": "i32", "x_stride": "i32", "slots_per_row": "i32", "tiles_per_split": "i32",
}  # fmt: skip
ATTEND = {
    "q": "*bf16", "k_pages": "*bf16", "v_pages": "*bf16", "out": "*fp32", "part_tops": "*fp32",
    "part_weights": "*fp32", "q_start": "*i32", "q_pos": "*i32", "block_table": "*i32",
    "tile_sequence": "*i32", "tile_row": "*i32", "table_width": "i32", "num_heads": "i32",
    "num_kv_heads": "i32", "head_dim": "i32", "window": "i32", "score_scale": "fp32", "num_splits": "i32",
}  # fmt: skip


def compiled(kernel, types, constants, architecture):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(EXACT))


def cases(everything):
    """Yield name, kernel, types and constants."""
    formats = [(4, 32, 8, False, False), (4, 32, 0, False, True), (0, 32, 0, False, False)]
    if everything:
        formats += [(8, 32, 128, False, False), (4, 32, 0, True, False), (8, 16, 32, False, False)]
        formats += [(8, 16, 0, True, False)]
    for (bits, group, zero, has_min, codebook), rows in itertools.product(formats, (16, 64)):
        types = MATMUL | ({} if bits else {"codes": "*bf16"})
        for apart, is_sorted in (
            ((rows == 16, False), (False, True)) if everything else ((rows == 16, False),)
        ):
            constants = {
                "NUM_SPLITS": 4, "SPLIT_APART": apart, "SORTED": is_sorted, "BITS": bits, "GROUP": group,
                "ZERO": zero, "HAS_MIN": has_min, "CODEBOOK": codebook, "ROWS": rows, "TO": tl.bfloat16,
            }  # fmt: skip
            yield f"matmul {bits} bits {group} min={has_min} {rows}", matmul._matmul, types, constants
    for rows, width in ((16, 128), (64, 128)):
        constants = {
            "HEADS_PER_KV": 4, "ROWS": rows, "WIDTH": width, "SPLIT": 512, "PAGE": 32, "APART": rows == 16,
            "TO": tl.bfloat16,
        }  # fmt: skip
        yield f"attend {rows}", attention._attend, ATTEND, constants
    wide = {
        "parts": "*fp32",
        "part_tops": "*fp32",
        "part_weights": "*fp32",
        "out": "*fp32",
        "shares": "*fp32",
    }
    ints = dict.fromkeys(
        ("num_lines", "head_dim", "num_splits", "width", "size", "num_heads", "num_kv_heads"), "i32"
    )
    yield "join splits", attention._join_splits, wide | ints, {"LINES": 16, "WIDTH": 128}
    rotate = dict.fromkeys(("q", "k", "v", "cos", "sin"), "*fp32")
    rotate |= {"slots": "*i32", "q_out": "*bf16", "k_pages": "*bf16", "v_pages": "*bf16"}
    yield "rotate and store", attention._rotate_store, rotate | ints, {"HALF": 64}
    floats = dict.fromkeys(("x", "y", "weight", "left", "right"), "*fp32") | {"out": "*bf16", "eps": "fp32"}
    yield "norm", fused._norm, floats | ints, {"HAS_Y": True, "WIDTH": 4096}
    yield "gate", fused._gate, floats | ints, {"BLOCK": 1024}
    yield "mix", fused._mix, wide | ints, {"TOP_K": 2, "BLOCK": 1024}
    yield "add splits", matmul._add_splits, wide | ints, {"NUM_SPLITS": 4, "BLOCK": 1024}


def main() -> None:
    everything = sys.argv[1:] == ["all"]
    for architecture in (80, 90, 120) if everything else (90,):
        for name, kernel, types, constants in cases(everything):
            made = compiled(kernel, types, constants, architecture)
            print(f"sm_{architecture} {name}: {len(made.asm['cubin'])} bytes, {made.metadata.shared} shared")


main()
