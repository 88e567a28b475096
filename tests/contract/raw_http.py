"""Bytes to a server and back, for requests that no client library would send."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass


@dataclass
class Reply:
    """One HTTP answer; status 0 when the connection closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Wire:
    """A connection."""

    def __init__(self, port: int, timeout: float = 60.0, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(("127.0.0.1", port))
        self._rest = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Send everything; False when the server closed before it was through."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def reply(self) -> Reply:
        """Read one answer."""
        data = self._rest
        while b"\r\n\r\n" not in data:
            more = self._more()
            if not more:
                return Reply(0, {}, data)
            data += more
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ")[1])
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        if status == 100:
            self._rest = rest
            return self.reply()
        if "content-length" in headers:
            size = int(headers["content-length"])
            while len(rest) < size:
                more = self._more()
                if not more:
                    break
                rest += more
            self._rest = rest[size:]
            return Reply(status, headers, rest[:size])
        while not rest.endswith(b"0\r\n\r\n"):
            more = self._more()
            if not more:
                break
            rest += more
        self._rest = b""
        return Reply(status, headers, _unchunked(rest))

    def _more(self) -> bytes:
        try:
            return self.socket.recv(1 << 16)
        except ConnectionResetError:
            return b""

    def closed(self) -> bool:
        """True when the server has closed (waits for it up to the timeout)."""
        try:
            return self.socket.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True


def _unchunked(data: bytes) -> bytes:
    result = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        count = int(size, 16) if size else 0
        result += data[:count]
        data = data[count + 2 :]
    return result


def post(path: str, body: bytes, *headers: str, host: str = "localhost", length: int | None = None) -> bytes:
    """Return the bytes of a POST."""
    extra = "".join(f"{line}\r\n" for line in headers)
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{extra}"
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + body


CHAT = b'{"model":"stub","messages":[{"role":"user","content":"Hi"}]}'
STREAM = CHAT[:-1] + b',"stream":true}'


def ask(port: int, data: bytes) -> Reply:
    """Send bytes on a new connection and read one answer."""
    with Wire(port) as wire:
        wire.send(data)
        return wire.reply()
