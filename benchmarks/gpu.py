"""Every speed that issue 8 names, measured on one GPU beside its own bandwidth and beside peers.

    python benchmarks/gpu.py [--only decode,prefill] [--model DIR] [--out FILE]
    python benchmarks/gpu.py --toy          the same program over toy shapes, on any machine

Weights are random: speed depends on bytes. A floor is the bytes that a step must read over the bandwidth that
was measured in the same run; `share` is the floor over the time. Each section is written to the result as it
ends, so a run that breaks off keeps what it had. The last line is the path of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    toy: bool
    device: str

    def pick(self, real: Any, toy: Any) -> Any:
        """Return the size for this run."""
        return toy if self.toy else real


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--toy", action="store_true", help="toy shapes; without a GPU in Triton's interpreter"
    )
    parser.add_argument("--only", default="", help="sections, with commas between them")
    parser.add_argument(
        "--model", type=Path, help="a model to time the start of, instead of random weights of a 7B in bf16"
    )
    parser.add_argument("--out", type=Path, help="where the result is written")
    arguments = parser.parse_args()
    if arguments.toy:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    on_gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    if not on_gpu and not arguments.toy:
        raise SystemExit("no CUDA device; --toy runs the same program over toy shapes")
    sys.path.insert(0, str(Path(__file__).parent))
    import gpu_sections

    scale = Scale(arguments.toy, "cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name().replace(" ", "-").lower() if on_gpu else "toy"
    out = arguments.out = arguments.out or RESULTS / f"{date.today()}-gpu-{name}.json"
    result: Record = {"machine": machine(torch, on_gpu), "toy": arguments.toy, "sections": {}}
    chosen = [part for part in arguments.only.split(",") if part]
    sections: dict[str, Callable[..., Record]] = gpu_sections.SECTIONS
    unknown = set(chosen) - set(sections)
    if unknown:
        raise SystemExit(f"no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    for title, section in sections.items():
        if chosen and title not in chosen and title != "bandwidth":
            continue
        began = time.perf_counter()
        try:
            found = section(scale, result["sections"], arguments)
        except Exception as error:  # a section that fails must not cost the others; it is in the result
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        found["seconds"] = round(time.perf_counter() - began, 2)
        result["sections"][title] = found
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(title, json.dumps(found), flush=True)
        if on_gpu:
            torch.cuda.empty_cache()
    failed = [title for title, found in result["sections"].items() if "error" in found]
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    print(out)
    if failed:
        raise SystemExit(1)


def machine(torch: Any, on_gpu: bool) -> Record:
    """Return what the numbers depend on."""
    import triton

    commit = ""
    with suppress(OSError):  # a lent machine may have no git
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found: Record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


if __name__ == "__main__":
    main()
