"""The quality card of a packed model: what was measured, on which text, by which command.

Two files beside the weights: `quality.json` for programs and `QUALITY.md` for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from bise import __version__
from bise.engine.memory import available_memory
from bise.errors import ModelFileError, UserError
from bise.kernels.cpu import CpuOps
from bise.model.checkpoint import open_model
from bise.model.pack import PackedWeights, Progress, pack_weights, plan_packing
from bise.model.packed import content_hash, read_packed
from bise.model.source import ModelSource
from bise.model.transformer import Transformer
from bise.quant.quality import Network, Quality, compare
from bise.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

CARD_JSON = "quality.json"
CARD_TEXT = "QUALITY.md"
CARD_VERSION = 1

ROW_TOKENS = 256
"""Tokens of a row that is measured or calibrated on."""
WORKING_BYTES = 256 << 20
"""Memory kept free for activations and logits when deciding whether the reference fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardText:
    """A text by content."""

    name: str
    """`bise:NAME` for a bundled one, else the file's name."""
    licence: str
    content: str

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 bytes (hex)."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def bundled_text(name: str) -> CardText:
    """Return the text `evaluation` or `calibration` that comes with bise."""
    content = (resources.files("bise.quant") / "data" / f"{name}.txt").read_text("utf-8")
    return CardText(name=f"bise:{name}", licence="Apache-2.0", content=content)


def text_file(path: Path) -> CardText:
    """Return a UTF-8 text file; UserError when it cannot be read."""
    try:
        content = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", field="text") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})", field="text") from error
    return CardText(name=path.name, licence="not stated", content=content)


def tokenizer_of(source: ModelSource) -> Tokenizer:
    """Return the tokenizer that lies beside a model; ModelFileError when there is none."""
    if any(key.startswith("tokenizer.ggml.") for key in source.metadata):
        return tokenizer_from_gguf(source.metadata, source.config.vocab_size)
    return load_tokenizer(source.path, source.config.vocab_size)


def token_rows(text: CardText, tokenizer: Tokenizer, max_context: int) -> list[list[int]]:
    """Return the text as rows of up to `ROW_TOKENS` ids, each begun with BOS where the model wants one.

    Example: BOS 1, ids 5 to 9 and room for three make [1, 5, 6], [1, 7, 8], [1, 9].
    """
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    ids = tokenizer.encode(text.content)
    step = max(1, min(ROW_TOKENS, max_context) - len(start))
    return [[*start, *ids[first : first + step]] for first in range(0, len(ids), step)]


def measure(
    source: ModelSource, out: Path, text: CardText, threads: int, progress: Progress | None = None
) -> tuple[Quality | None, str | None]:
    """Compare the packed model in `out` with its source at full precision on a text.

    Returns the quality, or None and the reason why nothing could be measured: no tokenizer, or a reference
    that does not fit into memory.
    """
    packed = open_model(out)
    needed = plan_packing(source, "none").size_bytes + WORKING_BYTES
    needed += sum(tensor.size_bytes for tensor in packed.tensors.values())
    free = available_memory()
    if free is not None and needed > free:
        return None, (
            f"the reference and the packed model together need {needed / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} GiB are free"
        )
    try:
        rows = token_rows(text, tokenizer_of(source), source.config.max_context)
    except ModelFileError as error:
        return None, f"no tokenizer to read the text with: {error}"
    ops = CpuOps(threads)
    reference = _network(source, pack_weights(source, "none", ops, progress), ops)
    return compare(reference, _network(packed, read_packed(packed), ops), rows), None


def _network(source: ModelSource, packed: PackedWeights, ops: CpuOps) -> Network:
    return Network(Transformer(source.config, packed.weights(ops), ops), ops)


def quality_card(
    source: ModelSource,
    out: Path,
    *,
    quant: str,
    calibration: CardText | None,
    text: CardText,
    measured: tuple[Quality | None, str | None],
    command: Sequence[str],
) -> dict[str, object]:
    """Return the card as JSON values."""
    packed = open_model(out)
    stored = sum(tensor.size_bytes for tensor in packed.tensors.values())
    matrices = [tensor for name, tensor in packed.tensors.items() if _read_per_token(name, tensor.shape)]
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in matrices)
    formats: dict[str, int] = {}
    for tensor in packed.tensors.values():
        formats[tensor.format] = formats.get(tensor.format, 0) + 1
    quality, reason = measured
    return {
        "card_version": CARD_VERSION,
        "bise_version": __version__,
        "command": list(command),
        "model": source.name or source.path.name,
        "model_sha256": content_hash(source),
        "quant": quant,
        "formats": formats,
        "calibration_text": None if calibration is None else _text_entry(calibration),
        "bits_per_weight": 8 * stored / source.config.num_params,
        "bits_per_weight_layers": 8 * sum(tensor.size_bytes for tensor in matrices) / max(weights, 1),
        "text": _text_entry(text),
        "reference": "the source's own values, computed in float32 (--quant none)",
        "quality": None if quality is None else asdict(quality),
        "not_measured": reason,
    }


def _read_per_token(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name not in ("tok_embeddings", "output") and not name.endswith(".router")


def _text_entry(text: CardText) -> dict[str, object]:
    return {
        "name": text.name,
        "licence": text.licence,
        "sha256": text.sha256,
        "characters": len(text.content),
    }


def write_card(out: Path, card: dict[str, object], quality: Quality | None) -> None:
    """Write the card's two files into `out`."""
    (out / CARD_JSON).write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", "utf-8")
    (out / CARD_TEXT).write_text(_page(card, quality), "utf-8")


def _page(card: dict[str, object], quality: Quality | None) -> str:
    lines = [
        f"# Quality of {card['model']} in {card['quant']}",
        "",
        f"- Bits per weight: {card['bits_per_weight']:.2f} in all, "
        f"{card['bits_per_weight_layers']:.2f} in the matrices of the layers",
    ]
    if quality is None:
        lines.append(f"- **Not measured**: {card['not_measured']}.")
    else:
        lines += [
            f"- KL(reference || packed): {quality.kl_mean:.5f} nats per token (99th percentile "
            f"{quality.kl_p99:.4f}) over {quality.positions} positions",
            f"- Same likeliest token: {100 * quality.top1_agreement:.2f} %",
            f"- Perplexity: {quality.perplexity:.4f}, reference {quality.perplexity_reference:.4f}, over "
            f"{quality.predicted_tokens} tokens",
        ]
    for title, key in (("Measured on", "text"), ("Calibrated on", "calibration_text")):
        entry = card[key]
        if isinstance(entry, dict):
            lines.append(f"- {title}: {entry['name']}, SHA-256 `{entry['sha256']}`")  # pyright: ignore[reportUnknownVariableType]
    command = card["command"]
    assert isinstance(command, list)
    lines += [
        f"- Reference: {card['reference']}",
        f"- Model files: SHA-256 `{card['model_sha256']}`",
        f"- Made by bise {card['bise_version']}: `{' '.join(map(str, command))}`",  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        "",
        "The text is short: compare cards of the same text, do not take the perplexity for a benchmark.",
        "",
    ]
    return "\n".join(lines)
