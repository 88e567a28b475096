"""Make brise-moe: experts grown out of brise's feed-forward layers, then trained with balanced routing.

    python recipes/brise-moe/upcycle.py --run RUN --brise src/bise/hub/brise
    python recipes/brise-moe/upcycle.py --run RUN --brise src/bise/hub/brise --dense    # the control

RUN holds the token arrays of recipes/brise/data.py; `moe.safetensors` and `moe.jsonl` go there (`--work`
names another place). A run that was stopped goes on. `--dense` trains brise itself on the same rows for the
same steps, to tell what the experts bring from what more training brings.

Sparse upcycling (arXiv 2212.05055), in pairs. Copies of a layer as experts would be eight times its size.
Here two experts share out the units of the layer: each holds the SHARED units that speak loudest and half of
the others, whose output counts twice. The router begins with equal scores for the two of a pair, so the two
best are always a pair, each weighs one half, and the model begins as the same function that brise is. Four
pairs, cut in four ways, drift apart in training.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "brise"))

from mixture import Stage
from network import Network, Weights
from train import Progress, Rows, Trainer, run_steps, valid_loss

from bise.config import ModelConfig
from bise.model.checkpoint import open_model
from bise.train.balance import BALANCE
from bise.train.network import read_weights

SEED = 20261122
EXPERTS = 8
SHARED = 64
"""Units of a layer that both experts of a pair hold."""
ROUTER_SPREAD = 0.1
"""Of the router's first weights; rows of width 256 then score tokens about 1.6 apart."""
ROWS = {"polish": 11, "pretrain": 5}
"""Rows of each kind in a step: chats with drills, and text."""
STAGE = Stage(row_tokens=512, rows_per_step=sum(ROWS.values()), peak_lr=1.5e-3, warmup_steps=20)


def upcycled_config(dense: ModelConfig) -> ModelConfig:
    """Return the shape of the model with experts."""
    return replace(
        dense,
        family="mixtral",
        num_experts=EXPERTS,
        experts_per_token=2,
        hidden_dim=(dense.hidden_dim + SHARED) // 2,
    )


def upcycled(dense: ModelConfig, weights: Weights, seed: int) -> Weights:
    """Return weights of the model with experts that computes what the dense one computes."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for name, weight in weights.items():
        prefix, _, last = name.rpartition(".")
        if last not in ("w1", "w2", "w3"):
            found[name] = weight
        elif last == "w1":
            pairs = torch.randn(EXPERTS // 2, dense.dim, generator=generator) * ROUTER_SPREAD
            found[f"{prefix}.router"] = pairs.repeat_interleave(2, 0)
            layer = tuple(weights[f"{prefix}.{part}"] for part in ("w1", "w3", "w2"))
            for pair in range(EXPERTS // 2):
                for half, expert in enumerate(_halves(layer, generator)):
                    for part, tensor in zip(("w1", "w3", "w2"), expert, strict=True):
                        found[f"{prefix}.experts.{2 * pair + half}.{part}"] = tensor
    return found


def _halves(layer: tuple[Tensor, ...], generator: torch.Generator) -> list[tuple[Tensor, ...]]:
    """Return two experts whose mean is the layer (gate [F, E], up [F, E], down [E, F])."""
    gate, up, down = layer
    loudness = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    order = loudness.argsort(descending=True, stable=True)
    shared, rest = order[:SHARED], order[SHARED:]
    rest = rest[torch.randperm(len(rest), generator=generator)]
    experts: list[tuple[Tensor, ...]] = []
    for own in rest.chunk(2):
        units = torch.cat((shared, own))
        columns = down[:, units].clone()
        columns[:, SHARED:] *= 2
        experts.append((gate[units].clone(), up[units].clone(), columns))
    return experts


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with the token arrays")
    parser.add_argument("--work", type=Path, help="where checkpoint and log go; default: RUN")
    parser.add_argument("--brise", type=Path, required=True, help="directory of the model to begin with")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--decay-steps", type=int, help="end after so many more steps, falling from here")
    parser.add_argument("--balance", type=float, default=BALANCE, help="what the balancing loss counts")
    parser.add_argument("--dense", action="store_true", help="train brise itself on: the control")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_model(options.brise)
    name = "dense" if options.dense else "moe"
    config = source.config if options.dense else upcycled_config(source.config)
    path = (options.work or options.run) / f"{name}.safetensors"
    if path.is_file():
        trainer = Trainer.load(path, config)
    else:
        weights = read_weights(source, "cpu")
        if not options.dense:
            weights = upcycled(source.config, weights, SEED)
        decay = max(1, options.steps - STAGE.warmup_steps)
        trainer = Trainer(
            config, weights, Progress(stage=name, decay_start=options.steps - decay, decay_steps=decay)
        )
    if options.decay_steps:
        trainer.progress = trainer.progress.ending_in(options.decay_steps)
    network = Network(
        config,
        trainer.weights,
        STAGE.rows_per_step,
        STAGE.row_tokens,
        balance=options.balance * config.is_moe,
    )
    rows = [Rows(options.run, array, count, SEED) for array, count in ROWS.items()]
    chat = Rows(options.run, "valid_chat", 8, 0)
    judge = Network(config, trainer.weights, chat.rows_per_step, chat.row_tokens)
    run_steps(
        trainer, network.loss, rows, STAGE, checkpoint=path,
        valid=lambda: valid_loss(judge, chat), valid_steps=100,
    )  # fmt: skip


if __name__ == "__main__":
    main()
