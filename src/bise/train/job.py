"""One fine-tuning job, from a model and a data file to a directory that the engine serves.

The result appears under its name by one rename, after the parity gate; until then everything lies in
`OUT.run`, from where the job resumes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from bise import __version__
from bise.config import default_threads
from bise.engine.load import load_text
from bise.errors import ConfigError, UserError
from bise.model.checkpoint import open_model
from bise.model.packed import content_hash
from bise.model.source import ModelSource
from bise.text.turns import LearnedText
from bise.train.curve import draw_losses
from bise.train.data import DataFile, read_data, truncated
from bise.train.loop import Report, Schedule, Training
from bise.train.network import Tensors, torch_ops
from bise.train.objective import NextToken, Objective, Preference, Sample
from bise.train.parameters import FullParameters, LoraParameters, Trainable, write_adapter
from bise.train.parity import engine_logprobs, probe_texts, require_parity
from bise.train.quantised import BITS
from bise.train.safetensors_writer import require_layout, write_model
from bise.train.sharding import Ranks
from bise.train.write import publish, require_free

METHODS = ("lora", "full", "dpo")
LOCK_WAIT_S = 60.0
"""How long a resumed run waits for the process before it, whose end may not have reached it yet."""
_LOCK_POLL_S = 0.2
MIN_SPLIT = 10
"""Fewer samples than this are all learned; none is held back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What to train and how."""

    method: str = "lora"
    """lora, full, or dpo (an adapter that learns preferences)."""
    base: str = "none"
    """How the matrices of the frozen model are kept under an adapter: none (the compute dtype), q8 or q4."""
    beta: float = 0.1
    """dpo: how dear it is to move away from the base."""
    recompute: bool = False
    """Compute what is inside of a block again on the way back, instead of keeping it."""
    rank: int = 16
    alpha: float | None = None
    """None: twice the rank."""
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    max_tokens: int | None = None
    """Longest text; None: the model's context."""
    truncate: bool = False
    """Cut longer texts instead of refusing them."""
    held_back: float = 0.1
    """Share of the texts to evaluate on."""
    dtype: str = "f32"
    device: str = "cpu"
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"method must be one of {', '.join(METHODS)}, got '{self.method}'", field="method"
            )
        if self.base != "none" and (self.base not in BITS or self.method == "full"):
            raise ConfigError(
                f"--base {self.base}: a model under an adapter can be kept as none, q8 or q4; all weights "
                "cannot be trained in few bits",
                field="base",
            )
        if not 0 < self.beta <= 100:
            raise ConfigError(f"--beta must be above 0 and at most 100, got {self.beta:g}", field="beta")
        if not 0 <= self.held_back <= 0.5:
            raise ConfigError(f"--held-back must be from 0 to 0.5, got {self.held_back:g}", field="held_back")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a finished job made."""

    path: Path
    steps: int
    train_loss: float
    best_loss: float | None
    """On the held-back texts; None when there are none."""
    best_step: int | None
    parity: float
    """Largest difference of a log-prob between trainer and engine, in nats."""
    seconds: float
    trained_tokens: int


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
        probes = probe_texts([sample[0] for sample in held_back or train])
        finished = _publish(
            model, source, out, run, trainable, settings, trained, record, probes, data_path.name
        )
        ranks.wait()
        return finished


def _train(
    trainable: Trainable,
    settings: JobSettings,
    samples: tuple[list[Sample], list[Sample]],
    run: Path,
    record: Mapping[str, Any],
    report: Report,
    should_stop: Callable[[], bool],
    ranks: Ranks,
) -> tuple[Training, Tensors, _Log] | None:
    """Return the finished training, its parameters and its log; None when it was stopped."""
    train, held_back = samples
    fingerprint = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    log = _Log(run / "events.jsonl", report)
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


def _publish(
    model: Path,
    source: ModelSource,
    out: Path,
    run: Path,
    trainable: Trainable,
    settings: JobSettings,
    trained: tuple[Training, Tensors, _Log],
    record: dict[str, Any],
    probes: list[LearnedText],
    data_name: str,
) -> JobResult:
    """Write what was trained, let it through the gate, and give it its name."""
    training, result, log = trained
    partial = run / "result"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if isinstance(trainable, LoraParameters):
        name = source.name or str(model)
        write_adapter(partial, result, trainable, base_name=name, base_sha256=record["base_sha256"])
    else:
        write_model(partial, source, lambda name: result[name].float().cpu().numpy())  # pyright: ignore[reportUnknownMemberType, reportUnknownLambdaType]
    difference = _gate(model, partial, trainable, settings, source, result, probes)
    has_evaluations = bool(record["held_back"])
    finished = JobResult(
        path=out,
        steps=training.progress.step,
        train_loss=log.last_loss,
        best_loss=training.progress.best_loss if has_evaluations else None,
        best_step=training.progress.best_step if has_evaluations else None,
        parity=difference,
        seconds=training.progress.elapsed_s,
        trained_tokens=training.progress.tokens,
    )
    (partial / "loss.svg").write_text(log.curve(f"{record['model']} on {data_name}"), encoding="utf-8")
    summary = record | {"result": asdict(finished) | {"path": out.name}}
    (partial / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    publish(partial, out)
    shutil.rmtree(run)
    return finished


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
        targets=settings.targets,
        seed=settings.schedule.seed,
        base_bits=BITS.get(settings.base),
        recompute=settings.recompute,
        sharded=sharded,
    )


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


def _gate(
    model: Path,
    partial: Path,
    trainable: Trainable,
    settings: JobSettings,
    source: ModelSource,
    result: Tensors,
    probes: list[LearnedText],
) -> float:
    """Compare the trained parameters in torch's float32 with what the engine makes of the written files."""
    is_lora = isinstance(trainable, LoraParameters)
    check = trainable
    if settings.dtype != "f32" or settings.base != "none" or trainable.network.is_sharded:
        check = _trainable(source, replace(settings, dtype="f32", base="none"))
    with torch.no_grad():
        for name, param in check.params.items():
            value = result[name]
            # A whole model is stored in the base's format; its parameters are rounded as the file's are.
            stored = torch.float32 if is_lora else _stored_dtype(source, name)
            param.copy_(value.to(stored))
        losses = check.network.token_losses(probes, check.loras())
    served = engine_logprobs(model if is_lora else partial, partial if is_lora else None, probes)
    trained = cast("list[float]", (-losses.double()).tolist())  # pyright: ignore[reportUnknownMemberType]
    return require_parity(trained, served)


def _stored_dtype(source: ModelSource, name: str) -> torch.dtype:
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[source.tensors[name].format]


class _Log:
    """Appends every event to a file, hands it on, and remembers the losses for the picture."""

    def __init__(self, path: Path, report: Report) -> None:
        self._path, self._report = path, report
        self._events: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self._events.append(json.loads(line))
                except json.JSONDecodeError:  # the last line of a process that was killed
                    break

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._events.append(dict(event))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self._report(event)

    def forget_after(self, step: int) -> None:
        """Drop what a killed process did after its last checkpoint; it is done again."""
        self._events = [event for event in self._events if event.get("step", 0) <= step]
        self._path.write_text("".join(json.dumps(event) + "\n" for event in self._events), encoding="utf-8")

    @property
    def last_loss(self) -> float:
        """Mean training loss of the last ten steps."""
        losses = [loss for _, loss in self._losses("step")[-10:]]
        return sum(losses) / len(losses)

    def curve(self, title: str) -> str:
        """Return the picture."""
        return draw_losses(self._losses("step"), self._losses("evaluation"), title)

    def _losses(self, kind: str) -> list[tuple[int, float]]:
        return [(event["step"], event["loss"]) for event in self._events if event["event"] == kind]
