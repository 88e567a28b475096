"""Quality of 4-bit and 8-bit weights beside the GGUF quantisations of the same weights, as Markdown tables.

    python benchmarks/quality.py [--brise DIRECTORY] [--ggml libggml-base.so]

Only the matrices of the layers change, everything is computed with float32 activations, so that the rounding
of the weights alone is compared. GGUF quantisers are ggml's own, through its shared library (it comes with
llama-cpp-python); without it their rows are left out. Rows that a format does not divide are padded with
zeros, which the bits per weight count.
Needs ../shared (texts, stories260K) and the `zstandard` package.
"""

import argparse
import ctypes
import io
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from bise.kernels.cpu import CpuOps, arena, packed_size
from bise.model.checkpoint import open_model
from bise.model.importance import column_importance
from bise.model.pack import pack_weights
from bise.model.source import ModelSource
from bise.model.transformer import Transformer
from bise.quant.calibration import CalibratedRounding, observe
from bise.quant.card import bundled_text, token_rows, tokenizer_of
from bise.quant.quality import Network, Quality, compare

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
ROW = 256
Floats = np.ndarray
GGML_KINDS = ("Q8_0", "Q6_K", "Q4_K", "IQ4_NL", "Q4_0", "Q3_K")


def valid_rows(encode: Callable[[str], list[int]], source: str, count: int) -> list[list[int]]:
    """Return the first `ROW` ids of the first `count` texts of the shared validation file that have so many,
    of sources whose name contains `source`.
    """
    import zstandard

    rows: list[list[int]] = []
    with (SHARED / "train/valid/text.jsonl.zst").open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8"):
            entry = json.loads(line)
            if source in entry["source"] and len(ids := encode(entry["text"][: 10 * ROW])) >= ROW:
                rows.append(ids[:ROW])
            if len(rows) == count:
                break
    return rows


def stories_encoder(path: Path) -> Callable[[str], list[int]]:
    """Return the encoder of a llama2.c vocabulary: characters, then the pair of the best score first."""
    content, pieces, offset = path.read_bytes(), [], 4
    while offset < len(content):
        score, size = struct.unpack_from("<fi", content, offset)
        pieces.append((content[offset + 8 : offset + 8 + size], score))
        offset += 8 + size
    index = {piece: number for number, (piece, _) in enumerate(pieces)}

    def encode(text: str) -> list[int]:
        ids = [index[b" "]]
        for character in text:
            raw = character.encode()
            ids += [index[raw]] if raw in index else [byte + 3 for byte in raw]
        while True:
            best: tuple[float, int, int] | None = None
            for at in range(len(ids) - 1):
                merged = index.get(pieces[ids[at]][0] + pieces[ids[at + 1]][0])
                if merged is not None and (best is None or pieces[merged][1] > best[0]):
                    best = pieces[merged][1], at, merged
            if best is None:
                return [1, *ids]
            ids[best[1] : best[1] + 2] = [best[2]]

    return encode


def stories() -> ModelSource:
    """Return stories260K, converted by the tests' own converter."""
    sys.path.insert(0, str(ROOT / "tests/equivalence"))
    import tempfile

    from test_stories260k import FOLDER, convert_llama2c

    directory = Path(tempfile.mkdtemp()) / "stories260K"
    convert_llama2c(FOLDER / "stories260K.bin", directory)
    return open_model(directory)


