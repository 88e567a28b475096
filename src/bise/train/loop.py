"""The training loop: AdamW under a cosine, evaluation with early stopping, checkpoints that resume bit-equal.

What a step does follows from its number and the seed alone, so weights, moments and a few numbers are all
that a checkpoint holds.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bise.errors import ConfigError, ModelFileError, NonFiniteError
from bise.train.checkpoint import Checkpoint, checkpoints, load_latest, number, save_checkpoint
from bise.train.layout import step_name
from bise.train.objective import Objective, Sample, passes, tokens_of
from bise.train.sharding import Ranks, here, rows_here, whole

Report = Callable[[Mapping[str, Any]], None]
"""Gets every event: {"event": "step" | "evaluation" | "epoch" | "checkpoint" | "stopped", ...}."""

CHECKPOINT_S = 60.0
"""Seconds between checkpoints."""
CLIP = 1.0
_KEPT = "epochs"
"""Where in a run's directory the states lie that are kept for the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast."""

    epochs: float = 3.0
    max_steps: int | None = None
    """Steps of the run, whatever the epochs say."""
    batch: int = 8
    """Texts or pairs per step."""
    pass_tokens: int = 4096
    """Tokens computed at once; a step of more is split, its gradients added up."""
    lr: float = 1e-3
    """Peak rate; it falls along a cosine to a tenth."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.0
    seed: int = 0
    evaluations: int = 10
    """Evaluations over the run, the last step's included."""
    patience: int = 3
    """Evaluations without progress after which training ends; 0 never ends early."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints; None: one a minute."""
    kept_epochs: int = 0
    """Of so many epochs, the last ones, what was learned by their end is kept for the result."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 0.001, 1e4), ("batch", 1, 1 << 16), ("pass_tokens", 1, 1 << 24), ("lr", 1e-9, 10),
            ("warmup", 0, 0.9), ("weight_decay", 0, 10), ("evaluations", 1, 10_000), ("patience", 0, 10_000),
            ("kept_epochs", 0, 1000),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be from {low:g} to {high:g}, got {value:g}", field=name)
        for name in ("max_steps", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}", field=name)

    def steps(self, num_texts: int) -> int:
        """Return the steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * num_texts / self.batch))

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, from 0."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        share = (step - warm) / max(1, steps - warm)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    best_step: int = -1
    best_loss: float = math.inf
    bad_evaluations: int = 0
    elapsed_s: float = 0.0
    tokens: int = 0
    """Tokens computed in all steps."""
    fingerprint: str = ""
    """Of settings, data and model: a run is resumed with the same ones only."""


