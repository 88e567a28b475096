"""Compile every kernel to machine code for a GPU that need not be there: `compile_kernels.py [all]`.

Prints one line per kernel and architecture: name, bytes of code, shared memory, registers, bytes spilled, and
the widest load of weights in bytes.
"""

import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bise.kernels.triton import EXACT, attention, fused, products, sampling, sorting
from bise.kernels.triton.launches import shape_of

# Types of parameters by name; the same name means the same thing in every kernel.
POINTERS = {
    "*bf16": "k_pages v_pages q_out",
    "*fp32": "squares norm_weight level_table parts residual squares_out shares q k v cos sin k_scales "
    "v_scales part_tops part_weights x y weight left right logits",
    "*fp16": "minimum minimum2",
    "*i32": "arrived slots experts positions owners block_table q_start q_pos tile_sequence tile_row "
    "token_ids chosen mask tokens status",
    "*fp64": "parameters weights",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()} | {
    "eps": "fp32",
    "score_scale": "fp32",
    "out": "*bf16",
}
DIVISIBLE = {
    "x_stride",
    "out_stride",
    "q_stride",
    "kv_stride",
    "width",
    "num_rows",
    "num_columns",
    "head_dim",
}
"""Integers that are multiples of 16 on every model of a size that matters."""


def compiled(kernel, types, constants, architecture, options):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (name in DIVISIBLE and name not in constants)
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=dict(EXACT) | options)


Q4 = (4, 32, 8, False, False, 1)
Z4 = (4, 32, 0, True, False, 3)
FLOATS = (0, 64, 0, False, False, 0)
FORMS = {
    "q4_1": (4, 32, 0, True, False, 2),
    "z4": Z4,
    "q4k": (4, 32, 0, True, False, 4),
    "n4": (4, 32, 0, False, True, 1),
    "n4k": (4, 32, 0, False, True, 5),
    "q8": (8, 32, 128, False, False, 0),
    "q6k": (8, 16, 32, False, False, 0),
    "q2k": (8, 16, 0, True, False, 0),
}
"""Bits, columns under one scale, zero point, minimum, codebook, `Scales`."""


