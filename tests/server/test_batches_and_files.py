"""Files and batches, driven by Mistral's and OpenAI's own clients against the whole application."""

from __future__ import annotations

import json
import time
from decimal import Decimal

import httpx
import pytest
from mistralai.client import Mistral
from openai import OpenAI

from bise.store.keys import KeyLimits
from bise.store.prices import Price

CHAT = "/v1/chat/completions"


def _line(number, *, url=True, **fields):
    body = {"model": "stub", "messages": [{"role": "user", "content": f"q{number}"}], **fields}
    line = {"custom_id": f"c{number}", "body": body}
    return json.dumps(line | ({"method": "POST", "url": CHAT} if url else {}))


class _Bridge(httpx.BaseTransport):
    """Lets a synchronous client talk to the application in this process."""

    def __init__(self, site):
        self.site = site

    def handle_request(self, request):
        path = request.url.raw_path.decode()
        headers = [(name, value) for name, value in request.headers.items() if name != "host"]
        answer = self.site.request(request.method, path, headers=headers, content=request.read())
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


@pytest.fixture
def openai(site):
    _, key = site.key(owner="ann")
    http = httpx.Client(transport=_Bridge(site))
    return OpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)


@pytest.fixture
def mistral(site):
    _, key = site.key(owner="ann")
    return Mistral(server_url="http://localhost", api_key=key, client=httpx.Client(transport=_Bridge(site)))


def test_openais_client_stores_lists_reads_and_deletes_files(openai):
    made = openai.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
    assert (made.object, made.bytes, made.filename, made.purpose, made.status) == (
        "file", 3, "in.jsonl", "batch", "processed",
    )  # fmt: skip
    assert openai.files.retrieve(made.id) == made
    assert openai.files.content(made.id).read() == b"{}\n"
    others = [openai.files.create(file=(f"{n}", b"x"), purpose="user_data").id for n in range(3)]
    assert [file.id for file in openai.files.list(purpose="batch")] == [made.id]
    assert {file.id for file in openai.files.list(limit=2)} == {made.id, *others}  # over two pages
    assert openai.files.delete(made.id).deleted


def test_mistrals_client_stores_lists_reads_and_deletes_files(mistral, site):
    made = mistral.files.upload(file={"file_name": "t.jsonl", "content": b"{}\n{}\n"}, purpose="fine-tune")
    found = mistral.files.retrieve(file_id=made.id)
    assert (found.size_bytes, found.num_lines, found.deleted, found.source) == (6, 2, False, "upload")
    listed = mistral.files.list(page=0, page_size=10)
    assert ([file.id for file in listed.data], listed.total) == ([made.id], 1)
    assert mistral.files.download(file_id=made.id).read() == b"{}\n{}\n"
    url = mistral.files.get_signed_url(file_id=made.id).url
    path = url.removeprefix("http://localhost")
    assert site.get(path).content == b"{}\n{}\n"
    for forged in (path.replace("until=1", "until=2"), path.replace("signature=", "signature=0"), path[:-1]):
        assert site.get(forged).status_code == 401
    site.clock.now += 25 * 3600
    assert site.get(path).status_code == 401
    assert mistral.files.delete(file_id=made.id).deleted


