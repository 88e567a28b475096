"""Personas: named ways of answering that a person keeps: instructions, a model, parameters.

A conversation takes a copy when a persona is chosen, so that changing a persona changes no old conversation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from bise.assistant.conversations import checked_changes
from bise.assistant.storage import Storage, new_id
from bise.assistant.wording import checked_name
from bise.errors import ConflictError, NotFoundError, RequestError, quoted
from bise.store.chat_schema import PersonaRecord
from bise.store.schema import JsonObject

MAX_PERSONAS = 200
"""Personas of one person."""
MAX_NAME = 100
_FIELDS = ("name", "system", "model", "params")


@dataclass(frozen=True, slots=True, kw_only=True)
class Persona:
    """A persona as others see it."""

    id: str
    name: str
    system: str
    model: str | None
    """None: whichever model the person has chosen."""
    params: JsonObject
    created_at: float


class Personas:
    """The personas in one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def listing(self, owner: str) -> list[Persona]:
        """Return a person's personas by name."""
        query = select(PersonaRecord).where(PersonaRecord.owner == owner)
        with self._storage.reading() as session:
            found = [_persona(record) for record in session.scalars(query)]
        return sorted(found, key=lambda persona: persona.name.casefold())

    def get(self, owner: str, persona_id: str) -> Persona:
        """Return one persona; NotFoundError when it is someone else's."""
        with self._storage.reading() as session:
            return _persona(_owned(session, owner, persona_id))

    def create(self, owner: str, fields: Mapping[str, Any]) -> Persona:
        """Keep a persona. Raises RequestError, and ConflictError for a name that is there already."""
        checked = _checked(fields)
        if "name" not in checked:
            raise RequestError("name is needed", field="name")
        with self._storage.writing() as session:
            held = select(func.count()).where(PersonaRecord.owner == owner)
            if (session.scalar(held) or 0) >= MAX_PERSONAS:
                raise ConflictError(f"a person keeps {MAX_PERSONAS} personas at most; delete one first")
            _check_free(session, owner, checked["name"], None)
            record = PersonaRecord(
                id=new_id(),
                owner=owner,
                name=checked["name"],
                system=checked.get("system", ""),
                model=checked.get("model"),
                params=checked.get("params", {}),
                created_at=time.time(),
            )
            session.add(record)
            session.flush()
            return _persona(record)

    def change(self, owner: str, persona_id: str, changes: Mapping[str, Any]) -> Persona:
        """Set fields of a persona; conversations that were given it keep what they have."""
        checked = _checked(changes)
        with self._storage.writing() as session:
            record = _owned(session, owner, persona_id)
            if "name" in checked:
                _check_free(session, owner, checked["name"], persona_id)
            for name, value in checked.items():
                setattr(record, name, value)
            session.flush()
            return _persona(record)

    def delete(self, owner: str, persona_id: str) -> None:
        """Remove a persona; conversations that were given it keep what they have."""
        with self._storage.writing() as session:
            session.delete(_owned(session, owner, persona_id))


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := next((name for name in fields if name not in _FIELDS), None):
        raise RequestError(f"{quoted(unknown)} is no field of a persona", field="body")
    checked = checked_changes({name: value for name, value in fields.items() if name != "name"})
    if "name" in fields:
        checked["name"] = checked_name(fields["name"], "name", MAX_NAME)
    return checked


def _check_free(session: Session, owner: str, name: str, own_id: str | None) -> None:
    query = select(PersonaRecord.id).where(PersonaRecord.owner == owner, PersonaRecord.name == name)
    if session.scalar(query) not in (None, own_id):
        raise ConflictError("there is a persona of this name already", field="name")


def _owned(session: Session, owner: str, persona_id: str) -> PersonaRecord:
    record = session.get(PersonaRecord, persona_id)
    if record is None or record.owner != owner:
        raise NotFoundError("there is no such persona", field="persona")
    return record


def _persona(record: PersonaRecord) -> Persona:
    return Persona(
        id=record.id,
        name=record.name,
        system=record.system,
        model=record.model,
        params=record.params,
        created_at=record.created_at,
    )
