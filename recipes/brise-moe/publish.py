"""Write brise-moe as a Hugging Face directory: weights in bf16, what experts are used for, and the card.

    python recipes/brise-moe/publish.py --run RUN --brise DIR --out OUT
    python recipes/brise/evaluate.py --run RUN --data DATA --model OUT --out OUT.json
    python recipes/brise-moe/publish.py --run RUN --brise DIR --out OUT --measured OUT.json --beside DIR.json
    bise quantize OUT --quant q4 --calibrate --out PACKED

DIR.json is what evaluate.py says of the model in DIR, which brise-moe was grown from.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np

RECIPES = Path(__file__).parents[1]
sys.path[:0] = [str(RECIPES), str(RECIPES / "brise")]

from chat import ChatEncoder  # noqa: E402
from data import concatenate  # noqa: E402
from drills import sums  # noqa: E402
from export import write_checksums, write_configs, write_weights  # noqa: E402
from pictures import shares  # noqa: E402
from routing import Grid, expert_use  # noqa: E402
from train import read_weights, steps_of  # noqa: E402
from upcycle import SEED, SHARED, STAGE, upcycled_config  # noqa: E402

from bise.config import ModelConfig  # noqa: E402
from bise.model.checkpoint import open_model  # noqa: E402

ROWS = 64
"""Of each kind, on which the use of experts is counted."""
SUMS = 4000
KEPT = ("tokenizer.json", "LICENSE")
CARD = """\
---
license: cc-by-sa-4.0
language:
- en
pipeline_tag: text-generation
tags:
- mixtral
- chat
---
# brise-moe

The small Mixtral-style sibling of brise, the model that ships inside bise: {experts} experts in each
layer, of which {top_k} answer for every token. {params:.1f} million parameters, {active:.2f} million of
them active per token ({dense:.2f} million in brise). It is there so that mixtures of experts can be tried
with a model that talks, and is as little to be relied on as brise. What brise's card says of data,
attribution and licence holds for it, too.

## Shape

{layers} layers, width {dim}, {heads} query heads and {kv_heads} key/value heads of {head_dim}, {experts}
experts of width {hidden} ({top_k} a token, weights by a softmax over their scores), sliding window
{window} tokens, context {context} tokens. Tokenizer and chat format are brise's.

## How it was made

