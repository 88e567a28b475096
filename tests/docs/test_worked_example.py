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


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (table, prefix, blocks, runner):
        monkeypatch.setattr(module, "BLOCK_SIZE", 4)


def test_the_worked_example_is_what_the_code_does(small_blocks):
    assert "\n".join(play()) in PAGE.read_text(encoding="utf-8")
