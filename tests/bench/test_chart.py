from __future__ import annotations

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chart.py"


def chart():
    spec = importlib.util.spec_from_file_location("chart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(peer, speed, **changes):
    fields = {"op": "decode", "prompt": 0, "batch": 1, "context": 16, "peer": peer, "tokens_per_s": speed}
    return fields | {"bise_ratio": None if peer == "bise" else 2.0} | changes


def document(*entries):
    run = {"model": "s06", "quant": "q4", "cpu": "A <chip> & more", "threads": 2, "isa": "avx512",
           "date": "2026-11-21T00:00:00", "commit": "abc", "results": list(entries)}  # fmt: skip
    return {"runs": {"one": run}}


def test_the_chart_is_well_formed_and_longer_bars_are_faster():
    drawn = ElementTree.fromstring(chart().draw(document(entry("bise", 80.0), entry("llama.cpp", 40.0))))
    bars = [float(bar.get("width")) for bar in drawn.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert bars[0] == 2 * bars[1]
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "40.0 tok/s  (bise 2.00x)" in texts
    assert any("A <chip> & more" in text for text in texts)


def test_a_case_without_a_peer_is_not_drawn():
    assert chart().groups(document(entry("bise", 80.0))) == []
