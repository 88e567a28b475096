"""Who asks: keys in headers, scopes, and which addresses only this machine can reach."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from bise.errors import AuthenticationError, ConfigError, PermissionDeniedError

if TYPE_CHECKING:
    from starlette.requests import Request

    from bise.store.keys import KeyInfo

LOCAL_OWNER = "local"
"""Owner of what is done without a key."""


class Access(StrEnum):
    """Who needs a key."""

    AUTO = "auto"
    """Everybody, once a key was made; before that whoever is on this machine needs none."""
    REQUIRED = "required"
    """Everybody."""
    OPEN = "open"
    """Nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks."""

    owner: str
    """Whose files, jobs and usage they reach."""
    scopes: frozenset[str]
    key: KeyInfo | None = None
    """None for someone without a key."""
    idempotency_key: str | None = None
    """Set by our own background work."""
    is_background: bool = False

    @property
    def key_id(self) -> str | None:
        """Id of the key, if there is one."""
        return None if self.key is None else self.key.id

    @property
    def is_admin(self) -> bool:
        """True when all owners' usage and keys may be seen."""
        return "admin" in self.scopes

    def require(self, scope: str) -> None:
        """Raise PermissionDeniedError unless the scope was granted; `read` needs none, admins have all but
        `inference`.
        """
        if (
            scope != "read"
            and scope not in self.scopes
            and not (scope in ("metrics", "tune") and self.is_admin)
        ):
            raise PermissionDeniedError(f"this key lacks the scope {scope}")


def check_bind(host: str, access: Access, has_keys: bool) -> None:
    """Refuse to listen where other machines can reach a server that no key protects (ConfigError)."""
    if access is Access.OPEN or is_loopback(host) or has_keys:
        return
    raise ConfigError(
        f"{host} is reachable from other machines and there is no key yet: make one with `bise keys create "
        "--name NAME`, listen on 127.0.0.1, or say --no-key",
        field="host",
    )


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def presented_key(request: Request) -> str | None:
    """Return the key in `Authorization: Bearer` or `x-api-key`; two that differ are refused."""
    found: set[str] = set()
    authorization = request.headers.get("authorization")
    if authorization is not None:
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise AuthenticationError("the Authorization header must be `Bearer KEY`")
        found.add(value.strip())
    found.update(value.strip() for value in request.headers.getlist("x-api-key"))
    if len(found) > 1:
        raise AuthenticationError("two different API keys were sent")
    return found.pop() if found else None
