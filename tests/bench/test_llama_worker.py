from __future__ import annotations

import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest

from bise.bench import llama_worker
from bise.bench.rounds import Case

PREFILL = Case(op="prefill", prompt=600, batch=1, context=0, steps=0)
DECODE = Case(op="decode", prompt=0, batch=3, context=20, steps=4)


class FakeLlama(ModuleType):
    """llama.cpp's functions over plain values; each decoded batch costs more with flash attention on."""

    __version__ = "0"

    def __init__(self, clock):
        super().__init__("llama_cpp")
        self.clock, self.decoded, self.contexts = clock, [], []
        for name in ("backend_init", "batch_free", "free", "memory_clear", "synchronize"):
            setattr(self, f"llama_{name}", lambda *args: None)
        self.llama_model_default_params = SimpleNamespace
        self.llama_context_default_params = SimpleNamespace
        self.llama_model_load_from_file = lambda path, params: path
        self.llama_model_get_vocab = lambda model: model
        self.llama_vocab_n_tokens = lambda vocab: 1000
        self.llama_get_memory = lambda context: context

    def llama_init_from_model(self, model, params):
        self.contexts.append(params)
        return params

    def llama_batch_init(self, size, embd, sequences):
        return SimpleNamespace(
            n_tokens=0, token=[0] * size, pos=[0] * size, n_seq_id=[0] * size,
            seq_id=[[0] for _ in range(size)], logits=[0] * size,
        )  # fmt: skip

    def llama_decode(self, context, batch):
        count = batch.n_tokens
        rows = [(batch.pos[i], batch.seq_id[i][0], batch.logits[i]) for i in range(count)]
        assert all(0 <= token < 1000 for token in batch.token[:count])
        self.decoded.append(rows)
        self.clock.time += 2.0 if context.flash_attn_type else 1.0
        return 0


@pytest.fixture
def llama(monkeypatch):
    clock = SimpleNamespace(time=0.0)
    fake = FakeLlama(clock)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setattr(llama_worker.time, "perf_counter", lambda: clock.time)
    return fake, llama_worker.LlamaPeer({"path": "x.gguf", "threads": 2})


def test_a_prompt_is_read_in_chunks_with_logits_for_its_last_token_only(llama):
    fake, peer = llama
    peer.prepare(PREFILL, 3)
    fake.decoded.clear()
    assert peer.run() == 2.0
    assert [len(rows) for rows in fake.decoded] == [512, 88]
    assert [row[0] for row in itertools.chain(*fake.decoded)] == list(range(600))
    assert [row for row in itertools.chain(*fake.decoded) if row[2]] == [(599, 0, True)]


def test_the_faster_setting_of_flash_attention_is_found_once_per_kind(llama):
    fake, peer = llama
    peer.prepare(PREFILL, 3)
    assert [context.flash_attn_type for context in fake.contexts] == [0, 1, 0]
    peer.release()
    peer.prepare(PREFILL, 3)
    assert [context.flash_attn_type for context in fake.contexts] == [0, 1, 0, 0]


def test_each_step_gives_every_sequence_its_next_token(llama):
    fake, peer = llama
    peer.prepare(DECODE, 2)
    fake.decoded.clear()
    assert peer.run() == 4.0
    assert fake.decoded == [[(20 + step, sequence, True) for sequence in range(3)] for step in range(4)]
    context = fake.contexts[-1]
    assert (context.n_seq_max, context.n_threads, context.n_threads_batch) == (3, 2, 2)
    assert context.n_ctx // 3 >= 20 + 4 * (2 + 1)