def matmul_case(name, *, rows, form=Z4, to=tl.bfloat16, **given):
    bits, group, zero, has_min, codebook, scales = form
    launch = shape_of(512 if rows == 128 else rows, bits)
    assert launch.rows == rows
    constants = {
        "NUM_SPLITS": 4, "APART": rows <= 16, "SLOTS": 0, "AFTER": 0, "NORMED": False, "TWO": 0, "TOP_K": 1,
        "SQUARES": 64, "BITS": bits, "GROUP": group, "ZERO": zero, "HAS_MIN": has_min, "CODEBOOK": codebook,
        "SCALES": scales, "ROWS": rows, "STAGES": launch.stages, "H": tl.bfloat16, "TO": to,
    }  # fmt: skip
    constants |= given
    types = dict(TYPES)
    types["x"] = "*fp32" if constants["NORMED"] else "*bf16"
    types["out"] = "*bf16" if constants["AFTER"] == 1 else "*fp32"
    weights = {0: "*bf16", 4: "*i32", 8: "*u8"}[bits]
    numbers = "*i32" if bits == 4 else "*fp16"
    types |= {"codes": weights, "codes2": weights, "scale": numbers, "scale2": numbers}
    return f"matmul {name}", products.matmul, types, constants, {
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip


QUICK = ("matmul z4 add one", "decode", "norm")
"""What is compiled without `all`: one of each kind, for seconds."""


def cases():
    """Yield name, kernel, types, constants and options."""
    for label, form in (("z4", Z4), ("bf16", FLOATS)):
        yield matmul_case(f"{label} qkv", rows=8, form=form, NORMED=True)
        yield matmul_case(f"{label} gate", rows=8, form=form, NORMED=True, AFTER=1, TWO=1)
        yield matmul_case(f"{label} add", rows=8, form=form, AFTER=2)
        yield matmul_case(f"{label} prompt", rows=128, form=form, TWO=2 if label == "bf16" else 0)
    yield matmul_case("z4 qkv one", rows=1, NORMED=True)
    yield matmul_case("z4 gate one", rows=1, NORMED=True, AFTER=1, TWO=1)
    yield matmul_case("z4 add one", rows=1, AFTER=2)
    yield matmul_case("route", rows=8, form=FLOATS, NORMED=True, AFTER=4, TOP_K=2, to=tl.float32)
    yield matmul_case("z4 expert gate", rows=1, SLOTS=1, NORMED=True, AFTER=1, TWO=1)
    yield matmul_case("z4 expert mix", rows=1, SLOTS=1, AFTER=3, TOP_K=2)
    yield matmul_case("z4 sorted gate", rows=64, SLOTS=2, AFTER=1, TWO=1)
    for name, form in FORMS.items():
        if form[0] == 4:
            yield matmul_case(f"{name} one", rows=1, form=form)
        yield matmul_case(f"{name} few", rows=8, form=form)
        yield matmul_case(f"{name} many", rows=64, form=form)
    yield matmul_case("z4 prompt gate", rows=128, AFTER=1, TWO=1)
    shape = {"HEADS_PER_KV": 4, "HALF": 64, "WIDTH": 128, "SPLIT": 512, "PAGE": 32, "TO": tl.bfloat16}
    decode = shape | {"ROWS": 16, "LANES": 8, "STORES": True}
    coded = TYPES | {"k_pages": "*i8", "v_pages": "*i8"}
    yield "decode", attention._decode, TYPES, decode | {"CODED": False}, {}
    yield "decode q8", attention._decode, coded, decode | {"CODED": True}, {}
    prompt = TYPES | {"q": "*bf16"}
    yield "attend", attention._attend, prompt, shape | {"ROWS": 64, "CODED": False}, {}
    turn = {"HALF": 64, "CODED": False}
    yield "rotate and store", attention._rotate_store, TYPES, turn, {}
    wide = TYPES | {"out": "*fp32"}
    table = {"BITS": 8, "GROUP": 32, "ZERO": 128, "HAS_MIN": False, "CODEBOOK": False, "SCALES": 0}
    yield "embed", fused._embed, wide | {"codes": "*u8", "scale": "*fp16"}, table, {"num_warps": 2}
    table = {"BITS": 4, "GROUP": 32, "ZERO": 0, "HAS_MIN": True, "CODEBOOK": False, "SCALES": 3}
    yield "embed z4", fused._embed, wide | {"codes": "*i32", "scale": "*i32"}, table, {"num_warps": 2}
    yield "add rows", fused._add_rows, wide, {"HAS_Y": True}, {"num_warps": 2}
    yield "norm", fused._norm, TYPES, {"SQUARES": 64, "WIDTH": 4096}, {}
    yield "gate", fused._gate, TYPES, {"BLOCK": 1024}, {}
    yield "mix", fused._mix, wide, {"TOP_K": 2, "BLOCK": 1024}, {}
    yield "sort", sorting._sort, TYPES, {"ROWS": 64, "EXPERTS": 8, "BLOCK": 1024}, {}
    yield "sample", sampling._sample, TYPES, {"HAS_MASK": True, "BLOCK": 4096}, {"num_warps": 8}


def widest_load(assembly):
    """Return the bytes of the widest load or copy of global memory."""
    sizes = [
        int(size, 16)
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x([0-9a-f]+)", assembly)
    ]
    for vector, kind in re.findall(r"ld\.global(?:\.[a-z_:0-9]+)*?(\.v\d)?\.[bfus](\d+) ", assembly):
        sizes.append(int(vector[2:] or 1) * int(kind) // 8)
    return max(sizes, default=0)


def main() -> None:
    everything = sys.argv[1:] == ["all"]
    for architecture in (80, 90, 120) if everything else (90,):
        for name, kernel, types, constants, options in cases():
            if not everything and name not in QUICK:
                continue
            made = compiled(kernel, types, constants, architecture, options)
            code = made.asm["ptx"]
            print(
                f"sm_{architecture} {name}: {len(made.asm['cubin'])} bytes, {made.metadata.shared} shared, "
                f"{widest_load(code)} bytes a load"
            )


if __name__ == "__main__":
    main()