def test_a_batch_of_openais_client_runs_to_its_output(openai, site):
    text = "\n".join([_line(0), _line(1, temperature=9), _line(2)]).encode()
    file = openai.files.create(file=("in.jsonl", text), purpose="batch")
    batch = openai.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
    )
    assert batch.status == "validating"
    site.work(lambda: openai_status(site, batch.id) == "succeeded")
    done = openai.batches.retrieve(batch.id)
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 2, 1)
    lines = [json.loads(line) for line in openai.files.content(done.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in lines] == ["c0", "c2"]
    body = lines[0]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "Hello, world!"
    (error,) = [json.loads(line) for line in openai.files.content(done.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("c1", 400)
    assert [batch.id for batch in openai.batches.list()] == [done.id]
    rows = site.store.ledger.rows()
    assert sum(row.completion_tokens for row in rows) == 26
    assert {row.owner for row in rows} == {"ann"}
    assert {request.priority for request in site.engine.requests} == {1000}


def openai_status(site, batch_id):
    return site.store.batches.get("ann", batch_id).status


def test_a_job_of_mistrals_client_with_inline_requests_runs_to_its_outputs(mistral, site):
    requests = [
        {"custom_id": str(n), "body": {"messages": [{"role": "user", "content": "hi"}]}} for n in range(3)
    ]
    job = mistral.batch.jobs.create(endpoint=CHAT, requests=requests, model="stub", timeout_hours=1)
    assert (job.status, job.total_requests) == ("QUEUED", 3)
    site.work(lambda: openai_status(site, job.id) == "succeeded")
    done = mistral.batch.jobs.get(job_id=job.id, inline=True)
    assert (done.status, done.completed_requests, done.succeeded_requests) == ("SUCCESS", 3, 3)
    assert [line["custom_id"] for line in done.outputs] == ["0", "1", "2"]
    assert mistral.batch.jobs.list(status=["SUCCESS"]).total == 1
    assert mistral.batch.jobs.list(status=["RUNNING"]).total == 0
    assert mistral.batch.jobs.delete(job_id=job.id).deleted
    assert mistral.batch.jobs.list().total == 0


def test_a_job_can_be_cancelled_while_it_runs(mistral, site):
    site.engine.endless, site.engine.token_s = True, 0.01
    requests = [{"body": {"messages": [{"role": "user", "content": "hi"}]}} for _ in range(10)]
    job = mistral.batch.jobs.create(endpoint=CHAT, requests=requests, model="stub")

    def cancelled():
        if site.engine.running and openai_status(site, job.id) == "running":
            site.store.batches.cancel("ann", job.id)
        return openai_status(site, job.id) == "cancelled"

    site.work(cancelled)
    assert mistral.batch.jobs.get(job_id=job.id).status == "CANCELLED"
    assert mistral.batch.jobs.get(job_id=job.id).succeeded_requests == 0


def test_a_line_that_a_stop_cut_off_is_billed_once(mistral, site):
    site.store.prices.set(Price(model="stub", input=Decimal(1), cached=Decimal(1), output=Decimal(1)))
    requests = [{"body": {"messages": [{"role": "user", "content": "hi"}]}}]
    job = mistral.batch.jobs.create(endpoint=CHAT, requests=requests, model="stub")
    site.engine.endless, site.engine.token_s = True, 0.01
    site.work(lambda: site.engine.running)  # the worker stops in the middle of the line
    site.engine.endless, site.engine.token_s = False, 0.0
    site.clock.now += 5000.0
    site.work(lambda: openai_status(site, job.id) == "succeeded")
    done, cut = site.store.ledger.rows()
    assert (cut.finish_reason, cut.cost) == ("abort", 0)
    assert (done.finish_reason, done.completion_tokens) == ("stop", 13)
    assert done.cost == Decimal(done.prompt_tokens + 13) / 1_000_000


def test_files_are_listed_by_every_filter_of_mistrals_client(mistral, site):
    requests = [{"body": {"messages": [{"role": "user", "content": "hi"}]}}]
    job = mistral.batch.jobs.create(endpoint=CHAT, requests=requests, model="stub")
    site.work(lambda: openai_status(site, job.id) == "succeeded")
    mistral.files.upload(file={"file_name": "train.jsonl", "content": b"{}\n"}, purpose="fine-tune")

    def names(**filters):
        return sorted(file.filename for file in mistral.files.list(**filters).data)

    everything = names()
    assert len(everything) == 3
    assert names(sample_type=["instruct"]) == ["train.jsonl"]
    assert names(sample_type=["instruct", "batch_request"]) == ["inline_requests.jsonl", "train.jsonl"]
    (output,) = names(sample_type=["batch_result"])
    assert names(sample_type=["batch_error"]) == names(sample_type=["pretrain"]) == []
    assert names(source=["mistral"]) == [output]
    assert names(source=["repository"]) == []
    assert names(source=["upload", "mistral"]) == everything
    assert mistral.files.list(include_total=False).total is None
    for query in ("mimetypes=a/b", "colour=red", "source=moon", "sample_type=x", "include_total=x"):
        _, key = site.key(owner="ann")
        assert site.get(f"/v1/files?{query}", key).status_code == 400


def test_jobs_are_listed_by_metadata_and_by_key(mistral, site):
    requests = [{"body": {"messages": [{"role": "user", "content": "hi"}]}}]
    for number in range(2):
        details = {"team": "red", "number": str(number)}
        mistral.batch.jobs.create(endpoint=CHAT, requests=requests, model="stub", metadata=details)
    assert mistral.batch.jobs.list(metadata={"team": "red"}).total == 2
    (only,) = mistral.batch.jobs.list(metadata={"team": "red", "number": "1"}).data
    assert only.metadata["number"] == "1"
    assert mistral.batch.jobs.list(metadata={"team": "blue"}).total == 0
    assert mistral.batch.jobs.list(created_by_me=True).total == 2
    _, other = site.key("other", owner="ann")
    listed = site.get("/v1/batch/jobs?created_by_me=true", other).json()
    assert (listed["total"], listed["data"]) == (0, [])
    assert site.get("/v1/batch/jobs?agent_id=x", other).status_code == 400
    assert site.get("/v1/batches?colour=red", other).status_code == 400


def test_lines_wait_while_the_queue_is_full_and_are_not_lost(openai, site):
    site.engine.max_queue = 1
    site.engine.token_s = 0.002
    text = "\n".join(_line(n) for n in range(4)).encode()
    file = openai.files.create(file=("in", text), purpose="batch")
    batch = openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    started = time.monotonic()
    site.work(lambda: openai_status(site, batch.id) == "succeeded")
    counts = openai.batches.retrieve(batch.id).request_counts
    assert (counts.completed, counts.failed) == (4, 0)
    assert time.monotonic() - started < 60


def test_a_job_whose_key_is_at_its_limit_does_not_hold_up_another_keys(site):
    poor, _ = site.key("poor", limits=KeyLimits(requests_per_minute=1))
    rich, _ = site.key("rich")
    jobs = {}
    for key in (poor, rich):
        file = site.store.files.create(
            key.owner, "in", "batch", [b"\n".join([_line(n).encode() for n in range(6)])]
        )
        job = site.store.batches.create(key.owner, endpoint=CHAT, input_files=[file.id], key_id=key.id)
        jobs[key.owner] = job.id
        site.clock.now += 1

    def state(key):
        return site.store.batches.get(key.owner, jobs[key.owner])

    site.work(lambda: state(rich).status == "succeeded" and state(poor).succeeded)
    assert state(rich).succeeded == 6
    behind = state(poor)
    assert (behind.status, behind.succeeded, behind.failed) == ("running", 1, 0)


def test_a_batch_of_a_revoked_key_fails_line_by_line(openai, site):
    file = openai.files.create(file=("in", _line(0).encode()), purpose="batch")
    batch = openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    site.store.keys.revoke(site.store.keys.list()[0].id)
    site.work(lambda: openai_status(site, batch.id) == "succeeded")
    done = site.store.batches.get("ann", batch.id)
    assert (done.succeeded, done.failed) == (0, 1)
    assert site.engine.requests == []


def test_a_bad_batch_file_tells_the_line(openai, mistral):
    file = openai.files.create(file=("in", b"not json\n"), purpose="batch")
    batch = openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert batch.status == "failed"
    assert batch.errors.data[0].line == 1
    assert "line 1" in mistral.batch.jobs.get(job_id=batch.id).errors[0].message


def test_everything_of_another_owner_is_not_found(site, openai):
    """Generated from the route table: every route with an id, asked for by someone else and by an admin."""
    file = openai.files.create(file=("in", _line(0).encode()), purpose="batch")
    batch = openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    ids = {"file_id": file.id, "batch_id": batch.id, "job_id": batch.id}
    others = [
        site.key(owner="bob", scopes=["inference", "tune"])[1],
        site.key(scopes=["inference", "admin"])[1],
    ]
    checked = 0
    for path, methods in _id_routes(site):
        for name, value in ids.items():
            path = path.replace(f"{{{name}}}", value)
        for method in methods:
            for key in others:
                response = site.request(method, path, key)
                assert response.status_code == 404, (method, path, response.text)
                assert response.json()["error"]["code"] == "not_found"
                checked += 1
    assert checked >= 18
    for key in others:
        for listing in ("/v1/files", "/v1/batches", "/v1/batch/jobs"):
            assert site.get(listing, key).json()["data"] == []
    assert openai.files.retrieve(file.id).id == file.id
    assert openai.batches.retrieve(batch.id).status == "validating"


def _id_routes(site):
    pending = list(site.app.routes)
    while pending:
        route = pending.pop(0)
        if inner := getattr(route, "original_router", None):
            pending += inner.routes
        elif any(f"{{{name}}}" in route.path for name in ("file_id", "batch_id", "job_id")):
            yield route.path, route.methods - {"HEAD"}


def test_usage_is_ones_own_unless_one_is_an_admin(site):
    _, ann = site.key(owner="ann")
    _, bob = site.key(owner="bob")
    _, admin = site.key(scopes=["admin"])
    site.chat(ann)
    site.chat(ann)
    site.chat(bob)
    assert site.get("/v1/usage?by=model", ann).json()["total"]["requests"] == 2
    assert site.get("/v1/usage?owner=ann", bob).json()["total"]["requests"] == 1
    assert site.get("/v1/usage", admin).json()["total"]["requests"] == 3
    assert site.get("/v1/usage?owner=bob", admin).json()["total"]["requests"] == 1
    assert [row["owner"] for row in site.get("/v1/usage/requests", bob).json()["data"]] == ["bob"]
    assert site.get("/v1/usage?by=prompt", ann).status_code == 400


def test_keys_and_prices_are_managed_over_the_admin_api(site):
    _, admin = site.key(scopes=["admin"])
    body = {"name": "n", "limits": {"requests_per_minute": 1, "money_per_month": "5"}}
    made = site.post("/v1/admin/keys", admin, json=body).json()
    assert site.get("/v1/models", made["key"]).status_code == 200
    listed = site.get("/v1/admin/keys", admin)
    assert made["key"] not in listed.text
    assert made["id"] in [key["id"] for key in listed.json()["data"]]
    assert site.request("DELETE", f"/v1/admin/keys/{made['id']}", admin).json()["revoked_at"]
    assert site.get("/v1/models", made["key"]).status_code == 401
    price = {"model": "stub", "input": "0.1", "output": "0.3"}
    assert site.request("PUT", "/v1/admin/prices", admin, json=price).json()["cached"] == "0.1"
    assert site.request("PUT", "/v1/admin/rates", admin, json={"energy": "0.3"}).json()["energy"] == "0.3"
    assert site.get("/v1/admin/prices", admin).json()["data"][0]["model"] == "stub"
    assert site.request("DELETE", "/v1/admin/prices/stub", admin).json()["deleted"]
    for bad in ({"name": ""}, {"name": "x", "scopes": ["root"]}, {"name": "x", "limits": {"rpm": 1}}, {}):
        assert site.post("/v1/admin/keys", admin, json=bad).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/batches", {"input_file_id": "x", "endpoint": "/v1/other", "completion_window": "24h"}),
        ("/v1/batches", {"input_file_id": "x", "endpoint": CHAT, "completion_window": "1h"}),
        ("/v1/batch/jobs", {"endpoint": CHAT}),
        ("/v1/batch/jobs", {"endpoint": CHAT, "input_files": ["x"], "requests": [{"body": {}}]}),
        ("/v1/batch/jobs", {"endpoint": CHAT, "requests": [{"body": {}}], "timeout_hours": 1000}),
        ("/v1/batch/jobs", {"endpoint": CHAT, "requests": [{"body": {}}], "metadata": {"a": {}}}),
        ("/v1/batch/jobs", {"endpoint": CHAT, "requests": [{"body": {}}], "agent_id": "a"}),
    ],
)
def test_a_bad_job_is_a_400(site, path, body):
    assert site.post(path, json=body).status_code == 400


@pytest.mark.parametrize(
    "path",
    ["/v1/files?limit=0", "/v1/files?limit=x", "/v1/files?page=-1", "/v1/files?order=up",
     "/v1/files?purpose=ocr", "/v1/batch/jobs?status=DONE", "/v1/batch/jobs?created_after=soon",
     "/v1/usage?since=now"],
)  # fmt: skip
def test_a_bad_query_is_a_400(site, path):
    assert site.get(path).status_code == 400


def test_an_upload_without_a_file_or_with_too_much_is_refused(site):
    assert site.post("/v1/files", data={"purpose": "batch"}).status_code in (400, 415)
    assert site.post("/v1/files", files={"other": ("a", b"x")}).status_code == 400
    assert (
        site.post("/v1/files", content=b"--x", headers={"content-type": "multipart/form-data"}).status_code
        == 400
    )
    assert site.upload(purpose="ocr").status_code == 400
    site.store.files.max_bytes = 10
    assert site.upload(content=b"x" * 11).status_code == 400
    assert site.store.files.list("local") == ([], 0)
