"""The model card of brise, filled with what the logs and the evaluation say.

Owns the prose. Reads RUN/<stage>.jsonl, the progress in RUN/<stage>.safetensors and
RUN/evaluation.json.
"""

import json
from pathlib import Path
from typing import TypedDict, cast

from mixture import STAGES, Mixture
from train import steps_of

STAGE_WORDS = {
    "pretrain": "text and chats, every token learned",
    "tune": "chats, assistant turns learned",
    "polish": "the same with drills (copying, small sums, common words)",
    "grow": "more layers and hidden units, then text and polish at once",
}


class Report(TypedDict):
    """One line of a training log."""

    step: int
    tokens: int
    loss: float
    lr: float
    tok_s: int
    elapsed_s: float


class Evaluation(TypedDict):
    """What evaluate.py wrote."""

    loss: dict[str, dict[str, float]]
    exact_match: dict[str, dict[str, int]]
    definitions: dict[str, int]
    samples: list[dict[str, str]]


_HEAD = """\
---
license: cc-by-sa-4.0
language:
- en
pipeline_tag: text-generation
tags:
- mistral
- chat
---
# brise

brise is a very small chat model that ships inside bise, so that a fresh installation has something to
talk to and every part of the engine can be tried without a download. It is a Mistral-architecture network
of {params:.1f} million parameters, trained in a few hours on two processor cores with the recipe
in `recipes/brise`.

It is a toy beside any model of a billion parameters. Do not rely on anything it says.

## Shape

{layers} layers, width {dim}, {heads} query heads and {kv_heads} key/value heads of {head_dim},
feed-forward width {hidden}, sliding window {window} tokens, context {context} tokens, {vocab} tokens of
vocabulary (byte-level BPE, digits one by one, tied embeddings), bf16 weights. The chat format is
Mistral's V7 in its tekken spelling: `<s>[SYSTEM_PROMPT]...[/SYSTEM_PROMPT][INST]...[/INST]...</s>`, the
system prompt optional.
"""

_CAN = """\
## What it can and cannot do

It can greet, say what it is, chat in short turns, do sums with small numbers, define common words that it
learnt by heart, and tell a short, simple story that begins well and soon goes round in circles.
It cannot be asked for facts: a question for the meaning of another word gets the form of a dictionary
entry and often a wrong meaning, and capitals, dates and translations are mostly wrong. It loses the
thread after a few turns, fails at arithmetic of several steps, repeats itself in long answers, and cannot
write code or call tools. Other languages than English are weak. It has had no safety training beyond a
filter of words on its data; a system prompt changes
little. It was trained on rows of {row_tokens} tokens; positions beyond that, up to {context}, rest on
the sliding window.
"""

_DATA = """\
## Data and attribution

Trained on a bundle of openly licensed text and conversations; its card, `DATA.md`, lists the sources with
repository and commit, the filters, and what was removed. Held-back rows were taken out by hash of their
content. Small talk was rewritten so that the assistant calls itself brise. Shares are in
`recipes/brise/mixture.toml`.

{sources}

Attribution: Wikipedia contributors (CC BY-SA 3.0); Wikinews contributors (CC BY 2.5); African Storybook
and Pratham Books / StoryWeaver authors and translators (CC BY 4.0); Tatoeba contributors and
www.manythings.org/anki (CC BY 2.0); Open English WordNet team and Princeton University (CC BY 4.0,
WordNet licence); Databricks (CC BY-SA 3.0); OpenTriviaQA contributors (CC BY-SA 4.0); Allen Institute for
AI, ARC (CC BY-SA 4.0) and OpenBookQA (Apache-2.0); Google LLC, Schema-Guided Dialogue (CC BY-SA 4.0),
Taskmaster-4 (CC BY 4.0) and Synthetic-Persona-Chat (CC BY 4.0); OpenAI, GSM8K (MIT); self-instruct seed
tasks (Apache-2.0); UCI, FairytaleQA (Apache-2.0); University of Edinburgh, Self-dialogue Corpus
(BSD-3-Clause); Gunther Cox, ChatterBot corpus (BSD-3-Clause); M. Schmitt, classic-books-markdown (public
domain texts); CIA World Factbook (public domain); TinyStories authors (CDLA-Sharing-1.0, which puts no
condition on models).

Whether weights are an adaptation of their training text is not settled; they are given under CC BY-SA
4.0, which is on the safe side of every licence above.
"""


def model_card(run: Path, mixture: Mixture) -> str:
    """Return README.md of the export; parts that were not measured yet say so."""
    config = mixture.shape(STAGES[-1])
    parts = [
        _HEAD.format(
            params=config.num_params / 1e6,
            layers=config.num_layers,
            dim=config.dim,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden=config.hidden_dim,
            window=config.windows[0],
            context=config.max_context,
            vocab=config.vocab_size,
        ),
        _training(run, mixture),
        _measured(run),
        _CAN.format(context=config.max_context, row_tokens=mixture.stages["tune"].row_tokens),
        _samples(run),
        _DATA.format(sources=_sources(mixture)),
    ]
    return "\n".join(part for part in parts if part)


