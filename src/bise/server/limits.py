"""The bounds of what one client may ask of the HTTP layer; checked before anything is allocated for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Sizes in bytes, times in seconds."""

    request_line: int = 16 << 10
    header_line: int = 16 << 10
    headers: int = 64 << 10
    """All headers of a request together."""
    num_headers: int = 128
    body: int = 16 << 20
    upload: int = 512 << 20
    """Body of /v1/files, and of an import into the assistant."""
    document: int = 64 << 20
    """A file that is dropped into a conversation."""
    json_depth: int = 64
    json_values: int = 500_000
    """Numbers, strings, objects and arrays in one body."""
    headers_s: float = 30.0
    """For the first byte of a connection to the end of its headers."""
    body_s: float = 60.0
    keep_alive_s: float = 65.0
    """Longer than the pools of the usual clients hold a connection, so that they close first."""
    stalled_reader_s: float = 60.0
    """After this long without reading a stream's client is given up."""
    ping_s: float = 15.0
    """A comment is sent in a stream that has been silent this long."""
    discard: int = 32 << 20
    """Of a body that nobody wants any more, read before the connection is cut."""
    linger_s: float = 2.0
    """How long a refused client may go on sending, so that it can read the refusal."""

    def body_of(self, path: str) -> int:
        """Return the size that a body may have on a route."""
        if path in (UPLOADS, IMPORTS):
            return self.upload
        return self.document if path.startswith(CONVERSATIONS) and path.endswith("/documents") else self.body


UPLOADS = "/v1/files"
IMPORTS = "/api/v1/import"
CONVERSATIONS = "/api/v1/conversations/"

MAX_DEADLINE_S = 86_400.0
"""Longest `deadline_s`; a day."""


MAX_CHOICES = 16
MAX_SEQUENCES = 128
"""Prompts times choices of one request."""
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_INPUTS = 2048
"""Prompts of one completion or embedding request."""
