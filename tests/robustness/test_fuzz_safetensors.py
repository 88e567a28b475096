"""Ten thousand mutations of a sound safetensors file: an error or the reference parser's answer, no crash.

Differences from the reference parser go one way only: what it accepts and we refuse is in `STRICTER`, by the
reason in our message; what we accept it must accept, with the same bytes.
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bise.errors import ModelFileError
from bise.model.safetensors_file import SafetensorsFile

safetensors = pytest.importorskip("safetensors")

MUTATIONS = 10_000
SECONDS_EACH = 2.0

STRICTER = (
    "twice in one object",  # the reference keeps the last of two equal keys
    "exactly dtype, shape and data_offsets",  # it skips unknown fields of a tensor
    "__metadata__ must map",  # it takes null for absent
    "does not start with",  # it skips white space before the brace, which the format forbids
)
"""Reasons for refusing a file that the reference parser accepts."""

NUMBERS = [
    b"-1", b"0", b"1", b"2", b"255", b"65536", b"2147483648", b"4294967296", b"9223372036854775807",
    b"9223372036854775808", b"18446744073709551615", b"18446744073709551616", b"1e3", b"1.0", b"1e999", b"-0",
    b"true", b"null", b"NaN", b'"1"', b"[]", b"{}", b"00", b"9" * 5000,
]  # fmt: skip
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\x00", b"\xff", b" ", b"\n",
    b'"dtype"', b'"F32"', b'"F16"', b'"BF16"', b'"I64"', b'"F4"', b'"shape"', b'"data_offsets"',
    b'"__metadata__":{},', b'"a":1,', b"[" * 300,
]  # fmt: skip


def sound_file(rng: random.Random) -> bytes:
    """Return a small valid file: a few tensors of several dtypes, shuffled names, sometimes metadata."""
    header: dict[str, object] = {}
    data = b""
    if rng.random() < 0.5:
        header["__metadata__"] = {"format": "pt", "k": "v\u00e9"}
    for index in range(rng.randint(1, 6)):
        dtype, size = rng.choice([("F32", 4), ("F16", 2), ("BF16", 2), ("I8", 1), ("I64", 8), ("BOOL", 1)])
        shape = [rng.randint(1, 4) for _ in range(rng.randint(0, 3))]
        count = size
        for length in shape:
            count *= length
        header[f"layer.{index}.w"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + count],
        }
        data += rng.randbytes(count)
    separators = rng.choice([(",", ":"), (", ", ": ")])
    raw = json.dumps(header, separators=separators).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return `content` after one to three edits; the length field follows nine times in ten."""
    length = int.from_bytes(content[:8], "little")
    header, data = bytearray(content[8 : 8 + length]), content[8 + length :]
    field: int | None = None
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(9)
        at = rng.randrange(len(header) + 1)
        if kind == 0 and header:  # flip a bit
            header[min(at, len(header) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:  # insert a token
            header[at:at] = rng.choice(TOKENS)
        elif kind == 2:  # delete a span
            del header[at : at + rng.randint(1, 12)]
        elif kind == 3:  # copy a span to another place
            start = rng.randrange(len(header) + 1)
            header[at:at] = header[start : start + rng.randint(1, 60)]
        elif kind == 4:  # replace a number
            digits = [i for i, byte in enumerate(header) if chr(byte).isdigit()]
            if digits:
                start = rng.choice(digits)
                header[start : start + 1] = rng.choice(NUMBERS)
        elif kind == 5:  # another length field
            field = rng.choice(
                [0, 1, len(header) - 1, len(header) + 1, 1 << 31, (1 << 64) - 1, rng.getrandbits(64)]
            )
        elif kind == 6:  # cut or grow the data
            data = (
                data[: rng.randrange(len(data) + 1)]
                if rng.random() < 0.5
                else data + rng.randbytes(rng.randint(1, 9))
            )
        elif kind == 7:  # sound JSON that means something else
            header = restated(header, rng)
        else:  # one piece of the grammar for another
            header = bytearray(bytes(header).replace(*rng.choice(SWAPS), 1))
    if field is None:
        field = len(header) if rng.random() < 0.9 else length
    return struct.pack("<Q", field % (1 << 64)) + bytes(header) + data


def restated(header: bytearray, rng: random.Random) -> bytearray:
    """Return a header that is still JSON: a key twice, one field more, another order, null metadata."""
    try:
        fields = json.loads(bytes(header))
        names = [name for name, value in fields.items() if isinstance(value, dict) and "dtype" in value]
    except (ValueError, AttributeError):
        return header
    kind = rng.randrange(5)
    name = rng.choice(names) if names else ""
    if kind == 0 and name:
        fields[name]["more"] = rng.choice([1, None, [], "F32"])
    elif kind == 1:
        fields["__metadata__"] = rng.choice([None, {}, {"a": None}, {"a": "b"}])
    elif kind == 2 and name:
        twice = json.dumps({name: fields[name]})[1:-1]
        return bytearray(f"{{{twice}, {json.dumps(fields)[1:]}".encode())
    elif kind == 3:
        fields = dict(reversed(fields.items()))
        return bytearray(json.dumps(fields, indent=rng.choice([None, 2])).encode())
    elif name:
        fields[name]["shape"] = (
            [1, *fields[name]["shape"]] if isinstance(fields[name].get("shape"), list) else 1
        )
    return bytearray(json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace"))


SWAPS = [
    (b'"dtype"', b'"shape"'), (b'"shape":', b'"Shape":'), (b"[", b"{"), (b"]", b"}"), (b'"F32"', b'"I32"'),
    (b'"F16"', b'"BF16"'), (b"data_offsets", b"data\\u005foffsets"), (b"layer.0.w", b"layer.1.w"),
    (b",", b",,"),
]  # fmt: skip


def reference(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Return what the reference parser reads, None when it refuses."""
    try:
        tensors = safetensors.deserialize(content)
    except Exception:  # its own exception type is private in some versions
        return None
    return {name: (entry["dtype"], list(entry["shape"]), bytes(entry["data"])) for name, entry in tensors}


def ours(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    file = SafetensorsFile(path)
    try:
        return {
            name: (entry.dtype, list(entry.shape), file.read(entry, 0, entry.size_bytes).tobytes())
            for name, entry in file.entries.items()
        }
    finally:
        file.close()


def test_mutated_headers_never_crash_and_agree_with_the_reference_parser(tmp_path: Path) -> None:
    rng = random.Random(20261121)
    path = tmp_path / "model.safetensors"
    # One file rewritten in place: truncating it to nothing each time would cost more than the test.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    counts: Counter[str] = Counter()
    for number in range(MUTATIONS):
        content = sound_file(rng)
        if number % 50:
            content = mutated(content, rng)
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        expected = reference(content)
        started = time.thread_time()
        try:
            found = ours(path)
        except ModelFileError as error:
            message = str(error)
            assert str(path) in message
            assert message.isprintable()
            assert len(message) < 1000
            if expected is None:
                counts["both refuse"] += 1
            else:
                reason = next((reason for reason in STRICTER if reason in message), None)
                assert reason is not None, (message, content)
                counts[f"stricter: {reason}"] += 1
        else:
            assert expected is not None, content
            assert found == expected
            counts["both accept"] += 1
        assert time.thread_time() - started < SECONDS_EACH
    os.close(descriptor)
    print(dict(counts))
    # The fuzzer is worth something only when both outcomes are common.
    assert counts["both accept"] > MUTATIONS // 50
    assert counts["both refuse"] > MUTATIONS // 2
    assert all(counts[f"stricter: {reason}"] for reason in STRICTER)


def test_the_unmutated_file_is_accepted_by_both(tmp_path: Path) -> None:
    content = sound_file(random.Random(1))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert ours(path) == reference(content)
    assert np.frombuffer(content[:8], "<u8")[0] > 0
