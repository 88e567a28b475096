"""API keys: made once, shown once, kept as a keyed hash."""

from __future__ import annotations

import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, or_, select
from sqlalchemy.orm import Session

from bise.errors import AuthenticationError, ConfigError, NotFoundError, StoreError
from bise.store.database import Database, is_sound_id
from bise.store.rules import Rule, rules_from_json
from bise.store.schema import KeyRecord, SettingRecord
from bise.store.secret import keyed_hash

KEY_PREFIX = "bise-"
ALLOWANCE_PREFIX = "acc_"
"""Ids of accounts' allowances, which stand among the keys and open nothing (`bise.store.allowances`)."""
KEY_BYTES = 32
"""Random bytes of a key: 256 bits."""
MAX_KEY_LENGTH = 200
"""Anything longer is no key of ours and is not even hashed."""
SCOPES = ("inference", "tune", "admin", "metrics")
"""Besides these, `model:NAME` narrows inference to the models named."""
_BY_HASH = select(KeyRecord).where(KeyRecord.hash == bindparam("its_hash"))
MAX_COUNT = 10**15
MAX_MONEY = Decimal(1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What a key may use; None means no limit. Raises ConfigError, naming the field."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    """Prompt and completion tokens together; days end at midnight UTC."""
    money_per_month: Decimal | None = None
    """In the price book's currency, at its prices; months are those of UTC."""
    concurrency: int | None = None
    """Requests at the same time."""
    priority: int = 0
    """Lower runs first."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency"):
            value = getattr(self, name)
            if value is not None and not _is_whole(value, 0, MAX_COUNT):
                raise ConfigError(
                    f"{name} must be a whole number from 0 to {MAX_COUNT}, got {value!r}", field=name
                )
        if not _is_whole(self.priority, -100, 100):
            raise ConfigError(
                f"priority must be a whole number from -100 to 100, got {self.priority!r}", field="priority"
            )
        money = self.money_per_month
        if money is not None and not (money.is_finite() and 0 <= money <= MAX_MONEY):
            raise ConfigError(
                f"money_per_month must be an amount from 0 to {MAX_MONEY}, got {money}",
                field="money_per_month",
            )

    def as_json(self) -> dict[str, Any]:
        """Return the limits that are set; money as a string, so that no float touches it."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        if self.money_per_month is not None:
            values["money_per_month"] = str(self.money_per_month)
        return values


def limits_from_json(values: dict[str, Any]) -> KeyLimits:
    """Return the limits that `as_json` wrote or an admin sent; ConfigError for an unknown or a bad field."""
    known = set(KeyLimits.__slots__)
    for name in values:
        if name not in known:
            raise ConfigError(f"{name} is not a limit; known: {', '.join(sorted(known))}", field=name)
    values = {name: value for name, value in values.items() if value is not None}
    if "money_per_month" in values:
        values["money_per_month"] = amount("money_per_month", values["money_per_month"])
    return KeyLimits(**values)


def changed_limits(limits: KeyLimits, changes: dict[str, Any]) -> KeyLimits:
    """Return limits with some of them changed; None lifts one. ConfigError for an unknown or a bad field."""
    merged = limits.as_json() | changes
    if merged.get("priority", 0) is None:
        merged["priority"] = 0
    return limits_from_json(merged)


def amount(name: str, value: object) -> Decimal:
    """Return money given as a string or a whole number; a float is refused, for it is not what was typed."""
    try:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InvalidOperation
        money = Decimal(value)
        if not money.is_finite():
            raise InvalidOperation
    except InvalidOperation as error:
        raise ConfigError(f'{name} must be an amount as a string such as "12.50"', field=name) from error
    return money


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """What is known of a key; everything but the key."""

    id: str
    name: str
    owner: str
    """Whose files, jobs and usage it reaches; the key's own id unless one was named."""
    scopes: frozenset[str]
    limits: KeyLimits = field(default_factory=KeyLimits)
    rules: tuple[Rule, ...] = ()
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def allows_model(self, model: str) -> bool:
        """Return True unless the key is narrowed to other models."""
        models = {scope.removeprefix("model:") for scope in self.scopes if scope.startswith("model:")}
        return not models or model in models

    def as_json(self) -> dict[str, Any]:
        """Return the key's record as shown to people."""
        return {
            "id": self.id,
            "object": "api_key",
            "name": self.name,
            "owner": self.owner,
            "scopes": sorted(self.scopes),
            "limits": self.limits.as_json(),
            "rules": [rule.as_json() for rule in self.rules],
            "created_at": int(self.created_at),
            "expires_at": None if self.expires_at is None else int(self.expires_at),
            "revoked_at": None if self.revoked_at is None else int(self.revoked_at),
        }


class Keys:
    """The keys of one database. `secret` is the server's; see `bise.store.secret`."""

    def __init__(self, database: Database, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        """Take the secret; StoreError when the database's keys were made with another one."""
        self._database = database
        self._secret = secret
        self._clock = clock
        self._check_secret()

    def create(
        self,
        name: str,
        *,
        owner: str | None = None,
        scopes: Iterable[str] = ("inference",),
        limits: KeyLimits | None = None,
        rules: Iterable[Rule] = (),
        expires_at: float | None = None,
    ) -> tuple[KeyInfo, str]:
        """Make a key and return what is known of it and the key itself, which nothing can show again.

        Raises ConfigError for a bad field.
        """
        key_id = f"key_{secrets.token_hex(12)}"
        key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        now = self._clock()
        if expires_at is not None and not (math.isfinite(expires_at) and expires_at > now):
            raise ConfigError("expires_at must be a time in the future", field="expires_at")
        info = KeyInfo(
            id=key_id,
            name=_label("name", name),
            owner=key_id if owner is None else _owner(owner),
            scopes=_checked_scopes(scopes),
            limits=limits or KeyLimits(),
            rules=tuple(rules),
            created_at=now,
            expires_at=expires_at,
        )
        record = KeyRecord(
            id=info.id,
            name=info.name,
            owner=info.owner,
            hash=keyed_hash(self._secret, "key", key),
            scopes=sorted(info.scopes),
            limits=info.limits.as_json(),
            rules=[rule.as_json() for rule in info.rules],
            created_at=now,
            expires_at=expires_at,
        )
        with self._database.writing() as session:
            session.add(record)
        return info, key

    def verify(self, presented: str, *, waits: bool = True) -> KeyInfo:
        """Return whose key this is. AuthenticationError when it is unknown, expired or revoked. Without
        `waits` the database is asked as `Database.glance` does.

        The database is asked every time, so a revoked key stops at once in every process. What is looked up
        is a keyed hash: how long it takes says nothing about a key.
        """
        if not 0 < len(presented) <= MAX_KEY_LENGTH:
            raise AuthenticationError("the API key is not valid")
        presented_hash = keyed_hash(self._secret, "key", presented)
        record = self._of_hash(presented_hash, waits=waits)
        if record is None or not hmac.compare_digest(record.hash, presented_hash):
            raise AuthenticationError("the API key is not valid")
        return self._check_usable(key_info(record))

    def _of_hash(self, its_hash: bytes, *, waits: bool) -> KeyRecord | None:
        if not waits:
            row = self._database.glance(_BY_HASH, {"its_hash": its_hash})
            return None if row is None else KeyRecord(**row)
        with self._database.reading() as session:
            return session.scalars(_BY_HASH, {"its_hash": its_hash}).one_or_none()

    def usable(self, key_id: str) -> KeyInfo:
        """Return a key by its id for work that was queued under it. AuthenticationError as from `verify`."""
        return self._check_usable(self.get(key_id))

    def _check_usable(self, info: KeyInfo) -> KeyInfo:
        if info.revoked_at is not None:
            raise AuthenticationError("the API key was revoked")
        if info.expires_at is not None and info.expires_at <= self._clock():
            raise AuthenticationError("the API key has expired")
        return info

    def list(self, *, with_revoked: bool = False) -> list[KeyInfo]:
        """Return all keys, oldest first."""
        query = select(KeyRecord).where(_is_key()).order_by(KeyRecord.created_at, KeyRecord.id)
        if not with_revoked:
            query = query.where(KeyRecord.revoked_at.is_(None))
        with self._database.reading() as session:
            return [key_info(record) for record in session.scalars(query)]

    def get(self, key_id: str) -> KeyInfo:
        """Return one key by its id; NotFoundError when there is none."""
        with self._database.reading() as session:
            record = session.get(KeyRecord, key_id) if is_sound_id(key_id) else None
        if record is None or key_id.startswith(ALLOWANCE_PREFIX):
            raise NotFoundError("there is no key of that id; `bise keys list` shows them")
        return key_info(record)

    def any_exist(self) -> bool:
        """Return True once a key was ever made, revoked ones included."""
        with self._database.reading() as session:
            return session.scalar(select(func.count()).select_from(KeyRecord).where(_is_key())) != 0

    def revoke(self, id_or_name: str) -> KeyInfo:
        """Revoke a key at once; a key that is revoked already stays so.

        NotFoundError when there is none, ConfigError when several keys bear the name.
        """
        with self._database.writing() as session:
            record = _named(session, id_or_name)
            if record.revoked_at is None:
                record.revoked_at = self._clock()
            return key_info(record)

    def change(
        self,
        id_or_name: str,
        limits: dict[str, Any] | None = None,
        rules: Iterable[Rule] | None = None,
    ) -> KeyInfo:
        """Change some of a key's limits (a limit that is None is lifted) or replace its guardrails, from its
        next request on.

        Raises as `revoke` does, and ConfigError for an unknown or a bad limit.
        """
        with self._database.writing() as session:
            record = _named(session, id_or_name)
            if limits is not None:
                record.limits = changed_limits(limits_from_json(record.limits), limits).as_json()
            if rules is not None:
                record.rules = [rule.as_json() for rule in rules]
            return key_info(record)

    def _check_secret(self) -> None:
        check = keyed_hash(self._secret, "database", "secret").hex()
        with self._database.reading() as session:
            stored = _setting(session)
        if stored is None:
            with self._database.writing() as session:
                stored = _setting(session)
                if stored is None:
                    session.add(SettingRecord(name="secret_check", value=check))
                    return
        if not hmac.compare_digest(stored, check):
            raise StoreError(
                "the server's secret is not the one this database's keys were made with; "
                "restore the file `secret` that lay beside it"
            )


def _is_key() -> ColumnElement[bool]:
    return KeyRecord.id.not_like(f"{ALLOWANCE_PREFIX}%")


def _named(session: Session, id_or_name: str) -> KeyRecord:
    """Return the one key of that id or name; of several with the name, the one that is not revoked."""
    matching = or_(KeyRecord.id == id_or_name, KeyRecord.name == id_or_name)
    query = select(KeyRecord).where(matching, _is_key())
    found = session.scalars(query).all() if id_or_name.isprintable() else ()
    records = [record for record in found if record.revoked_at is None or len(found) == 1]
    if not found:
        raise NotFoundError("there is no key of that id or name; `bise keys list` shows them")
    if len(records) != 1:
        raise ConfigError(f"{len(records)} keys bear that name; give the id", field="key")
    return records[0]


def _setting(session: Session) -> str | None:
    return session.scalar(select(SettingRecord.value).where(SettingRecord.name == "secret_check"))


def key_info(record: KeyRecord) -> KeyInfo:
    """Return what is known of a stored key."""
    return KeyInfo(
        id=record.id,
        name=record.name,
        owner=record.owner,
        scopes=frozenset(record.scopes),
        limits=limits_from_json(record.limits),
        rules=rules_from_json(record.rules),
        created_at=record.created_at,
        expires_at=record.expires_at,
        revoked_at=record.revoked_at,
    )


def _label(name: str, value: str, limit: int = 200) -> str:
    """Return a name for people if it is one line of printable text."""
    if not 0 < len(value) <= limit or not value.isprintable():
        raise ConfigError(f"{name} must have 1 to {limit} printable characters", field=name)
    return value


def _owner(owner: str) -> str:
    # "local" is who comes without a key, and an id is the owner of a key made without one.
    if owner == "local" or owner.startswith("key_"):
        raise ConfigError(f"owner {owner!r} is reserved; choose another name", field="owner")
    return _label("owner", owner)


def _checked_scopes(scopes: Iterable[str]) -> frozenset[str]:
    chosen = frozenset(scopes)
    for scope in chosen:
        if scope not in SCOPES and not (scope.startswith("model:") and len(scope) > len("model:")):
            raise ConfigError(
                f"{scope!r} is not a scope; known: {', '.join(SCOPES)}, model:NAME", field="scopes"
            )
        _label("scopes", scope, 300)
    if not chosen & set(SCOPES):
        raise ConfigError("a key needs at least one of the scopes " + ", ".join(SCOPES), field="scopes")
    return chosen
