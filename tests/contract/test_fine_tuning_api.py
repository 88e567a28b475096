"""Fine-tuning jobs over HTTP: official clients, a real process that trains, a server that comes and goes."""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from openai import APIStatusError, OpenAI

from bise.engine.fleet import Fleet
from bise.engine.model_spec import ModelSpec
from bise.server import fine_tuning, tuning_worker
from bise.store.keys import KeyLimits
from bise.store.opening import Store


def _tiny():
    path = Path(__file__).parents[1] / "train" / "tiny_model.py"
    spec = importlib.util.spec_from_file_location("tiny_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_model"] = module
    spec.loader.exec_module(module)
    return module


tiny = _tiny()
# Trainers have the lowest priority: beside other work they take what is left.
pytestmark = pytest.mark.timeout(600)


class Server:
    """`bise serve` as the command line puts it together, in a thread; the same folder is the same server."""

    def __init__(self, folder: Path, model: Path) -> None:
        from bise.server.app import create_app
        from bise.server.background import serve_all
        from bise.server.gate import StoreGate
        from bise.server.limits import HttpLimits
        from bise.server.serving import Serving, bind, url_of
        from bise.server.stored import routers

        folder.mkdir(exist_ok=True)
        (folder / "files").mkdir(exist_ok=True)
        self.store = Store.open(str(folder / "bise.db"), folder=folder / "files", secret=folder / "secret")
        self.fleet = Fleet([ModelSpec(name="tiny", path=model, threads=1)])
        self.gate = StoreGate(self.store, canonical=lambda name: self.fleet.card(name).spec.name)
        self.app = create_app(self.fleet, self.gate, routers=routers())
        self.listener = bind("127.0.0.1", 0)
        self.url = url_of(self.listener)
        ready = threading.Event()
        self.serving = Serving(self.app, limits=HttpLimits(), grace_s=5.0, on_ready=ready.set)

        async def main():
            self.loop = asyncio.get_running_loop()
            await serve_all(self.serving, self.app, self.gate, self.listener)

        self.thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        self.thread.start()
        assert ready.wait(100)

    def client(self, owner="ann", scopes=("inference", "tune"), **more):
        _, key = self.store.keys.create(owner, owner=owner, scopes=scopes, **more)
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def close(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.serving.stop)
            self.thread.join(60)
        self.listener.close()
        self.app.service.close()
        self.store.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("tuned") / "tiny")


