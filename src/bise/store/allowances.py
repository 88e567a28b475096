"""What people with an account may use: limits and guardrails per account, in the same books as those of keys.

An account's allowance is a key that nobody holds. It is made at the account's first answer; until an admin
sets its limits, those for everyone count, if there are any.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from bise.errors import NotFoundError
from bise.store.chat_schema import AccountRecord
from bise.store.database import Database
from bise.store.keys import (
    ALLOWANCE_PREFIX,
    KeyInfo,
    KeyLimits,
    changed_limits,
    key_info,
    limits_from_json,
)
from bise.store.rules import Rule
from bise.store.schema import KeyRecord

EVERYONE = "*"
"""Stands for all accounts without limits of their own."""
DELETED = "deleted account"
"""What the books call an account that is gone."""
_EVERYONE_ID = f"{ALLOWANCE_PREFIX}everyone"


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountLimits:
    """An account and what it may use."""

    account_id: str
    name: str
    role: str
    is_disabled: bool
    limits: KeyLimits
    rules: tuple[Rule, ...]
    is_own: bool
    """False when they are those of everyone."""

    def as_json(self) -> dict[str, Any]:
        """Return the account as shown to admins."""
        return {
            "id": self.account_id,
            "object": "account",
            "name": self.name,
            "role": self.role,
            "disabled": self.is_disabled,
            "limits": self.limits.as_json(),
            "rules": [rule.as_json() for rule in self.rules],
            "limits_are_own": self.is_own,
        }


class Allowances:
    """The allowances of the accounts in one database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def of(self, account_id: str, name: str) -> KeyInfo:
        """Return an account's allowance, made if need be, with the limits and rules that count for it."""
        info = self._made(_id_of(account_id), account_id, name)
        if info.limits != KeyLimits() or info.rules:
            return info
        everyone = self._read(_EVERYONE_ID)
        return info if everyone is None else replace(info, limits=everyone.limits, rules=everyone.rules)

    def change(
        self,
        account: str,
        limits: dict[str, Any] | None = None,
        rules: Iterable[Rule] | None = None,
    ) -> AccountLimits:
        """Change some of what an account (its id or name; EVERYONE for all) may use: a limit that is None is
        lifted. `rules` replace its guardrails.

        Raises NotFoundError when there is no such account, ConfigError for an unknown or a bad limit.
        """
        if account == EVERYONE:
            self._made(_EVERYONE_ID, _EVERYONE_ID, EVERYONE)
            self._write(_EVERYONE_ID, limits, rules)
            return self.everyone()
        record = self._account(account)
        self._made(_id_of(record.id), record.id, record.name)
        self._write(_id_of(record.id), limits, rules)
        return self._of(record)

    def forget(self, account_id: str) -> None:
        """Drop limits, guardrails and name of an account that was deleted; its rows in the books stay."""
        with self._database.writing() as session:
            record = session.get(KeyRecord, _id_of(account_id))
            if record is not None:
                record.name, record.limits, record.rules = DELETED, {}, []
                record.revoked_at = self._clock()

    def get(self, account: str) -> AccountLimits:
        """Return an account by id or name with what it may use; NotFoundError when there is none."""
        return self._of(self._account(account))

    def list(self) -> list[AccountLimits]:
        """Return all accounts by name."""
        with self._database.reading() as session:
            records = session.scalars(select(AccountRecord).order_by(AccountRecord.name)).all()
        return [self._of(record) for record in records]

    def everyone(self) -> AccountLimits:
        """Return what accounts without limits of their own may use."""
        info = self._read(_EVERYONE_ID)
        return AccountLimits(
            account_id=EVERYONE,
            name=EVERYONE,
            role="",
            is_disabled=False,
            limits=KeyLimits() if info is None else info.limits,
            rules=() if info is None else info.rules,
            is_own=info is not None,
        )

    def _of(self, record: AccountRecord) -> AccountLimits:
        own = self._read(_id_of(record.id))
        is_own = own is not None and (own.limits != KeyLimits() or bool(own.rules))
        info = own if is_own else self._read(_EVERYONE_ID)
        return AccountLimits(
            account_id=record.id,
            name=record.name,
            role=record.role,
            is_disabled=record.disabled_at is not None,
            limits=KeyLimits() if info is None else info.limits,
            rules=() if info is None else info.rules,
            is_own=is_own,
        )

    def _account(self, account: str) -> AccountRecord:
        with self._database.reading() as session:
            record = session.get(AccountRecord, account) if account.isprintable() else None
            if record is None and account.isprintable():
                query = select(AccountRecord).where(AccountRecord.name == account.strip().casefold())
                record = session.scalars(query).one_or_none()
        if record is None:
            raise NotFoundError("there is no account of that name or id; `bise accounts list` shows them")
        return record

    def _read(self, allowance_id: str) -> KeyInfo | None:
        with self._database.reading() as session:
            record = session.get(KeyRecord, allowance_id)
        return None if record is None else key_info(record)

    def _made(self, allowance_id: str, owner: str, name: str) -> KeyInfo:
        found = self._read(allowance_id)
        if found is not None:
            return found
        try:
            with self._database.writing() as session:
                if session.get(KeyRecord, allowance_id) is None:
                    session.add(self._record(allowance_id, owner, name))
        except IntegrityError:  # another process made it first
            pass
        made = self._read(allowance_id)
        assert made is not None
        return made

    def _record(self, allowance_id: str, owner: str, name: str) -> KeyRecord:
        return KeyRecord(
            id=allowance_id,
            name=name[:200],
            owner=owner,
            hash=secrets.token_bytes(32),  # the hash of no key that anybody has
            scopes=["inference"],
            limits={},
            rules=[],
            created_at=self._clock(),
            expires_at=None,
        )

    def _write(self, allowance_id: str, limits: dict[str, Any] | None, rules: Iterable[Rule] | None) -> None:
        with self._database.writing() as session:
            record = session.get_one(KeyRecord, allowance_id)
            if limits is not None:
                record.limits = changed_limits(limits_from_json(record.limits), limits).as_json()
            if rules is not None:
                record.rules = [rule.as_json() for rule in rules]


def _id_of(account_id: str) -> str:
    return ALLOWANCE_PREFIX + account_id.replace("-", "")
