"""How what training makes is called on disk. Knows nothing of torch."""

from __future__ import annotations

CHECKPOINTS = "checkpoints"
"""Directory in a result that holds the adapters of its last epochs, each under its `step_name`."""
METRICS = "metrics.csv"
"""File in a result: the losses of every step."""


def step_name(step: int) -> str:
    """Return the name of what a run had learned by a step."""
    return f"step-{step:08d}"