@pytest.fixture
def server(tmp_path, model, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BISE_THREADS", "1")
    for name in ("_IDLE_S", "_TICK_S"):
        monkeypatch.setattr(tuning_worker, name, 0.05)
    servers = []

    def start():
        servers.append(Server(tmp_path / "state", model))
        return servers[-1]

    yield start
    for one in servers:
        one.close()


def data(count=12) -> bytes:
    rows = [tiny.chat(f"What is {n} plus {n}?", f"It is {2 * n}.") for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def upload(client, content=None, name="train.jsonl"):
    return client.files.create(file=(name, data() if content is None else content), purpose="fine-tune").id


def wait(client, job_id, *statuses, seconds=500):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses:
            return job
        time.sleep(0.1)
    raise AssertionError(f"the job is {job.status}: {job.error}")


OVER = ("succeeded", "failed", "cancelled")


def is_step(event) -> bool:
    return event.type == "metrics" and "train_loss" in event.data


def follow(client, job_id):
    """Yield a job's events as they come, from the first one on, until it is over. pytest's limit is the only
    clock: how long a process of the lowest priority takes is up to what else runs.
    """
    with httpx.stream(
        "GET", f"{client.base_url}fine_tuning/jobs/{job_id}/events", params={"stream": "true"},
        headers={"authorization": f"Bearer {client.api_key}"}, timeout=None,
    ) as answer:  # fmt: skip
        said = ""
        for said in filter(None, answer.iter_lines()):
            if said != "data: [DONE]":
                yield json.loads(said.removeprefix("data: "))
        assert said == "data: [DONE]"


def wait_for_a_step(client, job_id, after=0) -> int:
    """Wait until a job has told the loss of a step beyond `after`; return its number."""
    for event in follow(client, job_id):
        if "train_loss" in event["data"] and event["data"]["step"] > after:
            return event["data"]["step"]
    raise AssertionError(f"the job ended before: {client.fine_tuning.jobs.retrieve(job_id)}")


def losses_are_a_file_and_tokens_a_row(here, ann, done, losses):
    (file_id,) = done.result_files
    rows = list(csv.DictReader(io.StringIO(ann.files.content(file_id).text)))
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(losses, rel=1e-4)
    assert rows[-1]["valid_loss"]
    assert ann.files.retrieve(file_id).filename == "step_metrics.csv"
    trained = [row for row in here.store.ledger.rows() if row.endpoint == "/v1/fine_tuning/jobs"]
    assert [(row.owner, row.request_id, row.model, row.prompt_tokens) for row in trained] == [
        ("ann", done.id, "tiny", done.trained_tokens)
    ]
    assert here.store.ledger.sums("endpoint", owner="ann")[0].prompt_tokens == done.trained_tokens


def checkpoints_answer(ann, bob, job_id) -> list[str]:
    """See that the states at the ends of epochs are models of their owner; return their names."""
    checkpoints = ann.fine_tuning.jobs.checkpoints.list(job_id, limit=1)
    assert [entry.step_number for entry in checkpoints] == [6, 3]  # over two pages; one at each epoch's end
    saved = [entry.fine_tuned_model_checkpoint for entry in checkpoints]
    for name in saved:
        said = ann.completions.create(model=name, prompt="What is", max_tokens=3, temperature=0)
        assert said.model == name
        with pytest.raises(APIStatusError) as caught:
            bob.completions.create(model=name, prompt="What is", max_tokens=3)
        assert caught.value.status_code == 404
    return saved


def test_a_job_of_openais_client_trains_and_its_model_answers_to_its_owner_alone(server, tmp_path):
    here = server()
    ann, bob = here.client("ann"), here.client("bob")
    validation = upload(ann, data(4), "valid.jsonl")
    made = ann.fine_tuning.jobs.create(
        model="tiny", training_file=upload(ann), validation_file=validation, suffix="mine", seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        metadata={"why": "test"},
    )  # fmt: skip
    assert made.status in ("queued", "validating_files", "running")
    assert (made.object, made.model, made.seed) == ("fine_tuning.job", "tiny", 3)
    assert made.metadata == {"why": "test"}
    with pytest.raises(APIStatusError) as caught:
        bob.fine_tuning.jobs.retrieve(made.id)
    assert caught.value.status_code == 404
    assert bob.fine_tuning.jobs.list().data == []
    done = wait(ann, made.id, *OVER)
    assert (done.status, done.fine_tuned_model, done.error) == ("succeeded", "tiny:mine", None)
    assert done.trained_tokens > 100
    assert done.hyperparameters.n_epochs == 2
    events = list(ann.fine_tuning.jobs.list_events(made.id, limit=3))  # over several pages
    assert events[-1].message == "The job was created."
    assert events[0].message == "The job has succeeded."
    assert any("12 examples to learn, 4 held back" in event.message for event in events)
    losses = [event.data["train_loss"] for event in reversed(events) if is_step(event)]
    assert len(losses) == 6
    assert [event.data["step"] for event in events if event.message.startswith("Checkpoint")] == [6, 3]
    assert losses[-1] < losses[0]
    answer = ann.completions.create(model="tiny:mine", prompt="What is", max_tokens=3, temperature=0)
    assert answer.model == "tiny:mine"
    losses_are_a_file_and_tokens_a_row(here, ann, done, losses)
    saved = checkpoints_answer(ann, bob, made.id)
    assert ann.models.delete(saved[0]).deleted
    assert [entry.step_number for entry in ann.fine_tuning.jobs.checkpoints.list(made.id)] == [3]
    assert "tiny:mine" in [entry.id for entry in ann.models.list()]
    assert "tiny:mine" not in [entry.id for entry in bob.models.list()]
    with pytest.raises(APIStatusError) as caught:
        bob.completions.create(model="tiny:mine", prompt="What is", max_tokens=3)
    assert caught.value.status_code == 404
    with pytest.raises(APIStatusError) as caught:
        bob.models.delete("tiny:mine")
    assert caught.value.status_code == 404
    here.close()
    again = server()  # a new process serves what was made before
    ann = OpenAI(base_url=f"{again.url}/v1", api_key=ann.api_key, max_retries=0)
    assert ann.completions.create(model=saved[1], prompt="What is", max_tokens=3).model == saved[1]
    assert (
        ann.completions.create(model="tiny:mine", prompt="What is", max_tokens=3, temperature=0).choices
        == answer.choices
    )
    assert ann.models.delete("tiny:mine").deleted
    assert ann.fine_tuning.jobs.retrieve(made.id).fine_tuned_model is None
    assert ann.fine_tuning.jobs.checkpoints.list(made.id).data == []
    for name in ("tiny:mine", saved[1]):
        with pytest.raises(APIStatusError) as caught:
            ann.completions.create(model=name, prompt="What is", max_tokens=3)
        assert caught.value.status_code == 404
    assert not list((tmp_path / "home" / "tuning").iterdir())


def test_a_job_goes_on_after_a_restart_pauses_resumes_and_is_cancelled(server, tmp_path):
    here = server()
    ann = here.client()
    job = ann.fine_tuning.jobs.create(
        model="tiny", training_file=upload(ann), hyperparameters={"n_epochs": 900, "batch_size": 2}
    )
    wait_for_a_step(ann, job.id)
    here.close()
    assert [stored.status for stored in here_jobs(tmp_path)] == ["queued"]
    again = server()
    ann = OpenAI(base_url=f"{again.url}/v1", api_key=ann.api_key, max_retries=0)
    running = wait(ann, job.id, "running")
    assert running.estimated_finish is None or running.estimated_finish > time.time() - 5
    checkpoints = ann.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoints
    assert checkpoints[0].step_number > 0
    steps = [event.data["step"] for event in ann.fine_tuning.jobs.list_events(job.id, limit=100).data
             if event.type == "metrics"]  # fmt: skip
    assert steps == sorted(steps, reverse=True)
    wait_for_a_step(ann, job.id, after=steps[0])
    assert ann.fine_tuning.jobs.pause(job.id).status == "running"
    assert wait(ann, job.id, "paused").finished_at is None
    told = [event.data for event in ann.fine_tuning.jobs.list_events(job.id, limit=100).data]
    step = max(data["step"] for data in told if data and "train_loss" in data)
    assert ann.fine_tuning.jobs.resume(job.id).status in ("queued", "validating_files", "running")
    wait_for_a_step(ann, job.id, after=step)
    ann.fine_tuning.jobs.cancel(job.id)
    assert wait(ann, job.id, *OVER).status == "cancelled"
    rows = [row for row in again.store.ledger.rows() if row.request_id == job.id]
    assert len(rows) == 3  # stopped with the server, paused, cancelled: what was computed until then
    assert all(row.prompt_tokens > 0 for row in rows)
    assert not (tmp_path / "home" / "tuning" / job.id).exists()
    with pytest.raises(APIStatusError) as caught:
        ann.fine_tuning.jobs.cancel(job.id)
    assert caught.value.status_code == 409


def here_jobs(tmp_path):
    folder = tmp_path / "state"
    store = Store.open(str(folder / "bise.db"), folder=folder / "files", secret=folder / "secret")
    try:
        return store.tuning.list("ann")[0]
    finally:
        store.close()


def test_mistrals_older_form_is_spoken_too(server):
    here = server()
    ann = here.client()
    headers = {"authorization": f"Bearer {ann.api_key}", "user-agent": "mistral-client-python/1.9.11"}
    with httpx.Client(base_url=here.url, headers=headers) as client:
        body = {
            "model": "tiny", "training_files": [{"file_id": upload(ann), "weight": 1}], "suffix": "m",
            "hyperparameters": {"training_steps": 3, "learning_rate": 0.001}, "auto_start": False,
        }  # fmt: skip
        job = client.post("/v1/fine_tuning/jobs", json=body).json()
        assert (job["object"], job["status"], job["job_type"]) == ("job", "QUEUED", "completion")
        assert client.get("/v1/fine_tuning/jobs", params={"page": 0, "page_size": 10}).json()["total"] == 1
        time.sleep(0.3)
        assert client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["status"] == "QUEUED"
        client.post(f"/v1/fine_tuning/jobs/{job['id']}/start")
        assert wait(ann, job["id"], *OVER).status == "succeeded"
        done = client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
        assert (done["status"], done["fine_tuned_model"]) == ("SUCCESS", "tiny:m")
        assert done["hyperparameters"]["training_steps"] == 3
        assert done["events"]
        listed = client.get("/v1/fine_tuning/jobs", params={"status": "SUCCESS", "model": "tiny"}).json()
        assert [entry["id"] for entry in listed["data"]] == [job["id"]]
        assert client.get("/v1/fine_tuning/jobs", params={"status": "FAILED"}).json()["total"] == 0


def test_bad_data_fails_the_job_with_the_line(server):
    here = server()
    ann = here.client()
    bad = upload(ann, data(3) + b'{"messages": [{"role": "user", "content": "x"}]}\n')
    job = ann.fine_tuning.jobs.create(model="tiny", training_file=bad)
    failed = wait(ann, job.id, *OVER)
    assert (failed.status, failed.error.code, failed.error.param) == (
        "failed", "invalid_training_file", "training_file",
    )  # fmt: skip
    assert failed.error.message.startswith("the training file: line 4: messages")
    first, *_ = follow(ann, job.id)
    assert first["message"] == "The job was created."


def test_what_cannot_be_done_is_refused_at_once(server, monkeypatch):
    here = server()
    ann, bob = here.client(), here.client("bob")
    file, theirs = upload(ann), upload(bob)
    other = ann.files.create(file=("b.jsonl", b"{}\n"), purpose="batch").id
    create = ann.fine_tuning.jobs.create
    for options, status, field in (
        ({"model": "nobody", "training_file": file}, 404, "model"),
        ({"model": "tiny:x", "training_file": file}, 400, "model"),
        ({"model": "tiny", "training_file": theirs}, 404, "file_id"),
        ({"model": "tiny", "training_file": other}, 400, "training_file"),
        ({"model": "tiny", "training_file": file, "suffix": "a:b"}, 400, "suffix"),
        ({"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 0}}, 400,
         "hyperparameters"),
        ({"model": "tiny", "training_file": file, "method": {"type": "reinforcement"}}, 400, "method.type"),
        ({"model": "tiny", "training_file": file, "integrations": [{"type": "wandb"}]}, 400, "integrations"),
    ):  # fmt: skip
        with pytest.raises(APIStatusError) as caught:
            create(**options)
        assert (caught.value.status_code, caught.value.param) == (status, field), options
    monkeypatch.setattr(fine_tuning, "find_spec", lambda name: None)
    with pytest.raises(APIStatusError, match=r"bise\[torch\]") as caught:
        create(model="tiny", training_file=file)
    assert caught.value.status_code == 501


def test_a_key_trains_only_with_the_scope_for_it_and_what_it_may_pay(server):
    here = server()
    for options, said in (
        ({"scopes": ("inference",)}, "scope tune"),
        ({"scopes": ("inference", "tune", "model:other")}, "may not use that model"),
        ({"limits": KeyLimits(money_per_month=Decimal(1))}, "nothing says what .tiny. costs"),
    ):
        client = here.client("ann", **options)
        with pytest.raises(APIStatusError, match=said) as caught:
            client.fine_tuning.jobs.create(model="tiny", training_file=upload(client))
        assert caught.value.status_code == 403
        assert client.fine_tuning.jobs.list().data == []


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the process that trains gets what other programs leave
def test_a_job_survives_kill_9_of_the_server(model, tmp_path):
    environment = os.environ | {"BISE_HOME": str(tmp_path / "home"), "BISE_THREADS": "1"}
    command = [sys.executable, "-m", "bise", "serve", str(model), "--port", "0"]

    def start():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        url = process.stdout.readline().split(" at ")[1].strip()
        return process, OpenAI(base_url=url, api_key="none", max_retries=3)

    process, client = start()
    try:
        job = client.fine_tuning.jobs.create(
            model="tiny", training_file=upload(client), hyperparameters={"n_epochs": 60, "batch_size": 2}
        )
        wait_for_a_step(client, job.id)
        process.kill()
        process.wait()
        process.stdout.close()
        process, client = start()
        told = [event["message"] for event in follow(client, job.id)]
        done = client.fine_tuning.jobs.retrieve(job.id)
        assert (done.status, told[-1]) == ("succeeded", "The job has succeeded.")
        assert "The job goes on after a restart." in told
        answer = client.completions.create(model=done.fine_tuned_model, prompt="What is", max_tokens=3)
        assert answer.model == done.fine_tuned_model
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
