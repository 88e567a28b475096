"""The assistant's page: static files of the built web app with strict headers."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import FileResponse, PlainTextResponse, Response

if TYPE_CHECKING:
    from starlette.requests import Request

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""KaTeX places its glyphs with inline styles; everything else comes from this server's files alone."""
PAGE_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
    ".json": "application/json",
    ".png": "image/png",
}
_ABSENT = "the page is not built: run `make web` in a checkout, or install a released wheel. The API works.\n"


class StaticPage:
    """Serves the files that were there when it was made, by their names alone."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(str(resources.files("bise.server"))) / "static" if folder is None else folder
        self._files: dict[str, Path] = {}
        if (self._folder / "index.html").is_file():
            for path in self._folder.rglob("*"):
                if path.is_file() and path.suffix in _TYPES:
                    self._files[path.relative_to(self._folder).as_posix()] = path

    def answer(self, request: Request, name: str) -> Response:
        """Return a file of the page; 404 for a name that it has not."""
        path = self._files.get(name)
        if path is None:
            text = _ABSENT if name == "index.html" else "not found\n"
            return PlainTextResponse(text, 404, headers=PAGE_HEADERS)
        headers = PAGE_HEADERS | {
            "cache-control": "public, max-age=31536000, immutable"
            if name.startswith("assets/")
            else "no-cache",
            "vary": "accept-encoding",
        }
        kind = _TYPES[path.suffix]
        accepted = request.headers.get("accept-encoding", "")
        for coding, ending in (("br", ".br"), ("gzip", ".gz")):
            packed = path.with_name(path.name + ending)
            if re.search(rf"(^|[\s,]){coding}($|[\s,;])", accepted) and packed.is_file():
                return FileResponse(packed, headers=headers | {"content-encoding": coding}, media_type=kind)
        return FileResponse(path, headers=headers, media_type=kind)
