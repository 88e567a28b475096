"""Accounts: names, roles, argon2id hashes, and browsers that are signed in. The first one is the admin's."""

from __future__ import annotations

import base64
import hashlib
import math
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from bise.assistant.conversations import remove_conversations
from bise.assistant.storage import Storage, new_id
from bise.errors import (
    AuthenticationError,
    ConflictError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestError,
)
from bise.store.chat_schema import (
    AccountRecord,
    ConversationRecord,
    PersonaRecord,
    PreferenceRecord,
    SignInRecord,
)

SIGNED_IN_S = 30 * 86400.0
MIN_PASSWORD = 10
MAX_PASSWORD = 1024
FREE_TRIES = 5
"""Wrong passwords for one name before waiting begins; the wait doubles up to MAX_WAIT_S."""
MAX_WAIT_S = 300.0
MAX_TRIED = 10_000
"""Names and addresses whose wrong passwords are remembered."""
HASHES = 4
"""Passwords that are checked at the same time."""
ROLES = ("admin", "user")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A person with an account."""

    id: str
    name: str
    role: str
    is_disabled: bool


class Accounts:
    """The accounts in one storage. Hashing takes tens of milliseconds: call from a thread."""

    def __init__(self, storage: Storage, hasher: PasswordHasher | None = None) -> None:
        """`hasher` is for tests, which need no dear hashes."""
        self._storage = storage
        self._hasher = hasher or PasswordHasher()
        self._nobody = _hash_of_nothing(self._hasher)
        self._tries: OrderedDict[tuple[str, str], tuple[int, float]] = OrderedDict()
        self._lock = threading.Lock()
        # A hash takes 64 MiB: a crowd at the door must not take the machine's memory.
        self._hashing = threading.BoundedSemaphore(HASHES)

    def is_empty(self) -> bool:
        """Return True while nobody has an account."""
        with self._storage.reading() as session:
            return not session.scalar(select(func.count()).select_from(AccountRecord))

    def create_first(self, name: str, password: str, *, adopts: str | None = None) -> Account:
        """Make the admin, who takes over what `adopts` owned. Raises ConflictError when there is one."""
        account = self._create(name, password, "admin", is_first=True)
        if adopts is not None:
            with self._storage.writing() as session:
                for record in (ConversationRecord, PreferenceRecord, PersonaRecord):
                    session.execute(update(record).where(record.owner == adopts).values(owner=account.id))
        return account

    def create(self, name: str, password: str, role: str = "user") -> Account:
        """Make an account. Raises RequestError or ConflictError for a name or password that cannot be."""
        return self._create(name, password, role, is_first=False)

    def sign_in(self, name: str, password: str, *, address: str = "") -> tuple[Account, str]:
        """Return the account and a token for the browser's cookie.

        Raises AuthenticationError, and RateLimitError after too many wrong passwords for a name from one
        address: nobody can lock somebody else out.
        """
        key = name.strip().casefold()[:100]
        tried = (key, address)
        self._wait(tried)
        with self._storage.reading() as session:
            record = session.scalar(select(AccountRecord).where(AccountRecord.name == key))
            session.expunge_all()
        good = self._matches(self._nobody if record is None else record.password_hash, password)
        if record is None or not good or record.disabled_at is not None:
            self._note_wrong(tried)
            raise AuthenticationError("the name or the password is wrong")
        with self._lock:
            self._tries.pop(tried, None)
        token, now = secrets.token_urlsafe(32), time.time()
        with self._storage.writing() as session:
            session.execute(delete(SignInRecord).where(SignInRecord.expires_at < now))
            session.add(
                SignInRecord(
                    token_hash=_digest(token),
                    account_id=record.id,
                    created_at=now,
                    expires_at=now + SIGNED_IN_S,
                )
            )
        return _account(record), token

    def whose(self, token: str) -> Account:
        """Return the account of a signed-in browser. Raises AuthenticationError."""
        with self._storage.reading() as session:
            entry = session.get(SignInRecord, _digest(token))
            record = None if entry is None else session.get(AccountRecord, entry.account_id)
            if entry is None or record is None or entry.expires_at < time.time() or record.disabled_at:
                raise AuthenticationError("sign in first")
            return _account(record)

    def sign_out(self, token: str) -> None:
        """Forget a signed-in browser."""
        with self._storage.writing() as session:
            session.execute(delete(SignInRecord).where(SignInRecord.token_hash == _digest(token)))

    def change_password(self, token: str, old: str, new: str) -> None:
        """Give whoever holds `token` a new password; all other browsers are signed out.

        Raises AuthenticationError for a wrong old password, RequestError for a new one that cannot be.
        """
        account = self.whose(token)
        tried = (account.name, "own")
        self._wait(tried)
        with self._storage.reading() as session:
            record = session.get(AccountRecord, account.id)
            stored = self._nobody if record is None else record.password_hash
        if not self._matches(stored, old):
            self._note_wrong(tried)
            raise PermissionDeniedError("the old password is wrong", field="old")
        fresh = self._hasher.hash(_checked_password(new))
        with self._storage.writing() as session:
            session.execute(
                update(AccountRecord).where(AccountRecord.id == account.id).values(password_hash=fresh)
            )
            session.execute(
                delete(SignInRecord).where(
                    SignInRecord.account_id == account.id, SignInRecord.token_hash != _digest(token)
                )
            )

    def listing(self) -> list[Account]:
        """Return all accounts by name."""
        with self._storage.reading() as session:
            return [
                _account(record)
                for record in session.scalars(select(AccountRecord).order_by(AccountRecord.name))
            ]

    def change(
        self,
        account_id: str,
        *,
        role: str | None = None,
        disabled: bool | None = None,
        password: str | None = None,
    ) -> Account:
        """Change an account; a disabled one or a new password signs all its browsers out.

        Raises ConflictError when no admin would be left.
        """
        with self._storage.writing() as session:
            record = _found(session, account_id)
            if role is not None:
                record.role = _checked_role(role)
            if password is not None:
                record.password_hash = self._hasher.hash(_checked_password(password))
            if disabled is not None:
                record.disabled_at = time.time() if disabled else None
            if disabled or password is not None:
                session.execute(delete(SignInRecord).where(SignInRecord.account_id == account_id))
            session.flush()
            _check_admins(session)
            return _account(record)

    def get(self, account_id: str) -> Account:
        """Return one account. Raises NotFoundError."""
        with self._storage.reading() as session:
            return _account(_found(session, account_id))

    def delete(self, account_id: str) -> int:
        """Remove an account for good, with its conversations, documents, personas and settings; returns how
        many conversations it had. Raises NotFoundError, ConflictError when no admin would be left.
        """
        with self._storage.writing() as session:
            session.delete(_found(session, account_id))
            session.flush()
            _check_admins(session)
            session.execute(delete(SignInRecord).where(SignInRecord.account_id == account_id))
            for record in (PersonaRecord, PreferenceRecord):
                session.execute(delete(record).where(record.owner == account_id))
            return remove_conversations(session, ConversationRecord.owner == account_id)

    def _create(self, name: str, password: str, role: str, *, is_first: bool) -> Account:
        key = name.strip().casefold()
        if not 1 <= len(key) <= 100 or any(ord(char) < 32 for char in key):
            raise RequestError("name must have 1 to 100 characters", field="name")
        record = AccountRecord(
            id=new_id(),
            name=key,
            role=_checked_role(role),
            password_hash=self._hasher.hash(_checked_password(password)),
            created_at=time.time(),
            disabled_at=None,
        )
        with self._storage.writing() as session:
            count = session.scalar(select(func.count()).select_from(AccountRecord))
            if is_first and count:
                raise ConflictError("there is an admin already; sign in")
            if session.scalar(select(AccountRecord).where(AccountRecord.name == key)) is not None:
                raise ConflictError("this name is taken")
            session.add(record)
        return _account(record)

    def _matches(self, stored: str, password: str) -> bool:
        try:
            with self._hashing:
                return len(password) <= MAX_PASSWORD and self._hasher.verify(stored, password)
        except (VerificationError, InvalidHashError):
            return False

    def _wait(self, tried: tuple[str, str]) -> None:
        with self._lock:
            count, last = self._tries.get(tried, (0, 0.0))
        if count < FREE_TRIES:
            return
        left = last + min(2.0 ** (count - FREE_TRIES), MAX_WAIT_S) - time.monotonic()
        if left > 0:
            raise RateLimitError(
                f"too many wrong passwords; try again in {math.ceil(left)} seconds", retry_after_s=left
            )

    def _note_wrong(self, tried: tuple[str, str]) -> None:
        with self._lock:
            count, _ = self._tries.pop(tried, (0, 0.0))
            self._tries[tried] = (min(count + 1, 40), time.monotonic())
            while len(self._tries) > MAX_TRIED:
                self._tries.popitem(last=False)


def _found(session: Session, account_id: str) -> AccountRecord:
    record = session.get(AccountRecord, account_id)
    if record is None:
        raise NotFoundError("there is no such account", field="account")
    return record


def _check_admins(session: Session) -> None:
    admins = select(func.count()).where(AccountRecord.role == "admin", AccountRecord.disabled_at.is_(None))
    if not session.scalar(admins):
        raise ConflictError("one admin must be left")


def _checked_role(role: str) -> str:
    if role not in ROLES:
        raise RequestError(f"role must be admin or user, got '{role[:20]}'", field="role")
    return role


def _checked_password(password: str) -> str:
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise RequestError(
            f"password must have {MIN_PASSWORD} to {MAX_PASSWORD} characters", field="password"
        )
    return password


def _hash_of_nothing(hasher: PasswordHasher) -> str:
    """Return what no password has as its hash: with it a name that does not exist costs as much time as a
    wrong password.
    """
    cost = f"m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}"
    salt, value = (
        base64.b64encode(secrets.token_bytes(length)).decode().rstrip("=")
        for length in (hasher.salt_len, hasher.hash_len)
    )
    return f"$argon2id$v=19${cost}${salt}${value}"


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _account(record: AccountRecord) -> Account:
    return Account(
        id=record.id, name=record.name, role=record.role, is_disabled=record.disabled_at is not None
    )
