"""The diary of a run: every event on disk, and what becomes of them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bise.diskfile import draft_of
from bise.train.curve import draw_losses
from bise.train.loop import Report


class RunLog:
    """Appends every event to a file, hands it on, and remembers them for the table and the picture."""

    def __init__(self, path: Path, report: Report) -> None:
        """Go on with what an earlier process wrote to `path`."""
        self._path, self._report = path, report
        self._events: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self._events.append(json.loads(line))
                except json.JSONDecodeError:  # the last line of a process that was killed
                    break

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event."""
        self._events.append(dict(event))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self._report(event)

    def forget_after(self, step: int) -> None:
        """Drop what a killed process did after its last checkpoint; it is done again."""
        self._events = [event for event in self._events if event.get("step", 0) <= step]
        draft = draft_of(self._path)
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(event) + "\n" for event in self._events)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)  # a kill in between leaves the old diary or the new one, never none

    @property
    def last_loss(self) -> float | None:
        """Mean training loss of the last ten steps; None when the file was lost since."""
        losses = [loss for _, loss in self._losses("step")[-10:]]
        return sum(losses) / len(losses) if losses else None

    @property
    def first_evaluation(self) -> float | None:
        """Loss on the held-back texts before the first step; None when there are none."""
        return next((loss for step, loss in self._losses("evaluation") if step == 0), None)

    def table(self) -> str:
        """Return the losses as CSV, a row a step, under the names of OpenAI's `step_metrics.csv`."""
        evaluated = dict(self._losses("evaluation"))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("step", "train_loss", "valid_loss", "learning_rate", "tokens"))
        for event in self._events:
            if event["event"] == "step":
                step, loss = event["step"], evaluated.get(event["step"])
                writer.writerow((
                    step, f"{event['loss']:.6g}", "" if loss is None else f"{loss:.6g}", f"{event['lr']:.6g}",
                    event["tokens"],
                ))  # fmt: skip
        return out.getvalue()

    def curve(self, title: str) -> str:
        """Return the picture."""
        return draw_losses(self._losses("step"), self._losses("evaluation"), title)

    def _losses(self, kind: str) -> list[tuple[int, float]]:
        return [(event["step"], event["loss"]) for event in self._events if event["event"] == kind]
