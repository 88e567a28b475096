"""The report on ablations: differences with their spread over seeds, tables, pictures.

    python recipes/ablations/report.py recipes/ablations/results/small

Reads <variant>.<seed>.json of ablate.py and decode.json of decode.py; writes report.json, report.md and SVG
pictures beside them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pictures import intervals, lines, shares

ORDER = ("gqa", "mha", "mqa", "window", "moe", "dense-total")
HEADS = ("mha", "gqa", "mqa")
COPIED = (
    "steps",
    "tokens",
    "flops",
    "parameters",
    "active_parameters",
    "kv_bytes_per_token",
    "kv_bytes_at_4096",
)
LOSSES = {"text_loss": "text", "chat_loss": "chat"}
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t of a two-sided 95 % interval, by the number of values from 2 on."""
RANGES = ((0, 64), (64, 256), (256, 512), (512, 1024), (1024, 2048))
"""Positions whose losses are put together."""

Result = Mapping[str, Any]
Results = Mapping[str, Sequence[Result]]
Row = dict[str, Any]
Rows = Mapping[str, Row]
Speeds = Mapping[str, Any] | None

HEAD = """\
# Ablations, size `{size}`

Every variant got the training compute of `gqa`: {flops:.3g} floating-point operations (6 per active weight
and token, attention counted), {tokens:.2f} M tokens for `gqa`. One network definition, one recipe (Muon and
AdamW, the same rates), one order of rows per seed; {machine}.
`gqa` has {shape}.

Loss is nats a token over {rows} held-back rows of 512 tokens of text, and over the assistant's turns of 80
held-back rows of chats. A difference is against `gqa` with the same seed, so with the same rows in the same
order. ± is half of the 95 % interval of Student's t over seeds: the luck of first weights and of the order of
rows. The luck of which rows were held back comes on top: ± {by_rows} of a difference on text, were rows
independent. A difference is **better** or **worse** where its interval over seeds leaves out zero, else open:
what is smaller than its ± these seeds cannot tell from nothing. One in twenty of such intervals may err by
luck, here there are {compared}, and two seeds make an interval of their own luck. What holds here need not
hold for billions of weights and trillions of tokens; ../../README.md tells what the papers claim.
"""


