"""Fine-tuning jobs and their events: what was asked for, where it stands, what happened.

A process claims a job under a lease; what a killed process had claimed is claimed again, and goes on from
its last checkpoint. What is trained, and where, is the worker's business.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, Double, ForeignKey, Integer, String, Text, func, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from bise.errors import ConflictError, NotFoundError
from bise.store.database import Database, is_sound_id
from bise.store.schema import JsonObject, Record
from bise.store.worker import LEASE_S, is_dead, this_worker

ACTIVE = ("waiting", "queued", "running", "pausing", "paused", "cancelling")
_STARTED = ("running", "pausing", "cancelling")


class TuningJobRecord(Record):
    """A fine-tuning job."""

    __tablename__ = "tuning_jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200), index=True)
    model: Mapped[str] = mapped_column(String(512))
    adapter: Mapped[str] = mapped_column(String(200))
    form: Mapped[str] = mapped_column(String(10))
    status: Mapped[str] = mapped_column(String(12), index=True)
    spec: Mapped[JsonObject] = mapped_column(JSON)
    result: Mapped[JsonObject | None] = mapped_column(JSON)
    error: Mapped[JsonObject | None] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(Double)
    modified_at: Mapped[float] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)
    worker: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[float | None] = mapped_column(Double)


class TuningEventRecord(Record):
    """Something that happened in a job."""

    __tablename__ = "tuning_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("tuning_jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[float] = mapped_column(Double)
    kind: Mapped[str] = mapped_column(String(12))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[JsonObject] = mapped_column(JSON)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningJob:
    """What is known of a job."""

    id: str
    owner: str
    model: str
    """The base model's name."""
    adapter: str
    """The name that the result gets beside its base."""
    form: str
    """`openai` or `mistral`: whose words it was asked for in."""
    status: str
    """waiting (to be started), queued, running, pausing, paused, cancelling; succeeded, failed, cancelled."""
    spec: dict[str, Any]
    """What was asked for: files, settings, metadata."""
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    """{"code", "message", "param"} of a job that failed."""
    created_at: float
    modified_at: float
    finished_at: float | None

    @property
    def checkpoints(self) -> list[int]:
        """Steps whose checkpoints are there to be used."""
        return list((self.result or {}).get("checkpoints") or ())

    @property
    def is_over(self) -> bool:
        """True when nothing will change any more."""
        return self.status not in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningEvent:
    """Something that happened in a job."""

    job_id: str
    number: int
    """From 1."""
    at: float
    kind: str
    """message, metrics or checkpoint."""
    message: str
    data: dict[str, Any]


