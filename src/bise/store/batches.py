"""Batch jobs: many requests worked through in the background, each exactly once in the result.

Every request is a row with a state. A process claims rows under a lease and completes them with answers, in
one transaction each; what a killed process had claimed is claimed again. One transaction ends a job.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from bise.errors import ConflictError, NotFoundError, RequestError
from bise.store.batch_lines import InputLine, parse_request, scan
from bise.store.database import Database, is_sound_id
from bise.store.files import Content, Files
from bise.store.ledger import BATCH
from bise.store.schema import BatchLineRecord, BatchRecord
from bise.store.worker import LEASE_S, is_dead, this_worker

ACTIVE = ("queued", "running", "cancelling")
OUTPUT_PURPOSE = "batch_output"
MAX_DETAILS = 16
_PAGE = 500
_DONE = ("done", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is known of a job."""

    id: str
    owner: str
    key_id: str | None
    """The key whose limits and prices its requests have; None for someone on this machine without one."""
    endpoint: str
    model: str | None
    status: str
    """queued, running, cancelling; succeeded, failed, expired, cancelled."""
    details: dict[str, Any]
    input_files: list[str]
    window: str | None
    """OpenAI's completion_window; None for a job in Mistral's form."""
    errors: list[dict[str, Any]]
    total: int
    succeeded: int
    failed: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    cancelled_at: float | None
    expires_at: float
    output_file: str | None
    error_file: str | None

    @property
    def is_over(self) -> bool:
        """True when nothing will change any more."""
        return self.status not in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedLine:
    """One request that a process took over."""

    batch: Batch
    number: int
    custom_id: str | None
    body: dict[str, Any]

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this request, so that it is billed once."""
        return f"{BATCH}{self.batch.id}:{self.number}"


class Batches:
    """The jobs of one database."""

    def __init__(
        self,
        database: Database,
        files: Files,
        clock: Callable[[], float] = time.time,
        worker: str | None = None,
    ) -> None:
        """`worker` names this process."""
        self._database = database
        self._files = files
        self._clock = clock
        self._worker = worker or this_worker()

    # What users ask for.

    def create(
        self,
        owner: str,
        *,
        endpoint: str,
        input_files: list[str],
        key_id: str | None = None,
        model: str | None = None,
        window: str | None = None,
        timeout_s: float = 86_400.0,
        details: dict[str, Any] | None = None,
    ) -> Batch:
        """Queue a job over the owner's files. A job whose lines are not in order is `failed` at once, with
        the faults.

        Raises NotFoundError for a file that is not the owner's, RequestError for one of another purpose.
        """
        for file_id in input_files:
            if self._files.get(owner, file_id).purpose != "batch":
                raise RequestError(
                    f"file {file_id[:64]} was not uploaded with purpose batch", field="input_files"
                )
        contents = ((file_id, self._files.read(owner, file_id)) for file_id in input_files)
        lines, faults = scan(contents, endpoint=endpoint, model=model, needs_url=window is not None)
        now = self._clock()
        record = BatchRecord(
            id=f"batch_{uuid.uuid4().hex}" if window is not None else str(uuid.uuid4()),
            owner=owner,
            key_id=key_id,
            endpoint=endpoint,
            model=model,
            status="failed" if faults else "queued",
            details=details or {},
            input_files=input_files,
            window=window,
            errors=[fault.as_json() for fault in faults],
            total=0 if faults else len(lines),
            succeeded=0,
            failed=0,
            created_at=now,
            finished_at=now if faults else None,
            expires_at=now + timeout_s,
        )
        with self._database.writing() as session:
            session.add(record)
            session.flush()
            if not faults:
                _insert_lines(session, record.id, lines)
            return _batch(record)

    def get(self, owner: str, batch_id: str) -> Batch:
        """Return one of the owner's jobs; NotFoundError when there is none, or it is someone else's."""
        with self._database.reading() as session:
            return _batch(_find(session, owner, batch_id))

    def list(
        self,
        owner: str,
        *,
        statuses: Iterable[str] = (),
        model: str | None = None,
        created_after: float | None = None,
        key_id: str | None = None,
        details: Mapping[str, str] | None = None,
        after: str | None = None,
        offset: int = 0,
        limit: int = 100,
        newest_first: bool = True,
    ) -> tuple[list[Batch], int]:
        """Return a page of the owner's jobs, and how many there are in all; see `Files.list`.

        `key_id` narrows to jobs that were queued with that key, `details` to those with such metadata.
        """
        query = select(BatchRecord).where(BatchRecord.owner == owner)
        if wanted := list(statuses):
            query = query.where(BatchRecord.status.in_(wanted))
        if model is not None:
            query = query.where(BatchRecord.model == model)
        if created_after is not None:
            query = query.where(BatchRecord.created_at > created_after)
        if key_id is not None:
            query = query.where(BatchRecord.key_id == key_id)
        with self._database.reading() as session:
            if details:
                # The databases differ in how they read JSON, so that it is compared here.
                pairs = session.execute(query.with_only_columns(BatchRecord.id, BatchRecord.details))
                fitting = [ident for ident, found in pairs if _has_all(found, details)]
                query = query.where(BatchRecord.id.in_(fitting))
            total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
            at, ident = BatchRecord.created_at, BatchRecord.id
            if after is not None:
                last = _find(session, owner, after)
                query = query.where((at < last.created_at) | ((at == last.created_at) & (ident < last.id)))
            order = (at.desc(), ident.desc()) if newest_first else (at, ident)
            page = session.scalars(query.order_by(*order).offset(offset).limit(limit))
            return [_batch(record) for record in page], total

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Stop a job: what runs ends, the rest is not begun. Does nothing to one that is being stopped.

        ConflictError when it is over.
        """
        with self._database.writing() as session:
            record = _find(session, owner, batch_id)
            if record.status not in ACTIVE:
                raise ConflictError(f"the batch is {record.status} and cannot be cancelled any more")
            if record.status != "cancelling":
                record.status = "cancelling"
                record.cancelled_at = self._clock()
            return _batch(record)

    def delete(self, owner: str, batch_id: str) -> None:
        """Remove a job that is over; its files stay. ConflictError when it is not over."""
        with self._database.writing() as session:
            record = _find(session, owner, batch_id)
            if record.status in ACTIVE:
                raise ConflictError("the batch is not over: cancel it first")
            session.delete(record)

    def output_lines(self, owner: str, batch_id: str) -> list[dict[str, Any]]:
        """Return the answers of a job that is over, in the order of its requests; [] before."""
        batch = self.get(owner, batch_id)
        if batch.output_file is None:
            return []
        text = b"".join(self._files.read(owner, batch.output_file))
        return [json.loads(line) for line in text.splitlines() if line]

    # What the process that works the jobs off asks for.

    def claim(self, limit: int, skip: Collection[str] = ()) -> list[ClaimedLine]:
        """Take over up to `limit` requests, oldest job first; also those that a dead process had taken.

        The jobs whose ids are in `skip` are left for later.
        """
        now = self._clock()
        claimed: list[ClaimedLine] = []
        with self._database.writing() as session:
            jobs = session.scalars(
                select(BatchRecord)
                .where(BatchRecord.status.in_(("queued", "running")), BatchRecord.expires_at > now)
                .order_by(BatchRecord.created_at, BatchRecord.id)
                .with_for_update()
            ).all()
            for job in jobs:
                if len(claimed) >= limit:
                    break
                if job.id in skip:
                    continue
                self._release_lost(session, job.id, now)
                rows = session.scalars(
                    select(BatchLineRecord)
                    .where(BatchLineRecord.batch_id == job.id, BatchLineRecord.state == "pending")
                    .order_by(BatchLineRecord.number)
                    .limit(limit - len(claimed))
                ).all()
                if rows and job.status == "queued":
                    job.status, job.started_at = "running", now
                for row in rows:
                    row.state, row.worker, row.lease_until = "running", self._worker, now + LEASE_S
                    claimed.append(self._claimed(job, row))
        return claimed

    def complete(self, line: ClaimedLine, status_code: int, request_id: str, body: object) -> bool:
        """Write a request's answer. False, and nothing is written, when another process took it over."""
        state = "done" if status_code < 400 else "failed"
        with self._database.writing() as session:
            changed = session.execute(
                update(BatchLineRecord)
                .where(
                    BatchLineRecord.batch_id == line.batch.id,
                    BatchLineRecord.number == line.number,
                    BatchLineRecord.state == "running",
                    BatchLineRecord.worker == self._worker,
                )
                .values(
                    state=state,
                    status_code=status_code,
                    request_id=request_id[:100],
                    # ASCII, because no database may choke on what a model wrote (PostgreSQL takes no NUL).
                    response=json.dumps(body, ensure_ascii=True),
                )
                .returning(BatchLineRecord.number)
            ).all()
            if not changed:
                return False
            counter = BatchRecord.succeeded if state == "done" else BatchRecord.failed
            session.execute(
                update(BatchRecord).where(BatchRecord.id == line.batch.id).values({counter: counter + 1})
            )
        return True

    def give_back(self, lines: Iterable[ClaimedLine]) -> None:
        """Make requests that were taken but not answered free for anyone, for example before a stop."""
        with self._database.writing() as session:
            for line in lines:
                session.execute(
                    update(BatchLineRecord)
                    .where(
                        BatchLineRecord.batch_id == line.batch.id,
                        BatchLineRecord.number == line.number,
                        BatchLineRecord.state == "running",
                        BatchLineRecord.worker == self._worker,
                    )
                    .values(state="pending", worker=None, lease_until=None)
                )

    def renew(self) -> None:
        """Say that this process is still at work on what it claimed; call it every LEASE_S / 3."""
        with self._database.writing() as session:
            session.execute(
                update(BatchLineRecord)
                .where(BatchLineRecord.state == "running", BatchLineRecord.worker == self._worker)
                .values(lease_until=self._clock() + LEASE_S)
            )

    def is_wanted(self, batch_id: str) -> bool:
        """Return False when a job's running requests should stop: it was cancelled or its time is over."""
        with self._database.reading() as session:
            record = session.get(BatchRecord, batch_id)
            return record is not None and record.status == "running" and record.expires_at > self._clock()

    def close_finished(self) -> list[Batch]:
        """End the jobs that have nothing left to do, were cancelled or ran out of time; return them."""
        now = self._clock()
        with self._database.reading() as session:
            jobs = [
                _batch(record)
                for record in session.scalars(select(BatchRecord).where(BatchRecord.status.in_(ACTIVE)))
            ]
        closed: list[Batch] = []
        for job in jobs:
            ending = (
                "cancelled" if job.status == "cancelling" else "expired" if job.expires_at <= now else None
            )
            with self._database.writing() as session:
                self._release_lost(session, job.id, now)
                states = _count_states(session, job.id)
            if states.get("running") or (ending is None and states.get("pending")):
                continue
            batch = self._close(job, ending or "succeeded")
            if batch is not None:
                closed.append(batch)
        return closed

    def _claimed(self, job: BatchRecord, row: BatchLineRecord) -> ClaimedLine:
        request = parse_request(self._files.read_part(row.file_id, row.offset, row.size))
        body = dict(request["body"])
        if job.model is not None:
            body["model"] = job.model
        return ClaimedLine(batch=_batch(job), number=row.number, custom_id=row.custom_id, body=body)

    def _release_lost(self, session: Session, batch_id: str, now: float) -> None:
        """Free the rows whose process is gone."""
        running = (BatchLineRecord.batch_id == batch_id, BatchLineRecord.state == "running")
        holders = session.scalars(select(BatchLineRecord.worker).where(*running).distinct())
        dead = [worker for worker in holders if worker is not None and is_dead(worker)]
        session.execute(
            update(BatchLineRecord)
            .where(*running, (BatchLineRecord.lease_until <= now) | BatchLineRecord.worker.in_(dead))
            .values(state="pending", worker=None, lease_until=None)
        )

    def _close(self, job: Batch, ending: str) -> Batch | None:
        """Write the output files and close the job, in one transaction; None when another process did."""
        output = self._write_output(job, ("done",), ending)
        errors = self._write_output(
            job, ("failed", "pending") if ending == "expired" else ("failed",), ending
        )
        contents = [content for content in (output, errors) if content is not None]
        try:
            with self._database.writing() as session:
                query = select(BatchRecord).where(BatchRecord.id == job.id).with_for_update()
                record = session.scalars(query).one_or_none()
                if record is None or record.status != job.status:
                    self._discard(contents)
                    return None
                record.status, record.finished_at = ending, self._clock()
                if ending == "expired":
                    record.failed = record.total - record.succeeded
                for name, content in (("output", output), ("error", errors)):
                    if content is not None:
                        self._files.enter(
                            session,
                            job.owner,
                            f"{job.id}_{name}.jsonl",
                            OUTPUT_PURPOSE,
                            content,
                            source="bise",
                        )
                        setattr(record, f"{name}_file", content.id)
                session.execute(delete(BatchLineRecord).where(BatchLineRecord.batch_id == job.id))
                return _batch(record)
        except BaseException:
            self._discard(contents)
            raise

    def _write_output(self, job: Batch, states: tuple[str, ...], ending: str) -> Content | None:
        with self._database.reading() as session:
            counts = _count_states(session, job.id)
        if not any(counts.get(state) for state in states):
            return None
        return self._files.write(self._output(job, states, ending))

    def _output(self, job: Batch, states: tuple[str, ...], ending: str) -> Iterator[bytes]:
        last = -1
        while True:
            with self._database.reading() as session:
                rows = session.scalars(
                    select(BatchLineRecord)
                    .where(
                        BatchLineRecord.batch_id == job.id,
                        BatchLineRecord.state.in_(states),
                        BatchLineRecord.number > last,
                    )
                    .order_by(BatchLineRecord.number)
                    .limit(_PAGE)
                ).all()
            if not rows:
                return
            for row in rows:
                yield json.dumps(_output_line(job, row, ending), ensure_ascii=True).encode() + b"\n"
            last = rows[-1].number

    def _discard(self, contents: Iterable[Content]) -> None:
        for content in contents:
            self._files.discard(content)


