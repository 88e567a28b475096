"""Small ablations of what Mistral's papers claim: attention heads, window, experts; each at equal compute.

    python recipes/ablations/ablate.py --run RUN --work WORK --out recipes/ablations/results/small --seeds 2

RUN is a folder of the brise recipe with `pretrain.ids.npy`, `valid_text.*` and `valid_chat.*`
(recipes/brise/data.py). Every variant is trained once per seed and written to OUT/<variant>.<seed>.json; what
is there is not trained again, and a run that was stopped goes on from its checkpoint in WORK. Several
processes may share the work: each takes a run that nobody trains. report.py makes the report.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

RECIPES = Path(__file__).parents[1]
sys.path[:0] = [str(RECIPES), str(RECIPES / "brise")]

from mixture import Stage  # noqa: E402
from network import Network, Weights, initial_weights  # noqa: E402
from routing import expert_use  # noqa: E402
from train import Progress, Rows, Trainer, run_steps, valid_loss  # noqa: E402

from bise.config import ModelConfig  # noqa: E402
from bise.train.balance import BALANCE  # noqa: E402

ROW_TOKENS = 512
LONG_TOKENS = 2048
"""Of the rows on which losses are told by position: four times what was trained on."""
LONG_ROWS = 24
BUCKET = 64
VALID_ROWS = 128
CHAT_ROWS = 80
ROUTED_ROWS = 64
VALID_STEPS = 60
WINDOW = 64


@dataclass(frozen=True, slots=True)
class Size:
    """How large and how long."""

    dim: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    rows: int
    """Of 512 tokens in a step."""
    steps: int
    """Of the base variant; the others get as much compute."""
    peak_lr: float = 4e-3

    @property
    def kv_heads(self) -> int:
        """Of the base variant: four queries share a key, as in Mistral 7B."""
        return self.heads // 4


SIZES = {
    "smallest": Size(64, 2, 8, 8, 192, 4, 20),
    "small": Size(128, 4, 8, 16, 384, 8, 240),
    "medium": Size(256, 6, 8, 32, 768, 16, 2000, 3e-3),
}


def variants(size: Size) -> dict[str, ModelConfig]:
    """Return the models that are compared: `gqa` is the base of all three questions."""
    base = ModelConfig(
        family="mistral", dim=size.dim, num_layers=size.layers, num_heads=size.heads,
        num_kv_heads=size.kv_heads, head_dim=size.head_dim, hidden_dim=size.hidden, vocab_size=4096,
        max_context=4096, tied_embeddings=True,
    )  # fmt: skip
    experts = {"family": "mixtral", "num_experts": 8, "experts_per_token": 2}
    return {
        "gqa": base,
        "mha": replace(base, num_kv_heads=size.heads),
        "mqa": replace(base, num_kv_heads=1),
        "window": replace(base, windows=(WINDOW,) * size.layers),
        "moe": replace(base, hidden_dim=size.hidden // 2, **experts),
        "dense-total": replace(base, hidden_dim=4 * size.hidden),
    }


def flops_per_token(config: ModelConfig) -> float:
    """Return what a token of a row costs to train on: 6 per active weight (the embedding is looked up, but it
    is the output as well), and attention over the keys that it sees on average.
    """
    window = config.windows[0] or ROW_TOKENS
    seen = sum(min(position + 1, window) for position in range(ROW_TOKENS)) / ROW_TOKENS
    return 6 * config.num_active_params + 12 * config.num_layers * config.q_dim * seen


def planned_steps(config: ModelConfig, size: Size) -> int:
    """Return the steps that cost what those of the base cost."""
    return round(size.steps * flops_per_token(variants(size)["gqa"]) / flops_per_token(config))


def losses_of(network: Network, rows: Rows, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses [count, ROW_TOKENS] of the first rows of a set, and which tokens are learned."""
    ids, targets, learned = rows.rows(np.arange(count))
    width = rows.row_tokens
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        for first in range(0, count, rows.rows_per_step):
            cut = [
                part.view(count, width)[first : first + rows.rows_per_step, :ROW_TOKENS].reshape(-1)
                for part in (ids, targets)
            ]
            parts.append(network.token_losses(*cut).view(-1, ROW_TOKENS))
    return torch.cat(parts).numpy(), (learned.view(count, width)[:, :ROW_TOKENS] > 0).numpy()


def by_position(config: ModelConfig, weights: Weights, run: Path) -> list[list[float]]:
    """Return the mean loss in each BUCKET of positions of long held-back rows, row after row [R, P]: rows of
    valid_text follow one another in the texts.
    """
    ids = np.load(run / "valid_text.ids.npy", mmap_mode="r")
    pieces = LONG_TOKENS // ROW_TOKENS
    step = len(ids) // LONG_ROWS
    assert step >= pieces
    network = Network(config, weights, 1, LONG_TOKENS)
    found: list[list[float]] = []
    for row in range(LONG_ROWS):
        chosen = np.asarray(ids[row * step : row * step + pieces], np.int64)
        assert (chosen[1:, 0] == chosen[:-1, -1]).all(), "rows overlap by one token"
        with torch.no_grad():
            losses = network.token_losses(
                torch.from_numpy(chosen[:, :-1].reshape(-1)), torch.from_numpy(chosen[:, 1:].reshape(-1))
            )
        found.append([round(float(part.mean()), 4) for part in losses.split(BUCKET)])
    return found