class TuningJobs:
    """The jobs of one database."""

    def __init__(
        self, database: Database, clock: Callable[[], float] = time.time, worker: str | None = None
    ) -> None:
        """`worker` names this process."""
        self._database = database
        self._clock = clock
        self._worker = worker or this_worker()

    # What users ask for.

    def create(
        self,
        owner: str,
        *,
        model: str,
        name: str | None,
        form: str,
        spec: Mapping[str, Any],
        is_waiting: bool,
    ) -> TuningJob:
        """Enter a job; its result will be called `name`, or something like it where that is taken."""
        now = self._clock()
        job_id = f"ftjob-{uuid.uuid4().hex}" if form == "openai" else str(uuid.uuid4())
        with self._database.writing() as session:
            wanted = name or f"tuned-{job_id[-6:]}"
            taken = session.scalar(
                select(func.count()).where(TuningJobRecord.model == model, TuningJobRecord.adapter == wanted)
            )
            record = TuningJobRecord(
                id=job_id,
                owner=owner,
                model=model,
                adapter=f"{wanted}-{job_id[-6:]}" if taken else wanted,
                form=form,
                status="waiting" if is_waiting else "queued",
                spec=dict(spec),
                result=None,
                error=None,
                created_at=now,
                modified_at=now,
                finished_at=None,
                worker=None,
                lease_until=None,
            )
            session.add(record)
            session.flush()
            self._add_event(session, job_id, "message", "The job was created.", {"status": record.status})
            return _job(record)

    def get(self, owner: str, job_id: str) -> TuningJob:
        """Return one of the owner's jobs; NotFoundError when there is none, or it is someone else's."""
        with self._database.reading() as session:
            return _job(_find(session, owner, job_id))

    def has_name(self, model: str, name: str) -> bool:
        """Tell whether a job, whoever's, has made MODEL:NAME or may still do so."""
        named = select(TuningJobRecord).where(
            TuningJobRecord.model == model,
            TuningJobRecord.adapter == name,
            TuningJobRecord.status.not_in(("failed", "cancelled")),
        )
        with self._database.reading() as session:
            return any(not (job.result or {}).get("is_deleted") for job in map(_job, session.scalars(named)))

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        offset: int = 0,
        limit: int = 100,
        filters: Mapping[str, Any] | None = None,
        created_after: float | None = None,
        created_before: float | None = None,
    ) -> tuple[list[TuningJob], int]:
        """Return a page of the owner's jobs, newest first, and how many there are in all.

        `filters` gives wanted values of `model`, `adapter` or (a list of) `status`.
        """
        query = select(TuningJobRecord).where(TuningJobRecord.owner == owner)
        for name, value in (filters or {}).items():
            column = getattr(TuningJobRecord, name)
            query = query.where(column.in_(value) if isinstance(value, list | tuple) else column == value)
        if created_after is not None:
            query = query.where(TuningJobRecord.created_at > created_after)
        if created_before is not None:
            query = query.where(TuningJobRecord.created_at < created_before)
        at, ident = TuningJobRecord.created_at, TuningJobRecord.id
        with self._database.reading() as session:
            total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
            if after is not None:
                last = _find(session, owner, after)
                query = query.where((at < last.created_at) | ((at == last.created_at) & (ident < last.id)))
            page = session.scalars(query.order_by(at.desc(), ident.desc()).offset(offset).limit(limit))
            return [_job(record) for record in page], total

    def events(
        self, owner: str, job_id: str, *, kinds: tuple[str, ...], after: int | None = None, limit: int = 20
    ) -> list[TuningEvent]:
        """Return a job's events of some kinds, newest first; `after`: those before the one of that number."""
        with self._database.reading() as session:
            _find(session, owner, job_id)
            query = select(TuningEventRecord).where(
                TuningEventRecord.job_id == job_id, TuningEventRecord.kind.in_(kinds)
            )
            if after is not None:
                query = query.where(TuningEventRecord.number < after)
            page = session.scalars(query.order_by(TuningEventRecord.number.desc()).limit(limit))
            return [
                TuningEvent(**{name: getattr(record, name) for name in TuningEvent.__slots__})
                for record in page
            ]

    def change(self, owner: str, job_id: str, wish: str) -> TuningJob:
        """Do a user's wish: `start`, `cancel`, `pause` or `resume`. ConflictError where that cannot be."""
        with self._database.writing() as session:
            record = _find(session, owner, job_id, is_locked=True)
            to = _WISHES[wish].get(record.status)
            if to is None:
                raise ConflictError(f"the job is {record.status}: it cannot be asked to {wish}")
            if to != record.status:
                self._set(session, record, to)
            return _job(record)

    def forget(self, owner: str, job_id: str, step: int | None = None) -> TuningJob:
        """Say that a job's model was removed with its checkpoints, or its checkpoint of a step alone;
        NotFoundError when the owner has no such job.
        """
        with self._database.writing() as session:
            record = _find(session, owner, job_id, is_locked=True)
            kept = [] if step is None else [kept for kept in _job(record).checkpoints if kept != step]
            gone = {"is_deleted": True} if step is None else {}
            record.result = (record.result or {}) | gone | {"checkpoints": kept}
            record.modified_at = self._clock()
            return _job(record)

    # What the process that trains asks for.

    def claim(self) -> TuningJob | None:
        """Take over the oldest job that waits to run, or that a dead process was at; None: there is none."""
        now = self._clock()
        with self._database.writing() as session:
            jobs = session.scalars(
                select(TuningJobRecord)
                .where(TuningJobRecord.status.in_(("queued", *_STARTED)))
                .order_by(TuningJobRecord.created_at, TuningJobRecord.id)
                .with_for_update()
            ).all()
            for job in jobs:
                if job.status != "queued":
                    alive = job.worker is not None and not is_dead(job.worker)
                    if alive and (job.lease_until or 0) > now:
                        continue
                    if job.status in ("cancelling", "pausing"):  # nothing runs any more
                        self._set(session, job, "cancelled" if job.status == "cancelling" else "paused")
                        continue
                    self._add_event(session, job.id, "message", "The job goes on after a restart.", {})
                elif job.worker is None:
                    self._add_event(session, job.id, "message", "The job was started.", {"status": "running"})
                job.status, job.worker = "running", self._worker
                job.lease_until, job.modified_at = now + LEASE_S, now
                return _job(job)
        return None

    def renew(self, job_id: str) -> str:
        """Say that this process is still at a job, and return the job's status: what is wished of it."""
        with self._database.writing() as session:
            record = session.get(TuningJobRecord, job_id, with_for_update=True)
            if record is None or record.worker != self._worker:
                return "lost"
            record.lease_until = self._clock() + LEASE_S
            return record.status

    def add_event(self, job_id: str, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Write down what happened."""
        with self._database.writing() as session:
            self._add_event(session, job_id, kind, message, data)

    def finish(
        self,
        job_id: str,
        status: str,
        message: str,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        enter: Callable[[Session], object] | None = None,
    ) -> bool:
        """End this process's work on a job: succeeded, failed, cancelled, paused, or queued for later. What
        `enter` writes is there together with the end, or not at all.

        Return False, and do nothing, when the job is another process's by now.
        """
        with self._database.writing() as session:
            record = session.get(TuningJobRecord, job_id, with_for_update=True)
            if record is None or record.worker != self._worker:
                return False
            if enter is not None:
                enter(session)
            record.result = None if result is None else dict(result)
            record.error = None if error is None else dict(error)
            self._set(session, record, status, message)
            return True

    def tell(self, job_id: str, **values: Any) -> None:
        """Keep facts about a running job (estimated_finish, steps) in its result."""
        with self._database.writing() as session:
            session.execute(
                update(TuningJobRecord)
                .where(TuningJobRecord.id == job_id, TuningJobRecord.worker == self._worker)
                .values(result=values)
            )

    def made(self) -> list[TuningJob]:
        """Return the jobs whose models are to be served."""
        with self._database.reading() as session:
            jobs = session.scalars(
                select(TuningJobRecord)
                .where(TuningJobRecord.status == "succeeded")
                .order_by(TuningJobRecord.finished_at)
            )
            return [job for job in map(_job, jobs) if not (job.result or {}).get("is_deleted")]

    def _set(
        self, session: Session, record: TuningJobRecord, status: str, message: str | None = None
    ) -> None:
        now = self._clock()
        record.status, record.modified_at = status, now
        if status not in ACTIVE:
            record.finished_at = now
        if status not in _STARTED:
            record.worker = None if status != "queued" else record.worker
            record.lease_until = None
        self._add_event(session, record.id, "message", message or f"The job is {status}.", {"status": status})

    def _add_event(
        self, session: Session, job_id: str, kind: str, message: str, data: Mapping[str, Any]
    ) -> None:
        last = session.scalar(
            select(func.max(TuningEventRecord.number)).where(TuningEventRecord.job_id == job_id)
        )
        session.add(
            TuningEventRecord(
                job_id=job_id,
                number=(last or 0) + 1,
                at=self._clock(),
                kind=kind,
                message=message,
                data=dict(data),
            )
        )
        session.flush()


_WISHES: Mapping[str, Mapping[str, str]] = {
    "start": {"waiting": "queued"},
    "cancel": {
        "waiting": "cancelled", "queued": "cancelled", "paused": "cancelled", "running": "cancelling",
        "pausing": "cancelling", "cancelling": "cancelling",
    },
    "pause": {"queued": "paused", "running": "pausing", "pausing": "pausing", "paused": "paused"},
    "resume": {"paused": "queued"},
}  # fmt: skip
"""What each wish makes of each status."""


def _find(session: Session, owner: str, job_id: str, *, is_locked: bool = False) -> TuningJobRecord:
    record = session.get(TuningJobRecord, job_id, with_for_update=is_locked) if is_sound_id(job_id) else None
    if record is None or record.owner != owner:
        raise NotFoundError(f"no fine-tuning job of yours has the id {job_id[:64]!r}", field="job_id")
    return record


def _job(record: TuningJobRecord) -> TuningJob:
    return TuningJob(**{name: getattr(record, name) for name in TuningJob.__slots__})
