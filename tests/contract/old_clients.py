"""Older and other clients against a live server, each in a virtual environment of its own.

    python tests/contract/old_clients.py [--port 8000] [--model brise]

Starts a server of its own without --port. Needs the package index. Exit code 1 when any of them fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ASK = '[{"role": "user", "content": "Name a river."}]'

MISTRAL_1 = f"""
from mistralai import Mistral
with Mistral(api_key="none", server_url=URL) as client:
    assert client.chat.complete(model=MODEL, messages={ASK}, max_tokens=8).choices[0].message.content
    chunks = [event.data for event in client.chat.stream(model=MODEL, messages={ASK}, max_tokens=8)]
    assert sum(chunk.usage is not None for chunk in chunks) == 1
    assert client.models.list().data[0].capabilities.completion_chat
    assert client.embeddings.create(model=MODEL, inputs=["a"]).data[0].embedding
"""
MISTRAL_TUNING = """
import json, time
from mistralai import Mistral
rows = [{"messages": [{"role": "user", "content": f"What is {n} plus {n}?"},
                      {"role": "assistant", "content": f"It is {2 * n}."}]} for n in range(12)]
content = "".join(json.dumps(row) + "\\n" for row in rows).encode()
with Mistral(api_key="none", server_url=URL) as client:
    file = client.files.upload(file={"file_name": "t.jsonl", "content": content}, purpose="fine-tune")
    jobs = client.fine_tuning.jobs
    made = jobs.create(model=MODEL, training_files=[{"file_id": file.id, "weight": 1}], auto_start=False,
                       hyperparameters={"training_steps": 3, "learning_rate": 0.0005})
    assert made.status == "QUEUED", made
    assert made.id in [job.id for job in jobs.list(page=0, page_size=50).data]
    jobs.start(job_id=made.id)
    while (job := jobs.get(job_id=made.id)).status not in ("SUCCESS", "FAILED", "FAILED_VALIDATION"):
        time.sleep(0.5)
    assert job.status == "SUCCESS", job
    assert job.trained_tokens > 0 and job.events and job.hyperparameters.training_steps == 3
    assert job.checkpoints[0].step_number == 3
    asked = dict(messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
    assert client.chat.complete(model=job.fine_tuned_model, **asked).model == job.fine_tuned_model
    assert client.models.delete(model_id=job.fine_tuned_model).deleted
    other = jobs.create(model=MODEL, training_files=[{"file_id": file.id}], auto_start=False,
                        hyperparameters={"training_steps": 3})
    assert jobs.cancel(job_id=other.id).status == "CANCELLED"
"""
MISTRAL_2 = MISTRAL_1.replace("from mistralai import", "from mistralai.client import")
OPENAI = f"""
from openai import OpenAI
client = OpenAI(api_key="none", base_url=URL + "/v1")
assert client.chat.completions.create(model=MODEL, messages={ASK}, max_tokens=8).choices[0].message.content
chunks = list(client.chat.completions.create(
    model=MODEL, messages={ASK}, max_tokens=8, stream=True, stream_options={{"include_usage": True}}))
assert chunks[-1].usage.completion_tokens <= 8
assert client.models.list().data
assert client.embeddings.create(model=MODEL, input="a").data[0].embedding
"""
LITELLM = f"""
import litellm
shared = dict(api_base=URL + "/v1", api_key="none", messages={ASK}, max_tokens=8)
answer = litellm.completion(model="openai/" + MODEL, **shared)
assert answer.choices[0].message.content
parts = litellm.completion(model="openai/" + MODEL, stream=True, **shared)
assert "".join(part.choices[0].delta.content or "" for part in parts)
answer = litellm.completion(model="mistral/" + MODEL, **shared)
assert answer.choices[0].message.content
"""
LANGCHAIN = """
from langchain_mistralai import ChatMistralAI
model = ChatMistralAI(model=MODEL, endpoint=URL + "/v1", api_key="none", temperature=0, max_tokens=8)
whole = model.invoke("Name a river.")
assert whole.content
parts = None
for part in model.stream("Name a river."):
    parts = part if parts is None else parts + part
assert parts.content == whole.content, (parts.content, whole.content)
assert parts.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
"""
CLIENTS = {
    "mistralai==1.12.4": MISTRAL_1 + MISTRAL_TUNING,
    "mistralai==1.9.11": MISTRAL_TUNING,
    "mistralai==2.10.1": MISTRAL_2,
    "openai==1.109.1": OPENAI,
    "openai==2.54.0": OPENAI,
    "litellm": LITELLM,
    "langchain-mistralai": LANGCHAIN,
}


def check(requirement: str, script: str, url: str, model: str, folder: Path) -> str | None:
    """Run a script with a client installed; return what went wrong."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    made = subprocess.run([python, "-m", "pip", "install", "-q", requirement], capture_output=True, text=True)
    if made.returncode:
        return f"cannot be installed: {made.stderr.strip().splitlines()[-1]}"
    source = f"URL, MODEL = {url!r}, {model!r}\n{script}"
    done = subprocess.run([python, "-c", source], capture_output=True, text=True, timeout=300)
    return None if done.returncode == 0 else done.stderr.strip()[-1500:]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int)
    parser.add_argument("--model", default="brise")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.port:
        return check_all(f"http://127.0.0.1:{options.port}", options.model, options.only)
    command = [sys.executable, "-m", "bise", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(" at ")[1].strip().removesuffix("/v1")
            return check_all(url, options.model, options.only)
        finally:
            server.terminate()


def check_all(url: str, model: str, only: str) -> int:
    """Run every client whose requirement holds `only`; return how it went as an exit code."""
    bad = 0
    for requirement, script in CLIENTS.items():
        if only not in requirement:
            continue
        with tempfile.TemporaryDirectory() as folder:
            wrong = check(requirement, script, url, model, Path(folder))
        print(f"{requirement}: {wrong or 'ok'}", flush=True)
        bad += wrong is not None
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