class Training:
    """One run."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        objective: Objective,
        schedule: Schedule,
        train: Sequence[Sample],
        held_back: Sequence[Sample],
        *,
        run: Path,
        fingerprint: str,
        report: Report,
        ranks: Ranks | None = None,
    ) -> None:
        """Take samples to learn and samples to evaluate on (there may be none); checkpoints go to `run`."""
        self._objective = objective
        self._device = next(iter(params.values())).device
        self._schedule = schedule
        self._train, self._held_back = train, held_back
        self._run = run
        self._ranks = ranks or Ranks("cpu")
        self._report = report if self._ranks.is_first else _tell_nobody
        self.progress = Progress(fingerprint=fingerprint)
        self.steps = schedule.steps(len(train))
        self._saved_step = 0
        self.params = dict(params)
        self.best: dict[str, Tensor] = {}
        decay = [p for p in self.params.values() if p.ndim == 2]
        rest = [p for p in self.params.values() if p.ndim != 2]
        groups = [
            {"params": decay, "weight_decay": schedule.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=(0.9, 0.99), foreach=False
        )

    def resume(self) -> int:
        """Go on from the newest checkpoint; return its step, 0 when there is none. ModelFileError when it
        belongs to another run.
        """
        found = load_latest(self._run)
        if found is None:
            return 0
        saved = found.progress
        if saved.get("fingerprint") != self.progress.fingerprint:
            raise ModelFileError(
                f"{self._run} holds a run of other settings, data or model; repeat those to resume it, or "
                "remove it to begin anew",
                field=str(self._run),
            )
        self.progress = Progress(
            step=int(number(saved, "step")),
            best_step=int(number(saved, "best_step")),
            best_loss=math.inf if saved["best_loss"] is None else number(saved, "best_loss"),
            bad_evaluations=int(number(saved, "bad_evaluations")),
            elapsed_s=number(saved, "elapsed_s"),
            tokens=int(number(saved, "tokens")),
            fingerprint=self.progress.fingerprint,
        )
        self._read(found)
        self._saved_step = self.progress.step
        return self.progress.step

    def _read(self, found: Checkpoint) -> None:
        """Take parameters, moments and the best parameters so far, each process its own rows."""

        def filled(tensor: Tensor, name: str) -> Tensor:
            here(tensor).copy_(found.rows(name, *rows_here(tensor)))
            return tensor

        with torch.no_grad():
            for name, param in self.params.items():
                filled(param, f"param.{name}")
                if f"best.{name}" in found.names:
                    self.best[name] = filled(torch.empty_like(param), f"best.{name}")
                self._optimizer.state[param] = {
                    "step": torch.tensor(float(self.progress.step)),
                    "exp_avg": filled(torch.empty_like(param), f"first.{name}"),
                    "exp_avg_sq": filled(torch.empty_like(param), f"second.{name}"),
                }

    def run(self, should_stop: Callable[[], bool]) -> bool:
        """Train to the end; return False when `should_stop` ended it, with a checkpoint to resume from.

        Raises NonFiniteError when a loss is NaN or infinite; the last checkpoint stays as it was.
        """
        progress = self.progress
        every = max(1, self.steps // self._schedule.evaluations)
        started, before_s = time.monotonic(), progress.elapsed_s
        saved_s = started
        self._objective.prepare([*self._train, *self._held_back])
        if self._held_back and progress.step == 0:
            self._tell_evaluation(self.losses_of(self._held_back))
        while progress.step < self.steps and not self._is_stale():
            if self._ranks.agree(should_stop()):
                self._save()
                self._report({"event": "stopped", "step": progress.step})
                return False
            self._step(time.monotonic() - started + before_s)
            progress.elapsed_s = time.monotonic() - started + before_s
            if self._held_back and (progress.step % every == 0 or progress.step == self.steps):
                self._evaluate()
            if self._schedule.kept_epochs and self._ends_epoch(progress.step):
                self._keep()
            wanted = self._schedule.checkpoint_steps
            due = progress.step % wanted == 0 if wanted else time.monotonic() - saved_s > CHECKPOINT_S
            if self._ranks.agree(due):
                self._save()
                saved_s = time.monotonic()
        return True

    def result(self) -> dict[str, Tensor]:
        """Return the parameters of the best evaluation, the last ones where nothing was evaluated; in all
        processes but the first, which writes them, nothing.
        """
        result: dict[str, Tensor] = {}
        for name, param in self.params.items():
            tensor = whole(self.best.get(name, param.detach()))
            if self._ranks.is_first:
                result[name] = tensor
        return result

    def kept(self) -> dict[int, dict[str, Tensor]]:
        """Return the parameters at the ends of the last epochs, as many as are kept, by step."""
        found = (Checkpoint(path) for path in checkpoints(self._run / _KEPT))
        return {
            int(number(state.progress, "step")): {name: state.whole(name) for name in self.params}
            for state in found
        }

    def losses_of(self, samples: Sequence[Sample]) -> Tensor:
        """Return the losses of samples in float64, without gradients."""
        with torch.no_grad():
            parts = [
                self._objective.losses(group).double()
                for group in passes(samples, self._schedule.pass_tokens)
            ]
        return torch.cat(parts)

    def loss_of(self, samples: Sequence[Sample]) -> float:
        """Return the mean loss: in nats a learned token, or of a pair."""
        return float(self.losses_of(samples).mean())

    def _is_stale(self) -> bool:
        return 0 < self._schedule.patience <= self.progress.bad_evaluations

    def _samples(self, step: int) -> list[Sample]:
        """Return the samples of a step: every epoch goes through all of them in an order of its own."""
        count = len(self._train)
        chosen: list[Sample] = []
        for place in range(step * self._schedule.batch, (step + 1) * self._schedule.batch):
            order = np.random.default_rng([self._schedule.seed, place // count]).permutation(count)
            chosen.append(self._train[int(order[place % count])])
        return chosen

    def _step(self, elapsed_s: float) -> None:
        progress = self.progress
        started = time.monotonic()
        samples = self._samples(progress.step)
        rate = self._schedule.rate(progress.step, self.steps)
        count = sum(self._objective.count(sample) for sample in samples)
        loss = 0.0
        for group, factor in self._passes(samples):
            part = self._objective.losses(group).sum() * (factor / count)
            part.backward()  # pyright: ignore[reportUnknownMemberType]
            loss += float(part.detach())
        loss = self._ranks.total(loss)
        self._ranks.add_gradients(self.params)
        norm = self._ranks.clip(self.params, CLIP)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"the loss of step {progress.step + 1} is {loss}, its gradient {norm}: training came apart; "
                f"lower --lr ({self._schedule.lr:g}); the last checkpoint in {self._run} is good"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        self._optimizer.zero_grad()
        progress.step += 1
        seconds = time.monotonic() - started
        tokens = sum(tokens_of(sample) for sample in samples)
        progress.tokens += tokens
        self._report({
            "event": "step", "step": progress.step, "steps": self.steps, "loss": loss, "lr": rate,
            "gradient": norm, "tokens": tokens,
            "trained_tokens": progress.tokens, "tokens_per_s": tokens / max(seconds, 1e-9),
            "eta_s": (elapsed_s + seconds) / progress.step * (self.steps - progress.step),
            "memory_bytes": self._ranks.most(_peak_memory(self._device)),
        })  # fmt: skip

    def _passes(self, samples: list[Sample]) -> list[tuple[list[Sample], float]]:
        """Return this process's passes and how much each counts. All processes have as many, because they
        gather shards together: some compute a sample that counts for nothing.
        """
        plans = [
            [(group, 1.0) for group in passes(self._ranks.share(samples, rank), self._schedule.pass_tokens)]
            for rank in range(self._ranks.count)
        ]
        own, most = plans[self._ranks.rank], max(len(plan) for plan in plans)
        return [*own, *[(samples[:1], 0.0)] * (most - len(own))]

    def _evaluate(self) -> None:
        progress = self.progress
        losses = self.losses_of(self._held_back)
        loss = float(losses.mean())
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the evaluation after step {progress.step} gave the loss {loss}; lower --lr"
            )
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.bad_evaluations = loss, progress.step, 0
            self.best = {name: param.detach().clone() for name, param in self.params.items()}
        else:
            progress.bad_evaluations += 1
        self._tell_evaluation(losses)

    def _tell_evaluation(self, losses: Tensor) -> None:
        """Report losses on the held-back samples; those before the first step are no result to go back to."""
        loss = float(losses.mean())
        self._report({
            "event": "evaluation", "step": self.progress.step, "loss": loss,
            "best": min(loss, self.progress.best_loss), **self._objective.metrics(losses),
        })  # fmt: skip

    def _ends_epoch(self, step: int) -> bool:
        count, batch = len(self._train), self._schedule.batch
        return step == self.steps or step * batch // count > (step - 1) * batch // count

    def _keep(self) -> None:
        """Keep the parameters as they are at the end of an epoch, and tell so."""
        step, kept = self.progress.step, self._schedule.kept_epochs
        gathered = (whole(param.detach()).cpu() for param in self.params.values())
        if not self._ranks.is_first:
            for _ in gathered:
                continue
            return
        shapes = {name: tuple(param.shape) for name, param in self.params.items()}
        folder = self._run / _KEPT
        if not (folder / step_name(step)).exists():  # or a process that was killed since had these bits
            save_checkpoint(folder, step, shapes, gathered, {"step": step}, kept=kept)
        self._report(
            {"event": "epoch", "step": step, "epoch": step * self._schedule.batch // len(self._train)}
        )

    def _save(self) -> None:
        """Write a checkpoint, then announce it."""
        progress = self.progress
        if progress.step == self._saved_step:
            return
        self._saved_step = progress.step
        parts = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, param in self.params.items():
            state = cast("dict[str, Tensor]", self._optimizer.state[param])
            parts[f"param.{name}"] = param.detach()
            parts[f"first.{name}"], parts[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        gathered = (whole(tensor).cpu() for tensor in parts.values())
        if not self._ranks.is_first:
            for _ in gathered:
                continue
            return
        values = asdict(progress)
        if not math.isfinite(progress.best_loss):
            values["best_loss"] = None
        shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        path = save_checkpoint(self._run, progress.step, shapes, gathered, values)
        self._report({"event": "checkpoint", "step": progress.step, "path": str(path)})


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far, on the device that it trains on."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _tell_nobody(event: Mapping[str, Any]) -> None:
    """Say nothing: the first process tells."""
