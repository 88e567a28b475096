"""A host of models on loopback that answers as a test says."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-upstream-secret"
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def completion(content="Hi there", calls=None, reason="stop", usage=USAGE):
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    body = {"id": "x", "model": "big", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}
    return body | ({"usage": usage} if usage else {})


def call(arguments, name="weather"):
    return [{"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}]


class Upstream:
    """Answers with `answer`: an object, bytes of events, or a function that is given the handler."""

    def __init__(self):
        self.answer = completion()
        self.status = 200
        self.headers = {}
        self.seen = []
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                upstream.seen.append((self.path, dict(self.headers), body))
                answer = upstream.answer
                try:
                    if callable(answer):
                        answer(self)
                        return
                    is_stream = isinstance(answer, bytes)
                    self.send_response(upstream.status)
                    kind = "text/event-stream" if is_stream else "application/json"
                    for name, value in {"content-type": kind, **upstream.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(answer if is_stream else json.dumps(answer).encode())
                except OSError:
                    pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def events(*deltas, reason="stop", usage=USAGE, done=True):
    lines = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    lines.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage:
        lines.append({"choices": [], "usage": usage})
    data = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
    return (data + ("data: [DONE]\n\n" if done else "")).encode()


def chunks(response):
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