def check_details(details: dict[str, Any]) -> None:
    """Raise RequestError for metadata that is not a few short strings."""
    if len(details) > MAX_DETAILS or not all(
        isinstance(value, str) and len(key) <= 64 and len(value) <= 512 and "\0" not in key + value
        for key, value in details.items()
    ):
        raise RequestError(
            f"metadata must be at most {MAX_DETAILS} strings of up to 512 characters under names of up to 64",
            field="metadata",
        )


def _insert_lines(session: Session, batch_id: str, lines: list[InputLine]) -> None:
    for start in range(0, len(lines), _PAGE):
        session.execute(
            insert(BatchLineRecord),
            [
                {
                    "batch_id": batch_id,
                    "number": start + index,
                    "custom_id": line.custom_id,
                    "file_id": line.file_id,
                    "offset": line.offset,
                    "size": line.size,
                    "state": "pending",
                }
                for index, line in enumerate(lines[start : start + _PAGE])
            ],
        )


def _output_line(job: Batch, row: BatchLineRecord, ending: str) -> dict[str, Any]:
    answered = row.state in _DONE
    return {
        "id": f"batch_req_{job.id.removeprefix('batch_')}_{row.number}",
        "custom_id": row.custom_id,
        "response": {
            "status_code": row.status_code,
            "request_id": row.request_id,
            "body": json.loads(row.response or "null"),
        }
        if answered
        else None,
        "error": None
        if answered
        else {"code": f"batch_{ending}", "message": f"the batch was {ending} before this request ran"},
    }


def _count_states(session: Session, batch_id: str) -> dict[str, int]:
    counted = select(BatchLineRecord.state, func.count().label("num"))
    query = counted.where(BatchLineRecord.batch_id == batch_id).group_by(BatchLineRecord.state)
    return {row.state: row.num for row in session.execute(query)}


def _has_all(found: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Return True when metadata holds every wanted pair."""
    return all(found.get(name) == value for name, value in wanted.items())


def _find(session: Session, owner: str, batch_id: str) -> BatchRecord:
    query = select(BatchRecord).where(BatchRecord.id == batch_id, BatchRecord.owner == owner)
    record = session.scalars(query).one_or_none() if is_sound_id(batch_id) else None
    if record is None:
        raise NotFoundError(f"no batch of yours has the id {batch_id[:64]!r}", field="batch_id")
    return record


def _batch(record: BatchRecord) -> Batch:
    return Batch(**{name: getattr(record, name) for name in Batch.__slots__})
