"""Compile every kernel to machine code for a GPU that need not be there: `compile_kernels.py [all]`.

Prints one line per kernel and architecture: name, bytes of code, shared memory, the widest load of weights in
bytes, how many neighbouring columns a thread takes into a product at once, which instruction multiplies, and
how many instructions of the loop that multiplies move registers to memory and back.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bise.kernels.triton import EXACT, attention, fused, products, sampling, sorting
from bise.kernels.triton.launches import Card, least_rows_of, shape_of, with_norm

# Types of parameters by name; the same name means the same thing in every kernel.
POINTERS = {
    "*bf16": "k_pages v_pages q_out level_table",
    "*fp32": "squares norm_weight parts residual squares_out shares q k v cos sin k_scales "
    "v_scales part_tops part_weights x y weight left right logits",
    "*fp16": "minimum",
    "*i32": "arrived slots experts positions owners block_table q_start q_pos tile_sequence tile_row "
    "token_ids chosen mask tokens status",
    "*fp64": "parameters weights",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()} | {
    "eps": "fp32",
    "score_scale": "fp32",
    "to_codes2": "i64",
    "to_scale2": "i64",
    "to_minimum2": "i64",
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


SMALL = Card(processors=84, shared_bytes=99 << 10)
"""A consumer's card."""
HOPPER = Card(least_rows=least_rows_of(9, triton.__version__))
CARDS = {80: Card(108, 163 << 10), 89: SMALL, 90: HOPPER, 120: SMALL}


