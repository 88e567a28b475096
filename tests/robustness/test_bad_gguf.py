"""Malformed GGUF files are refused in one line that names the file, quickly, without a big allocation."""

from __future__ import annotations

import importlib.util
import random
import re
import resource
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bise.errors import BiseError, UserError
from bise.model.gguf import open_gguf


def _load(name: str) -> ModuleType:
    """Import a module that lies beside this file; the next ones import it by its plain name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


draft, container, model = _load("gguf_draft"), _load("bad_gguf"), _load("bad_gguf_model")
MUST_REFUSE = [*container.CONTAINER_CASES, *model.MODEL_CASES]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("case", MUST_REFUSE, ids=lambda case: case.name)
def test_malformed_file_is_refused_in_one_line_naming_it(case, tmp_path: Path) -> None:
    path = case.make(tmp_path)
    before, start = _peak_mib(), time.thread_time()
    with pytest.raises(UserError) as caught:
        open_gguf(path)
    assert time.thread_time() - start < 2
    assert _peak_mib() - before < 64
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    assert path.stem.split("-")[0] in message
    assert re.search(case.error, message), message
    assert caught.value.field


@pytest.mark.parametrize("case", model.MUST_OPEN, ids=lambda case: case.name)
def test_valid_file_opens_and_its_rows_are_readable(case, tmp_path: Path) -> None:
    source = open_gguf(case.make(tmp_path))
    for tensor in source.tensors.values():
        assert len(tensor.floats(0, tensor.shape[0])) == tensor.shape[0]


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    names = [case.name for case in MUST_REFUSE]
    assert len(names) == len(set(names)) >= 140


def _mutant(data: bytes, header: int, rng: random.Random) -> bytes:
    """Return `data` with one to four faults, most of them in the first `header` bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = min(header if rng.random() < 0.9 else len(out), len(out))
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(7)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            out[at : at + 1] = bytes([out[at] ^ (1 << rng.randrange(8))]) if at < len(out) else b""
        elif kind == 2:
            out[at : at + 8] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**64 - 32)).to_bytes(
                8, "little"
            )
        elif kind == 3:
            del out[at : at + rng.randint(1, 16)]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 5:
            source = rng.randrange(max(end, 1))
            out[at:at] = out[source : source + rng.randint(1, 64)]
        else:
            del out[rng.randrange(len(out)) if rng.random() < 0.2 else len(out) :]
        if not out:
            break
    return bytes(out)


def test_ten_thousand_mutations_are_refused_cleanly_or_open(tmp_path: Path) -> None:
    data = draft.valid().build()
    header = data.index(b"blk.0.ffn_down.weight") + 50
    rng = random.Random(20261121)
    path = tmp_path / "mutant.gguf"
    opened, slowest, before = 0, 0.0, _peak_mib()
    for index in range(10_000):
        path.write_bytes(_mutant(data, header, rng))
        start = time.thread_time()
        try:
            source = open_gguf(path)
            tensor = source.tensors["layers.0.wq"]
            tensor.floats(0, tensor.shape[0])
            opened += 1
        except UserError as error:
            if "mutant.gguf" not in str(error) or not str(error).isprintable():
                pytest.fail(f"mutation {index}: {error!r}")
        except BiseError as error:
            pytest.fail(f"mutation {index}: {error!r} is not a user's error")
        slowest = max(slowest, time.thread_time() - start)
    assert 100 < opened < 9_000
    assert slowest < 2
    assert _peak_mib() - before < 64
