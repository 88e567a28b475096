"""A stand-in for a loaded model: bytes as tokens, an echo as the answer. Tests of the command line only."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

from bise.config import ModelConfig
from bise.engine.handle import RequestHandle
from bise.engine.request import Delta, FinishReason, Request, Timings, TokenLogprob, Usage
from bise.errors import BiseError, ContextOverflowError

BOS, EOS, INST, END_INST, SYSTEM = 1, 2, 300, 301, 302
CONFIG = ModelConfig(
    family="mistral",
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_dim=128,
    vocab_size=303,
    max_context=200,
)


class FakeTokenizer:
    """Byte b is token b + 3."""

    vocab_size = 303
    bos_id = BOS
    adds_bos = True
    stop_ids = frozenset({EOS})
    space_prefix = False

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in token_ids if 3 <= i < 259).decode(errors="replace")


class FakeTemplate:
    """`<s> [SYS] system [INST] user [/INST] assistant </s>`; with `moves_system`, the system goes last."""

    name = "fake"

    def __init__(self, *, moves_system: bool = False) -> None:
        self.moves_system = moves_system

    def encode(self, messages, tools=None, *, continue_final: bool = False) -> list[int]:
        spell = FakeTokenizer().encode
        ids = [BOS]
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        for i, message in enumerate(messages):
            content = spell(message["content"])
            if message["role"] == "system":
                ids += [] if self.moves_system else [SYSTEM, *content]
            elif message["role"] == "user":
                extra = spell(system) if self.moves_system and system and i == last_user else []
                ids += [INST, *extra, *content, END_INST]
            else:
                closed = not (continue_final and i == len(messages) - 1)
                ids += [*content, *([EOS] if closed else [])]
        return ids


class FakeEngine:
    """Answers `echo: ` and the text between the last [INST] and [/INST], one character per delta."""

    def __init__(self, max_context: int = 200) -> None:
        self.max_context = max_context
        self.requests: list[Request] = []
        self.cancelled = 0
        self.interrupt_after: int | None = None
        self.fails_with: BiseError | None = None
        self.endless = False

    def submit(self, request: Request) -> RequestHandle:
        self.requests.append(request)
        params = request.params
        room = self.max_context - len(request.token_ids)
        if (params.max_tokens or 1) > room and params.max_tokens != 0:
            raise ContextOverflowError(
                f"a prompt of {len(request.token_ids)} tokens exceeds the context of {self.max_context}"
            )
        made: list[InterruptingHandle] = []
        handle = InterruptingHandle(params.seed or 0, lambda: self._cancel(made, request), None)
        made.append(handle)
        handle.interrupt_after = self.interrupt_after
        deltas = self._score(request) if request.prompt_logprobs else self._answer(request, room)
        for delta in deltas:
            handle.push(delta)
        return handle

    def _cancel(self, handle_of: list[InterruptingHandle], request: Request) -> None:
        self.cancelled += 1
        handle_of[0].push(self._end(request, 0, FinishReason.ABORT))

    def _answer(self, request: Request, room: int) -> list[Delta]:
        ids = list(request.token_ids)
        start = len(ids) - ids[::-1].index(INST) if INST in ids else 1
        text = "echo: " + FakeTokenizer().decode(ids[start:])
        limit = min(request.params.max_tokens or room, room)
        pieces = list(text)[:limit]
        reason = FinishReason.LENGTH if len(text) > limit else FinishReason.STOP
        if self.fails_with is not None:
            return [
                Delta(text="e", token_ids=(104,)),
                self._end(request, 1, FinishReason.ERROR, self.fails_with),
            ]
        logprobs = () if request.params.logprobs is None else (TokenLogprob(104, -0.5, ((104, -0.5),)),)
        body = [Delta(text=p, token_ids=(p.encode()[0] + 3,), logprobs=logprobs) for p in pieces]
        return [*body, self._end(request, len(body), reason)]

    def _score(self, request: Request) -> list[Delta]:
        scores = [None] + [TokenLogprob(i, -math.log(2 + i % 2)) for i in request.token_ids[1:]]
        return [Delta(prompt_logprobs=tuple(scores)), self._end(request, 0, FinishReason.LENGTH)]

    def _end(
        self, request: Request, count: int, reason: FinishReason, error: BiseError | None = None
    ) -> Delta:
        return Delta(
            finish_reason=reason,
            usage=Usage(prompt_tokens=len(request.token_ids), cached_tokens=0, completion_tokens=count),
            timings=Timings(queue_s=0.0, prefill_s=0.25, decode_s=0.5),
            error=error,
        )


class InterruptingHandle(RequestHandle):
    """Raises KeyboardInterrupt once after so many deltas, as Ctrl-C would."""

    interrupt_after: int | None = None

    def _take(self) -> Delta:
        if self.interrupt_after is not None:
            if self.interrupt_after == 0:
                self.interrupt_after = None
                while not self._deltas.empty():
                    self._deltas.get()
                raise KeyboardInterrupt
            self.interrupt_after -= 1
        return super()._take()


@dataclass
class FakeLoaded:
    """What load_model returns."""

    source: object
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    template: FakeTemplate | None = field(default_factory=FakeTemplate)
    engine: FakeEngine = field(default_factory=FakeEngine)
    notes: tuple[str, ...] = ()
    temperature: float = 0.7
    closed: bool = False

    def expert_counts(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


def fake_loaded(path: Path) -> FakeLoaded:
    """Return a fake model that says it came from `path`."""
    source = SimpleNamespace(
        path=path, config=CONFIG, name="fake-1", licence="Apache-2.0", kind="safetensors"
    )
    return FakeLoaded(source)


def stand_in(make: Callable[[Path], FakeLoaded] = fake_loaded) -> ModuleType:
    """Return a module to put in the place of `bise.engine.load`: it makes fakes."""
    module = ModuleType("bise.engine.load")
    module.LoadedModel = FakeLoaded  # type: ignore[attr-defined]
    module.load_model = lambda path, **_: make(path)  # type: ignore[attr-defined]
    for name in ("DraftSource", "LoadedModel", "Progress", "load_text"):  # what engine.model_spec names
        if not hasattr(module, name):
            setattr(module, name, None)
    return module


if __name__ == "__main__":
    from bise.cli.app import main

    sys.modules["bise.engine.load"] = stand_in()
    main()
