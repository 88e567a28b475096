"""`bise tune`: fine-tune a model on one's own examples; check the data, merge what was learned."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import text
from bise.cli.output import ProgressBar, aside, on_terminal, write_json, write_pairs, write_table
from bise.errors import ConfigError

if TYPE_CHECKING:
    from bise.config import ModelConfig
    from bise.train.data import DataFile
    from bise.train.estimate import StepTimer
    from bise.train.job import JobResult
    from bise.train.settings import JobSettings

SHOWN_BAD = 100
"""Bad lines listed on a terminal; --json lists all."""

_path = click.Path(path_type=Path)


class TuneGroup(click.Group):
    """A group whose first argument may be a model as well: `bise tune MODEL DATA` is `bise tune run ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` in front of arguments that name no subcommand."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group("tune", cls=TuneGroup)
def command() -> None:
    """Fine-tune a model on your own examples.

    `bise tune MODEL DATA --out DIR` trains a LoRA adapter; `bise chat MODEL --adapter DIR` uses it. DATA is
    JSONL: {"messages": [...]} with tools or without, or {"text": ...}.
    """


@command.command("run")
@click.argument("model", type=text)
@click.argument("data", type=_path)
@click.option("--out", required=True, type=_path, help="Directory to make: the adapter, or the model.")
@click.option(
    "--method", default="lora", show_default=True, type=click.Choice(["lora", "full", "dpo"]),
    help="An adapter beside the frozen model, all weights, or an adapter that learns preference pairs.",
)  # fmt: skip
@click.option(
    "--base", default="none", show_default=True, type=click.Choice(["none", "q8", "q4"]),
    help="Bits that the frozen model is kept in under an adapter (QLoRA); none: --dtype.",
)  # fmt: skip
@click.option(
    "--beta", default=0.1, show_default=True, help="dpo: how dear it is to move away from the base."
)
@click.option("--rank", default=16, show_default=True, help="Rank of the adapter.")
@click.option("--alpha", type=float, help="Scale of the adapter times its rank.  [default: twice the rank]")
@click.option(
    "--targets", type=text, help="Matrices to adapt, of wq,wk,wv,wo,w1,w2,w3.  [default: all that can be]"
)
@click.option("--epochs", default=3.0, show_default=True, help="Times through the data.")
@click.option("--steps", type=int, help="Steps, whatever --epochs says.")
@click.option("--batch", default=8, show_default=True, help="Examples per step.")
@click.option("--lr", type=float, help="Peak learning rate.  [default: 1e-3 for lora, 1e-4 for full and dpo]")
@click.option("--warmup", default=0.05, show_default=True, help="Share of the steps in which the rate rises.")
@click.option("--weight-decay", default=0.0, show_default=True, help="Of matrices, as in AdamW.")
@click.option("--seed", default=0, show_default=True, help="Of the order and the first values.")
@click.option(
    "--held-back", default=0.1, show_default=True, help="Share of the examples to evaluate on, not learned."
)
@click.option("--validation", type=_path, help="Data to evaluate on, instead of a share of DATA.")
@click.option("--evaluations", default=10, show_default=True, help="Evaluations over the run.")
@click.option(
    "--patience", default=3, show_default=True,
    help="Stop after so many evaluations without progress; 0: never.",
)  # fmt: skip
@click.option("--max-tokens", type=int, help="Longest example.  [default: the model's context]")
@click.option("--truncate", is_flag=True, help="Cut the ends of longer examples instead of refusing them.")
@click.option("--pass-tokens", default=4096, show_default=True, help="Tokens at once: bounds the memory.")
@click.option("--recompute", is_flag=True, help="Keep less for the way back, compute it again: same bits.")
@click.option("--checkpoint-steps", type=int, help="Steps between checkpoints.  [default: one a minute]")
@click.option(
    "--keep-epochs", "kept_epochs", default=0, show_default=True,
    help="Adapters of the last epochs to keep in DIR/checkpoints, beside the best one.",
)  # fmt: skip
@click.option(
    "--dtype", default="f32", show_default=True, type=click.Choice(["f32", "bf16"]), help="To compute in."
)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]), help="Where.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the same run.")
@click.option("--json", "as_json", is_flag=True, help="Print every event as a JSON line, then the result.")
def run(
    model: str, data: Path, out: Path, validation: Path | None, resume: bool, as_json: bool, **values: Any
) -> None:
    """Train, and publish the result once the engine computes what the trainer does.

    Ctrl-C saves a checkpoint; --resume goes on with the same bits.
    """
    from bise.hub.registry import resolve

    _require_torch()
    from bise.train.job import run_job
    from bise.train.sharding import Ranks

    settings = _settings(values)
    ranks = Ranks(settings.device)
    stops: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _: stops.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with ProgressBar() as bar:
            teller = _Teller(bar, as_json)
            result = run_job(
                resolve(model), data, out, settings,
                resume=resume, report=teller, should_stop=lambda: bool(stops), validation=validation,
                progress=bar if ranks.is_first else None, ranks=ranks,
            )  # fmt: skip
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = 0
    if result is not None:
        _tell(result, f"bise chat {model} --adapter {out}" if settings.method != "full" else None, as_json)
    elif ranks.is_first or stops:
        code = 128 + (stops or [signal.SIGTERM])[0]  # without one of its own another process was stopped
        if ranks.is_first:
            aside(f"stopped; the same command with --resume goes on (checkpoint in {out}.run)")
    ranks.close(code)
    if code:
        raise click.exceptions.Exit(code)


