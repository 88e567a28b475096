import json

import pytest

from bise.errors import ConflictError, NotFoundError, RequestError
from bise.store.batches import Batches, check_details
from bise.store.files import Files
from bise.store.worker import LEASE_S

CHAT = "/v1/chat/completions"


class Place:
    """Files and batches of one database, as several processes see them."""

    def __init__(self, database, folder, clock):
        folder.mkdir(exist_ok=True)
        self.database, self.clock = database, clock
        self.files = Files(database, folder, clock)
        self.batches = self.process("here:1:1")

    def process(self, worker):
        return Batches(self.database, self.files, self.clock, worker=worker)

    def upload(self, *lines, owner="ann"):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        return self.files.create(owner, "in.jsonl", "batch", [text.encode()]).id

    def job(self, num_lines=3, **fields):
        lines = [{"custom_id": f"c{n}", "body": {"model": "brise", "n": n}} for n in range(num_lines)]
        return self.batches.create("ann", endpoint=CHAT, input_files=[self.upload(*lines)], **fields)

    def output(self, file_id):
        return [json.loads(line) for line in b"".join(self.files.read("ann", file_id)).splitlines()]


@pytest.fixture
def place(database, tmp_path, clock):
    return Place(database, tmp_path / "files", clock)


def test_a_job_runs_from_queued_to_its_output_file(place):
    job = place.job(3)
    assert (job.status, job.total) == ("queued", 3)
    lines = place.batches.claim(10)
    assert [line.body["n"] for line in lines] == [0, 1, 2]
    assert place.batches.get("ann", job.id).status == "running"
    for line in reversed(lines):
        assert place.batches.complete(line, 200, f"req{line.number}", {"é": f"\0{line.number}"})
    (closed,) = place.batches.close_finished()
    assert (closed.status, closed.succeeded, closed.failed, closed.error_file) == ("succeeded", 3, 0, None)
    output = place.output(closed.output_file)
    assert [line["custom_id"] for line in output] == ["c0", "c1", "c2"]
    assert output[1]["response"] == {"status_code": 200, "request_id": "req1", "body": {"é": "\x001"}}
    assert output[1]["error"] is None
    assert place.batches.output_lines("ann", job.id) == output
    assert place.batches.close_finished() == []


def test_failed_requests_go_to_the_error_file(place):
    job = place.job(2)
    first, second = place.batches.claim(2)
    place.batches.complete(first, 200, "r", {})
    place.batches.complete(second, 400, "r", {"error": "bad"})
    (closed,) = place.batches.close_finished()
    assert (closed.succeeded, closed.failed) == (1, 1)
    assert [line["custom_id"] for line in place.output(closed.output_file)] == ["c0"]
    assert place.output(closed.error_file)[0]["response"]["status_code"] == 400
    assert job.id == closed.id


def test_no_request_is_claimed_twice(place):
    place.job(5)
    others = place.process("there:2:2")
    claimed = [*place.batches.claim(2), *others.claim(2), *place.batches.claim(2), *others.claim(2)]
    assert sorted(line.number for line in claimed) == [0, 1, 2, 3, 4]


def test_what_a_lost_process_had_claimed_is_done_by_another_exactly_once(place, clock):
    place.job(2)
    (mine,) = place.batches.claim(1)
    clock.pass_(LEASE_S / 2)
    place.batches.renew()
    clock.pass_(LEASE_S / 2 + 1)
    others = place.process("there:2:2")
    assert [line.number for line in others.claim(5)] == [1]
    clock.pass_(LEASE_S)
    others.renew()
    (again,) = others.claim(5)
    assert again.number == mine.number
    assert again.idempotency_key == mine.idempotency_key
    assert not place.batches.complete(mine, 200, "late", {})
    assert others.complete(again, 200, "r", {})
    assert not others.complete(again, 200, "r", {})
    assert others.get("ann", again.batch.id).succeeded == 1


def test_requests_given_back_are_free_at_once(place):
    place.job(2)
    lines = place.batches.claim(2)
    place.batches.give_back(lines)
    assert len(place.process("there:2:2").claim(5)) == 2


def test_a_cancelled_job_keeps_what_was_done(place):
    job = place.job(3)
    first, second = place.batches.claim(2)
    place.batches.complete(first, 200, "r", {})
    assert place.batches.is_wanted(job.id)
    assert place.batches.cancel("ann", job.id).status == "cancelling"
    assert not place.batches.is_wanted(job.id)
    assert place.batches.claim(5) == []
    assert place.batches.close_finished() == []  # one still runs
    place.batches.give_back([second])
    (closed,) = place.batches.close_finished()
    assert (closed.status, closed.succeeded) == ("cancelled", 1)
    assert len(place.output(closed.output_file)) == 1
    with pytest.raises(ConflictError):
        place.batches.cancel("ann", job.id)


def test_a_job_that_runs_out_of_time_names_what_did_not_run(place, clock):
    job = place.job(3, timeout_s=3600)
    (line,) = place.batches.claim(1)
    place.batches.complete(line, 200, "r", {})
    clock.pass_(3600)
    assert place.batches.claim(5) == []
    (closed,) = place.batches.close_finished()
    assert (closed.status, closed.succeeded, closed.failed) == ("expired", 1, 2)
    errors = place.output(closed.error_file)
    assert [line["custom_id"] for line in errors] == ["c1", "c2"]
    assert errors[0]["error"]["code"] == "batch_expired"
    assert job.id == closed.id


