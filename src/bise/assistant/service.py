"""The assistant: conversations, their messages and the runs that write answers, for any number of people.

No HTTP. Everything async runs on one event loop; storage is used in threads and never held during a run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bise.assistant.conversations import Conversation, checked_params
from bise.assistant.documents import Document
from bise.assistant.events import Hub
from bise.assistant.left_out import dropped_part
from bise.assistant.messages import LIVE, Message, Page, Turn
from bise.assistant.models import ChatModels, Job, ModelFacts
from bise.assistant.personas import Personas
from bise.assistant.preferences import change_preferences, preferences_of
from bise.assistant.prompting import build_prompt
from bise.assistant.reader import DocumentReader
from bise.assistant.retrieval import Progress, Retrieval
from bise.assistant.runs import Run, Runs
from bise.assistant.shelf import Shelf
from bise.assistant.storage import Memory, Storage
from bise.assistant.summaries import begin_summary, summary_job, summary_part, summary_prompt
from bise.assistant.titles import first_words, is_small, write_title
from bise.errors import BiseError, ModelNotFoundError, NotFoundError, RequestError

logger = logging.getLogger(__name__)

PURGE_S = 3600.0


class Assistant:
    """Everything the assistant's routes need. Make it inside the event loop that will use it."""

    def __init__(self, storage: Storage, models: ChatModels) -> None:
        self.models = models
        self.runs = Runs(models)
        self.hub = Hub()
        self._memory = Memory()
        self._disk = Shelf(storage)
        self._temporary = Shelf(self._memory)
        self.personas = Personas(storage)
        self.retrieval = Retrieval(models, self.runs.is_busy)
        self._reader = DocumentReader()
        interrupted = self._disk.messages.interrupt_all()
        if interrupted:
            logger.warning("event=answers_interrupted count=%d", interrupted)
        self._disk.conversations.purge()
        self._background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Interrupt the runs, keeping their text."""
        await self.runs.close()
        await self.retrieval.close()
        for task in self._background:
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)
        self._memory.close()

    @property
    def disk(self) -> Shelf:
        """What outlives the process."""
        return self._disk

    def model_facts(self, name: str | None) -> ModelFacts:
        """Return a model's facts; the default's for None. Raises ModelNotFoundError."""
        facts = self.models.facts()
        for model in facts:
            if name is None or model.id == name:
                return model
        known = ", ".join(model.id for model in facts) or "no model"
        raise ModelNotFoundError(f"'{name}' is not served here; served: {known}", field="model")

    # Conversations

    async def create(self, owner: str, *, temporary: bool = False, **fields: Any) -> Conversation:
        """Make a conversation; a temporary one never touches the disk and is gone with the process."""
        shelf = self._temporary if temporary else self._disk
        given = {name: value for name, value in fields.items() if value}
        fields = {**fields, **await self._of_persona(owner, fields.get("persona_id")), **given}
        made = await asyncio.to_thread(lambda: shelf.conversations.create(owner, **fields))
        if not temporary:
            self.hub.tell(owner, "conversation", id=made.id)
        return made

    async def shelf_of(self, owner: str, conversation_id: str) -> Shelf:
        """Return where a conversation lies. Raises NotFoundError."""
        return await asyncio.to_thread(self._shelf_of, owner, conversation_id)

    def is_temporary(self, shelf: Shelf) -> bool:
        """Return True for the shelf in memory."""
        return shelf is self._temporary

    async def change(self, owner: str, conversation_id: str, changes: Mapping[str, Any]) -> Conversation:
        """Change a conversation's fields; `leaf` shows another branch."""
        shelf = await self.shelf_of(owner, conversation_id)
        fields = dict(changes)
        leaf = fields.pop("leaf", None)
        if leaf is not None:
            if not isinstance(leaf, str):
                raise RequestError("leaf must be a message id", field="leaf")
            message = await asyncio.to_thread(shelf.messages.get, owner, leaf)
            if message.conversation_id != conversation_id:
                raise RequestError("leaf names no message of this conversation", field="leaf")
            await asyncio.to_thread(shelf.messages.show, owner, leaf)
        if isinstance(fields.get("model"), str):
            self.model_facts(fields["model"])
        fields = {**await self._of_persona(owner, fields.get("persona_id")), **fields}
        changed = await asyncio.to_thread(shelf.conversations.change, owner, conversation_id, fields)
        self.hub.tell(owner, "conversation", id=conversation_id)
        return changed

    async def delete(self, owner: str, conversation_ids: Sequence[str]) -> None:
        """Delete conversations and stop what runs in them."""
        for conversation_id in conversation_ids:
            shelf = await self.shelf_of(owner, conversation_id)
            for run in self.runs.of_conversation(conversation_id):
                await self.runs.stop(run)
            await asyncio.to_thread(shelf.conversations.delete, owner, [conversation_id])
            self.hub.tell(owner, "deleted", id=conversation_id)

    async def forget(self, owner: str) -> None:
        """Stop all that runs for someone and remove their temporary chats; the disk is not touched."""
        for run in self.runs.live(owner):
            await self.runs.stop(run)
        await asyncio.to_thread(self._temporary.conversations.forget, owner)

    async def keep_house(self) -> None:
        """Remove for good what was deleted a week ago, every hour until cancelled."""
        while True:
            await asyncio.sleep(PURGE_S)
            try:
                await asyncio.to_thread(self._disk.conversations.purge)
            except BiseError as error:
                logger.warning("event=purge_failed code=%s", error.code)

    async def restore(self, owner: str, conversation_id: str) -> Conversation:
        """Undo a deletion."""
        restored = await asyncio.to_thread(self._disk.conversations.restore, owner, conversation_id)
        self.hub.tell(owner, "conversation", id=conversation_id)
        return restored

    async def page(
        self, owner: str, conversation_id: str, *, leaf: str | None = None, before: str | None, limit: int
    ) -> Page:
        """Return messages of the branch that ends at `leaf` (None: the one on screen), with the text of
        running answers as it is now.
        """
        shelf = await self.shelf_of(owner, conversation_id)
        page = await asyncio.to_thread(
            lambda: shelf.messages.page(owner, conversation_id, leaf=leaf, before=before, limit=limit)
        )
        return replace(page, messages=tuple(self.live(message) for message in page.messages))

    def live(self, message: Message) -> Message:
        """Return a message with its run's text and number, both read at the same instant."""
        run = self.runs.get(message.run_id)
        if run is None or message.status not in LIVE:
            return message
        if run.is_over:  # it ended between the read and now: what the run says is what was saved
            figures = run.figures()
            return replace(
                message,
                text=run.text,
                seq=run.seq,
                status=run.status,
                parts=tuple(run.parts),
                finish_reason=run.finish_reason,
                error=run.error,
                usage=figures["usage"],
                timings=figures["timings"],
            )
        return replace(
            message,
            text=run.text,
            parts=tuple(run.parts),
            seq=run.seq,
            status=run.status,
            timings=run.speed(),
        )

    # Answers

    async def ask(
        self,
        owner: str,
        conversation_id: str,
        *,
        text: str,
        parent_id: str | None,
        client_id: str | None = None,
        model: str | None = None,
        documents: Sequence[str] = (),
        run: bool = True,
        keep_from: str | None = None,
    ) -> tuple[Message, Message | None]:
        """Add a question and start its answer, which reads from the question `keep_from` on where given."""
        shelf = await self.shelf_of(owner, conversation_id)
        conversation = await asyncio.to_thread(shelf.conversations.get, owner, conversation_id)
        name = self.model_facts(model or self._known(conversation.model)).id
        for document in documents:
            await asyncio.to_thread(shelf.documents.get, owner, conversation_id, document)
        parts: list[dict[str, Any]] = []
        if keep_from is not None:
            leading = () if parent_id is None else await self._leading(shelf, owner, parent_id)
            parts.append(dropped_part(leading, keep_from))
        question, answer, is_new = await asyncio.to_thread(
            lambda: shelf.messages.ask(
                owner,
                conversation_id,
                text=text,
                parent_id=parent_id,
                client_id=client_id,
                model=name,
                params=conversation.params,
                documents=documents,
                with_answer=run,
            )
        )
        if is_new and parent_id is None and not conversation.title:
            await asyncio.to_thread(shelf.conversations.name, owner, conversation_id, first_words(text))
        if is_new and answer is not None:
            await self._start(shelf, owner, await self._with_parts(shelf, answer, parts))
        return question, None if answer is None else self.live(answer)

    async def answer_again(
        self,
        owner: str,
        message_id: str,
        *,
        model: str | None,
        hint: str | None,
        params: Mapping[str, Any] | None,
    ) -> Message:
        """Write another answer beside one, with another model or a hint such as "shorter" where given."""
        shelf, message = await self.message(owner, message_id)
        facts = self.model_facts(model or self._known(message.model))
        chosen = dict(message.params if params is None else checked_params(dict(params)))
        answer = await asyncio.to_thread(
            lambda: shelf.messages.ask_again(owner, message_id, model=facts.id, params=chosen)
        )
        parts = [part for part in message.parts if part.get("type") == "dropped"]
        if (summary := summary_part(message)) is not None:
            parts.append({**summary, "is_small": is_small(facts)})
        answer = await self._with_parts(shelf, answer, parts)
        await self._start(shelf, owner, answer, hint=hint)
        return self.live(answer)

    async def go_on(self, owner: str, message_id: str) -> Message:
        """Continue an answer that was cut, where it was cut."""
        shelf, _ = await self.message(owner, message_id)
        answer = await asyncio.to_thread(shelf.messages.resume, owner, message_id)
        await self._start(shelf, owner, answer)
        return self.live(answer)

    async def branch_off(self, owner: str, message_id: str) -> Conversation:
        """Copy the branch up to a message into a conversation of its own, with the same settings."""
        shelf, _ = await self.message(owner, message_id)
        turn = await asyncio.to_thread(shelf.messages.turn, owner, message_id)
        source = turn.conversation

        def copy() -> Conversation:
            made = shelf.conversations.create(
                owner, title=source.title, model=source.model, system=source.system, params=source.params
            )
            kept = [*turn.history, turn.answer]
            ids = list(dict.fromkeys(key for message in kept for key in message.documents))
            renamed = shelf.documents.copy(owner, source.id, made.id, ids)
            shelf.messages.copy(owner, made.id, kept, renamed)
            return shelf.conversations.get(owner, made.id)

        made = await asyncio.to_thread(copy)
        self.hub.tell(owner, "conversation", id=made.id)
        return made

    async def sum_up(
        self, owner: str, conversation_id: str, model: str | None = None
    ) -> tuple[Conversation, Message]:
        """Begin a conversation with a summary of the branch on screen of another, which a model writes.

        It has the old one's settings and documents. Raises ConflictError while the old one is being written,
        RequestError when nothing was said there.
        """
        shelf = await self.shelf_of(owner, conversation_id)
        source = await asyncio.to_thread(shelf.conversations.get, owner, conversation_id)
        facts = self.model_facts(model or self._known(source.model))
        made, answer = await asyncio.to_thread(begin_summary, shelf, owner, source, facts)
        await self._start(shelf, owner, answer)
        self.hub.tell(owner, "conversation", id=made.id)
        return made, self.live(answer)

    async def stop(self, owner: str, run_id: str) -> None:
        """Stop a run; returns when its place is free, at once where it is over already.

        Raises NotFoundError for someone else's.
        """
        if self.runs.get(run_id) is None and await asyncio.to_thread(
            self._disk.messages.has_run, owner, run_id
        ):
            return
        await self.runs.stop(self.run(owner, run_id))

    def run(self, owner: str, run_id: str) -> Run:
        """Return a run of `owner`. Raises NotFoundError."""
        run = self.runs.get(run_id)
        if run is None or run.owner != owner:
            raise NotFoundError("there is no such run; its answer is in the conversation", field="run")
        return run

    async def message(self, owner: str, message_id: str) -> tuple[Shelf, Message]:
        """Return a message and where it lies. Raises NotFoundError."""
        for shelf in (self._temporary, self._disk):
            try:
                return shelf, await asyncio.to_thread(shelf.messages.get, owner, message_id)
            except NotFoundError:
                continue
        raise NotFoundError("there is no such message", field="message")

    async def add_document(self, owner: str, conversation_id: str, name: str, content: bytes) -> Document:
        """Read a file and keep its text in a conversation. Raises RequestError for what cannot be read."""
        shelf = await self.shelf_of(owner, conversation_id)
        conversation = await asyncio.to_thread(shelf.conversations.get, owner, conversation_id)
        kind, read = await self._reader.read(name, content)
        model = self.model_facts(self._known(conversation.model)).id
        tokens = await self.models.count_text(model, read.text)
        return await asyncio.to_thread(
            lambda: shelf.documents.add(
                owner, conversation_id, name=name, kind=kind, read=read, tokens=tokens
            )
        )

    # Preferences

    async def preferences(self, owner: str) -> dict[str, Any]:
        """Return a person's settings."""
        return await asyncio.to_thread(preferences_of, self._disk.storage, owner)

    async def change_preferences(self, owner: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Set some of a person's settings; null removes one. Raises RequestError for more than a few."""
        changed = await asyncio.to_thread(change_preferences, self._disk.storage, owner, changes)
        self.hub.tell(owner, "settings")
        return changed

    # Inside

    async def _leading(self, shelf: Shelf, owner: str, message_id: str) -> tuple[Message, ...]:
        """Return a message and those that lead to it, root first."""
        turn = await asyncio.to_thread(shelf.messages.turn, owner, message_id)
        return (*turn.history, turn.answer)

    async def _with_parts(self, shelf: Shelf, answer: Message, parts: list[dict[str, Any]]) -> Message:
        """Give a fresh answer its first parts."""
        if not parts:
            return answer
        await asyncio.to_thread(lambda: shelf.messages.save(answer.id, {"parts": parts}, is_final=False))
        return replace(answer, parts=tuple(parts))

    async def _of_persona(self, owner: str, persona_id: Any) -> dict[str, Any]:
        """Return what a conversation takes from a persona. Raises NotFoundError for someone else's."""
        if not isinstance(persona_id, str):
            return {}
        persona = await asyncio.to_thread(self.personas.get, owner, persona_id)
        taken = {"system": persona.system, "params": persona.params}
        return taken | ({} if self._known(persona.model) is None else {"model": persona.model})

    def _shelf_of(self, owner: str, conversation_id: str) -> Shelf:
        try:
            self._temporary.conversations.get(owner, conversation_id)
        except NotFoundError:
            self._disk.conversations.get(owner, conversation_id)
            return self._disk
        return self._temporary

    def _known(self, name: str | None) -> str | None:
        """Return a model's name if it is still served, so that old conversations stay usable."""
        return name if any(model.id == name for model in self.models.facts()) else None

    async def _start(self, shelf: Shelf, owner: str, answer: Message, *, hint: str | None = None) -> None:
        turn = await asyncio.to_thread(shelf.messages.turn, owner, answer.id)
        assert answer.run_id is not None
        assert answer.model is not None
        run = Run(
            answer.run_id,
            message_id=answer.id,
            conversation_id=answer.conversation_id,
            owner=owner,
            job=Job(
                model=answer.model,
                messages=(),
                params=answer.params,
                tenant=owner,
                keeps_nothing=self.is_temporary(shelf),
            ),
            text=answer.text,
            parts=answer.parts,
        )

        def reading(done: int, total: int) -> None:
            run.tell("reading", {"done": done, "total": total})

        async def save(fields: dict[str, Any], is_final: bool) -> None:
            await asyncio.to_thread(lambda: shelf.messages.save(answer.id, fields, is_final=is_final))

        async def ended(run: Run) -> None:
            self.hub.tell(owner, "run_ended", id=run.conversation_id, message=run.message_id, run=run.id)
            if len(turn.history) == 1 and run.status == "complete":
                self._later(self._make_title(shelf, owner, turn, run))

        async def prepared() -> None:
            if (summary := summary_part(answer)) is not None:
                whole = await self._summed_up(shelf, owner, summary)
                facts = self.model_facts(answer.model)
                run.job = summary_job(run.job, facts)
                begun = answer.text
                asked = await summary_prompt(
                    self.models, facts, run.job, whole, reading, begun=begun, hint=hint
                )
                run.job = replace(run.job, messages=asked, continues=bool(begun))
                return
            messages, sources = await self.prompt(shelf, owner, turn, hint, progress=reading)
            run.job = replace(run.job, messages=messages, continues=bool(answer.text))
            if sources:
                await save({"sources": sources}, False)
                run.tell("sources", {"sources": sources})

        self.runs.start(run, save, ended, prepared)
        self.hub.tell(owner, "run_started", id=answer.conversation_id, message=answer.id, run=run.id)

    async def prompt(
        self,
        shelf: Shelf,
        owner: str,
        turn: Turn,
        hint: str | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
        """Return the messages that a run is asked with, and the passages of documents among them.

        `progress` is told of embeddings that the question waits for; without it none are made.
        """
        facts = self.model_facts(self._known(turn.answer.model))
        return await build_prompt(self.retrieval, shelf, owner, facts, turn, hint, progress)

    async def _summed_up(self, shelf: Shelf, owner: str, summary: Mapping[str, Any]) -> Sequence[Message]:
        """Return the messages that a summary is of. Raises RequestError when they are gone."""
        try:
            return await self._leading(shelf, owner, str(summary.get("leaf")))
        except NotFoundError:
            raise RequestError("the conversation that this sums up is not there any more") from None

    async def _make_title(self, shelf: Shelf, owner: str, turn: Turn, run: Run) -> None:
        """Let the model that answered name the conversation, when it is large enough to."""
        if is_small(self.model_facts(run.job.model)):
            return  # the question's first words are better
        try:
            title = await write_title(
                self.models,
                run.job.model,
                question=turn.history[0].text,
                answer=run.text,
                tenant=owner,
                keeps_nothing=self.is_temporary(shelf),
            )
            if title and await asyncio.to_thread(shelf.conversations.name, owner, run.conversation_id, title):
                self.hub.tell(owner, "conversation", id=run.conversation_id)
        except BiseError as error:
            logger.info("event=title_failed code=%s", error.code)

    def _later(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