def texts(run: Path) -> dict[str, np.ndarray]:
    """Return the held-back rows on which the use of experts is told."""
    kinds = {"prose": "valid_text", "chat": "valid_chat"}
    return {
        kind: np.load(run / f"{name}.ids.npy")[:ROUTED_ROWS, :ROW_TOKENS].astype(np.int64)
        for kind, name in kinds.items()
    }


def trained(
    name: str, config: ModelConfig, size: Size, options: argparse.Namespace, seed: int
) -> tuple[Trainer, float | None]:
    """Return a variant after its training, or at the step where a signal asked to stop, and the seconds of a
    core that a step took (None: nothing was left to do).
    """
    steps = planned_steps(config, size)
    stage = Stage(
        row_tokens=ROW_TOKENS, rows_per_step=size.rows, peak_lr=size.peak_lr, warmup_steps=max(1, steps // 10)
    )
    path = options.work / f"{name}.{seed}.safetensors"
    if path.is_file():
        trainer = Trainer.load(path, config)
    else:
        planned = Progress(stage=name, decay_start=steps // 2, decay_steps=steps - steps // 2)
        trainer = Trainer(config, initial_weights(config, seed), planned)
    network = Network(config, trainer.weights, size.rows, ROW_TOKENS, balance=BALANCE * config.is_moe)
    judge = Network(config, trainer.weights, size.rows, ROW_TOKENS)
    held_back = Rows(options.run, "valid_text", size.rows, 0)
    before, began_s = trainer.progress.step, time.process_time()
    run_steps(
        trainer, network.loss, [Rows(options.run, "pretrain", size.rows, seed)], stage, checkpoint=path,
        valid=lambda: valid_loss(judge, held_back), valid_steps=VALID_STEPS,
    )  # fmt: skip
    done = trainer.progress.step - before
    return trainer, (time.process_time() - began_s) / done if done else None


def result_of(
    name: str, config: ModelConfig, size: Size, options: argparse.Namespace, seed: int
) -> Mapping[str, object]:
    """Train one variant and return what is reported of it."""
    trainer, step_s = trained(name, config, size, options, seed)
    if not trainer.progress.is_finished:
        raise SystemExit(f"stopped at step {trainer.progress.step} of {name}; the same command goes on")
    judge = Network(config, trainer.weights, size.rows, ROW_TOKENS)
    text, _ = losses_of(judge, Rows(options.run, "valid_text", size.rows, 0), VALID_ROWS)
    chat, learned = losses_of(judge, Rows(options.run, "valid_chat", size.rows, 0), CHAT_ROWS)
    log = [
        json.loads(line) for line in (options.work / f"{name}.{seed}.jsonl").read_text("utf-8").splitlines()
    ]
    reports = {entry["step"]: entry for entry in log}  # steps after the last checkpoint were done twice
    steps = trainer.progress.step
    tokens = steps * size.rows * ROW_TOKENS
    cache = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return {
        "variant": name, "size": options.size, "seed": seed, "steps": steps, "tokens": tokens,
        "flops": flops_per_token(config) * tokens, "core_seconds_a_step": step_s,
        "parameters": config.num_params, "active_parameters": config.num_active_params,
        "train_loss": reports[max(reports)]["loss"],
        "text_loss": float(text.mean()), "chat_loss": float(chat[learned].mean()),
        "text_rows": [round(float(loss), 4) for loss in text.mean(1)],
        "kv_bytes_per_token": cache,
        "kv_bytes_at_4096": cache * min(config.windows[0] or 4096, 4096),
        "curve": [
            [step, entry["valid_loss"]] for step, entry in sorted(reports.items()) if "valid_loss" in entry
        ],
        "bucket": BUCKET, "by_position": by_position(config, trainer.weights, options.run),
        "by_position_cut": by_position(
            replace(config, windows=(WINDOW,) * size.layers), trainer.weights, options.run
        ) if name == "gqa" else None,
        "expert_use": expert_use(config, trainer.weights, texts(options.run)) if config.is_moe else None,
        "shape": f"{size.layers} layers, width {size.dim}, {size.heads} heads of {size.head_dim} over "
        f"{config.num_kv_heads} of keys, hidden {config.hidden_dim}, 4096 tokens of vocabulary",
        "machine": f"torch {torch.__version__}, bf16, {options.threads} thread",
    }  # fmt: skip


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder with the token arrays")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="smallest")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--only", action="append", choices=variants(SIZES["smallest"]), help="may be repeated"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    size = SIZES[options.size]
    wanted = [name for name in variants(size) if not options.only or name in options.only]
    for seed, name in itertools.product(range(options.seeds), wanted):
        path = options.out / f"{name}.{seed}.json"
        with (options.work / f"{name}.{seed}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process trains it
            if path.exists():
                continue
            result = result_of(name, variants(size)[name], size, options, seed)
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            print(
                f"{name} seed {seed}: text {result['text_loss']:.4f}, chat {result['chat_loss']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