Sparse upcycling in pairs (`recipes/brise-moe/upcycle.py`): two experts share out the {old_hidden} hidden
units of brise's layer, each with the {shared} that speak loudest and half of the others; four such pairs a
layer. The router begins with equal scores for the two of a pair, so the first step computes what brise
computes. Then {steps} steps of {rows} rows of 512 tokens ({tokens:.2f} M tokens, a third of the rows text,
the rest chats and drills), Muon and AdamW, rate {lr:g} falling to zero, with a load-balancing loss in the
form of Switch Transformers over both choices of a token (its coefficients: the recipe's README). Seed {seed}.

## Measured

{measured}
## What the experts are used for

![share of choices of each expert](experts.svg)

Share of the choices of each layer that falls on each expert, on held-back text, on held-back chats and on
generated sums ({kept} rows of 512 tokens each; `experts.json`). Least and most over layers and experts:
{extremes}.
{specialised}
"""


def texts(run: Path, encoder: ChatEncoder) -> dict[str, np.ndarray]:
    """Return rows of 512 tokens of prose, chat and sums."""
    drills = [
        encoder.chat(row["messages"])
        for row in sums(SUMS, random.Random(SEED), frozenset())  # no held-back prompts are drilled here
    ]
    found = {
        "prose": np.load(run / "valid_text.ids.npy"),
        "chat": np.load(run / "valid_chat.ids.npy"),
        "sums": concatenate(drills, STAGE.row_tokens)[0],
    }
    return {kind: rows[:ROWS, : STAGE.row_tokens] for kind, rows in found.items()}


def extremes(use: dict[str, Grid]) -> str:
    """Return the least and the greatest share of each kind of text, in words."""
    return "; ".join(
        f"{kind} {100 * min(map(min, grid)):.1f} to {100 * max(map(max, grid)):.1f} %"
        for kind, grid in use.items()
    )


def apart(first: Grid, second: Grid) -> float:
    """Return which part of the choices would have to move to turn one use into the other, over the layers."""
    layers = [
        sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2
        for one, other in zip(first, second, strict=True)
    ]
    return sum(layers) / len(layers)


def measured(own: Path | None, beside: Path | None) -> str:
    """Return the table of held-back losses and right answers; a line that says so when there is none."""
    if own is None or beside is None:
        return "Not yet.\n"
    rows = ["| model | text: nats a token | chat: nats a token | exact answers | sums and numbers right |"]
    rows.append("|---|---:|---:|---:|---:|")
    for name, path in (("brise, which it was grown from", beside), ("brise-moe", own)):
        found = json.loads(path.read_text("utf-8"))
        matches = found["exact_match"].values()
        exact, count, right, numbers = (
            sum(match[key] for match in matches) for key in ("matched", "rows", "number_matched", "numbers")
        )
        losses = [found["loss"][kind]["nats_per_token"] for kind in ("text", "chat")]
        cells = (name, *(f"{loss:.3f}" for loss in losses), f"{exact} of {count}", f"{right} of {numbers}")
        rows.append(f"| {' | '.join(cells)} |")
    told = "Greedy answers, the held-back sets of brise's card, weights in float32 (evaluate.py)."
    return "\n".join([*rows, "", told, ""])


def card(dense: ModelConfig, config: ModelConfig, steps: int, use: dict[str, Grid], table: str) -> str:
    """Return README.md."""
    tokens = steps * STAGE.rows_per_step * STAGE.row_tokens
    specialised = (
        f"Between prose and sums {100 * apart(use['prose'], use['sums']):.0f} % of the choices move to "
        f"another expert, between prose and chat {100 * apart(use['prose'], use['chat']):.0f} %."
    )
    return CARD.format(
        experts=config.num_experts, top_k=config.experts_per_token, params=config.num_params / 1e6,
        active=config.num_active_params / 1e6, dense=dense.num_active_params / 1e6, layers=config.num_layers,
        dim=config.dim, heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        hidden=config.hidden_dim, window=config.windows[0], context=config.max_context,
        old_hidden=dense.hidden_dim, shared=SHARED, steps=steps, rows=STAGE.rows_per_step,
        tokens=tokens / 1e6, lr=STAGE.peak_lr, seed=SEED, measured=table, kept=ROWS,
        extremes=extremes(use), specialised=specialised,
    )  # fmt: skip


def main() -> None:
    """Publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with the held-back arrays")
    parser.add_argument("--work", type=Path, help="where moe.safetensors is; default: RUN")
    parser.add_argument("--brise", type=Path, required=True, help="directory of the model it began with")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--measured", type=Path, help="what evaluate.py says of it")
    parser.add_argument("--beside", type=Path, help="what evaluate.py says of the model it began with")
    options = parser.parse_args()
    checkpoint = (options.work or options.run) / "moe.safetensors"
    dense = open_model(options.brise).config
    config, weights = upcycled_config(dense), read_weights(checkpoint)
    options.out.mkdir(parents=True, exist_ok=True)
    write_weights(options.out, config, weights)
    write_configs(options.out, config)
    for name in KEPT:
        if (options.brise / name).is_file():
            shutil.copy(options.brise / name, options.out / name)
    use = expert_use(config, weights, texts(options.run, ChatEncoder.load(options.out / "tokenizer.json")))
    (options.out / "experts.json").write_text(json.dumps(use) + "\n", "utf-8")
    (options.out / "experts.svg").write_text(shares(use), "utf-8")
    table = measured(options.measured, options.beside)
    text = card(dense, config, steps_of(checkpoint), use, table)
    (options.out / "README.md").write_text(text, "utf-8")
    write_checksums(options.out)
    print(f"wrote {options.out}: {config.num_params} parameters, {extremes(use)}")


if __name__ == "__main__":
    main()