def _reports(run: Path, stage: str) -> list[Report]:
    path = run / f"{stage}.jsonl"
    if not path.is_file():
        return []
    return [cast(Report, json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def _training(run: Path, mixture: Mixture) -> str:
    lines = [
        "## Training",
        "",
        "| stage | steps | tokens seen | hours | tokens/s | rate, peak to end | loss, begin to end |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    total = 0
    hours = 0.0
    for name, words in STAGE_WORDS.items():
        reports = _reports(run, name)
        if not reports:
            continue
        first, last, stage = reports[min(1, len(reports) - 1)], reports[-1], mixture.stages[name]
        steps = steps_of(run / f"{name}.safetensors")
        tokens = steps * stage.rows_per_step * stage.row_tokens
        total, hours = total + tokens, hours + last["elapsed_s"] / 3600
        lines.append(
            f"| {name}: {words} | {steps} | {tokens / 1e6:.1f} M "
            f"| {last['elapsed_s'] / 3600:.2f} | {last['tokens'] / last['elapsed_s']:.0f} "
            f"| {stage.peak_lr:g} to {last['lr']:.1g} | {first['loss']:.2f} to {last['loss']:.2f} |"
        )
    lines += [
        f"| all | | {total / 1e6:.1f} M | {hours:.2f} | | | |",
        "",
        "Two cores of an AMD EPYC (Zen 4) shared with much other work, no accelerator; one step is "
        f"{mixture.stages['pretrain'].rows_per_step} rows of {mixture.stages['pretrain'].row_tokens} tokens. "
        "Muon for the matrices of the blocks and AdamW for embeddings and norms (both of torch.optim), "
        "float32 master weights, bf16 compute, gradients clipped to norm 1. Losses are nats a token on "
        f"the stage's own rows. Seed {mixture.seed}; the order of the data follows from it.",
        "",
    ]
    return "\n".join(lines)


def _evaluation(run: Path) -> Evaluation | None:
    path = run / "evaluation.json"
    return cast(Evaluation, json.loads(path.read_text("utf-8"))) if path.is_file() else None


def _measured(run: Path) -> str:
    found = _evaluation(run)
    if found is None:
        return "## Measured\n\nNot yet: this is a first edition from an early checkpoint.\n"
    lines = [
        "## Measured",
        "",
        "| held-back set | tokens | nats a token | bits a byte |",
        "|---|---:|---:|---:|",
    ]
    names = {"text": "text, every token", "chat": "chat, assistant turns"}
    for kind, loss in found["loss"].items():
        lines.append(
            f"| {names[kind]} | {loss['tokens']} | {loss['nats_per_token']:.3f} "
            f"| {loss['bits_per_byte']:.3f} |"
        )
    matches = found["exact_match"]
    rows = sum(match["rows"] for match in matches.values())
    matched = sum(match["matched"] for match in matches.values())
    lines += [
        "",
        "Exact match of the greedy answer to the first user turn of every held-back conversation, in lower "
        "case and without punctuation (few rows a source: read the counts, not the percentages):",
        "",
        "| source | rows | exact | % | rows with a number | ending on it |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for source, match in matches.items():
        percent = 100 * match["matched"] / match["rows"]
        lines.append(
            f"| {source} | {match['rows']} | {match['matched']} | {percent:.0f} "
            f"| {match['numbers']} | {match['number_matched']} |"
        )
    known = found["definitions"]
    lines += [
        f"| all | {rows} | {matched} | {100 * matched / rows:.0f} | | |",
        "",
        f"Of the {known['words']} words whose meaning was drilled, {known['right']} come back word for word "
        f"when asked to define them; of the {known['common_words']} commonest, {known['common_right']}. "
        "These were learnt by heart: the held-back words of chat/wordnet above were never shown.",
        "",
    ]
    return "\n".join(lines)


def _samples(run: Path) -> str:
    found = _evaluation(run)
    if found is None:
        return ""
    lines = [
        "## Samples",
        "",
        "The first ten held-back conversations, in file order, greedy, first turn only:",
        "",
    ]
    for sample in found["samples"]:
        lines += [f"- **{_one_line(sample['prompt'])}**", f"  {_one_line(sample['answer'])}"]
    return "\n".join([*lines, ""])


def _one_line(text: str) -> str:
    return " / ".join(part for part in text.splitlines() if part)


def _sources(mixture: Mixture) -> str:
    lines = ["| source | passes planned, pretrain | passes planned, tune and polish |", "|---|---:|---:|"]
    lines += [f"| {source.name} | {source.pretrain:g} | {source.tune:g} |" for source in mixture.sources]
    return "\n".join(lines)
