"""Train brise in stages: pretrain (every token), tune, polish (assistant turns), grow (both); resumable.

    python recipes/brise/train.py --run RUN --stage pretrain
    python recipes/brise/train.py --run RUN --stage pretrain --decay-steps 400
    python recipes/brise/train.py --run RUN --stage tune --max-steps 300

The rate warms up and stays until a run is started with `--decay-steps`: from there it falls to zero over so
many steps, and the run ends. Resume without the flag to keep to the plan; with it, the rest of the fall is
planned anew. A run that ended goes on with `--decay-level` as well. SIGTERM and SIGINT write a checkpoint and
stop. Progress is one JSON line a report in RUN/<stage>.jsonl.
"""

import argparse
import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from grow import grown
from mixture import STAGES, Mixture, RecipeError, Stage
from network import Network, Weights, initial_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bise.config import ModelConfig
from bise.model.transformer import weight_shapes

CHECKPOINT_S = 120.0
"""Seconds between checkpoints; one takes 0.1 s."""
REPORT_STEPS = 20
VALID_STEPS = 200
VALID_ROWS = 64


Targets = tuple[Tensor, Tensor, Tensor]
"""Ids and targets [T] int64; float32 [T], which targets are learned, or their shares of the loss."""
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`Network.loss`, compiled or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a stage stands; with the weights and moments this is all that a resumed run needs."""

    stage: str
    step: int = 0
    elapsed_s: float = 0.0
    decay_start: int = -1
    """Step at which the rate began to fall; -1 while it has not."""
    decay_steps: int = 0
    decay_level: float = 1.0
    """Share of the peak rate from which it falls; below 1 when the end was planned anew during a fall."""

    @property
    def is_finished(self) -> bool:
        """True when the rate has reached zero."""
        return self.decay_start >= 0 and self.step >= self.decay_start + self.decay_steps

    @property
    def level(self) -> float:
        """Share of the peak rate at this step, warm-up aside: flat, then a linear fall to zero."""
        if self.decay_start < 0:
            return 1.0
        left = self.decay_start + self.decay_steps - self.step
        return self.decay_level * min(1.0, max(0.0, left / self.decay_steps))

    def rate(self, stage: Stage) -> float:
        """Return the learning rate of the next step."""
        return stage.peak_lr * self.level * min(1.0, (self.step + 1) / stage.warmup_steps)

    def ending_in(self, decay_steps: int, level: float | None = None) -> "Progress":
        """Return this progress with the fall to zero planned from here, over `decay_steps` steps.

        It begins at `level`, a share of the peak rate; without one, at the level reached.
        """
        level = self.level if level is None else level
        return replace(self, decay_level=level, decay_start=self.step, decay_steps=decay_steps)


class Rows:
    """Rows of one array in a seeded order that depends on the step alone."""

    def __init__(self, run: Path, name: str, rows_per_step: int, seed: int) -> None:
        """Map the arrays that data.py wrote; raises RecipeError when they are missing."""
        try:
            self._ids = np.load(run / f"{name}.ids.npy", mmap_mode="r")
            self._learned = np.load(run / f"{name}.learned.npy", mmap_mode="r")
        except OSError as error:
            raise RecipeError(f"{run / name}.ids.npy cannot be read; run data.py first") from error
        self.rows_per_step = rows_per_step
        self.row_tokens: int = self._ids.shape[1] - 1
        self.steps_per_pass = len(self._ids) // rows_per_step
        if self.steps_per_pass == 0:
            raise RecipeError(f"{name} has {len(self._ids)} rows, fewer than the {rows_per_step} of one step")
        self._seed = seed

    def step(self, step: int) -> Targets:
        """Return what a step trains on."""
        order = np.random.default_rng([self._seed, step // self.steps_per_pass]).permutation(len(self._ids))
        first = step % self.steps_per_pass * self.rows_per_step
        return self.rows(np.sort(order[first : first + self.rows_per_step]))

    def rows(self, index: npt.NDArray[np.int64]) -> Targets:
        """Return the rows of `index`."""
        ids = torch.from_numpy(self._ids[index].astype(np.int64))
        learned = torch.from_numpy(self._learned[index][:, 1:].reshape(-1)).float()
        return ids[:, :-1].reshape(-1), ids[:, 1:].reshape(-1), learned


def joined(parts: Sequence[Targets]) -> Targets:
    """Return the rows of several arrays as one; their learned targets share the loss evenly."""
    ids, targets, learned = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ids, targets, learned / learned.sum().clamp(min=1.0)


def make_optimizers(weights: Weights) -> list[torch.optim.Optimizer]:
    """Return AdamW for embeddings, norms and routers and Muon for the other matrices, rates set by each step.

    Muon: Jordan 2024, as in torch.optim, its updates scaled to the size of AdamW's: one rate serves both.
    """
    tables = [name for name in weights if name == "tok_embeddings" or name.endswith(".router")]
    matrices = [weight for name, weight in weights.items() if weight.ndim == 2 and name not in tables]
    vectors = [weight for weight in weights.values() if weight.ndim == 1]
    adam = torch.optim.AdamW(
        [
            {"params": [weights[name] for name in tables], "weight_decay": 0.01},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        fused=True,
    )
    muon = torch.optim.Muon(matrices, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


class Trainer:
    """Weights, optimizers and progress of one stage."""

    def __init__(self, config: ModelConfig, weights: Weights, progress: Progress) -> None:
        """Take float32 weights, which training changes in place."""
        self.config = config
        self.weights = {name: weight.requires_grad_() for name, weight in weights.items()}
        self.progress = progress
        self.optimizers = make_optimizers(self.weights)

    def step(self, loss_of: LossOf, rows: Sequence[Rows], stage: Stage) -> float:
        """Do one step and return its loss in nats a token."""
        rate = self.progress.rate(stage)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = loss_of(*joined([part.step(self.progress.step) for part in rows]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.progress = replace(self.progress, step=self.progress.step + 1)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write weights, moments and progress to `path`, whole or not at all."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        names = {id(weight): name for name, weight in self.weights.items()}
        for optimizer in self.optimizers:
            for weight, state in optimizer.state.items():
                tensors |= {f"state.{names[id(weight)]}.{key}": value for key, value in state.items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"progress": json.dumps(asdict(self.progress))})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, config: ModelConfig) -> "Trainer":
        """Read back what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
        tensors = load_file(path)
        weights = {
            name: tensors[f"weight.{name}"] for name in weight_shapes(config)
        }  # the order of summing norms
        trainer = cls(config, weights, progress)
        for optimizer in trainer.optimizers:
            by_index: dict[int, dict[str, Tensor]] = {}
            packed = optimizer.state_dict()
            ordered = [weight for group in optimizer.param_groups for weight in group["params"]]
            names = {id(weight): name for name, weight in trainer.weights.items()}
            for index, weight in enumerate(ordered):
                prefix = f"state.{names[id(weight)]}."
                found = {
                    key.removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
                if found:
                    by_index[index] = found
            optimizer.load_state_dict({"state": by_index, "param_groups": packed["param_groups"]})
        return trainer


def read_weights(path: Path) -> Weights:
    """Return the float32 weights of a checkpoint; raises RecipeError when there is none."""
    if not path.is_file():
        raise RecipeError(f"{path} is missing; train that stage first")
    return {name[7:]: tensor for name, tensor in load_file(path).items() if name.startswith("weight.")}


def steps_of(path: Path) -> int:
    """Return the step at which a checkpoint stands."""
    with safe_open(path, framework="pt") as file:
        return Progress(**json.loads(file.metadata()["progress"])).step


def start(
    run: Path,
    stage: str,
    mixture: Mixture,
    decay_steps: int,
    begin_from: Path | None = None,
    decay_level: float | None = None,
) -> Trainer:
    """Return the trainer of a stage: resumed, begun from scratch or from a checkpoint (the stage before)."""
    path = run / f"{stage}.safetensors"
    if path.is_file():
        trainer = Trainer.load(path, mixture.shape(stage))
    elif stage == STAGES[0]:
        trainer = Trainer(mixture.model, initial_weights(mixture.model, mixture.seed), Progress(stage=stage))
    else:
        weights = read_weights(begin_from or run / f"{STAGES[STAGES.index(stage) - 1]}.safetensors")
        if stage == "grow":
            weights = grown(weights, mixture.model, mixture.grown, mixture.seed)
        trainer = Trainer(mixture.shape(stage), weights, Progress(stage=stage))
    if decay_steps:
        trainer.progress = trainer.progress.ending_in(decay_steps, decay_level)
    return trainer


def valid_loss(network: Network, rows: Rows) -> float:
    """Return the loss in nats a learned token over the first VALID_ROWS held-back rows."""
    total = 0.0
    share = 0
    with torch.no_grad():
        for first in range(0, min(VALID_ROWS, rows.steps_per_pass * rows.rows_per_step), rows.rows_per_step):
            total += float(network.loss(*joined([rows.rows(np.arange(first, first + rows.rows_per_step))])))
            share += 1
    return total / share


def run_steps(
    trainer: Trainer,
    loss_of: LossOf,
    rows: Sequence[Rows],
    stage: Stage,
    *,
    checkpoint: Path,
    valid: Callable[[], float],
    valid_steps: int = VALID_STEPS,
    max_steps: int | None = None,
) -> None:
    """Train until the rate has fallen to zero, `max_steps` are done or a signal asks to stop.

    Writes `checkpoint` now and then and at the end; a line every REPORT_STEPS goes to the .jsonl beside it,
    every `valid_steps` with what `valid` says.
    """
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stops.append(received))
    saved_s = reported_s = time.monotonic()
    before_s = trainer.progress.elapsed_s
    losses: list[float] = []
    tokens_per_step = stage.rows_per_step * stage.row_tokens
    with checkpoint.with_suffix(".jsonl").open("a", encoding="utf-8") as log:
        while not (trainer.progress.is_finished or stops or trainer.progress.step == max_steps):
            rate = trainer.progress.rate(stage)
            losses.append(trainer.step(loss_of, rows, stage))
            now_s = time.monotonic()
            step = trainer.progress.step
            if step % REPORT_STEPS == 0:
                entry = {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "loss": round(sum(losses) / len(losses), 4),
                }
                speed = len(losses) * tokens_per_step / (now_s - reported_s)
                before_s += now_s - reported_s
                entry |= {"lr": rate, "tok_s": round(speed), "elapsed_s": round(before_s, 1)}
                if step % valid_steps == 0:
                    entry["valid_loss"] = round(valid(), 4)
                print(json.dumps(entry), file=log, flush=True)
                trainer.progress = replace(trainer.progress, elapsed_s=before_s)
                losses, reported_s = [], time.monotonic()
            if now_s - saved_s > CHECKPOINT_S:
                trainer.save(checkpoint)
                saved_s = now_s
    trainer.save(checkpoint)


