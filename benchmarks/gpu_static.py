"""What the inner loop of a product costs, read from machine code: no GPU is needed.

    python benchmarks/gpu_static.py [--architecture 90]

For each form of weights and one row, eight, or a prompt: instructions that a warp issues in the loop that
multiplies, how many of them move registers to memory and back, bytes of weights that the loop takes, loads
that are not under way before they are needed (`waits_for`), and the time of memory (4.3 TB/s, 132 processors,
1.755 GHz: 18.6 bytes a cycle and processor) and of the tensor cores (2,048 products a cycle of 16 bits) over
that of issuing (four instructions a cycle): `memory_share` and `tensor_share`, above 1 of which issuing is
not the limit. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests" / "kernels" / "triton"
BYTES_PER_CYCLE = 4.3e12 / 132 / 1.755e9
ISSUED_PER_CYCLE = 4
PRODUCTS_PER_CYCLE = 2048
STEP_BYTES = {"z4": 9216, "q4": 9216, "q4k": 9216, "n4": 9216, "q8": 4096 + 256, "bf16": 8192}
"""What a step of the loop takes of a block of 64 rows, with scales: 256 columns of 4-bit codes, else 64."""
KINDS = {
    "plain": {"AFTER": 2},
    "normed": {"NORMED": True},
    "gate": {"NORMED": True, "AFTER": 1, "TWO": 1},
    "prompt": {"TWO": 2},
    "prompt gate": {"AFTER": 1, "TWO": 1},
}


def counted(counts: Counter[str], form: str, blocks: int, rows: int, warps: int) -> dict[str, object]:
    """Return what a loop issues that takes a step of `blocks` blocks of 64 outputs."""
    issued = sum(counts.values())
    cycles = max(issued, 1) * warps / ISSUED_PER_CYCLE
    columns = 256 if STEP_BYTES[form] == 9216 else 64
    return {
        "instructions": issued,
        "spilled": counts["LDL"] + counts["STL"],
        "bytes": STEP_BYTES[form] * blocks,
        "memory_share": round(STEP_BYTES[form] * blocks / BYTES_PER_CYCLE / cycles, 2),
        "tensor_share": round(64 * blocks * columns * rows / PRODUCTS_PER_CYCLE / cycles, 2),
        "waits_for": counts["LDG"],
        "most": dict(counts.most_common(8)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", type=int, default=90)
    architecture = parser.parse_args().architecture
    sys.path.insert(0, str(TESTS))
    import compile_kernels

    result: dict[str, object] = {}
    forms = compile_kernels.FORMS | {"q4": compile_kernels.Q4, "bf16": compile_kernels.FLOATS}
    for form in STEP_BYTES:
        for kind, options in KINDS.items():
            few = (1, 8) if forms[form][0] == 4 else (8,)
            for slots in (512,) if "prompt" in kind else few:
                name, kernel, types, constants, launch = compile_kernels.matmul_case(
                    form, slots=slots, form=forms[form], card=compile_kernels.CARDS[architecture], **options
                )
                made = compile_kernels.compiled(kernel, types, constants, architecture, launch)
                found = counted(
                    compile_kernels.hot_loop(compile_kernels.machine_code(made.asm["cubin"])),
                    form, 2 if constants["TWO"] else 1, constants["ROWS"], launch["num_warps"],
                )  # fmt: skip
                result[f"{form} {kind} {slots}"] = found | {"shared_memory": made.metadata.shared}
                print(name, kind, slots, found, file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
