"""Grammars of one engine's requests: what is refused, what is compiled once, what follows an output.

`Follower` says which tokens may come and closes an output before its tokens run out; `choice.py` asks it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from bise.engine.request import Request
from bise.errors import RequestError
from bise.grammar.spec import GrammarKind, GrammarSpec
from bise.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bise.grammar.compiler import Compiled, GrammarCache
    from bise.grammar.follower import Follower

__all__ = ["GrammarKind", "GrammarSpec", "Grammars"]


class Grammars:
    """Compiles and hands out grammars. Any thread may ask; the engine's own never compiles."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._cache: GrammarCache | None = None
        self._lock = threading.Lock()

    def prepare(self, spec: GrammarSpec, *, continuation: bool = False) -> Compiled:
        """Compile `spec`, unless it was lately, in the calling thread: up to a second.

        Raises RequestError for a grammar that is wrong, cannot be enforced or is too much work.
        """
        from bise.grammar.compiler import Lead

        tokenizer = self._tokenizer
        if tokenizer is None:
            raise RequestError(f"{spec.field} needs a tokenizer, and this engine has none", field=spec.field)
        # A SentencePiece model begins a text with a space that the text does not show.
        hides_space = tokenizer.space_prefix and not continuation and spec.trigger is None
        return self._compiled().get(spec, Lead.SPACE if hides_space else Lead.NONE)

    def follow(self, request: Request, end_ids: frozenset[int], max_tokens: int) -> Follower | None:
        """Return what follows the output of a request; None for a request without a grammar.

        Raises RequestError as `prepare`, for what no output can keep together with a grammar, and when even
        the shortest output has more than `max_tokens`.
        """
        spec = request.grammar
        if spec is None:
            return None
        from bise.grammar.follower import Follower

        _check_params(request, spec)
        compiled = self.prepare(spec, continuation=request.continuation)
        vocabulary = self._compiled().vocabulary
        trigger = None if spec.trigger is None else vocabulary.control(spec.trigger, spec.field)
        follower = Follower(
            compiled,
            vocabulary,
            end_ids=end_ids,
            trigger=trigger,
            forbids_trigger=spec.kind is GrammarKind.FREE,
        )
        shortest = follower.shortest(spec.field)
        if shortest > max_tokens:
            raise RequestError(
                f"max_tokens {max_tokens} cannot hold an output of this grammar: the shortest that is known "
                f"takes {shortest} tokens",
                field="max_tokens",
            )
        return follower

    def _compiled(self) -> GrammarCache:
        """Return the cache, made with its vocabulary the first time."""
        from bise.grammar.compiler import GrammarCache
        from bise.grammar.vocabulary import Vocabulary

        with self._lock:
            if self._cache is None:
                assert self._tokenizer is not None, "prepare asks for one"
                self._cache = GrammarCache(Vocabulary(self._tokenizer, self._vocab_size))
            return self._cache


def _check_params(request: Request, spec: GrammarSpec) -> None:
    """Refuse parameters that would end an output where the grammar does not let it end."""
    params = request.params
    if params.stop and spec.trigger is None:
        raise RequestError(
            f"stop cannot be combined with {spec.field}, which says itself where the text may end",
            field="stop",
        )
    if params.stop_token_ids:
        raise RequestError(
            f"stop_token_ids cannot be combined with {spec.field}, which says itself where the text may end",
            field="stop_token_ids",
        )
    if params.max_tokens == 0 or request.pooling is not None:
        raise RequestError(
            f"{spec.field} needs an output; max_tokens 0 and pooling produce none", field="max_tokens"
        )
