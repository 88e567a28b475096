"""What of the documents goes into a prompt: all where they fit, else the passages that suit the question.

Embeddings come from the model that answers and are made once, when they are first needed, while nobody's
answer is being written. A question waits for them for a moment; then the words decide alone, and say so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bise.assistant.documents import Documents, WholeDocument
from bise.assistant.messages import Message
from bise.assistant.models import ChatModels, ModelFacts
from bise.assistant.passages import Passage, by_meaning, by_words, cut_passages, fuse, passage_size, take
from bise.errors import BiseError

if TYPE_CHECKING:
    from bise.assistant.passages import Matrix

logger = logging.getLogger(__name__)

MAX_PASSAGES = 12
WAIT_S = 20.0
"""How long a question waits for the embeddings of its documents."""
TICK_S = 0.25
BATCH = 8
"""Passages embedded at once, and lost at most when the process ends."""
DEFAULT_WINDOW = 8192
"""Where a model's context is not known."""

Progress = Callable[[int, int], None]
"""Told of passages embedded, and all."""


class Retrieval:
    """Finds passages for questions; lives in the event loop's thread."""

    def __init__(self, models: ChatModels, is_busy: Callable[[], bool]) -> None:
        """`is_busy` says that an answer is being written, so that embeddings should wait."""
        self._models = models
        self._is_busy = is_busy
        self._making: dict[tuple[str, str, int], _Making] = {}

    async def close(self) -> None:
        """Stop making embeddings; those that were made are kept."""
        for making in self._making.values():
            making.task.cancel()
        await asyncio.gather(*(making.task for making in self._making.values()), return_exceptions=True)

    async def fill(
        self,
        documents: Documents,
        owner: str,
        facts: ModelFacts,
        history: Sequence[Message],
        texts: list[str],
        *,
        begun: Sequence[dict[str, Any]] = (),
        progress: Progress | None = None,
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the texts with their documents in them, and the passages used where they were too long:
        `begun` where an answer was begun with these, for it cites them by number.

        All documents go in whole when together they take at most half of the window; else the last question
        gets the passages that fit it best, numbered, within the same share. Without `progress` nothing is
        embedded: words decide.
        """
        attached: list[list[WholeDocument]] = []
        for message in history:
            found = [
                await asyncio.to_thread(documents.get, owner, message.conversation_id, key)
                for key in message.documents
            ]
            attached.append(found)
        everything = list({document.id: document for found in attached for document in found}.values())
        room = (facts.context or DEFAULT_WINDOW) // 2
        if sum(document.tokens for found in attached for document in found) <= room:
            whole = ["".join(_whole(document) for document in found) for found in attached]
            return [part + text for part, text in zip(whole, texts, strict=True)], []
        sources = [*begun] or await self._sources(
            documents, facts, everything, texts[-1], room, owner, progress
        )
        parts = [f"[{source['number']}] from {_place(source)}:\n{source['text']}" for source in sources]
        lead = "Passages from documents; cite them by number, like [1]:\n\n" + "\n\n".join(parts) + "\n\n"
        return [*texts[:-1], lead + texts[-1]], sources

    async def _sources(
        self,
        documents: Documents,
        facts: ModelFacts,
        everything: Sequence[WholeDocument],
        question: str,
        room: int,
        owner: str,
        progress: Progress | None,
    ) -> list[dict[str, Any]]:
        rate = max(document.tokens / max(1, document.chars) for document in everything)
        size = passage_size(room, rate)
        cut = await asyncio.to_thread(
            lambda: [(document, found) for document in everything for found in _passages(document, size)]
        )
        rankings = [await asyncio.to_thread(by_words, [found.text for _, found in cut], question)]
        method = "words"
        if progress is not None:
            vectors = await self._vectors(documents, facts.id, size, everything, owner, progress)
            if vectors is not None and len(vectors) == len(cut):
                asked = await self._embedded(facts.id, question, owner)
                if asked is not None:
                    rankings.append(await asyncio.to_thread(by_meaning, vectors, asked))
                    method = "words and meaning"
        sizes = [document.tokens * len(found.text) / max(1, len(document.text)) for document, found in cut]
        return [
            {
                "number": number,
                "document_id": cut[index][0].id,
                "name": cut[index][0].name,
                "passage": cut[index][1].number,
                "start": cut[index][1].start,
                "end": cut[index][1].end,
                "page": cut[index][1].page,
                "text": cut[index][1].text,
                "method": method,
            }
            for number, index in enumerate(take(fuse(rankings), sizes, room, MAX_PASSAGES), 1)
        ]

    async def _embedded(self, model: str, question: str, owner: str) -> Matrix | None:
        import numpy as np

        try:
            made = await self._models.embed(model, [question], tenant=owner)
        except BiseError as error:
            logger.info("event=question_not_embedded code=%s", error.code)
            return None
        return np.frombuffer(made.rows[0], np.float32)

    async def _vectors(
        self,
        documents: Documents,
        model: str,
        size: int,
        everything: Sequence[WholeDocument],
        owner: str,
        progress: Progress,
    ) -> Matrix | None:
        """Return the embeddings of all passages in order [n, E]; None where some are not there in time."""
        deadline = asyncio.get_running_loop().time() + WAIT_S
        rows: list[bytes] = []
        for document in everything:
            making = self._make(documents, model, size, document, owner)
            with making.waiting(progress):
                left = deadline - asyncio.get_running_loop().time()
                done, _ = await asyncio.wait([making.task], timeout=max(0.0, left))
            if not done or making.task.cancelled() or (found := making.task.result()) is None:
                return None
            rows += found
        return await asyncio.to_thread(_matrix, rows)

    def _make(
        self, documents: Documents, model: str, size: int, document: WholeDocument, owner: str
    ) -> _Making:
        """Return the work on a document's embeddings, which goes on when nobody waits for it any more."""
        key = (document.id, model, size)
        making = self._making.get(key)
        if making is None:
            making = self._making[key] = _Making()
            making.task = asyncio.create_task(
                self._embed_all(making, documents, model, size, document, owner)
            )
            making.task.add_done_callback(lambda _: self._making.pop(key, None))
        return making

    async def _embed_all(
        self,
        making: _Making,
        documents: Documents,
        model: str,
        size: int,
        document: WholeDocument,
        owner: str,
    ) -> list[bytes] | None:
        """Return the embeddings of all passages, those that are missing made first; None when that failed."""
        passages = await asyncio.to_thread(_passages, document, size)
        kind = f"{model}@{size}"  # passages of another size are others
        kept = await asyncio.to_thread(documents.vectors, document.id, kind)
        left = [passage for passage in passages if passage.number not in kept]
        try:
            for start in range(0, len(left), BATCH):
                while self._is_busy() and not making.listeners:
                    await asyncio.sleep(TICK_S)
                making.tell(len(kept), len(passages))
                batch = left[start : start + BATCH]
                made = await self._models.embed(model, [passage.text for passage in batch], tenant=owner)
                new = {passage.number: row for passage, row in zip(batch, made.rows, strict=True)}
                await asyncio.to_thread(documents.add_vectors, document.id, kind, new)
                kept |= new
        except BiseError as error:
            logger.warning("event=embedding_failed code=%s", error.code)
            return None
        return [kept[passage.number] for passage in passages]


class _Making:
    """Embeddings of one document on their way, and who waits for them."""

    task: asyncio.Task[list[bytes] | None]

    def __init__(self) -> None:
        self.listeners: list[Progress] = []

    def tell(self, done: int, total: int) -> None:
        """Tell everyone who waits how far it is."""
        for listener in self.listeners:
            listener(done, total)

    def waiting(self, listener: Progress) -> _Waiting:
        """Let `listener` be told for as long as the context lasts; work goes on at full speed meanwhile."""
        return _Waiting(self.listeners, listener)


class _Waiting:
    def __init__(self, listeners: list[Progress], listener: Progress) -> None:
        self._listeners = listeners
        self._listener = listener

    def __enter__(self) -> None:
        self._listeners.append(self._listener)

    def __exit__(self, *_: object) -> None:
        self._listeners.remove(self._listener)


def _passages(document: WholeDocument, size: int) -> list[Passage]:
    return cut_passages(document.text, document.pages, size)


def _matrix(rows: Sequence[bytes]) -> Matrix:
    import numpy as np

    return np.stack([np.frombuffer(row, np.float32) for row in rows])


def _whole(document: WholeDocument) -> str:
    return f"Document {document.name}:\n\n{document.text}\n\n(end of {document.name})\n\n"


def _place(source: dict[str, Any]) -> str:
    return source["name"] if source["page"] is None else f"{source['name']}, page {source['page']}"
