"""`bise models`: what can be run here, and the aliases that are known."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from bise.cli.model_files import pull, rm, verify
from bise.cli.model_remotes import add_remote, remote_rows
from bise.cli.output import write_json, write_table


@click.group("models", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the models on this machine, hosted ones and known aliases; fetch, check, remove them."""
    if context.invoked_subcommand is None:
        _list(as_json)


for _verb in (pull, rm, verify, add_remote):
    command.add_command(_verb)


def _list(as_json: bool) -> None:
    from bise.hub.registry import gigabytes, known_models, models_dir
    from bise.hub.remotes import load_remotes

    here, cache = _local(), _packed_cache()
    remotes = remote_rows(load_remotes().values())
    known: list[dict[str, Any]] = [
        {
            "alias": model.alias,
            "repo": model.repo,
            "licence": model.licence,
            "parameters": model.config.num_params,
            "bytes_bf16": model.bf16_bytes,
            "bytes_q4": model.q4_bytes,
            "chat": model.chat,
            "here": any(entry["name"] == model.alias for entry in here),
        }
        for model in known_models()
    ]
    if as_json:
        write_json({"local": here, "packed_cache": cache, "known": known, "remote": remotes}, indent=2)
        return
    rows = [
        [
            entry["name"] + (" (embedded)" if entry["embedded"] else ""),
            gigabytes(entry["bytes"]),
            *_needs(entry),
            entry["path"],
        ]
        for entry in here
    ]
    if rows:
        write_table(["ON THIS MACHINE", "SIZE", "MEMORY", "CONTEXT", "PATH"], rows)
        for entry in here:
            if entry["fault"]:
                click.echo(f"{entry['name']} cannot be loaded: {entry['fault']}")
        click.echo()
    if remotes:
        write_table(
            ["HOSTED ELSEWHERE", "LEAVES THIS MACHINE FOR", "ITS NAME THERE", "KEY FROM"],
            [[r["name"], r["url"], r["model"], r["key_env"] or "-"] for r in remotes],
        )
        click.echo()
    if cache["files"]:
        count = f"{cache['files']} file{'' if cache['files'] == 1 else 's'}"
        click.echo(f"packed cache: {count}, {gigabytes(cache['bytes'])}, {cache['path']}\n")
    write_table(
        ["ALIAS", "16 BIT", "4 BIT", "PUBLISHED AS", "LICENCE"],
        [
            [m["alias"], gigabytes(m["bytes_bf16"]), gigabytes(m["bytes_q4"]), m["repo"], m["licence"]]
            for m in known
        ],
    )
    click.echo(
        "\n`bise models pull ALIAS` fetches one; or give a path (bise chat PATH), or put a model at\n"
        f"{models_dir()}/ALIAS to call it by name."
    )


def _local() -> list[dict[str, Any]]:
    from bise.errors import ModelFileError
    from bise.hub.embedded import NAME, embedded_path, is_embedded
    from bise.hub.registry import local_models

    entries: list[tuple[str, Path]] = []
    with suppress(ModelFileError):  # `bise doctor` tells; a list of models need not fail for it
        entries.append((NAME, embedded_path()))
    entries += [(path.stem if path.suffix == ".gguf" else path.name, path) for path in local_models()]
    return [
        {"name": name, "path": str(path), "bytes": size_on_disk(path), "embedded": is_embedded(path)}
        | _planned(path)
        for name, path in entries
    ]


def _planned(path: Path) -> dict[str, Any]:
    """Return what loading the model alone would take now, from its headers; null with the fault where it
    cannot be loaded.
    """
    from bise.engine.memory import available_memory
    from bise.engine.model_spec import ModelSpec, plan_model
    from bise.errors import BiseError

    try:
        plan = plan_model(ModelSpec(name="-", path=path), available_memory())
    except BiseError as error:
        return {"memory_bytes": None, "context": None, "fault": str(error)}
    return {"memory_bytes": plan.size_bytes, "context": plan.context, "fault": None}


def _needs(entry: dict[str, Any]) -> tuple[str, str]:
    from bise.hub.registry import gigabytes

    if entry["memory_bytes"] is None:
        return "-", "-"
    return gigabytes(entry["memory_bytes"]), f"{entry['context']:,}"


def _packed_cache() -> dict[str, Any]:
    from bise.config import bise_home

    folder = bise_home() / "cache" / "packed"
    files = [path for path in folder.glob("*.safetensors") if path.is_file()] if folder.is_dir() else []
    return {"path": str(folder), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files directly in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
