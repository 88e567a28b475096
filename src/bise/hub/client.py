"""The HTTP side of a pull: what a hub lists, and the bytes of its files.

https with verified certificates only, plain http only to this machine. The token goes to the configured host
and nowhere else: a redirect to another host loses it for good. Bodies are taken as they are, never unpacked,
and never beyond the size that is due.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urljoin, urlsplit

from bise.errors import ConfigError, HubError, ModelFileError, UserError
from bise.hub.file_names import check_names
from bise.jsonfile import parse_json

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 5
MAX_LISTING = 8 << 20
CONNECT_S = 15.0
SILENCE_S = 60.0
"""Longest pause inside an answer."""
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_MAX_FILE = 1 << 43


class BrokenOffError(HubError):
    """A transfer ended early or did not begin; trying again may help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository and how to tell that it arrived whole."""

    name: str
    size: int
    sha256: str | None
    """None for a small file that is kept in git itself; then `git_sha1` is known."""
    git_sha1: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One commit of a repository."""

    repo: str
    commit: str
    licence: str | None
    files: dict[str, HubFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The bytes of a file from `start` on."""

    start: int
    etag: str | None
    chunks: Iterator[bytes]


def is_loopback_host(host: str) -> bool:
    """Return True for a name or address of this machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_url(url: str, *, field: str) -> str:
    """Return an address without its last slash. Raises ConfigError unless it is https, or http to this
    machine, without a password, query or fragment in it.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host, parts = "", urlsplit("")
    if not host or not url.isprintable() or " " in url:
        raise ConfigError(f"{field} must be an address such as https://HOST, got '{url[:200]}'", field=field)
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"{field} must have no password, query or fragment in it", field=field)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback_host(host)):
        raise ConfigError(
            f"{field} must begin with https:// (http is for this machine only), got '{parts.scheme}://{host}'",
            field=field,
        )
    return url.rstrip("/")


class HubClient:
    """A hub at `url`. Use it as a context manager."""

    def __init__(self, url: str, token: str | None = None, *, silence_s: float = SILENCE_S) -> None:
        """`token` is sent to the host of `url` only. Raises ConfigError for a bad address."""
        import httpx

        self.url = checked_url(url, field="--hub")
        self._origin = _origin(self.url)
        self._is_local = is_loopback_host(urlsplit(self.url).hostname or "")
        self._token = token
        self._client = httpx.Client(
            timeout=httpx.Timeout(silence_s, connect=CONNECT_S),
            follow_redirects=False,
            trust_env=not self._is_local,  # proxies of the environment
            headers={"user-agent": "bise", "accept-encoding": "identity"},
        )

    def __enter__(self) -> HubClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def listing(self, repo: str, revision: str) -> Listing:
        """Return what a repository holds at a revision. Raises HubError; UserError for one that is not there
        or not for this token.
        """
        with self._get(f"{self.url}/api/models/{repo}/revision/{revision}?blobs=true", {}) as response:
            _require(response, (200,), f"{repo}@{revision}")
            data = b"".join(_bounded(response, MAX_LISTING, "the hub's listing"))
        try:
            value = parse_json(data, "the hub's listing", max_values=500_000)
        except ModelFileError as error:
            raise HubError(str(error)) from error
        return _as_listing(repo, value)

    @contextmanager
    def open(self, repo: str, commit: str, file: HubFile, start: int, etag: str | None) -> Generator[Body]:
        """Yield the bytes of a file from `start` on, or from 0 when the hub cannot go on there.

        Raises BrokenOffError where another try may help, HubError where not.
        """
        headers = {"range": f"bytes={start}-"} if start else {}
        if start and etag:
            headers["if-range"] = etag
        with self._get(f"{self.url}/{repo}/resolve/{commit}/{file.name}", headers) as response:
            _require(response, (200, 206), file.name)
            begin = _first_byte(response, file) if response.status_code == 206 else 0
            if response.status_code == 206 and begin != start:
                raise HubError(f"{file.name}: the hub sent other bytes than those asked for")
            declared = response.headers.get("content-length")
            if declared is not None and declared.isdecimal() and int(declared) != file.size - begin:
                raise BrokenOffError(
                    f"{file.name}: the hub announces {declared} bytes where {file.size - begin} are due"
                )
            strong = response.headers.get("etag")
            yield Body(
                start=begin,
                etag=strong if strong and not strong.startswith("W/") and len(strong) < 200 else None,
                chunks=_bounded(response, file.size - begin, file.name),
            )

    @contextmanager
    def _get(self, url: str, headers: dict[str, str]) -> Generator[httpx.Response]:
        """Follow redirects by hand, so that each is judged before anything is sent."""
        import httpx

        has_token = self._token is not None
        for _ in range(MAX_REDIRECTS + 1):
            self._check_hop(url)
            has_token = has_token and _origin(url) == self._origin
            extra = {"authorization": f"Bearer {self._token}"} if has_token else {}
            try:
                with self._client.stream("GET", url, headers=headers | extra) as response:
                    target = response.headers.get("location")
                    if response.status_code not in (301, 302, 303, 307, 308) or target is None:
                        yield response
                        return
            except (httpx.TransportError, httpx.StreamError) as error:
                host = urlsplit(url).hostname
                raise BrokenOffError(f"{host}: {type(error).__name__}: {_reason(error)}") from error
            except httpx.InvalidURL as error:
                raise HubError("the hub redirects to an address that is none") from error
            try:
                url = urljoin(url, target)
            except ValueError as error:
                raise HubError("the hub redirects to an address that is none") from error
        raise HubError(f"the hub redirects more than {MAX_REDIRECTS} times")

    def _check_hop(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
        except ValueError as error:
            raise HubError("the hub redirects to an address that is none") from error
        if is_loopback_host(host) and not self._is_local:
            raise HubError("the hub redirects to this machine; that is refused")
        if parts.scheme == "https" or (parts.scheme == "http" and is_loopback_host(host)):
            return
        raise HubError(f"the hub redirects to {parts.scheme}://{host}, which is not https; that is refused")


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise HubError("the hub redirects to an address that is none") from error
    return parts.scheme, parts.hostname or "", port or {"https": 443, "http": 80}.get(parts.scheme, 0)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or "no answer"


def _require(response: httpx.Response, wanted: tuple[int, ...], what: str) -> None:
    status = response.status_code
    if status in wanted:
        return
    if status in (401, 403):
        raise UserError(
            f"{what}: the hub refuses ({status}): accept the model's terms there and give a token with "
            "--token-env VARIABLE"
        )
    if status == 404:
        raise UserError(f"{what}: the hub has no such repository, revision or file")
    if status in (408, 416, 429) or status >= 500:
        raise BrokenOffError(f"{what}: the hub answered {status}")
    raise HubError(f"{what}: the hub answered {status}")


def _bounded(response: httpx.Response, limit: int, what: str) -> Iterator[bytes]:
    """Yield a body of at most `limit` bytes as it comes over the wire; refuse a packed or longer one."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise HubError(f"{what}: the hub sends it packed ({coding[:20]}), though it was asked not to")
    left = limit
    for chunk in response.iter_raw():
        left -= len(chunk)
        if left < 0:
            raise HubError(f"{what}: the hub sends more than the {limit} bytes that are due")
        yield chunk


def _first_byte(response: httpx.Response, file: HubFile) -> int:
    match = _RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None or int(match[3]) != file.size or int(match[2]) != file.size - 1:
        raise HubError(f"{file.name}: the hub's Content-Range does not fit a file of {file.size} bytes")
    return int(match[1])


def _as_listing(repo: str, value: object) -> Listing:
    fields = _fields(value)
    commit = fields.get("sha")
    if not isinstance(commit, str) or not _SHA1.fullmatch(commit):
        raise HubError("the hub's listing names no commit; nothing was pulled")
    siblings = fields.get("siblings")
    if not isinstance(siblings, list):
        raise HubError("the hub's listing has no files; nothing was pulled")
    entries = [_fields(entry) for entry in cast(list[object], siblings)]
    names = check_names(entry.get("rfilename") for entry in entries)
    files = {name: _as_file(name, entry) for name, entry in zip(names, entries, strict=True)}
    return Listing(repo=repo, commit=commit, licence=_licence(fields), files=files)


def _as_file(name: str, entry: dict[str, Any]) -> HubFile:
    if entry.get("type", "file") not in ("file", "blob") or str(entry.get("mode", "100644")) == "120000":
        raise HubError(f"the hub lists {name!a} as something else than a file; nothing was pulled")
    lfs = _fields(entry.get("lfs") or {})
    size = lfs.get("size", entry.get("size"))
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_FILE:
        raise HubError(f"the hub gives no size of {name!a}; nothing was pulled")
    sha256, git_sha1 = lfs.get("sha256"), entry.get("blobId")
    has_sha256 = isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None
    has_sha1 = isinstance(git_sha1, str) and _SHA1.fullmatch(git_sha1) is not None
    return HubFile(
        name=name,
        size=size,
        sha256=cast(str, sha256) if has_sha256 else None,
        git_sha1=cast(str, git_sha1) if has_sha1 and not lfs else None,
    )


def _licence(fields: dict[str, Any]) -> str | None:
    card: object = fields.get("cardData")
    known = cast(dict[str, Any], card) if isinstance(card, dict) else {}
    for value in (known.get("license_name"), known.get("license")):
        if isinstance(value, str) and value and value != "other":
            return value[:100]
        if isinstance(value, list):
            return ", ".join(str(part) for part in cast(list[object], value))[:100]
    tags: object = fields.get("tags")
    for tag in cast(list[object], tags) if isinstance(tags, list) else []:
        if isinstance(tag, str) and tag.startswith("license:"):
            return tag.removeprefix("license:")[:100]
    return None


def _fields(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HubError("the hub's listing is not in the form of a hub; is --hub right?")
    return cast(dict[str, Any], value)


Progress = Callable[[str, float], None]
"""Called with (what, fraction from 0 to 1)."""