def write_report(out: Path) -> None:
    """Write the report from the results in a folder; nothing while `gqa` is missing."""
    results = read_results(out)
    if "gqa" not in results:
        return
    decode = out / "decode.json"
    speeds = json.loads(decode.read_text(encoding="utf-8")) if decode.is_file() else None
    rows = {name: row_of(results["gqa"], found) for name, found in results.items()}
    (out / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    first = results["gqa"][0]
    by_rows = [row["text_by_rows"] for row in rows.values()][1:] or [0.0]
    told = {
        "by_rows": " to ".join(f"{half:.3f}" for half in sorted({min(by_rows), max(by_rows)})),
        "tokens": first["tokens"] / 1e6,
        "rows": len(first["text_rows"]),
        "compared": len(LOSSES) * (len(rows) - 1),
    }
    head = HEAD.format(**{**first, **told})
    parts = [
        head,
        _table(rows),
        _heads(rows, speeds),
        _window(rows, results, speeds),
        _experts(rows, results, speeds),
    ]
    (out / "report.md").write_text("\n".join(parts), encoding="utf-8")
    for name, picture in _pictures(rows, results).items():
        (out / name).write_text(picture, encoding="utf-8")


def read_results(out: Path) -> dict[str, list[Result]]:
    """Return the results of each variant by seed, in the order of the questions."""
    found: dict[str, list[Result]] = {}
    for name in ORDER:
        paths = sorted(out.glob(f"{name}.*.json"))
        if paths:
            found[name] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return found


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of up to ten values and half of its 95 % interval; None where there is one value."""
    mean, count = sum(values) / len(values), len(values)
    if count == 1:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, T_95[count - 2] * math.sqrt(variance / count)


def row_of(base: Sequence[Result], found: Sequence[Result]) -> Row:
    """Return what is told of a variant whose results are `found`; `base` are those it is compared with."""
    same = {result["seed"]: result for result in base}
    row: Row = {name: found[0][name] for name in COPIED}
    row["seeds"] = len(found)
    for kind in (*LOSSES, "train_loss"):
        row[kind], row[f"{kind}_interval"] = interval([result[kind] for result in found])
    for kind in LOSSES:
        pairs = [result[kind] - same[result["seed"]][kind] for result in found if result["seed"] in same]
        mean, half = interval(pairs)
        row[f"{kind}_difference"], row[f"{kind}_difference_interval"] = mean, half
        row[f"{kind}_differences"] = pairs
        row[f"{kind}_decided"] = half is not None and abs(mean) > half
    row["text_by_rows"] = _by_rows([(own, same[own["seed"]]) for own in found if own["seed"] in same])
    times = [result["core_seconds_a_step"] for result in found if result["core_seconds_a_step"]]
    row["core_seconds_a_step"] = min(times, default=None)
    return row


def _by_rows(pairs: Sequence[tuple[Result, Result]]) -> float:
    """Return half of the 95 % interval, over held-back rows, of the mean difference of pairs of results."""
    each = zip(*(zip(own["text_rows"], base["text_rows"], strict=True) for own, base in pairs), strict=True)
    values = [sum(own - base for own, base in row) / len(row) for row in each]
    mean = sum(values) / len(values)
    return 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _grid(head: Sequence[str], body: Sequence[Sequence[object]]) -> list[str]:
    """Return a table in Markdown."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *body)]


def _loss(row: Row, kind: str) -> str:
    half = row[f"{kind}_interval"]
    return f"{row[kind]:.3f}" + ("" if half is None else f" ± {half:.3f}")


def _difference(row: Row, kind: str) -> str:
    mean, half = row[f"{kind}_difference"], row[f"{kind}_difference_interval"]
    if half is None:
        return f"{mean:+.3f}, one seed"
    verdict = ("**better**" if mean < 0 else "**worse**") if row[f"{kind}_decided"] else "open"
    return f"{mean:+.3f} ± {half:.3f}, {verdict}"


def _table(rows: Rows) -> str:
    body = [
        (
            name,
            row["seeds"],
            f"{row['parameters'] / 1e6:.2f} M, {row['active_parameters'] / 1e6:.2f} M",
            f"{row['tokens'] / 1e6:.2f} M",
            _loss(row, "text_loss"),
            _loss(row, "chat_loss"),
            _difference(row, "text_loss") if name != "gqa" else "",
            _difference(row, "chat_loss") if name != "gqa" else "",
        )
        for name, row in rows.items()
    ]
    head = (
        "model",
        "seeds",
        "weights: all, active",
        "tokens",
        "text",
        "chat",
        "text against gqa",
        "chat against gqa",
    )
    pictures = ["![differences with their intervals](differences.svg)", "![loss over the training](loss.svg)"]
    return "\n".join([*_grid(head, body), "", "\n\n".join(pictures), ""])


def _heads(rows: Rows, speeds: Speeds) -> str:
    depths = [] if speeds is None else speeds["depths"]
    body = [
        (
            name,
            f"{rows[name]['kv_bytes_per_token']:,}",
            f"{rows[name]['kv_bytes_at_4096'] / 1024:,.0f} KiB",
            _difference(rows[name], "text_loss") if name != "gqa" else "",
            *[f"{speeds['models'][name][str(depth)]:.1f} tok/s" for depth in depths if speeds],
            *[
                f"{speeds['models'][name][f'held at {depth}'] / 1e6:.1f} MB"
                for depth in depths[-1:]
                if speeds
            ],
        )
        for name in HEADS
        if name in rows
    ]
    head = ["model", "KV bytes a token", "at 4,096 tokens", "text against gqa"]
    head += [f"decode at {depth:,} tokens" for depth in depths]
    head += [f"KV memory there at {depth:,}" for depth in depths[-1:]]
    told = ["", f"Decode: {speeds['what']}"] if speeds else []
    return "\n".join(
        ["## Grouped queries", "", *_grid(head, body), *told, "", "![loss and cache](kv.svg)", ""]
    )


def position_curves(results: Results) -> dict[str, list[float]]:
    """Return the mean loss in each bucket of positions, over rows and seeds."""
    found: dict[str, list[float]] = {}
    for name, key, label in (
        ("gqa", "by_position", "gqa"),
        ("gqa", "by_position_cut", "gqa, cut"),
        ("window", "by_position", "window"),
    ):
        rows = [row for result in results.get(name, ()) for row in result.get(key) or ()]
        if rows:
            found[label] = [sum(column) / len(column) for column in zip(*rows, strict=True)]
    return found


def _window(rows: Rows, results: Results, speeds: Speeds) -> str:
    if "window" not in rows:
        return ""
    curves = position_curves(results)
    bucket = results["gqa"][0]["bucket"]
    body: list[list[str]] = []
    for low, high in RANGES:
        parts = [curve[low // bucket : high // bucket] for curve in curves.values()]
        if len(parts[0]) * bucket == high - low:
            cells = [f"{math.exp(sum(part) / len(part)):.1f}" for part in parts]
            body.append([f"{low:,} to {high - 1:,}", *cells])
    full, cut = (rows[name]["kv_bytes_at_4096"] / 1024 for name in ("gqa", "window"))
    return "\n".join([
        "## Window",
        "",
        "Perplexity by position in texts longer than the 512 tokens that were trained on. The model of",
        "`window` was trained and is run with its window of 64 tokens a layer; `gqa, cut` is the model of",
        "full attention, run with that window.",
        "",
        *_grid(["positions", *curves], body),
        "",
        f"Keys and values that are still seen at 4,096 tokens: {full:,.0f} KiB with full attention,",
        f"{cut:,.0f} KiB with the window. " + ("" if speeds is None else speeds["window"]),
        "",
        "![loss by position](position.svg)",
        "",
    ])  # fmt: skip


def _experts(rows: Rows, results: Results, speeds: Speeds) -> str:
    if "moe" not in rows:
        return ""
    grids = [grid for result in results["moe"] for grid in result["expert_use"].values()]
    use = [share for grid in grids for row in grid for share in row]
    told = [
        "## Experts",
        "",
        "`moe` has 8 experts of half the hidden width, of which two answer: as many active weights as `gqa`",
        "but for the router, and as many in all as `dense-total`, which pays for all of them with fewer",
        "tokens. The balancing loss counts 0.01.",
        "",
        f"Share of the choices that falls on an expert, over all layers and seeds: {100 * min(use):.1f} % at",
        f"least, {100 * max(use):.1f} % at most; even use is 12.5 %.",
    ]  # fmt: skip
    if "dense-total" in rows:
        gap = rows["moe"]["text_loss"] - rows["dense-total"]["text_loss"]
        told.append(
            f"Against `dense-total`, at equal weights in all and equal compute: {gap:+.3f} nats on text."
        )
    ours, dense = (rows[name]["core_seconds_a_step"] for name in ("moe", "gqa"))
    if ours and dense:
        told.append(
            f"A step took {ours / dense:.2f} times the processor time of one of `gqa`, optimiser included."
        )
    if speeds is not None:
        depth = str(speeds["depths"][0])
        own, base, whole = (f"{speeds['models'][name][depth]:,.0f}" for name in ("moe", "gqa", "dense-total"))
        told.append(
            f"Decode at {depth} tokens in the engine, shape as above: {own} tok/s, {base} for the dense "
            f"model of as many active weights, {whole} for the one of as many in all."
        )
    return "\n".join([*told, "", "![use of the experts](experts.svg)", ""])


def _pictures(rows: Rows, results: Results) -> dict[str, str]:
    curves = {
        name: [(column[0][0] / found[0]["steps"], sum(loss for _, loss in column) / len(found))
               for column in zip(*(result["curve"] for result in found), strict=True)]
        for name, found in results.items()
        if found[0]["curve"]
    }  # fmt: skip
    apart = {
        f"{name}, {label}": (row[f"{kind}_differences"], row[f"{kind}_difference_interval"])
        for name, row in rows.items()
        for kind, label in LOSSES.items()
        if name != "gqa"
    }
    memory = {
        name: [(row["kv_bytes_at_4096"] / 1024, row["text_loss"])]
        for name, row in rows.items()
        if name in (*HEADS, "window")
    }
    nats = "loss on held-back text (nats a token)"
    pictures = {"kv.svg": lines(memory, "KiB of keys and values at 4,096 tokens (float16)", nats)}
    if apart:
        pictures["differences.svg"] = intervals(apart, "loss against gqa (nats a token)")
    if curves:
        pictures["loss.svg"] = lines(curves, "share of the training compute (mean over seeds)", nats)
    bucket = results["gqa"][0]["bucket"]
    by_position = {
        name: [((index + 0.5) * bucket, loss) for index, loss in enumerate(curve)]
        for name, curve in position_curves(results).items()
    }
    pictures["position.svg"] = lines(by_position, "position in the text", "loss (nats a token)")
    if "moe" in results:
        pictures["experts.svg"] = shares(results["moe"][0]["expert_use"])
    return pictures


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
