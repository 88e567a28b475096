"""A hub on loopback with every fault that a test asks for. Run as a script it serves until it is killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bise.hub.checksums import damaged_in
from bise.hub.client import HubClient
from bise.hub.pull import pull

REPO = "owner/tiny"
COMMIT = "c" * 40


def model_files(size: int = 300_000) -> dict[str, bytes]:
    rng = random.Random(5)
    return {
        "config.json": b'{"model_type": "mistral"}',
        "tokenizer.json": rng.randbytes(5000),
        "model-00001-of-00002.safetensors": rng.randbytes(size),
        "model-00002-of-00002.safetensors": rng.randbytes(size // 3 + 7),
        "LICENSE": b"do what you like",
    }


class StubHub:
    """Serves `files`; `faults` is consulted with (handler, name, data) before each file and returns True when
    it has answered."""

    def __init__(self, files: dict[str, bytes] | None = None, pause_s: float = 0.0) -> None:
        self.files = model_files() if files is None else files
        self.extra: list[dict] = []
        self.faults: list = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.lying_sums: dict[str, str] = {}
        self.lying_sizes: dict[str, int] = {}
        self.listing_headers: dict[str, str] = {}
        self.ranges = True
        self.pause_s = pause_s
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def listing(self) -> dict:
        files = []
        for name, data in self.files.items():
            size = self.lying_sizes.get(name, len(data))
            entry = {"rfilename": name, "size": size}
            if name.endswith(".safetensors"):
                digest = self.lying_sums.get(name, hashlib.sha256(data).hexdigest())
                entry["lfs"] = {"sha256": digest, "size": size}
            else:
                blob = b"blob %d\0" % len(data) + data
                entry["blobId"] = self.lying_sums.get(name, hashlib.sha1(blob).hexdigest())
            files.append(entry)
        return {"sha": COMMIT, "siblings": files + self.extra, "cardData": {"license": "apache-2.0"}}

    def requests_for(self, name: str) -> list[dict[str, str]]:
        return [headers for path, headers in self.seen if path.endswith(f"/{name}")]


def fetch(hub, token=None, accept=lambda listing, size: None, name="tiny", silence_s=5.0):
    with HubClient(hub.url, token, silence_s=silence_s) as client:
        return pull(client, REPO, "main", name, accept=accept, pause=lambda seconds: None)


def installed(home) -> dict[str, bytes] | None:
    folder = home / "models" / "tiny"
    return {f.name: f.read_bytes() for f in folder.iterdir()} if folder.exists() else None


def assert_whole(hub, home):
    files = installed(home)
    assert {name: files[name] for name in hub.files} == hub.files
    assert set(files) == {*hub.files, "pulled.json", "SHA256SUMS"}
    assert damaged_in(home / "models" / "tiny") == []
    staging = home / "models" / ".pulling"
    assert [entry.name for entry in staging.iterdir()] == ["tiny.lock"]


def _handler(hub: StubHub):
    class Handler(BaseHTTPRequestHandler):
        def handle(self):
            with contextlib.suppress(ConnectionError):  # of pulls that were killed
                super().handle()

        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            hub.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            try:
                self.answer()
            except OSError:
                self.close_connection = True

        def answer(self):
            if self.path.startswith("/api/models/"):
                data = json.dumps(hub.listing()).encode()
                self.head(200, {"content-length": str(len(data)), **hub.listing_headers})
                self.wfile.write(data)
                return
            name = self.path.rsplit("/", 1)[1]
            data = hub.files.get(name)
            for fault in hub.faults:
                if fault(self, name, data):
                    return
            if data is None:
                self.head(404, {"content-length": "0"})
                return
            self.send_file(data)

        def send_file(self, data, etag='"e1"'):
            start = 0
            wanted = self.headers.get("range")
            if wanted and hub.ranges and self.headers.get("if-range", etag) == etag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers = {"content-length": str(len(data) - start), "etag": etag}
            if start:
                headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.head(206 if start else 200, headers)
            for place in range(start, len(data), 16384):
                self.wfile.write(data[place : place + 16384])
                if hub.pause_s:
                    threading.Event().wait(hub.pause_s)

        def head(self, status, headers):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

        def cut(self):
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)

    return Handler


if __name__ == "__main__":
    stub = StubHub(model_files(int(sys.argv[1])), float(sys.argv[2]))
    print(stub.url, flush=True)
    threading.Event().wait()
