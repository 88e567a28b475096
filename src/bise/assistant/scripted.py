"""A stand-in for models that writes prepared answers at a set pace: for tests of the page and of clients."""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence

from argon2 import PasswordHasher

from bise.assistant.models import ChatTurn, Embeddings, Job, ModelFacts, Piece
from bise.assistant.wording import folded
from bise.engine.request import Timings, Usage
from bise.errors import EngineError

Script = Callable[[str], str]
"""From the last question to the answer."""


def quick_hasher() -> PasswordHasher:
    """Return a hasher for `Accounts` whose hashes take no time, and protect nobody."""
    return PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


class ScriptedModels:
    """Answers with `script(question)`, `piece` characters at a time, one piece every `pace_s` seconds.

    A token is four characters. An answer that contains FAIL fails there.
    """

    def __init__(
        self,
        script: Script,
        *,
        names: Sequence[str] = ("scripted-24b", "scripted-7b"),
        context: int = 32_768,
        piece: int = 4,
        pace_s: float = 0.0,
        delay_s: float = 0.0,
    ) -> None:
        self.script = script
        self.names = names
        self.context = context
        self.piece = piece
        self.pace_s = pace_s
        self.delay_s = delay_s

    def facts(self) -> Sequence[ModelFacts]:
        """Return models that exist in name only."""
        return [
            ModelFacts(id=name, title=name, context=self.context, parameters=24 * 10**8, state="ready")
            for name in self.names
        ]

    async def stream(self, job: Job) -> AsyncGenerator[Piece]:
        """Yield the prepared answer."""
        prompt = await self.count(job.model, job.messages)
        yield Piece(prefill=(0, prompt))
        started = time.perf_counter()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        question = next(turn["content"] for turn in reversed(job.messages) if turn["role"] == "user")
        text = self.script(question)
        if job.continues:
            text = text[len(job.messages[-1]["content"]) :]
        limit = job.params.get("max_tokens")
        most = len(text) if limit is None else min(len(text), 4 * int(limit))
        prefilled = time.perf_counter()
        for start in range(0, most, self.piece):
            part = text[start : min(most, start + self.piece)]
            if "FAIL" in part:
                raise EngineError("the script says FAIL here")
            yield Piece(text=part, tokens=1)
            await asyncio.sleep(self.pace_s)
        yield Piece(
            finish_reason="stop" if most == len(text) else "length",
            usage=Usage(
                prompt_tokens=prompt, cached_tokens=prompt // 2, completion_tokens=-(-most // self.piece)
            ),
            timings=Timings(
                queue_s=0.0, prefill_s=prefilled - started, decode_s=time.perf_counter() - prefilled
            ),
        )

    async def count(self, model: str, messages: Sequence[ChatTurn], *, continues: bool = False) -> int:
        """Return a quarter of the characters, and four tokens a message."""
        return sum(4 + len(turn["content"]) // 4 for turn in messages)

    async def count_text(self, model: str, text: str) -> int:
        """Return a quarter of the characters."""
        return len(text) // 4

    async def embed(self, model: str, texts: Sequence[str], *, tenant: str = "") -> Embeddings:
        """Return how often which three letters follow each other: words with one stem lie near."""
        rows: list[bytes] = []
        for text in texts:
            counts = [0.0] * 256
            plain = f" {folded(text)} "
            for start in range(len(plain) - 2):
                counts[zlib.crc32(plain[start : start + 3].encode()) % 256] += 1.0
            length = math.sqrt(sum(count * count for count in counts)) or 1.0
            rows.append(array("f", (count / length for count in counts)).tobytes())
        usage = Usage(
            prompt_tokens=sum(len(text) // 4 for text in texts), cached_tokens=0, completion_tokens=0
        )
        return Embeddings(rows=tuple(rows), usage=usage)
