"""`bise inspect`: what a model is and what it costs to hold, read from its headers alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import model_argument
from bise.cli.output import write_json, write_pairs, write_table

if TYPE_CHECKING:
    from bise.config import ModelConfig
    from bise.model.source import ModelSource

CONTEXTS = {"4k": 4096, "32k": 32768, "128k": 131072}
"""Context lengths, in tokens, that the KV cache is told for."""


@click.command("inspect")
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str | None, as_json: bool) -> None:
    """Show what a model file holds and what it costs to run.

    Reads headers only: architecture, shapes, storage formats, parameters, KV cache, window, context, licence.
    """
    from bise.hub.registry import resolve
    from bise.model.checkpoint import open_model

    source = open_model(resolve(model))
    report = describe(source)
    if as_json:
        write_json(report, indent=2)
        return
    write_pairs(_pairs(report, source.config))
    click.echo()
    write_table(
        ["FORMAT", "TENSORS", "PARAMETERS", "BYTES"],
        [
            [entry["format"], f"{entry['tensors']:,}", f"{entry['parameters']:,}", f"{entry['bytes']:,}"]
            for entry in report["formats"]
        ],
    )


def describe(source: ModelSource) -> dict[str, Any]:
    """Return everything `bise inspect --json` prints; sizes in bytes, KV cache in 16 bits per value."""
    config = source.config
    return {
        "name": source.name or source.path.name,
        "path": str(source.path),
        "source": source.kind,
        "family": config.family,
        "licence": source.licence,
        "parameters": {"total": config.num_params, "active": config.num_active_params},
        "shape": {
            "dim": config.dim,
            "layers": config.num_layers,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_dim": config.hidden_dim,
            "vocab_size": config.vocab_size,
            "experts": config.num_experts,
            "experts_per_token": config.experts_per_token,
            "tied_embeddings": config.tied_embeddings,
        },
        "rope": {
            "theta": config.rope_theta,
            "scaling": asdict(config.rope_scaling) if config.rope_scaling else None,
        },
        "norm_eps": config.norm_eps,
        "context": config.max_context,
        "windows": list(config.windows),
        "kv_cache": {
            "bits_per_value": 16,
            "bytes_per_token": int(config.kv_bytes_per_token()),
            "bytes_at": {name: int(config.kv_bytes(length)) for name, length in CONTEXTS.items()},
        },
        "default_quant": source.default_quant,
        "formats": _formats(source),
        "bytes": sum(tensor.size_bytes for tensor in source.tensors.values()),
    }


def _formats(source: ModelSource) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for tensor in source.tensors.values():
        entry = found.setdefault(
            tensor.format, {"format": tensor.format, "tensors": 0, "parameters": 0, "bytes": 0}
        )
        count = 1
        for size in tensor.shape:
            count *= size
        entry["tensors"] += 1
        entry["parameters"] += count
        entry["bytes"] += tensor.size_bytes
    return sorted(found.values(), key=lambda entry: -entry["bytes"])


def window_text(config: ModelConfig) -> str:
    """Return the windows for people: `none`, `4096 tokens in every layer`, `4096 in 12 of 36 layers`."""
    parts: list[str] = []
    for window in config.window_groups:
        count = config.windows.count(window)
        where = "every layer" if count == config.num_layers else f"{count} of {config.num_layers} layers"
        if window is not None:
            parts.append(f"{window:,} tokens in {where}")
    return "; ".join(parts) or "none (full attention)"


def _pairs(report: dict[str, Any], config: ModelConfig) -> list[tuple[str, str]]:
    from bise.hub.registry import gigabytes

    shape, parameters, kv = report["shape"], report["parameters"], report["kv_cache"]
    total, active = f"{parameters['total']:,}", f"{parameters['active']:,}"
    experts = (
        f"{shape['experts']} ({shape['experts_per_token']} per token)" if shape["experts"] else "none (dense)"
    )
    scaling = report["rope"]["scaling"]
    stretched = f", {scaling['kind']} x{scaling['factor']:g}" if scaling else ""
    at = ", ".join(f"{mebibytes(size)} at {name}" for name, size in kv["bytes_at"].items())
    beyond = " (its own context is shorter)" if report["context"] < max(CONTEXTS.values()) else ""
    return [
        ("model", report["name"]),
        ("path", report["path"]),
        ("family", f"{report['family']} (read from {report['source']})"),
        ("licence", report["licence"] or "not stated in the files"),
        ("parameters", total if total == active else f"{total} in all, {active} per token"),
        ("layers", f"{shape['layers']}, width {shape['dim']:,}, feed-forward {shape['hidden_dim']:,}"),
        (
            "attention",
            f"{shape['heads']} heads over {shape['kv_heads']} key/value heads of {shape['head_dim']}",
        ),
        ("experts", experts),
        ("vocabulary", f"{shape['vocab_size']:,}{', tied embeddings' if shape['tied_embeddings'] else ''}"),
        ("context", f"{report['context']:,} tokens, rope theta {report['rope']['theta']:g}{stretched}"),
        ("window", window_text(config)),
        ("KV cache", f"{kv['bytes_per_token']:,} bytes per token in 16 bits; {at}{beyond}"),
        ("weights", f"{gigabytes(report['bytes'])} on disk; --quant auto means {report['default_quant']}"),
    ]


def mebibytes(size_bytes: float) -> str:
    """Return a size in binary units for people: `512 MiB`, `4 GiB`."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.4g} {unit}"
    return f"{size_bytes:.0f} B"
