"""Two `bise serve` processes on one database: limits, the ledger under a storm, a stop, restarts, the log."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

SECRET_WORD = "xylophone-of-the-third-kind"


class Server:
    """One process over a home directory and a database."""

    def __init__(self, home: Path, database: str, log: Path):
        self.log = log
        self.environment = os.environ | {"BISE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
        self.database = database
        command = [sys.executable, "-m", "bise", "serve", "--port", "0", "--db", database, "--grace", "100",
                   "--threads", "1", "--log-level", "debug"]  # fmt: skip
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env=self.environment, text=True
            )
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, log.read_text()[-2000:]
        self.url = found[0]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def chat(self, key, stream=False, **fields):
        body = {"model": "brise", "messages": [{"role": "user", "content": f"Say {SECRET_WORD}"}],
                "max_tokens": 1, "stream": stream, **fields}  # fmt: skip
        return self.client.post("/v1/chat/completions", headers=bearer(key), json=body)

    def cli(self, *args):
        command = [sys.executable, "-m", "bise", *args, "--db", self.database, "--json"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stop(self):
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(110)

    def kill(self):
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def database(request, tmp_path, free_port):
    if request.param == "sqlite":
        yield str(tmp_path / "bise.db")
        return
    path = Path(__file__).parent.parent / "store" / "conftest.py"
    spec = importlib.util.spec_from_file_location("store_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    binaries = module._postgres_bin()
    if binaries is None:
        pytest.skip("no PostgreSQL on this machine (apt-get install postgresql)")
    server = module.PostgresServer(binaries, free_port())
    yield server.new_url()
    server.stop()


@pytest.fixture
def start(tmp_path, database):
    servers = []

    def make():
        servers.append(Server(tmp_path / "home", database, tmp_path / "log"))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


def admin_key(home, database):
    from bise.store.opening import Store

    (home / "files").mkdir(parents=True, exist_ok=True)
    with Store.open(database, folder=home / "files", secret=home / "secret") as store:
        return store.keys.create("root", scopes=["admin", "inference", "metrics"])[1]


def storm(servers, key, count, seed):
    """Send requests of which many are left early, in different ways; return when nothing runs any more."""

    def one(number):
        dice = random.Random(seed * 1000 + number)
        server = servers[number % len(servers)]
        text = SECRET_WORD * dice.randint(1, 20)
        body = {"model": "brise", "messages": [{"role": "user", "content": text}],
                "max_tokens": dice.choice([1, 5, 40, 80]), "stream": dice.random() < 0.7}  # fmt: skip
        try:
            options = {"headers": bearer(key), "json": body, "timeout": dice.choice([0.02, 0.2, 30])}
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", **options) as response:
                for index, _ in enumerate(response.iter_lines()):
                    if dice.random() < 0.3 and index > dice.randint(0, 6):
                        return
        except httpx.HTTPError:
            pass

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(count)))
    until = time.monotonic() + 100
    while any(metric(server, key, r"bise_(?:running|waiting)_requests\{") for server in servers):
        assert time.monotonic() < until
        time.sleep(0.05)


def written_usage(one, two, key):
    """Return what the ledger says, once it has all that was counted: rows follow the answers."""
    patterns = {
        "requests": r"bise_requests_total\{",
        "prompt_tokens": r'bise_tokens_total\{kind="prompt"',
        "completion_tokens": r'bise_tokens_total\{kind="completion"',
        "cached_tokens": r'bise_tokens_total\{kind="cached"',
    }
    until = time.monotonic() + 60
    while True:
        usage = one.client.get("/v1/usage", headers=bearer(key)).json()["total"]
        told = {name: metric(one, key, of) + metric(two, key, of) for name, of in patterns.items()}
        if told == {name: usage[name] for name in told}:
            return usage
        assert time.monotonic() < until, (told, usage)
        time.sleep(0.05)


def metric(server, key, pattern):
    page = server.client.get("/metrics", headers=bearer(key)).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if re.match(pattern, line))


@pytest.mark.timeout(400)
def test_two_processes_share_limits_the_ledger_and_nothing_of_a_users_text(start, tmp_path, database):
    root = admin_key(tmp_path / "home", database)
    one, two = start(), start()
    made = one.client.post(
        "/v1/admin/keys", headers=bearer(root), json={"name": "ann", "limits": {"requests_per_minute": 15}}
    ).json()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: (one, two)[n % 2].chat(made["key"]).status_code, range(24)))
    assert sorted(set(answers)) == [200, 429]
    assert abs(answers.count(200) - 15) <= 1
    assert one.chat(root).status_code == two.chat(root).status_code == 200  # others are not concerned

    storm([one, two], root, 60, seed=7)
    usage = written_usage(one, two, root)
    told = one.cli("usage", "--by", "model")["total"]
    assert told == usage
    rows, before = [], 0
    while True:
        query = f"?limit=50{f'&before={before}' if before else ''}"
        page = two.client.get(f"/v1/usage/requests{query}", headers=bearer(root)).json()
        rows += page["data"]
        if not page["has_more"]:
            break
        before = rows[-1]["id"]
    assert len(rows) == usage["requests"]
    assert sum(row["completion_tokens"] for row in rows) == usage["completion_tokens"]
    assert any(row["finish_reason"] == "abort" for row in rows)

    # A restart forgets nothing of a limit (which is a minute's, and the storm may have taken long).
    while one.chat(made["key"]).status_code == 200:
        pass
    assert one.stop() == 0
    third = start()
    assert third.chat(made["key"]).status_code == 429
    assert (two.stop(), third.stop()) == (0, 0)
    log = (tmp_path / "log").read_text()
    assert "event=" in log
    assert SECRET_WORD not in log
    assert made["key"] not in log
    assert root not in log


@pytest.mark.timeout(400)
def test_a_stop_lets_a_stream_end_and_a_batch_goes_on_after_the_restart(start, tmp_path, database):
    root = admin_key(tmp_path / "home", database)
    server = start()
    lines = [
        json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": "brise", "messages": [{"role": "user", "content": f"Count {n}"}], "max_tokens": 30}})
        for n in range(30)
    ]  # fmt: skip
    content = "\n".join(lines).encode()
    uploaded = server.client.post(
        "/v1/files", headers=bearer(root), files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}
    ).json()
    job = server.client.post(
        "/v1/batches",
        headers=bearer(root),
        json={
            "input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h",
        },
    ).json()  # fmt: skip
    streams: list[str] = []

    begun = threading.Semaphore(0)

    def read(number):
        body = {"model": "brise", "messages": [{"role": "user", "content": f"Tell a story {number}"}],
                "max_tokens": 150, "ignore_eos": True, "stream": True}  # fmt: skip
        request = {"headers": bearer(root), "json": body}
        text = ""
        with server.client.stream("POST", "/v1/chat/completions", **request) as response:
            for part in response.iter_text():
                if not text:
                    begun.release()
                text += part
        streams.append(text)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for reader in readers:
        reader.start()
    for _ in readers:
        assert begun.acquire(timeout=100)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(110) == 0
    for reader in readers:
        reader.join(60)
    assert len(streams) == 4
    assert all(text.rstrip().endswith("data: [DONE]") and '"error"' not in text for text in streams)

    again = start()
    until = time.monotonic() + 200
    found = job
    while found["status"] not in ("completed", "failed"):
        assert time.monotonic() < until
        time.sleep(0.1)
        found = again.client.get(f"/v1/batches/{job['id']}", headers=bearer(root)).json()
    assert found["status"] == "completed"
    path = f"/v1/files/{found['output_file_id']}/content"
    answers = again.client.get(path, headers=bearer(root)).text.splitlines()
    assert sorted(json.loads(line)["custom_id"] for line in answers) == sorted(f"c{n}" for n in range(30))
    assert again.stop() == 0
