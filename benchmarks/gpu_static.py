"""What the inner loop of a product costs, read from machine code: no GPU is needed.

    python benchmarks/gpu_static.py [--architecture 90]

For each form of weights and one row or eight: instructions that a warp issues in the loop that multiplies,
bytes of weights that the loop takes, loads that are not under way before they are needed (`waits_for`), and
the share of a bandwidth at which issuing alone would keep a processor busy. One processor of an H200 issues
four instructions a cycle; at 4.3 TB/s, 132 processors and 1.755 GHz it has 18.6 bytes a cycle to take. Above
1 memory is the limit. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests" / "kernels" / "triton"
BYTES_PER_CYCLE = 4.3e12 / 132 / 1.755e9
ISSUED_PER_CYCLE = 4
STEP_BYTES = {"z4": 9216, "q4": 9216, "q4k": 9216, "n4": 9216, "q8": 4096 + 256, "bf16": 8192}
"""What a step of the loop takes of a block of 64 rows, with scales: 256 columns of 4-bit codes, else 64."""


def machine_code(cubin: bytes) -> str:
    """Return the instructions of a compiled kernel as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def hot_loop(code: str) -> Counter[str]:
    """Return how often each instruction occurs in the shortest loop that multiplies matrices."""
    pattern = r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);"
    lines = re.findall(pattern, code)
    at = {int(address, 16): index for index, (address, _, _) in enumerate(lines)}
    loops: list[list[tuple[str, str, str]]] = []
    for index, (_, name, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) in at:
            start = at[int(target[1], 16)]
            body = lines[start : index + 1]
            if start < index and any("MMA" in each[1] for each in body):
                loops.append(body)
    best = min(loops, key=len, default=[])
    return Counter(name.split(".")[0] for _, name, _ in best)


def counted(code: str, size: int, warps: int) -> dict[str, object]:
    """Return what a loop that takes `size` bytes of weights issues."""
    counts = hot_loop(code)
    issued = sum(counts.values())
    share = size / BYTES_PER_CYCLE / (issued * warps / ISSUED_PER_CYCLE) if issued else 0
    return {
        "instructions": issued,
        "bytes": size,
        "issue_share": round(share, 2),
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
    for form, step_bytes in STEP_BYTES.items():
        for kind, options in (
            ("plain", {"AFTER": 2}),
            ("normed", {"NORMED": True}),
            ("gate", {"NORMED": True, "AFTER": 1, "TWO": 1}),
        ):
            for rows in (1, 8) if forms[form][0] == 4 else (8,):
                name, kernel, types, constants, launch = compile_kernels.matmul_case(
                    form, rows=rows, form=forms[form], **options
                )
                made = compile_kernels.compiled(kernel, types, constants, architecture, launch)
                size = step_bytes * (2 if kind == "gate" else 1)
                found = counted(machine_code(made.asm["cubin"]), size, launch["num_warps"])
                result[f"{form} {kind} {rows}"] = found | {"shared_memory": made.metadata.shared}
                print(name, kind, rows, found, file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
