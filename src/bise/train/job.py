"""One fine-tuning job, from a model and a data file to a directory that the engine serves.

The result appears under its name by one rename, after the parity gate; until then everything lies in
`OUT.run`, from where the job resumes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from bise import __version__
from bise.config import default_threads
from bise.engine.load import load_text
from bise.errors import ConfigError, UserError
from bise.model.checkpoint import open_model
from bise.model.packed import content_hash
from bise.model.source import ModelSource
from bise.train.data import DataFile, read_data, truncated
from bise.train.events import RunLog
from bise.train.loop import Report, Training
from bise.train.network import Tensors, torch_ops
from bise.train.objective import NextToken, Objective, Preference, Sample
from bise.train.parameters import FullParameters, LoraParameters, Trainable, adaptable
from bise.train.parity import probe_texts
from bise.train.quantised import BITS
from bise.train.result import FinishedRun, JobResult, publish_result
from bise.train.safetensors_writer import require_layout
from bise.train.settings import JobSettings
from bise.train.sharding import Ranks
from bise.train.write import require_free

LOCK_WAIT_S = 60.0
"""How long a resumed run waits for the process before it, whose end may not have reached it yet."""
_LOCK_POLL_S = 0.2
MIN_SPLIT = 10
"""Fewer samples than this are all learned; none is held back."""


def run_directory(out: Path) -> Path:
    """Return where the checkpoints of a job lie."""
    return out.with_name(out.name + ".run")


def split(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return (samples to learn, samples held back), drawn by the seed."""
    held = round(share * len(samples)) if len(samples) >= MIN_SPLIT and share else 0
    order = np.random.default_rng([seed, 0xE7A1]).permutation(len(samples))
    chosen = set(order[:held].tolist())
    return (
        [sample for index, sample in enumerate(samples) if index not in chosen],
        [sample for index, sample in enumerate(samples) if index in chosen],
    )


def checked_samples(data: DataFile, source: ModelSource, settings: JobSettings) -> list[Sample]:
    """Return the samples of good data, cut only where that was asked for."""
    data.require_good()
    has_pairs, wants_pairs = "preference" in data.kinds, settings.method == "dpo"
    if has_pairs != wants_pairs:
        found = "preference pairs, which --method dpo learns" if has_pairs else "no preference pairs"
        raise UserError(
            f"{data.path}: holds {found}; --method {settings.method} "
            + ("needs them" if wants_pairs else "learns chats and texts"),
            field="method",
        )
    limit = source.config.max_context if settings.max_tokens is None else settings.max_tokens
    if not 2 <= limit <= source.config.max_context:
        raise ConfigError(
            f"--max-tokens must be from 2 to the model's context of {source.config.max_context}, got {limit}",
            field="max_tokens",
        )
    samples, cut = truncated_samples(data, limit)
    if cut and not settings.truncate:
        line = next(e.line for e in data.examples if any(len(text.ids) > limit for text in e.texts))
        raise UserError(
            f"{data.path}: {cut} texts are longer than {limit} tokens, the first in line {line}; shorten "
            "them or cut their ends with --truncate",
            field="max_tokens",
        )
    if not samples:
        raise UserError(f"{data.path}: nothing to learn is left of the texts cut to {limit} tokens")
    return samples


def truncated_samples(data: DataFile, limit: int) -> tuple[list[Sample], int]:
    """Return the samples cut to `limit` tokens, and how many texts were cut. A text without a learned token
    left is dropped; of a pair both answers need one.
    """
    if "preference" not in data.kinds:
        texts, cut = truncated(data.texts, limit)
        return [(text,) for text in texts], cut
    samples: list[Sample] = []
    total = 0
    for example in data.examples:
        texts, cut = truncated(example.texts, limit)
        total += cut
        if len(texts) == len(example.texts):
            samples.append(tuple(texts))
    return samples, total


