"""A model whose output a test writes: bytes as tokens, Mistral's v7 chat format, an engine that says what it
is told, and a fleet of one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bise.engine.grammar import Grammars
from bise.engine.handle import RequestHandle
from bise.engine.model_spec import ModelCard, ModelPlan, ModelSpec
from bise.engine.placement import NATIVE
from bise.engine.receipt import ModelIdentity
from bise.engine.request import Delta, FinishReason, Request, Timings, TokenLogprob, Usage
from bise.errors import BiseError, ContextOverflowError, ModelNotFoundError, QueueFullError, RequestError
from bise.text.mistral_template import MistralTemplate
from bise.text.stream import TextStream

_NAMES = """
<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS]
[TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CONTENT] [PREFIX] [SUFFIX] [MIDDLE] [ARGS] [CALL_ID] [THINK] [/THINK]
"""
CONTROLS = {name: 256 + place for place, name in enumerate(_NAMES.split())}
BOS, EOS = CONTROLS["<s>"], CONTROLS["</s>"]


class ScriptedTokenizer:
    """Byte b is token b."""

    vocab_size = 256 + len(CONTROLS)
    bos_id = BOS
    adds_bos = True
    stop_ids = frozenset({EOS})
    space_prefix = False

    def __init__(self, without: Sequence[str] = ()) -> None:
        self.controls = {name: value for name, value in CONTROLS.items() if name not in without}

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        return list(text.encode())

    def control_id(self, name: str) -> int | None:
        return self.controls.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def spell(self, text: str) -> list[int]:
        """Return the ids of a text in which control strings stand for control tokens."""
        ids: list[int] = []
        while text:
            name = next((name for name in self.controls if text.startswith(name)), None)
            if name:
                ids.append(self.controls[name])
                text = text[len(name) :]
            else:
                ids += text[0].encode()
                text = text[1:]
        return ids


@dataclass
class ScriptedEngine:
    """Answers with `text`, or with what `script(request)` returns; a token per delta, from its own thread."""

    tokenizer: ScriptedTokenizer
    text: str = "Hello, world!"
    script: Callable[[Request], str] | None = None
    max_context: int = 4096
    token_s: float = 0.0
    """Pause before each token."""
    endless: bool = False
    """Go on until aborted, whatever limit the request names."""
    cached_tokens: int = 0
    """What usage says of the cache."""
    fails_with: BiseError | None = None
    refuses_with: BiseError | None = None
    failure: BiseError | None = None
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    aborted: int = 0
    made: int = 0
    """Tokens that were handed on."""
    go: threading.Event = field(default_factory=threading.Event)
    """Tokens come while it is set; without it requests stay where they are, until they are aborted."""
    max_queue: int = 10_000
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.go.set()
        self.grammars = Grammars(self.tokenizer, self.tokenizer.vocab_size)
        """The engine's own, so that a grammar is refused here when it is refused there."""

    def submit(self, request: Request) -> RequestHandle:
        if self.refuses_with is not None:
            raise self.refuses_with
        with self.lock:
            self.requests.append(request)
            if self.running >= self.max_queue:
                raise QueueFullError("the queue is full")
        unknown = [key for key in request.params.logit_bias if key >= self.tokenizer.vocab_size]
        if unknown:
            raise RequestError(f"logit_bias has token {unknown[0]}", field="logit_bias")
        wanted = request.params.max_tokens
        if len(request.token_ids) + (1 if wanted is None else wanted) > self.max_context:
            raise ContextOverflowError(
                f"a prompt of {len(request.token_ids)} tokens and max_tokens {wanted} exceed the context of "
                f"{self.max_context} tokens",
                field="max_tokens",
            )
        limit = self.max_context - len(request.token_ids) if wanted is None else wanted
        self.grammars.follow(request, frozenset({EOS}), limit)
        cancelled = threading.Event()
        seed = 7 if request.params.seed is None else request.params.seed
        handle = RequestHandle(seed, cancelled.set, None)
        with self.lock:
            self.running += 1
        threading.Thread(target=self._run, args=(request, handle, cancelled), daemon=True).start()
        return handle

    def stats(self):
        return type("Stats", (), {"num_running": self.running, "num_waiting": 0})()

    def close(self, *, drain: bool = False) -> None:
        pass

    def _run(self, request: Request, handle: RequestHandle, cancelled: threading.Event) -> None:
        try:
            last = self._say(request, handle, cancelled)
        finally:
            with self.lock:
                self.running -= 1
        handle.push(last)  # who has seen it finds the place free

    def _say(self, request: Request, handle: RequestHandle, cancelled: threading.Event) -> Delta:
        params = request.params
        text = self.text if self.script is None else self.script(request)
        ids = self.tokenizer.spell(text)
        room = self.max_context - len(request.token_ids)
        limit = room if params.max_tokens is None else params.max_tokens
        stream = TextStream(self.tokenizer, params.stop, continuation=request.continuation)
        made = 0
        prompt = self._prompt_scores(request)
        begun = time.monotonic()
        while not cancelled.is_set():
            if self.token_s:
                time.sleep(self.token_s)
            if not self.go.wait(0.01):
                continue
            if request.deadline_s is not None and made and time.monotonic() - begun > request.deadline_s:
                reason = FinishReason.DEADLINE
                break
            if made >= len(ids) and not self.endless:
                reason = FinishReason.STOP
                break
            if made >= limit and not self.endless:
                reason = FinishReason.LENGTH
                break
            token = ids[made % len(ids)]
            made += 1
            scores = () if params.logprobs is None else (self._score(token, params.logprobs),)
            piece = stream.push((token,))
            handle.push(Delta(token_ids=(token,), text=piece, logprobs=scores, prompt_logprobs=prompt))
            with self.lock:
                self.made += 1
            prompt = ()
            if stream.stopped is not None:
                reason = FinishReason.STOP
                break
            if self.fails_with is not None:
                reason = FinishReason.ERROR
                break
        else:
            reason = FinishReason.ABORT
            self.aborted += 1
        tail = stream.finish()
        if stream.stopped is not None and reason is not FinishReason.ABORT:
            reason = FinishReason.STOP
        return Delta(
            text=tail,
            prompt_logprobs=prompt,
            finish_reason=reason,
            stop_match=stream.stopped,
            error=self.fails_with if reason is FinishReason.ERROR else None,
            usage=Usage(
                prompt_tokens=len(request.token_ids),
                cached_tokens=self.cached_tokens,
                completion_tokens=made,
                accepted_prediction_tokens=min(made, len(request.prediction)),
                rejected_prediction_tokens=max(0, len(request.prediction) - made),
            ),
            timings=Timings(queue_s=0.0, prefill_s=0.1, decode_s=0.2),
            embedding=self._vector(request) if request.pooling else (),
        )

    def _score(self, token: int, top: int) -> TokenLogprob:
        rivals = [(token, -0.25), *((other, -2.0 - other) for other in range(65, 90) if other != token)]
        return TokenLogprob(token, -0.25, tuple(rivals[:top]))

    def _prompt_scores(self, request: Request):
        if not request.prompt_logprobs:
            return ()
        top = request.params.logprobs or 0
        return (None, *(self._score(token, top) for token in request.token_ids[1:]))

    def _vector(self, request: Request) -> tuple[float, ...]:
        values = [float(sum(request.token_ids) % 7 + 1), 2.0, -3.0, 0.5] * 4
        norm = math.sqrt(sum(value * value for value in values))
        return tuple(value / norm for value in values)