@pytest.mark.parametrize("action", ["get", "cancel", "delete", "output_lines"])
def test_the_job_of_someone_else_does_not_exist(place, action):
    job = place.job()
    with pytest.raises(NotFoundError):
        getattr(place.batches, action)("bob", job.id)
    assert place.batches.list("bob") == ([], 0)


def test_a_job_over_someone_elses_file_is_refused(place):
    file_id = place.upload({"body": {"model": "m"}}, owner="bob")
    with pytest.raises(NotFoundError):
        place.batches.create("ann", endpoint=CHAT, input_files=[file_id])


def test_a_file_of_another_purpose_is_refused(place):
    file_id = place.files.create("ann", "x", "fine-tune", [b"{}"]).id
    with pytest.raises(RequestError, match="purpose batch"):
        place.batches.create("ann", endpoint=CHAT, input_files=[file_id])


@pytest.mark.parametrize(
    ("line", "param"),
    [
        ("not json", None),
        ("[1]", None),
        ('{"custom_id": "a"}', "body"),
        ('{"custom_id": 5, "body": {"model": "m"}}', "custom_id"),
        ('{"custom_id": "a", "body": {"model": "m", "stream": true}}', "body.stream"),
        ('{"custom_id": "a", "body": {"model": "m"}, "url": "/v1/other"}', "url"),
        ('{"custom_id": "a", "body": {}}', "body.model"),
        ('{"custom_id": "ok", "body": {"model": "m"}}', "custom_id"),  # twice
        ('{"a": 1, "a": 2}', None),
        ("[" * 10_000, None),
        ('{"custom_id": "\\ud800", "body": {"model": "m"}}', None),
    ],
)
def test_a_bad_line_fails_the_job_with_its_number(place, line, param):
    file_id = place.upload({"custom_id": "ok", "body": {"model": "m"}}, line)
    job = place.batches.create("ann", endpoint=CHAT, input_files=[file_id])
    assert (job.status, job.total) == ("failed", 0)
    (fault,) = job.errors
    assert fault["line"] == 2
    assert fault["param"] == param or param is None
    assert place.batches.claim(5) == []


def test_openais_lines_need_method_and_url(place):
    good = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m"}}
    for missing in ("custom_id", "method", "url"):
        line = {name: value for name, value in good.items() if name != missing}
        job = place.batches.create("ann", endpoint=CHAT, input_files=[place.upload(line)], window="24h")
        assert job.errors[0]["param"] == missing
    job = place.batches.create("ann", endpoint=CHAT, input_files=[place.upload(good)], window="24h")
    assert job.status == "queued"


def test_an_empty_input_fails_the_job(place):
    job = place.batches.create("ann", endpoint=CHAT, input_files=[place.upload("", "  ")])
    assert job.errors[0]["code"] == "empty_file"


def test_the_jobs_model_holds_for_all_its_lines(place):
    place.batches.create("ann", endpoint=CHAT, model="brise", input_files=[place.upload({"body": {"n": 0}})])
    assert place.batches.claim(1)[0].body == {"n": 0, "model": "brise"}
    other = place.upload({"body": {"model": "other"}})
    job = place.batches.create("ann", endpoint=CHAT, model="brise", input_files=[other])
    assert job.errors[0]["param"] == "body.model"


def test_a_job_is_deleted_only_when_it_is_over(place):
    job = place.job()
    with pytest.raises(ConflictError):
        place.batches.delete("ann", job.id)
    place.batches.cancel("ann", job.id)
    place.batches.close_finished()
    place.batches.delete("ann", job.id)
    with pytest.raises(NotFoundError):
        place.batches.get("ann", job.id)


def test_jobs_are_listed_in_pages(place, clock):
    ids = []
    for _ in range(4):
        clock.pass_(1)
        ids.insert(0, place.job(1).id)
    page, total = place.batches.list("ann", limit=2)
    assert ([job.id for job in page], total) == (ids[:2], 4)
    assert [job.id for job in place.batches.list("ann", after=ids[1])[0]] == ids[2:]
    assert place.batches.list("ann", statuses=["running"]) == ([], 0)


def test_lines_of_any_length_are_found_across_pieces(place):
    lines = [{"custom_id": str(n), "body": {"model": "m", "text": "x" * 7 * n}} for n in range(40)]
    text = "".join(json.dumps(line) + "\r\n" for line in lines).encode()
    pieces = [text[i : i + 13] for i in range(0, len(text), 13)]
    file_id = place.files.create("ann", "in", "batch", pieces).id
    place.batches.create("ann", endpoint=CHAT, input_files=[file_id])
    assert [line.body for line in place.batches.claim(100)] == [line["body"] for line in lines]


@pytest.mark.parametrize(
    "details", [{"a": 1}, {"x" * 65: ""}, {"a": "x" * 513}, {str(n): "" for n in range(17)}]
)
def test_metadata_is_a_few_short_strings(details):
    with pytest.raises(RequestError):
        check_details(details)
