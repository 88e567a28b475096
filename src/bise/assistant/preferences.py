"""A person's settings in the assistant: a few small values under names that the page chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select

from bise.assistant.storage import Storage
from bise.errors import RequestError
from bise.store.chat_schema import PreferenceRecord

MAX_PREFERENCES = 40
MAX_CHARS = 100_000
"""Of all settings of one person together."""


def preferences_of(storage: Storage, owner: str) -> dict[str, Any]:
    """Return a person's settings."""
    with storage.reading() as session:
        return session.scalar(select(PreferenceRecord.value).where(PreferenceRecord.owner == owner)) or {}


def change_preferences(storage: Storage, owner: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Set some of a person's settings and return all; null removes one. Raises RequestError for too many."""
    with storage.writing() as session:
        record = session.get(PreferenceRecord, owner)
        merged = {**({} if record is None else record.value), **changes}
        value = {name: setting for name, setting in merged.items() if setting is not None}
        if len(value) > MAX_PREFERENCES or len(repr(value)) > MAX_CHARS:
            raise RequestError("too many settings", field="settings")
        session.merge(PreferenceRecord(owner=owner, value=value))
        return value
