"""The benchmark of a GPU runs to its end over toy shapes, so that no minute on a real one is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(tmp_path, *arguments):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_section_runs_over_toy_shapes(tmp_path):
    result = run(tmp_path)
    sections = result["sections"]
    assert not [name for name, found in sections.items() if "error" in found]
    assert set(sections) == {
        "bandwidth", "kernels", "decode", "window", "batch", "prefill", "same_bits", "sampling", "profile",
        "peers", "llama_cpp", "roofline", "start",
    }  # fmt: skip
    assert sections["start"]["seconds"] > 0
    assert set(sections["decode"]["lines"]) == {"bf16", "int8", "int4", "mixture int4"}
    assert {(line["form"], line["shape"]) for line in sections["kernels"]["lines"]} == {
        (form, shape) for form in ("bf16", "int8", "int4") for shape in ("qkv", "wo", "gate_up", "down")
    }
    assert sections["decode"]["lines"]["bf16"]["bytes"] > sections["decode"]["lines"]["int4"]["bytes"]


def test_a_section_is_chosen_by_name_and_says_when_it_is_skipped(tmp_path):
    result = run(tmp_path, "--only", "roofline")
    assert set(result["sections"]) == {"bandwidth", "roofline"}
    assert "kernels" in result["sections"]["roofline"]["skipped"]
    assert result["toy"] is True