def _tell(result: JobResult, next_command: str | None, as_json: bool) -> None:
    if as_json:
        write_json({"event": "finished", **asdict(result), "path": str(result.path)})
        return
    evaluated = "-" if result.best_loss is None else f"{result.best_loss:.4f} (step {result.best_step})"
    trained = "-" if result.train_loss is None else f"{result.train_loss:.4f}"
    write_pairs([
        ("made", str(result.path)),
        ("loss", f"{trained} training, {evaluated} held back"),
        *([] if result.loss_before is None else [("before", f"{result.loss_before:.4f} held back")]),
        ("parity", f"engine and trainer differ by {result.parity:.1e} nats at most"),
    ])  # fmt: skip
    aside(f"{result.steps} steps in {result.seconds:.0f} s")
    if next_command is not None:
        aside(f"try: {next_command}")


@command.command("check")
@click.argument("data", type=_path)
@click.option("--model", type=text, help="Model to train.  [default: the embedded one]")
@click.option("--max-tokens", type=int, help="Longest example.  [default: the model's context]")
@click.option(
    "--method", default="lora", show_default=True, type=click.Choice(["lora", "full", "dpo"]),
    help="To estimate time and memory for; --epochs and --batch too.",
)  # fmt: skip
@click.option("--epochs", default=3.0, show_default=True, help="Times through the data.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Examples per step.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    data: Path,
    model: str | None,
    max_tokens: int | None,
    method: str,
    epochs: float,
    batch: int,
    as_json: bool,
) -> None:
    """Report bad lines, lengths in tokens, what would be cut, duplicates, time, memory.

    Where PyTorch is installed, the time comes from a step that is timed over the model's shapes.
    """
    from bise.engine.load import load_text
    from bise.hub.registry import resolve
    from bise.model.checkpoint import open_model
    from bise.train.data import read_data
    from bise.train.estimate import Plan, data_report

    source = open_model(resolve(model))
    tokenizer, template = load_text(source)
    with ProgressBar() as bar:
        file = read_data(data, tokenizer, template, bar)
    plan = Plan(method=method, epochs=epochs, batch=batch, max_tokens=max_tokens or source.config.max_context)
    report = data_report(file, source.config, plan, _timer())
    if as_json:
        write_json(report)
    else:
        _show(file, report)
    if file.bad:
        raise click.exceptions.Exit(2)


@command.command("merge")
@click.argument("model", type=text)
@click.argument("adapter", type=_path)
@click.option("--out", required=True, type=_path, help="Directory to make.")
def merge(model: str, adapter: Path, out: Path) -> None:
    """Write the model with an adapter's changes in its weights, in the layout that it came in."""
    _write(model, adapter, out, "safetensors")


@command.command("export")
@click.argument("model", type=text)
@click.option("--adapter", type=_path, help="Adapter to add to the weights.")
@click.option("--out", required=True, type=_path, help="File (.gguf) or directory (safetensors) to make.")
@click.option(
    "--format", "form", default="gguf-f16", show_default=True,
    type=click.Choice(["safetensors", "gguf-f16", "gguf-q8_0", "gguf-q4_k"]), help="What to write.",
)  # fmt: skip
def export(model: str, adapter: Path | None, out: Path, form: str) -> None:
    """Write a model for other programs: GGUF for llama.cpp, or safetensors; needs no PyTorch."""
    _write(model, adapter, out, form)


