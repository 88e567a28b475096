"""The version of the arithmetic is raised when bits change: receipts and caches of prefixes rest on it."""

from __future__ import annotations

import hashlib
import struct

from bise.engine.engine import Engine
from bise.engine.receipt import NUMERICS_VERSION
from bise.engine.request import Request, SamplingParams

BITS = {
    1: (
        "ed3554b5b054",  # numpy's exp with AVX-512
        "a420b5f8161e",  # without
    )
}
"""Start of the SHA-256 over token ids and log-prob bits of the requests below, per version. When this test
fails, the bits of some output changed: raise NUMERICS_VERSION and add the new hashes. The native kernels give
the same bits on every instruction set; the log-probs' last bit depends on numpy's exp (docs/receipts.md).
"""

SETTINGS = [
    (model, packed_format, kv_format)
    for model in ("interleaved", "8 experts")
    for packed_format, kv_format in (("f32", "f32"), ("q8", "q16"), ("q4", "q8"), ("bf16", "f16"))
]


def test_the_bits_of_a_version_do_not_change(cpu_model, byte_tokenizer):
    digest = hashlib.sha256()
    for model, packed_format, kv_format in SETTINGS:
        transformer, ops = cpu_model(model, packed_format, 1)
        engine = Engine(
            transformer,
            ops,
            config=transformer.config,
            tokenizer=byte_tokenizer,
            num_blocks=20,
            kv_format=kv_format,
            threaded=False,
        )
        for temperature in (0, 1.0):
            prompt = (256, *(index * 37 % 256 for index in range(90)))
            params = SamplingParams(
                temperature=temperature, top_p=0.9, seed=1, max_tokens=10, logprobs=0, ignore_eos=True
            )
            done = engine.submit(Request(token_ids=prompt, params=params)).result()
            for entry in done.logprobs:
                digest.update(struct.pack("<qd", entry.token_id, entry.logprob))
    assert digest.hexdigest()[:12] in BITS[NUMERICS_VERSION]