class ScriptedModel:
    """What a lease holds."""

    def __init__(
        self, *, chat_format: str | None = "v7-tekken", without: Sequence[str] = ("[THINK]",)
    ) -> None:
        self.tokenizer = ScriptedTokenizer(without)
        self.template = MistralTemplate(self.tokenizer, chat_format) if chat_format else None
        self.engine = ScriptedEngine(self.tokenizer)
        self.temperature = 0.7
        self.notes = ()
        self.quant, self.kv, self.placement = "q8", "q16", NATIVE

    def expert_counts(self):
        return None

    def identity(self) -> ModelIdentity:
        return ModelIdentity(name="stub", weights_sha256="", config_sha256="", tokenizer_sha256="")

    def close(self) -> None:
        pass


class ScriptedLease:
    adapter = None

    def __init__(self, fleet: ScriptedFleet, loaded: ScriptedModel) -> None:
        self.loaded = loaded
        self._fleet = fleet
        self._open = True
        fleet.leases += 1

    def release(self) -> None:
        if self._open:
            self._open = False
            self._fleet.leases -= 1


class ScriptedFleet:
    """Serves one model as `stub`, also called `stub-latest`."""

    def __init__(self, model: ScriptedModel | None = None) -> None:
        self.model = model or ScriptedModel()
        self.leases = 0
        self.reloads = 0
        self.fails_with: BiseError | None = None

    @property
    def engine(self) -> ScriptedEngine:
        return self.model.engine

    def names(self) -> tuple[str, ...]:
        return ("stub",)

    def cards(self):
        spec = ModelSpec(name="stub", path=Path("/nowhere/stub"), aliases=("stub-latest",))
        plan = ModelPlan(
            size_bytes=1, weight_bytes=1, context=self.engine.max_context, kv_format="f32", family="mistral",
            parameters=1, title="Stub", licence="Apache-2.0", modified_s=1_700_000_000.0,
        )  # fmt: skip
        return (ModelCard(spec=spec, plan=plan, state="ready", users=0),)

    def card(self, name: str) -> ModelCard:
        if name not in ("stub", "stub-latest"):
            raise ModelNotFoundError(f"'{name[:50]}' is not served here; served: stub", field="model")
        return self.cards()[0]

    def acquire(self, name: str, *, wait_s: float | None = None) -> ScriptedLease:
        self.card(name)
        if self.fails_with is not None:
            raise self.fails_with
        return ScriptedLease(self, self.model)

    def acquire_loaded(self, name: str) -> ScriptedLease:
        return self.acquire(name)

    def sleep(self, name: str, *, wait_s: float | None = 0.0) -> None:
        assert self.leases == 0
        self.engine.failure = None
        self.reloads += 1

    def close(self, *, drain: bool = False) -> None:
        pass