def ggml_quantizer(library: Path) -> Callable[[str, Floats], Floats]:
    """Return a function that gives the values of a matrix after a GGUF format."""
    call = ctypes.CDLL(str(library)).ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(name: str, values: Floats) -> Floats:
        kind = gguf.GGMLQuantizationType[name]
        length, size = gguf.GGML_QUANT_SIZES[kind]
        columns = values.shape[1]
        padded = np.ascontiguousarray(np.pad(values, ((0, 0), (0, -columns % length))))
        out = np.zeros((len(padded), padded.shape[1] // length * size), np.uint8)
        call(int(kind), padded.ctypes.data, out.ctypes.data, 0, *padded.shape, None)
        return gguf.quants.dequantize(out, kind)[:, :columns]

    return quantize


def native_values(
    ops: CpuOps, packed_format: str, values: Floats, importance: Floats | None = None
) -> Floats:
    """Return the values of a matrix packed by the native search."""
    memory = arena(packed_size(packed_format, *values.shape))
    assert ops.pack_floats(packed_format, values, memory, importance)
    return ops.unpack(ops.packed(packed_format, *values.shape, memory))


def calibrated_values(ops: CpuOps, rounding: CalibratedRounding, name: str, values: Floats) -> Floats:
    """Return the values of a matrix after calibrated rounding (the search where that leaves it alone)."""
    blocks = rounding(name, values)
    if blocks is None:
        return native_values(ops, "n4", values)
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.IQ4_NL)


def row_cells(q: Quality) -> tuple[str, str]:
    """Return the cells of one text: those of the reference, and those of the rounded weights."""
    base = f"0 | 0 | 100 % | {q.perplexity_reference:.3f}"
    return base, f"{q.kl_mean:.5f} | {q.kl_p99:.4f} | {100 * q.top1_agreement:.1f} % | {q.perplexity:.3f}"


def table(
    source: ModelSource, texts: dict[str, list[list[int]]], calibration: list[list[int]], ggml: Path | None
) -> None:
    """Print one row per way of rounding, with KL, top-1 agreement and perplexity on each text."""
    ops = CpuOps(2)
    weights = {name: t.floats(0, t.shape[0]) for name, t in source.tensors.items()}
    layers = [name for name, w in weights.items() if w.ndim == 2 and name not in ("tok_embeddings", "output")]

    def network(values: dict[str, Floats]) -> Network:
        forms = {n: ops.vector(w) if w.ndim == 1 else ops.weight(w) for n, w in values.items()}
        return Network(Transformer(source.config, forms, ops), ops)

    rounding = observe(source, pack_weights(source, "none", ops), calibration, 2)

    def packed_bits(packed_format: str) -> float:
        stored = sum(8 * packed_size(packed_format, *weights[name].shape) for name in layers)
        return stored / sum(weights[name].size for name in layers)

    def ggml_bits(kind: str) -> float:
        length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        stored = sum(weights[n].shape[0] * -(-weights[n].shape[1] // length) * 8 * size for n in layers)
        return stored / sum(weights[name].size for name in layers)

    ways: dict[str, tuple[float, Callable[[str], Floats]]] = {
        "bise q8": (packed_bits("q8"), lambda name: native_values(ops, "q8", weights[name])),
        "bise q4": (
            packed_bits("z4"),
            lambda name: native_values(ops, "z4", weights[name], column_importance(source, name)),
        ),
        "its search with all columns alike": (
            packed_bits("z4"),
            lambda name: native_values(ops, "z4", weights[name]),
        ),
        "bise q4 --calibrate": (
            packed_bits("n4"),
            lambda name: calibrated_values(ops, rounding, name, weights[name]),
        ),
        "codebook, search (format n4)": (packed_bits("n4"), lambda n: native_values(ops, "n4", weights[n])),
        "even steps, search (format q4)": (packed_bits("q4"), lambda n: native_values(ops, "q4", weights[n])),
    }
    if ggml is not None:
        quantize = ggml_quantizer(ggml)
        for kind in GGML_KINDS:
            ways[f"GGUF {kind}"] = ggml_bits(kind), lambda name, kind=kind: quantize(kind, weights[name])
    header = " | ".join(f"{name}: KL | p99 | top-1 | perplexity" for name in texts)
    print(f"\n| {source.path.name}: weights | bits | {header} |")
    print("|---|---|" + "---|---|---|---|" * len(texts))
    reference = network(weights)
    for title, (bits, values) in ways.items():
        candidate = network(weights | {name: values(name) for name in layers})
        cells = [row_cells(compare(reference, candidate, rows)) for rows in texts.values()]
        if title == "bise q8":
            print("| float32 reference | 32 | " + " | ".join(base for base, _ in cells) + " |")
        print(f"| {title} | {bits:.2f} | " + " | ".join(own for _, own in cells) + " |", flush=True)


def main() -> None:
    """Print the tables of both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--brise", type=Path, default=ROOT / "src/bise/hub/brise")
    parser.add_argument("--ggml", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="texts of the validation file")
    args = parser.parse_args()
    small = stories()
    encode = stories_encoder(SHARED / "weights/stories260K/tok512.bin")

    def cut(name: str) -> list[list[int]]:
        ids = encode(bundled_text(name).content)[1:]
        return [[1, *ids[at : at + ROW - 1]] for at in range(0, len(ids), ROW - 1)]

    story_texts = {
        "TinyStories (valid)": valid_rows(encode, "tinystories", args.rows),
        "bundled": cut("evaluation"),
    }
    table(small, story_texts, cut("calibration"), args.ggml)
    brise = open_model(args.brise)
    tokenizer = tokenizer_of(brise)
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    rows = valid_rows(lambda text: [*start, *tokenizer.encode(text)], "", args.rows)
    bundled = token_rows(bundled_text("evaluation"), tokenizer, brise.config.max_context)
    calibration = token_rows(bundled_text("calibration"), tokenizer, brise.config.max_context)
    table(brise, {"valid text": rows, "bundled": bundled}, calibration, args.ggml)


if __name__ == "__main__":
    main()
