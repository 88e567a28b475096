"""Tiny vocabularies in Hugging Face's form, trained on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

CHAT_TOKENS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
]
WORDS = [
    "hello",
    "world",
    "the",
    "wind",
    "system",
    "user",
    "assistant",
    "in",
    "st",
    "Grüße",
    "été",
    "漢字",
    "naïve",
    "😀",
    "123",
    "4567",
    "def f(x):",
    "return",
    "\n",
    "\n\n",
    "  ",
    ".",
    "!?",
    "<",
    ">",
    "[",
    "]",
    "|",
    "im",
    "end",
    "'s",
]


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", "", " "]) for _ in range(count))


def byte_level_tokenizer() -> object:
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(pattern, behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>", *CHAT_TOKENS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(seed, 400) for seed in range(20)], trainer)
    return tokenizer


def sentencepiece_like_tokenizer(*, legacy: bool) -> object:
    """`legacy`: the dummy prefix before every piece, by a normaliser; else before the first only, by
    Metaspace.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    specials = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.train_from_iterator(
        ["\u2581" + words(seed, 60) for seed in range(20)],
        BpeTrainer(vocab_size=1000, special_tokens=specials, show_progress=False, max_token_length=16),
    )
    document = json.loads(tokenizer.to_str())
    keep = {"<unk>", "<s>", "</s>"}
    document["added_tokens"] = [entry for entry in document["added_tokens"] if entry["content"] in keep]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    strip = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(strip)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(CHAT_TOKENS)
    return tokenizer


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a model directory: kind `bytes`, `legacy` or `metaspace`, with tokenizer_config.json entries."""
    documents: dict[str, str] = {}

    def write(kind: str, **config: object) -> Path:
        if kind not in documents:
            made = (
                byte_level_tokenizer()
                if kind == "bytes"
                else sentencepiece_like_tokenizer(legacy=kind == "legacy")
            )
            documents[kind] = made.to_str()
        folder = tmp_path_factory.mktemp(kind)
        (folder / "tokenizer.json").write_text(documents[kind])
        entries = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
        } | config
        (folder / "tokenizer_config.json").write_text(json.dumps(entries))
        return folder

    return write
