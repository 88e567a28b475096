"""Shared by all tests: a tokenizer of bytes, and a model made of a hash that reads its history through the KV
pages.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from bise.config import ModelConfig
from bise.kernels import BLOCK_SIZE
from bise.model.batch import Batch

# The same examples on every run: what CI sees is what everyone sees. No clock judges them.
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")

# A shell that starts this in the background ignores Ctrl-C for it and all it starts; programs under test must
# not inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Without a GPU, kernels run in Triton's interpreter; it asks for that before anything imports triton. A
# container may have another GPU than the first one.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"


class ByteTokenizer:
    """Ids 0 .. 255 are bytes, 256 is BOS, 257 ends a text."""

    vocab_size = 258
    bos_id = 256
    adds_bos = True
    stop_ids = frozenset({257})
    space_prefix = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def control_id(self, name: str) -> int | None:
        return {"<s>": 256, "</s>": 257}.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")


class HashOps:
    """Pages are plain arrays of token ids; nothing else is needed by `HashModel`."""

    name = "hash"

    def layer(self, index):
        return self

    def pages(self, num_blocks, num_kv_heads, head_dim, kv_format):
        return np.full(num_blocks * BLOCK_SIZE, -1, np.int64)

    def read_block(self, pages, block):
        return [pages[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].view(np.uint8)]

    def write_block(self, pages, block, content):
        self.read_block(pages, block)[0][:] = content


class HashModel:
    """A model whose logits are a hash of the tokens that each layer's window shows, read through the block
    tables.

    A wrong slot, a block freed too early or a row out of order changes the logits. `script` maps a token to
    the token that must follow; `broken` lists tokens whose row of logits is NaN; `fail` makes the next pass
    raise. From batch `slow_from` on a pass takes long: what a test is about to end has not ended by itself.
    """

    def __init__(self, config: ModelConfig, script: dict[int, int] | None = None, broken: Sequence[int] = ()):
        self.config = config
        self.script = script or {}
        self.broken = set(broken)
        self.fail: Exception | None = None
        self.slow_from: int | None = None
        self.batches: list[Batch] = []
        self.most_logit_rows = 0

    def forward(self, batch, cache):
        self.batches.append(batch)
        if self.slow_from is not None and len(self.batches) > self.slow_from:
            time.sleep(0.05)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        hidden = np.zeros((len(batch.token_ids), 2), np.int64)
        hidden[:, 1] = batch.token_ids
        for layer, window in enumerate(self.config.windows):
            meta = batch.attention[self.config.window_groups.index(window)]
            pages = cache.layer(layer)
            pages[meta.slots] = batch.token_ids
            for index in range(len(meta.q_pos)):
                for row in range(meta.q_start[index], meta.q_start[index + 1]):
                    position = batch.positions[row]
                    assert position == meta.q_pos[index] + row - meta.q_start[index]
                    seen = np.arange(max(0, position - (window or 1 << 30) + 1), position + 1)
                    blocks = meta.block_table[index, seen // BLOCK_SIZE]
                    assert (blocks >= 0).all(), "a visible block is absent"
                    keys = pages[blocks * BLOCK_SIZE + seen % BLOCK_SIZE]
                    hidden[row, 0] = zlib.crc32(keys.tobytes(), int(hidden[row, 0]))
        return hidden

    def logits(self, hidden):
        self.most_logit_rows = max(self.most_logit_rows, len(hidden))
        size = self.config.vocab_size
        rows = [np.random.default_rng(int(seed)).standard_normal(size) * 3 for seed in hidden[:, 0]]
        for row, token in zip(rows, hidden[:, 1], strict=True):
            if int(token) in self.script:
                row[self.script[int(token)]] = 100.0
            if int(token) in self.broken:
                row[3] = np.nan
        return np.array(rows, np.float32).reshape(-1, self.config.vocab_size)


def hash_config(*windows: int | None, max_context: int = 512) -> ModelConfig:
    """Return the configuration of a hash model over the byte vocabulary, one layer per window."""
    return ModelConfig(
        family="mistral",
        dim=8,
        num_layers=len(windows),
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        hidden_dim=8,
        vocab_size=ByteTokenizer.vocab_size,
        max_context=max_context,
        windows=windows,
    )


@pytest.fixture(scope="module")
def no_authorities():
    """Let HTTP clients trust nobody: each one that is made reads all known authorities otherwise (25 ms), and
    what talks to loopback needs none.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", os.fspath(Path(__file__).parent))
        yield


@pytest.fixture(scope="session")
def free_port():
    """Return a function that finds a port nobody listens on, for a server that cannot say which it took.

    It is none of those that outgoing connections get (from 32,768 on): one of them, from any test beside this
    one, could have it before the server is there.
    """
    chance = random.SystemRandom()  # no seed: two workers look at the same time

    def find() -> int:
        while True:
            port = chance.randrange(15_000, 32_000)
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
                return port

    return find


@pytest.fixture(scope="session")
def quickest():
    """Return a function that tells the seconds of processor time that some work takes at its quickest:
    `quickest(work, enough)`.

    A neighbour's work, or a collection of what other tests left, can fall into one measurement, hardly into
    five; no more are made than it takes to come below `enough`. `clock` may count other threads, too.
    """

    def measure(work, enough: float, clock=time.thread_time) -> float:
        best = float("inf")
        for _ in range(5):
            begun = clock()
            work()
            best = min(best, clock() - begun)
            if best < enough:
                break
        return best

    return measure


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def hash_engine(byte_tokenizer):
    """Return a function that makes an engine without a thread over a hash model: (windows, **engine
    options).
    """
    from bise.engine.engine import Engine

    engines: list[Engine] = []

    def make(
        *windows: int | None,
        script=None,
        broken=(),
        model_context: int = 512,
        num_blocks=64,
        tokenizer=byte_tokenizer,
        sample=None,
        takes_masks=True,
        **options,
    ) -> tuple[Engine, HashModel]:
        ops = HashOps()
        if sample is not None:
            ops.sample, ops.takes_masks = sample, takes_masks  # a backend that chooses tokens
        model = HashModel(hash_config(*(windows or (None,)), max_context=model_context), script, broken)
        options = {"threaded": False, **options}
        if "kv_memory_bytes" not in options:
            options["num_blocks"] = num_blocks
        engine = Engine(model, ops, config=model.config, tokenizer=tokenizer, **options)
        engines.append(engine)
        return engine, model

    yield make
    for engine in engines:
        engine.close()
