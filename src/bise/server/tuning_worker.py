"""Works the fine-tuning jobs off: one at a time, in a process of its own at the lowest priority.

The process is `bise tune run`; what it prints becomes the job's events. A job that a stop or a crash cut
short goes on from its last checkpoint when a server is back; what came out is served beside its base.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bise.config import state_directory
from bise.errors import BiseError, StoreError
from bise.server.gate import StoreGate
from bise.server.service import Service
from bise.server.tuned import TunedModel
from bise.server.tuning_schema import checkpoint_adapter
from bise.store.files import RESULTS
from bise.store.ledger import LedgerRow
from bise.train.layout import CHECKPOINTS, METRICS, step_name

if TYPE_CHECKING:
    from asyncio.subprocess import Process

    from sqlalchemy.orm import Session

    from bise.store.tuning import TuningJob

logger = logging.getLogger(__name__)

_IDLE_S = 2.0
_TICK_S = 1.0
_GRACE_S = 30.0
"""How long a process may take to save its checkpoint before it is killed."""
_MAX_EVENTS = 100
"""Metrics events of a job, about."""
KEPT_EPOCHS = 3
"""Checkpoints of a job that are served beside its result, one an epoch, the last ones."""
ENDPOINT = "/v1/fine_tuning/jobs"
RESULT_FILE = "step_metrics.csv"
"""What OpenAI calls the file with the losses of every step."""
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(slots=True)
class _Run:
    """What is known of the process that trains."""

    steps: int = 0
    started: bool = False
    tokens: int = 0
    """Tokens that the job has computed so far, also before a restart."""
    billed: int = 0
    """Those of them that are in the ledger."""
    train_loss: float | None = None
    valid_loss: float | None = None
    finished: dict[str, Any] | None = None


class TuningWorker:
    """The worker of one server. `start` it on the event loop, `stop` it before the gate."""

    def __init__(self, service: Service, gate: StoreGate, *, folder: Path | None = None) -> None:
        """Keep jobs in `folder` (BISE_HOME/tuning)."""
        self._service = service
        self._gate = gate
        self._jobs = gate.store.tuning
        self._folder = state_directory("tuning") if folder is None else folder
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def start(self) -> None:
        """Serve what earlier jobs made, and begin to work."""
        for job in await self._gate.offload(self._jobs.made):
            try:
                await self._publish(job, job.checkpoints)
            except BiseError as error:
                logger.warning("event=tuned_model_not_served job=%s code=%s", job.id, error.code)
        self._service.tuned.wake = self._wake.set
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Let the process save its checkpoint, and leave the job to whoever comes next."""
        self._is_stopping = True
        self._wake.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def directory(self, job_id: str) -> Path:
        """Return where a job's files lie."""
        return self._folder / job_id

    async def _work(self) -> None:
        while not self._is_stopping:
            try:
                job = await self._gate.offload(self._jobs.claim)
                if job is not None:
                    await self._do(job)
                    continue
            except StoreError:
                logger.warning("event=tuning_store_unreachable")
            except Exception:  # root of the task: other jobs must go on whatever one did
                logger.exception("event=tuning_worker_failed")
            self._wake.clear()
            if not self._is_stopping:
                await self._nap(_IDLE_S)

    async def _nap(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _do(self, job: TuningJob) -> None:
        """Run a claimed job to its end, or to the server's."""
        run = _Run(billed=(job.result or {}).get("billed_tokens", 0))
        run.tokens = run.billed
        try:
            command = await self._gate.offload(self._prepare, job)
            code, complaint = 0, ""
            share = self._gate.begin_share()
            try:
                if command is None:
                    run.finished = _published_result(self.directory(job.id) / "adapter")
                    run.tokens = run.finished["trained_tokens"]
                else:
                    code, complaint = await self._train(job, command, run)
            finally:
                await self._gate.offload(self._bill, job, run, share)
            status = await self._gate.offload(self._jobs.renew, job.id)
            if run.finished is not None and status != "cancelling":
                await self._succeed(job, run)
                return
        except BiseError as error:
            if isinstance(error, StoreError):
                raise
            await self._fail(job, error.code, str(error))
            return
        if status == "cancelling":
            await self._gate.offload(shutil.rmtree, self.directory(job.id), ignore_errors=True)
            await self._end(job, "cancelled", "The job was cancelled.")
        elif status == "pausing":
            told = {"billed_tokens": run.billed}
            await self._end(job, "paused", "The job is paused; its last checkpoint is kept.", result=told)
        elif self._is_stopping and code in (*_STOPPED, -signal.SIGTERM, -signal.SIGKILL):
            told = {"billed_tokens": run.billed}
            await self._end(job, "queued", "The server stops; the job goes on when it is back.", result=told)
        else:
            invalid = code == 2 and not run.started
            await self._fail(job, "invalid_training_file" if invalid else "training_failed", complaint)

    def _bill(self, job: TuningJob, run: _Run, share: str) -> None:
        """Write the tokens that were computed since the job's last row into the ledger."""
        row = LedgerRow(
            request_id=job.id,
            key_id=job.spec.get("key_id"),
            owner=job.owner,
            endpoint=ENDPOINT,
            model=job.model,
            adapter=job.adapter,
            prompt_tokens=run.tokens - run.billed,
            finish_reason="stop",
            idempotency_key=f"tuning:{job.id}:{run.tokens}",
        )
        if row.prompt_tokens > 0:
            self._gate.record_training(row, share)
            run.billed = run.tokens
        else:
            self._gate.end_share(share)

    async def _succeed(self, job: TuningJob, run: _Run) -> None:
        """Serve what came out, and end the job with its table of losses as a file."""
        result, files = _result(run), self._gate.store.files
        kept = await self._publish(job, result.pop("checkpoints") or ())
        table = (self.directory(job.id) / "adapter" / METRICS).read_bytes()
        content = await self._gate.offload(files.write, [table])
        result |= {"checkpoints": kept, "result_files": [content.id], "billed_tokens": run.billed}

        def enter(session: Session) -> None:
            files.enter(session, job.owner, RESULT_FILE, RESULTS, content, source="bise")

        is_ours = await self._end(job, "succeeded", "The job has succeeded.", result=result, enter=enter)
        if not is_ours:
            await self._gate.offload(files.discard, content)

    def _prepare(self, job: TuningJob) -> list[str] | None:
        """Write the data files and return the command to run; None when the result is there already."""
        folder = self.directory(job.id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        out = folder / "adapter"
        if out.exists():
            return None
        spec = job.spec
        for name in ("training", "validation"):
            if spec[f"{name}_files"]:
                with (folder / f"{name}.jsonl").open("wb") as file:
                    for file_id in spec[f"{name}_files"]:
                        for piece in self._gate.store.files.read(job.owner, file_id):
                            file.write(piece)
                        file.write(b"\n")
        model = self._service.models.card(job.model).spec.path
        command = ["tune", "run", str(model), str(folder / "training.jsonl"), "--out", str(out), "--json",
                   "--keep-epochs", str(KEPT_EPOCHS)]  # fmt: skip
        if spec["validation_files"]:
            command += ["--validation", str(folder / "validation.jsonl")]
        for option, value in spec["options"].items():
            command += [f"--{option}"] if value is True else [f"--{option}", str(value)]
        if (folder / "adapter.run").exists():
            command.append("--resume")
        return [sys.executable, "-m", "bise", *command]

    async def _train(self, job: TuningJob, command: list[str], run: _Run) -> tuple[int, str]:
        """Run the process; return its exit code and what it complained about."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, limit=1 << 20
        )
        _give_way(process.pid)
        assert process.stdout is not None
        assert process.stderr is not None
        complaints = asyncio.create_task(process.stderr.read())
        reading = asyncio.create_task(self._read(job, process.stdout, run))
        control = asyncio.create_task(self._control(job, process))
        try:
            await reading
            code = await process.wait()
        finally:
            control.cancel()
            if process.returncode is None:
                process.kill()
            await asyncio.gather(control, reading, return_exceptions=True)
        lines = (await complaints).decode(errors="replace").strip().splitlines()
        text = lines[-1].removeprefix("bise: error: ") if lines else f"the process ended with code {code}"
        for name in ("training", "validation"):
            text = text.replace(str(self.directory(job.id) / f"{name}.jsonl"), f"the {name} file")
        return code, text.partition(" (`bise tune check")[0]

    async def _read(self, job: TuningJob, stream: asyncio.StreamReader, run: _Run) -> None:
        while line := await stream.readline():
            try:
                event = cast("dict[str, Any]", json.loads(line))
            except json.JSONDecodeError:  # a process that was killed in the middle of a line
                continue
            await self._note(job, event, run)

    async def _control(self, job: TuningJob, process: Process) -> None:
        """Keep the lease; stop the process when the job is not wanted any more, or the server goes."""
        asked_s: float | None = None
        clock = asyncio.get_running_loop().time
        while True:
            status = await self._gate.offload(self._jobs.renew, job.id)
            if status != "running" or self._is_stopping:
                if asked_s is None:
                    asked_s = clock()
                    process.terminate()
                elif status == "lost" or clock() - asked_s > _GRACE_S:
                    process.kill()
                await asyncio.sleep(_TICK_S)
            else:
                self._wake.clear()
                await self._nap(_TICK_S)

    async def _note(self, job: TuningJob, event: dict[str, Any], run: _Run) -> None:
        """Turn an event of the process into events of the job."""
        kind, add = event["event"], self._jobs.add_event
        if kind == "started":
            run.started, run.steps = True, event["steps"]
            message = f"Files are valid: {event['texts']} examples to learn, {event['held_back']} held back."
            await self._gate.offload(add, job.id, "message", message, {"status": "validated"})
            await self._tell(job, run)
        elif kind == "step":
            run.train_loss = event["loss"]
            run.tokens = event["trained_tokens"]
            if event["step"] % max(1, run.steps // _MAX_EVENTS) == 0:
                data = {"step": event["step"], "total_steps": event["steps"], "train_loss": event["loss"],
                        "learning_rate": event["lr"], "tokens_per_s": event["tokens_per_s"]}  # fmt: skip
                message = f"Step {event['step']}/{event['steps']}: training loss={event['loss']:.4f}"
                await self._gate.offload(add, job.id, "metrics", message, data)
                finish = self._gate.store.clock() + event["eta_s"]
                await self._tell(job, run, estimated_finish=finish)
        elif kind == "evaluation":
            run.valid_loss = event["loss"]
            data = {"step": event["step"], "valid_loss": event["loss"], "best_valid_loss": event["best"]}
            message = f"Step {event['step']}: validation loss={event['loss']:.4f}"
            await self._gate.offload(add, job.id, "metrics", message, data)
        elif kind == "epoch":
            data = {"step": event["step"], "train_loss": run.train_loss, "valid_loss": run.valid_loss}
            message = f"Checkpoint created at step {event['step']}, after {event['epoch']} epochs."
            await self._gate.offload(add, job.id, "checkpoint", message, data)
        elif kind == "finished":
            run.finished = event

    async def _tell(self, job: TuningJob, run: _Run, **values: Any) -> None:
        await self._gate.offload(self._jobs.tell, job.id, steps=run.steps, billed_tokens=run.billed, **values)

    async def _publish(self, job: TuningJob, steps: Iterable[int]) -> list[int]:
        """Serve what a job made as MODEL:NAME, and its checkpoints, to its owner; return the steps of those
        that are served: where memory is short it may be less than all.
        """
        folder, add = self.directory(job.id) / "adapter", self._service.models.add_adapter
        await self._service.offload(add, job.model, job.adapter, folder)
        self._service.tuned.add(job.model, job.adapter, TunedModel(job.owner, job.id))
        served: list[int] = []
        for step in sorted(steps):
            name = checkpoint_adapter(job, step)
            try:
                path = folder / CHECKPOINTS / step_name(step)
                await self._service.offload(add, job.model, name, path)
            except BiseError as error:
                message = f"The checkpoint of step {step} is not served: {error}"
                await self._gate.offload(self._jobs.add_event, job.id, "message", message, {"step": step})
                continue
            self._service.tuned.add(job.model, name, TunedModel(job.owner, job.id, step))
            served.append(step)
        return served

    async def _end(self, job: TuningJob, status: str, message: str, **more: Any) -> bool:
        return await self._gate.offload(self._jobs.finish, job.id, status, message, **more)

    async def _fail(self, job: TuningJob, code: str, message: str) -> None:
        param = "training_file" if code == "invalid_training_file" else None
        error = {"code": code, "message": message[:2000], "param": param}
        logger.warning("event=tuning_failed job=%s code=%s", job.id, code)
        await self._end(job, "failed", f"The job failed: {message[:2000]}", error=error)


def _give_way(pid: int) -> None:
    """Let everything else on this machine go before a process, and let it die first when memory is short."""
    adjust: Callable[[], object] = lambda: Path(f"/proc/{pid}/oom_score_adj").write_text("1000")  # noqa: E731
    for act in (lambda: os.setpriority(os.PRIO_PROCESS, pid, 19), adjust):
        try:
            act()
        except OSError:
            continue


def _published_result(out: Path) -> dict[str, Any]:
    """Return the result of a run that ended just before the server did."""
    summary = json.loads((out / "training.json").read_text(encoding="utf-8"))
    return cast("dict[str, Any]", summary["result"])


def _result(run: _Run) -> dict[str, Any]:
    names = ("steps", "train_loss", "best_loss", "best_step", "parity", "seconds", "trained_tokens",
             "checkpoints")  # fmt: skip
    finished = run.finished or {}
    return {name: finished.get(name) for name in names}