def _write(model: str, adapter: Path | None, out: Path, form: str) -> None:
    from bise.hub.registry import resolve
    from bise.model.checkpoint import open_model
    from bise.train.whole import WholeModel
    from bise.train.write import export_model

    for remark in export_model(WholeModel(open_model(resolve(model)), adapter), out, form):
        aside(remark)
    size = sum(file.stat().st_size for file in (out.iterdir() if out.is_dir() else [out]))
    write_pairs([("made", str(out)), ("size", f"{size / 1e6:,.1f} MB")])


def _timer() -> StepTimer | None:
    """Return what times a step; None where PyTorch is not installed."""
    if find_spec("torch") is None:
        return None

    def timed(config: ModelConfig, lengths: Sequence[int], learned: float, is_full: bool) -> float:
        from bise.train.timing import step_seconds

        return step_seconds(config, lengths, learned, is_full=is_full)

    return timed


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise ConfigError("bise tune needs PyTorch: pip install 'bise[torch]'", field="torch")


def _settings(values: dict[str, Any]) -> JobSettings:
    from bise.train.loop import Schedule
    from bise.train.settings import JobSettings

    lr = values.pop("lr")
    if lr is None:
        lr = 1e-3 if values["method"] == "lora" else 1e-4
    names = ("epochs", "batch", "warmup", "weight_decay", "seed", "evaluations", "patience", "pass_tokens",
             "checkpoint_steps", "kept_epochs")  # fmt: skip
    schedule = Schedule(lr=lr, max_steps=values.pop("steps"), **{name: values.pop(name) for name in names})
    targets = tuple(part.strip() for part in (values.pop("targets") or "").split(",") if part.strip())
    return JobSettings(targets=targets, schedule=schedule, **values)


class _Teller:
    """Tells a person how training goes: a bar on a terminal, a line per evaluation elsewhere, or JSON."""

    def __init__(self, bar: ProgressBar, as_json: bool) -> None:
        self._bar, self._as_json = bar, as_json
        self._told = 0
        self._held = ""

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self._as_json:
            write_json(event)
            return
        if event["event"] == "step":
            # Short enough that 80 columns show the time left behind it.
            line = (
                f"{event['step']}/{event['steps']}  loss {event['loss']:.3f}{self._held}  "
                f"lr {event['lr']:.1e}  {event['tokens_per_s']:,.0f} tok/s  "
                f"{event['memory_bytes'] / 1e9:.1f} GB"
            )
            self._bar(line, event["step"] / event["steps"])
            tenth = 10 * event["step"] // event["steps"]
            if not on_terminal(sys.stderr) and tenth > self._told:
                self._told = tenth
                aside(f"step {line}  {event['eta_s']:.0f} s left")
        elif event["event"] == "evaluation":
            self._held = f", held {event['loss']:.3f}"
            if not on_terminal(sys.stderr):
                aside(f"held back: loss {event['loss']:.4f}, best {event['best']:.4f}")


def _show(file: DataFile, report: Mapping[str, Any]) -> None:
    pairs = [
        ("examples", ", ".join(f"{count} {kind}" for kind, count in report["kinds"].items()) or "none"),
        ("tokens", f"{report['tokens']:,}, {report['learned_tokens']:,} of them learned"),
        ("too long", f"{report['too_long']} of more than {report['max_tokens']} tokens"),
        ("duplicates", _duplicates(file)),
        ("memory", f"about {report['memory_bytes'] / 1e9:.1f} GB for --method {report['method']}"),
        (
            "time",
            f"about {report['seconds']:.0f} s for {report['epochs']:g} epochs on this machine's CPU, "
            + (
                "from a step timed now"
                if report["is_timed"]
                else "a guess: nothing was timed without PyTorch"
            ),
        ),
    ]
    write_pairs(pairs)
    if report["histogram"]:
        most = max(entry["texts"] for entry in report["histogram"])
        rows = [
            [str(entry["up_to"]), str(entry["texts"]), "#" * max(1, round(40 * entry["texts"] / most))]
            for entry in report["histogram"]
        ]
        write_table(["TOKENS UP TO", "TEXTS", ""], rows)
    for bad in file.bad[:SHOWN_BAD]:
        click.echo(f"bad: {bad}")
    if len(file.bad) > SHOWN_BAD:
        click.echo(f"and {len(file.bad) - SHOWN_BAD} more bad lines (--json lists all)")
    click.echo(f"{len(file.bad)} bad lines" if file.bad else "no bad lines")


def _duplicates(file: DataFile) -> str:
    if not file.duplicates:
        return "none"
    line, earlier = file.duplicates[0]
    return f"{len(file.duplicates)} lines repeat earlier ones, the first is line {line} (as line {earlier})"