def train(
    run: Path, trainer: Trainer, mixture: Mixture, *, compiled: bool, max_steps: int | None = None
) -> None:
    """Train a stage; see `run_steps`."""
    name = trainer.progress.stage
    stage = mixture.stages[name]
    network = Network(trainer.config, trainer.weights, stage.rows_per_step, stage.row_tokens)
    held_back = Rows(run, "valid_text" if name == "pretrain" else "valid_chat", stage.rows_per_step, 0)
    judge = Network(trainer.config, trainer.weights, stage.rows_per_step, held_back.row_tokens)
    run_steps(
        trainer,
        torch.compile(network.loss, dynamic=False) if compiled else network.loss,
        [Rows(run, array, count, mixture.seed) for array, count in mixture.blended(name).items()],
        stage,
        checkpoint=run / f"{name}.safetensors",
        valid=lambda: valid_loss(judge, held_back),
        max_steps=max_steps,
    )


def main() -> None:
    """Train one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with the arrays; checkpoints go here")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument(
        "--decay-steps", type=int, default=0, help="begin now to let the rate fall, over so many steps"
    )
    parser.add_argument(
        "--decay-level",
        type=float,
        help="share of the peak rate to fall from, for a run that ended (default: where the rate stands)",
    )
    parser.add_argument(
        "--begin-from", type=Path, help="checkpoint to begin from (default: the stage before)"
    )
    parser.add_argument("--max-steps", type=int, help="stop at this step without decay (for trials)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--eager", action="store_true", help="do not compile (slower; no C++ compiler needed)"
    )
    parser.add_argument("--mixture", type=Path, default=Path(__file__).with_name("mixture.toml"))
    args = parser.parse_args()
    if args.decay_level is not None and not args.decay_steps:
        parser.error("--decay-level says where the rate falls from: give --decay-steps as well")
    torch.set_num_threads(args.threads)
    mixture = Mixture.load(args.mixture)
    trainer = start(args.run, args.stage, mixture, args.decay_steps, args.begin_from, args.decay_level)
    train(args.run, trainer, mixture, compiled=not args.eager, max_steps=args.max_steps)


if __name__ == "__main__":
    main()
