"""What a finished run becomes: files that the engine serves, let through the gate, named by one rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from bise.model.source import ModelSource
from bise.text.turns import LearnedText
from bise.train.events import RunLog
from bise.train.layout import CHECKPOINTS, METRICS, step_name
from bise.train.loop import Training
from bise.train.network import Tensors
from bise.train.parameters import LoraParameters, Trainable, write_adapter
from bise.train.parity import engine_logprobs, require_parity
from bise.train.safetensors_writer import write_model
from bise.train.write import publish


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a finished job made."""

    path: Path
    steps: int
    train_loss: float | None
    """Mean of the last ten steps; None when the run's diary was lost."""
    loss_before: float | None
    """On the held-back texts before training; None when there are none."""
    best_loss: float | None
    """On the held-back texts; None when there are none."""
    best_step: int | None
    parity: float
    """Largest difference of a log-prob between trainer and engine, in nats."""
    seconds: float
    trained_tokens: int
    checkpoints: tuple[int, ...] = ()
    """Steps at the ends of epochs whose adapters lie beside the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run that is over, and all that its result is made of."""

    model: Path
    source: ModelSource
    trainable: Trainable
    exact: Callable[[], Trainable]
    """Returns a trainable of the same shape in float32 on this process alone; `trainable` if it is one."""
    training: Training
    tensors: Tensors
    """The parameters to publish."""
    log: RunLog
    record: Mapping[str, Any]
    """What `training.json` says of settings and data."""
    probes: Sequence[LearnedText]
    data_name: str


def publish_result(finished: FinishedRun, run: Path, out: Path) -> JobResult:
    """Write what was trained into the run's directory, let it through the gate, and rename it to `out`; the
    run's directory is gone then.

    Raises EngineError when the engine computes anything else than the trainer: nothing is published.
    """
    training, log, record = finished.training, finished.log, finished.record
    partial = run / "result"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    written = _write(finished, partial)
    difference = _gate(finished, partial, written)
    has_evaluations = bool(record["held_back"])
    result = JobResult(
        path=out,
        steps=training.progress.step,
        train_loss=log.last_loss,
        loss_before=log.first_evaluation,
        best_loss=training.progress.best_loss if has_evaluations else None,
        best_step=training.progress.best_step if has_evaluations else None,
        parity=difference,
        seconds=training.progress.elapsed_s,
        trained_tokens=training.progress.tokens,
        checkpoints=tuple(sorted(training.kept())),
    )
    (partial / "loss.svg").write_text(
        log.curve(f"{record['model']} on {finished.data_name}"), encoding="utf-8"
    )
    (partial / METRICS).write_text(log.table(), encoding="utf-8")
    summary = {**record, "result": asdict(result) | {"path": out.name}}
    (partial / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    publish(partial, out)
    shutil.rmtree(run)
    return result


def _write(finished: FinishedRun, partial: Path) -> list[tuple[Path, Tensors]]:
    """Write the result, and the adapters of the last epochs; return each directory and what is in it."""
    source, trainable, tensors = finished.source, finished.trainable, finished.tensors
    if not isinstance(trainable, LoraParameters):
        write_model(partial, source, lambda name: tensors[name].float().cpu().numpy())  # pyright: ignore[reportUnknownMemberType, reportUnknownLambdaType]
        return [(partial, tensors)]
    written = [(partial, tensors)]
    for step, state in sorted(finished.training.kept().items()):
        written.append((partial / CHECKPOINTS / step_name(step), state))
    for directory, values in written:
        directory.mkdir(parents=True, exist_ok=True)
        write_adapter(
            directory, values, trainable, base_name=source.name or str(finished.model),
            base_sha256=finished.record["base_sha256"],
        )  # fmt: skip
    return written


def _gate(finished: FinishedRun, partial: Path, written: Sequence[tuple[Path, Tensors]]) -> float:
    """Compare what torch's float32 makes of parameters with what the engine makes of the written files."""
    is_lora = isinstance(finished.trainable, LoraParameters)
    check = finished.exact()
    trained: list[list[float]] = []
    for _, tensors in written:
        with torch.no_grad():
            for name, param in check.params.items():
                # A whole model is stored in the base's format; its parameters are rounded as the file's are.
                stored = torch.float32 if is_lora else _stored_dtype(finished.source, name)
                param.copy_(tensors[name].to(stored))
            losses = check.network.token_losses(finished.probes, check.loras())
        trained.append(cast("list[float]", (-losses.double()).tolist()))  # pyright: ignore[reportUnknownMemberType]
    adapters = [directory if is_lora else None for directory, _ in written]
    served = engine_logprobs(finished.model if is_lora else partial, adapters, finished.probes)
    return max(require_parity(ours, theirs) for ours, theirs in zip(trained, served, strict=True))


def _stored_dtype(source: ModelSource, name: str) -> torch.dtype:
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[source.tensors[name].format]
