"""The worked example of docs/architecture.md, computed by the scheduler and the runner themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from bise.cache import prefix, table
from bise.cache.pool import BlockPool
from bise.engine import blocks, runner, scheduler
from bise.engine.request import Request
from bise.engine.sequence import Sequence

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def shown(name: str, values: object) -> str:
    return f"{name:<14} {values}".rstrip()


def play() -> list[str]:
    """Run a prompt of 10 tokens in steps of 8 with window 8, then decode three tokens; tell it all."""
    plan = scheduler.Scheduler([BlockPool(5)], [8], max_step_tokens=8, max_sequences=1)
    sequence = Sequence(Request(token_ids=tuple(range(100, 110))), arrival=0, max_tokens=8)
    plan.add(sequence)
    lines: list[str] = []
    for number in range(1, 6):
        step = plan.plan()
        row = step.rows[0]
        blocks = sequence.tables[0].blocks
        batch = runner.build_batch(step, 1)
        meta = batch.attention[0]
        lines += [
            f"step {number}",
            shown(
                "  Step",
                f"row (first={row.first}, num_tokens={row.num_tokens}, num_samples={row.num_samples})",
            ),
            shown("  table", blocks.tolist()),
            shown("  positions", batch.positions.tolist()),
            shown("  q_start", meta.q_start.tolist()),
            shown("  q_pos", meta.q_pos.tolist()),
            shown("  slots", meta.slots.tolist()),
            shown("  logit_rows", batch.logit_rows.tolist()),
        ]
        plan.complete(step)
        lines.append(shown("  table after", sequence.tables[0].blocks.tolist()))
        if row.num_samples:
            sequence.token_ids.append(200 + number)
    return lines


def play_prefix() -> list[str]:
    """Run the same prompt with a prefix cache, then the next turn of the conversation; tell it all."""
    pools = [BlockPool(6)]
    cache = prefix.PrefixCache(pools, [8])
    plan = scheduler.Scheduler(pools, [8], max_step_tokens=8, max_sequences=1, prefix=cache)
    lines: list[str] = []
    first = Sequence(Request(token_ids=tuple(range(100, 110))), arrival=0, max_tokens=4)
    second = Sequence(Request(token_ids=(*range(100, 110), 201, 202, 203, 7, 8, 9)), arrival=1, max_tokens=8)
    for sequence in (first, second):
        sequence.salt = prefix.salt_of("model", "f16", "", "alice")
    plan.add(first)
    for number in range(4):
        step = plan.plan()
        plan.complete(step)
        if step.rows[0].num_samples:
            first.token_ids.append(200 + number)
    lines.append(shown("first turn", f"table {first.tables[0].blocks.tolist()}, {first.num_computed} tokens"))
    plan.finish(first)
    lines.append(shown("it ends", f"cached, least recently used first: {pools[0].cached}"))
    found = cache.match(second.salt, second.token_ids, len(second.token_ids) - 1)
    lines.append(
        shown("second turn", f"match of {found.num_tokens} tokens, needed from block {found.firsts[0]}")
    )
    plan.add(second)
    step = plan.plan()
    row = step.rows[0]
    batch = runner.build_batch(step, 1)
    lines += [
        shown(
            "  Step", f"row (first={row.first}, num_tokens={row.num_tokens}, num_samples={row.num_samples})"
        ),
        shown("  table", second.tables[0].blocks.tolist()),
        shown("  positions", batch.positions.tolist()),
        shown("  slots", batch.attention[0].slots.tolist()),
        shown("  cached", pools[0].cached),
    ]
    return lines


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (table, prefix, blocks, runner):
        monkeypatch.setattr(module, "BLOCK_SIZE", 4)


def test_the_worked_example_is_what_the_code_does(small_blocks):
    assert "\n".join(play()) in PAGE.read_text(encoding="utf-8")


def test_the_worked_example_of_the_prefix_cache_is_what_the_code_does(small_blocks):
    assert "\n".join(play_prefix()) in PAGE.read_text(encoding="utf-8")