def matmul_case(name, *, slots, form=Z4, to=tl.bfloat16, card=CARDS[90], **given):
    bits, group, zero, has_min, codebook, scales = form
    launch = shape_of(slots, bits, card, is_wide=to == tl.float32)
    if given.get("NORMED"):
        launch = with_norm(launch, card)
    rows = launch.rows
    constants = {
        "NUM_SPLITS": 4, "APART": rows <= 16, "SLOTS": 0, "AFTER": 0, "NORMED": False, "TWO": 0, "TOP_K": 1,
        "SQUARES": 64, "BITS": bits, "GROUP": group, "ZERO": zero, "HAS_MIN": has_min, "CODEBOOK": codebook,
        "SCALES": scales, "EVEN": True, "LEAST": card.least_rows, "ROWS": rows, "STAGES": launch.stages,
        "H": tl.bfloat16, "TO": to,
    }  # fmt: skip
    constants |= given
    if slots == 1:
        constants["num_slots"] = 1  # as a number that is 1 comes to a kernel: as a constant
    types = dict(TYPES)
    types["x"] = "*fp32" if constants["NORMED"] or to == tl.float32 else "*bf16"
    types["out"] = "*bf16" if constants["AFTER"] == 1 else "*fp32"
    weights = {0: "*fp32" if to == tl.float32 else "*bf16", 4: "*i32", 8: "*u8"}[bits]
    numbers = "*i32" if bits == 4 else "*fp16"
    types |= {"codes": weights, "scale": numbers}
    return f"matmul {name}", products.matmul, types, constants, {
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip


QUICK = ("matmul z4 add one", "decode q8", "attend q8")
"""What is compiled without `all`: one of each kind, for seconds."""


def products_of(card):
    """Yield the cases of the matrix kernel."""

    def case(name, **options):
        return matmul_case(name, card=card, **options)

    for label, form in (("z4", Z4), ("bf16", FLOATS)):
        yield case(f"{label} qkv", slots=8, form=form, NORMED=True)
        yield case(f"{label} gate", slots=8, form=form, NORMED=True, AFTER=1, TWO=1)
        yield case(f"{label} add", slots=8, form=form, AFTER=2)
        yield case(f"{label} prompt", slots=512, form=form, TWO=2)
        yield case(f"{label} prompt gate", slots=512, form=form, AFTER=1, TWO=1)
    yield case("z4 qkv one", slots=1, NORMED=True)
    yield case("z4 gate one", slots=1, NORMED=True, AFTER=1, TWO=1)
    yield case("z4 add one", slots=1, AFTER=2)
    yield case("route", slots=8, form=FLOATS, NORMED=True, AFTER=4, TOP_K=2, to=tl.float32)
    yield case("route many", slots=512, form=FLOATS, AFTER=4, TOP_K=2, to=tl.float32)
    yield case("adapter", slots=512, form=FLOATS, to=tl.float32)
    yield case("z4 f32", slots=512, to=tl.float32)
    yield case("z4 expert gate", slots=1, SLOTS=1, NORMED=True, AFTER=1, TWO=1)
    yield case("z4 expert mix", slots=1, SLOTS=1, AFTER=3, TOP_K=2)
    slots = 128 if card.is_large else 32  # as `launch_of` looks up what sorted slots get
    yield case("z4 sorted gate", slots=slots, SLOTS=2, AFTER=1, TWO=1)
    for name, form in FORMS.items():
        if form[0] == 4:
            yield case(f"{name} one", slots=1, form=form)
        yield case(f"{name} few", slots=8, form=form)
        yield case(f"{name} many", slots=512, form=form, TWO=2)
    yield case("z4 uneven", slots=8, EVEN=False)
    if card.is_large:
        yield case("bf16 long", slots=512, form=FLOATS, TWO=2, ROWS=256)


def cases(card):
    """Yield name, kernel, types, constants and options."""
    yield from products_of(card)
    shape = {"HEADS_PER_KV": 4, "HALF": 64, "WIDTH": 128, "SPLIT": 512, "PAGE": 32, "TO": tl.bfloat16}
    decode = shape | {"ROWS": 16, "STORES": True}
    coded = TYPES | {"k_pages": "*i8", "v_pages": "*i8"}
    yield "decode", attention._decode, TYPES, decode | {"CODED": False}, {}
    yield "decode q8", attention._decode, coded, decode | {"CODED": True}, {}
    prompt = TYPES | {"q": "*bf16"}
    yield "attend", attention._attend, prompt, shape | {"ROWS": 64, "CODED": False}, {}
    coded = coded | {"q": "*bf16"}
    yield "attend q8", attention._attend, coded, shape | {"ROWS": 32, "CODED": True}, {}
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


def columns_at_once(code):
    """Return how many neighbouring columns a thread takes into the products of a kernel (TTGIR), in order.

    Two, and what the tensor cores multiply at once are 16 neighbouring columns; more, and they are columns
    apart from one another: other sums, rounded elsewhere. Hopper's own instruction always takes neighbours.
    """
    if "#ttg.nvidia_mma" not in code:
        return "-"
    found = re.findall(r"tt\.dot .*opIdx = 1, [^}]*kWidth = (\d+)", code)
    found += ["2"] * code.count("ttng.warp_group_dot ")
    return "+".join(sorted(set(found)))


def widest_load(assembly):
    """Return the bytes of the widest load or copy of global memory."""
    sizes = [
        int(size, 16)
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x([0-9a-f]+)", assembly)
    ]
    for vector, kind in re.findall(r"ld\.global(?:\.[a-z_:0-9]+)*?(\.v\d)?\.[bfus](\d+) ", assembly):
        sizes.append(int(vector[2:] or 1) * int(kind) // 8)
    return max(sizes, default=0)


def multiplies(assembly):
    """Return the instruction that multiplies matrices: of warps together, of each warp, or of each thread."""
    return next((name for name in ("wgmma", "tcgen05", "mma.sync") if f"{name}." in assembly), "fma")


def machine_code(cubin):
    """Return the instructions of a compiled kernel as text."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def hot_loop(code):
    """Return how often each instruction occurs in the shortest loop that multiplies matrices."""
    pattern = r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);"
    lines = re.findall(pattern, code)
    at = {int(address, 16): index for index, (address, _, _) in enumerate(lines)}
    loops = []
    for index, (_, name, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) in at:
            start = at[int(target[1], 16)]
            body = lines[start : index + 1]
            if start < index and any("MMA" in each[1] for each in body):
                loops.append(body)
    best = min(loops, key=len, default=[])
    return Counter(name.split(".")[0] for _, name, _ in best)


def main() -> None:
    everything = sys.argv[1:] == ["all"]
    for architecture, card in CARDS.items() if everything else [(90, CARDS[90])]:
        for name, kernel, types, constants, options in cases(card):
            if not everything and name not in QUICK:
                continue
            made = compiled(kernel, types, constants, architecture, options)
            loop = hot_loop(machine_code(made.asm["cubin"]))
            print(
                f"sm_{architecture} {name}: {len(made.asm['cubin'])} bytes, {made.metadata.shared} shared, "
                f"{widest_load(made.asm['ptx'])} bytes a load, {columns_at_once(made.asm['ttgir'])} columns, "
                f"{multiplies(made.asm['ptx'])}, {loop['LDL'] + loop['STL']} spilled"
            )


if __name__ == "__main__":
    main()
