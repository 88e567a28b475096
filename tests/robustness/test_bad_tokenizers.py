"""Malformed tokenizers and templates are refused in one line that names the file, quickly and quietly."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bise.errors import ModelFileError
from bise.text.template import load_template
from bise.text.tokenizer import load_tokenizer, tokenizer_from_gguf


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bad = _load("bad_tokenizers")


def check(message: str, begin: float, peak: int, printed: tuple[str, str]) -> None:
    assert "\n" not in message
    assert len(message) < 600
    assert printed == ("", ""), "the library wrote to the terminal"
    assert time.monotonic() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10


@pytest.mark.parametrize("case", [*bad.HF_CASES, *bad.MISTRAL_CASES], ids=lambda case: case.name)
def test_malformed_directory_is_refused_in_one_line_naming_it(case, tmp_path, capfd):
    bad.write_valid(tmp_path)
    case.spoil(tmp_path)
    begin, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if case.template:
        tokenizer = load_tokenizer(tmp_path, bad.VOCAB_SIZE)
        with pytest.raises(ModelFileError) as caught:
            load_template(tmp_path, tokenizer)
    else:
        with pytest.raises(ModelFileError) as caught:
            load_tokenizer(tmp_path, bad.VOCAB_SIZE)
        assert str(tmp_path) in str(caught.value)
    check(str(caught.value), begin, peak, capfd.readouterr())


@pytest.mark.parametrize("name", bad.GGUF_CASES)
def test_malformed_gguf_vocabulary_is_refused_in_one_line_naming_the_key(name, capfd):
    begin, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFileError) as caught:
        tokenizer_from_gguf(bad.GGUF_CASES[name], bad.VOCAB_SIZE)
    assert "tokenizer.ggml." in str(caught.value)
    check(str(caught.value), begin, peak, capfd.readouterr())


def test_the_directory_that_is_spoiled_is_valid_before(tmp_path):
    bad.write_valid(tmp_path)
    tokenizer = load_tokenizer(tmp_path, bad.VOCAB_SIZE)
    assert tokenizer.decode(tokenizer.encode("abc é")) == "abc é"
    template = load_template(tmp_path, tokenizer)
    assert template.encode([{"role": "user", "content": "abc"}]) == [1, tokenizer.encode("abc")[0]]
    template.close()


def test_the_mistral_files_that_are_spoiled_are_valid_before(tmp_path):
    bad.tekken("version", to=1)(tmp_path)
    tokenizer = load_tokenizer(tmp_path, bad.VOCAB_SIZE)
    assert tokenizer.decode(tokenizer.encode("abc é")) == "abc é"
    (tmp_path / "tekken.json").unlink()
    bad.spm(bad.valid_spm())(tmp_path)
    tokenizer = load_tokenizer(tmp_path, bad.VOCAB_SIZE)
    assert tokenizer.token_bytes(3) == b"a"


def test_the_gguf_vocabularies_that_are_spoiled_are_valid_before():
    for metadata in (bad.gguf_bpe(), bad.gguf_spm()):
        tokenizer = tokenizer_from_gguf(metadata, bad.VOCAB_SIZE)
        assert tokenizer.decode(tokenizer.encode("abab")) == "abab"
