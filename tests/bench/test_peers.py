from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from bise.bench import peers
from bise.bench.gguf_file import gguf_formats, gguf_path
from bise.bench.peers import PeerContestant, PeerSpec, parse_peers, start_peer
from bise.bench.rounds import Case, PeerError
from bise.config import ModelConfig
from bise.errors import ConfigError
from bise.model.transformer import weight_shapes
from bise.plan import shape_source

TINY = ModelConfig(
    family="mistral", dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=512,
    vocab_size=512, max_context=512,
)  # fmt: skip
MIXTURE = dataclasses.replace(TINY, num_experts=4, experts_per_token=2)
CASE = Case(op="prefill", prompt=8, batch=1, context=0, steps=0)

WORKER = """
import sys
from bise.bench.worker import serve

class Peer:
    version = "7"
    def __init__(self, options): self.options = options
    def prepare(self, case, rounds): print("noise on standard output"); self.case = case
    def run(self): return 0.25 if self.options["mode"] == "ok" else sys.exit(3)
    def release(self): pass

serve(Peer)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch) -> str:
    (tmp_path / "some_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    return "some_worker"


def test_a_list_of_peers_is_parsed_with_the_format_asked_for():
    assert parse_peers(" llama.cpp:Q4_K_M, ctranslate2") == (
        PeerSpec(engine="llama.cpp", kind="Q4_K_M"),
        PeerSpec(engine="ctranslate2"),
    )
    assert parse_peers("") == ()


@pytest.mark.parametrize("text", ["vllm", "llama.cpp:Q9", "transformers:Q4_0"])
def test_an_unknown_peer_or_format_is_refused(text):
    with pytest.raises(ConfigError, match=r"known: llama\.cpp|takes Q4_0"):
        parse_peers(text)


def test_a_peer_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(PeerError, match="the package ctranslate2 is not installed"):
        start_peer(PeerSpec(engine="ctranslate2"), shape_source("tiny", TINY), quant="q8", threads=1)


def test_a_peer_without_windows_is_not_asked_to_run_them(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    windowed = shape_source("tiny", dataclasses.replace(TINY, windows=(64, 64)))
    with pytest.raises(PeerError, match="no sliding window"):
        start_peer(PeerSpec(engine="llama.cpp"), windowed, quant="q4", threads=1)


def test_a_worker_answers_through_its_pipe_whatever_it_prints(worker):
    peer = PeerContestant("some", worker, {"mode": "ok"}, {}, "f16")
    try:
        assert peer.version == "7"
        peer.prepare(CASE, 1)
        assert peer.run() == 0.25
        assert peer.cpu_seconds() > 0
        peer.release()
    finally:
        peer.close()


def test_a_worker_that_dies_is_an_error_with_its_code(worker):
    peer = PeerContestant("some", worker, {"mode": "die"}, {}, "f16")
    try:
        with pytest.raises(PeerError, match="ended with code 3"):
            peer.run()
    finally:
        peer.close()


def test_a_worker_that_cannot_start_is_an_error(worker):
    with pytest.raises(PeerError, match="ended with code 1"):
        PeerContestant("some", "no_such_module_at_all", {}, {}, "f16")


@pytest.mark.parametrize("config", [TINY, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M", "Q8_0", "BF16"])
def test_a_written_gguf_is_the_shape_it_stands_for(config, kind, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from bise.model.checkpoint import open_model

    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    path = gguf_path(shape_source("tiny", config), kind)
    source = open_model(path)
    for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "vocab_size",
                 "num_experts", "experts_per_token"):  # fmt: skip
        assert getattr(source.config, name) == getattr(config, name)
    assert set(gguf_formats(config, kind)) == set(weight_shapes(config)) == set(source.tensors)
    stamp = path.stat().st_mtime_ns
    assert gguf_path(shape_source("tiny", config), kind).stat().st_mtime_ns == stamp  # written once
    assert not list(Path(path.parent).glob("*.tmp"))