def run_job(
    model: Path,
    data_path: Path,
    out: Path,
    settings: JobSettings,
    *,
    resume: bool,
    report: Report,
    should_stop: Callable[[], bool],
    progress: Callable[[str, float], None] | None = None,
    validation: Path | None = None,
    ranks: Ranks | None = None,
) -> JobResult | None:
    """Train and publish `out`; return None when `should_stop` ended the run early (resume it), and in all
    processes of a run but the first.

    `validation` is a file of data to evaluate on, instead of a share of `data_path`. Raises UserError for bad
    data, settings, an `out` that is there already, or one that another process works at.
    """
    ranks = ranks or Ranks()
    run = _claim(out, resume)
    ranks.wait()
    source = open_model(model)
    if settings.method == "full":
        require_layout(source)
    text = load_text(source)
    data = read_data(data_path, *text, progress)
    samples = checked_samples(data, source, settings)
    if validation is None:
        train, held_back = split(samples, settings.held_back, settings.schedule.seed)
        evaluated = data
    else:
        evaluated = read_data(validation, *text, progress)
        train, held_back = samples, checked_samples(evaluated, source, settings)
    torch.set_num_threads(default_threads())
    record = {"bise": __version__, "model": source.name or model.name, "base_sha256": content_hash(source),
              "data_sha256": data.sha256, "evaluation_sha256": evaluated.sha256,
              "settings": asdict(settings), "texts": len(train), "held_back": len(held_back)}  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    with _alone(run, ranks, LOCK_WAIT_S if resume else 0.0):
        trainable = _trainable(source, settings, sharded=ranks.is_many)
        trained = _train(trainable, settings, (train, held_back), run, record, report, should_stop, ranks)
        if trained is None or not ranks.is_first:
            ranks.wait()  # until the first has published
            return None
        training, tensors, log = trained
        finished = FinishedRun(
            model=model, source=source, trainable=trainable,
            exact=lambda: _exact(trainable, source, settings), training=training, tensors=tensors, log=log,
            record=record, probes=probe_texts([sample[0] for sample in held_back or train]),
            data_name=data_path.name,
        )  # fmt: skip
        result = publish_result(finished, run, out)
        ranks.wait()
        return result


def _train(
    trainable: Trainable,
    settings: JobSettings,
    samples: tuple[list[Sample], list[Sample]],
    run: Path,
    record: Mapping[str, Any],
    report: Report,
    should_stop: Callable[[], bool],
    ranks: Ranks,
) -> tuple[Training, Tensors, RunLog] | None:
    """Return the finished training, its parameters and its log; None when it was stopped."""
    train, held_back = samples
    fingerprint = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    log = RunLog(run / "events.jsonl", report)
    training = Training(
        trainable.params, _objective(trainable, settings), settings.schedule, train, held_back,
        run=run, fingerprint=fingerprint, report=log, ranks=ranks,
    )  # fmt: skip
    step = training.resume()
    if ranks.is_first:
        report(
            {"event": "started", "steps": training.steps, "texts": len(train), "held_back": len(held_back)}
        )
        log.forget_after(step)
        if step:
            log({"event": "resumed", "step": step})
    if not training.run(should_stop):
        return None
    return training, training.result(), log


def _claim(out: Path, resume: bool) -> Path:
    """Return the run's directory; refuse an `out` that exists and a run that nobody asked to resume."""
    run = run_directory(out)
    require_free(out)
    if run.exists() and not resume:
        raise ConfigError(f"{run} holds an unfinished run; --resume goes on with it", field="out")
    if resume and not run.exists():
        raise ConfigError(f"there is no {run} to resume", field="resume")
    return run


def _trainable(source: ModelSource, settings: JobSettings, *, sharded: bool = False) -> Trainable:
    ops = torch_ops(settings.dtype, settings.device)
    if settings.method == "full":
        return FullParameters(source, ops, recompute=settings.recompute, sharded=sharded)
    return LoraParameters(
        source,
        ops,
        rank=settings.rank,
        alpha=2.0 * settings.rank if settings.alpha is None else settings.alpha,
        targets=settings.targets or adaptable(source.config),
        seed=settings.schedule.seed,
        base_bits=BITS.get(settings.base),
        recompute=settings.recompute,
        sharded=sharded,
    )


def _exact(trainable: Trainable, source: ModelSource, settings: JobSettings) -> Trainable:
    """Return a trainable that computes in float32, over the base in float32, all in this process."""
    if settings.dtype == "f32" and settings.base == "none" and not trainable.network.is_sharded:
        return trainable
    return _trainable(source, replace(settings, dtype="f32", base="none"))


def _objective(trainable: Trainable, settings: JobSettings) -> Objective:
    if settings.method == "dpo":
        return Preference(trainable.network, trainable.loras, beta=settings.beta)
    return NextToken(trainable.network, trainable.loras)


@contextmanager
def _alone(run: Path, ranks: Ranks, wait_s: float) -> Generator[None]:
    """Hold a run's directory for this run; ConfigError when another one works at it."""
    if not ranks.is_first:
        yield
        return
    with (run / "lock").open("w") as file:
        until = time.monotonic() + wait_s
        while not _locked(file):
            if time.monotonic() >= until:
                raise ConfigError(f"another process trains in {run}; wait for it or end it", field="out")
            time.sleep(_LOCK_POLL_S)
        yield


def _locked(file: IO[str]) -> bool:
    """Take the lock on a file; False when another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
