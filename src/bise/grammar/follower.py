"""One output under a grammar: which tokens may come, and the way out before the tokens run out.

The mask engine has limits of its own, which an output can reach in its middle. It is then closed by the
shortest way out, which the tracker alone knows: what was accepted stays valid.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bise.errors import EngineError, RequestError
from bise.grammar.compiler import Compiled
from bise.grammar.tracker import Tracker
from bise.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.intp]


class Follower:
    """The state of one output; owned by whoever produces it."""

    __slots__ = (
        "_bits",
        "_compiled",
        "_dense",
        "_end_ids",
        "_forbids_trigger",
        "_matcher",
        "_path",
        "_taken",
        "_tracker",
        "_trigger",
        "_vocabulary",
        "gave_up",
        "is_started",
        "was_cut",
    )

    def __init__(
        self,
        compiled: Compiled,
        vocabulary: Vocabulary,
        *,
        end_ids: frozenset[int] = frozenset(),
        trigger: int | None = None,
        forbids_trigger: bool = False,
    ) -> None:
        """Start at the beginning. `end_ids` end an output where the grammar lets it end.

        With a `trigger`, a control token, everything is free until that token, which is the first of the
        grammar's; with `forbids_trigger` that token never comes.
        """
        self._compiled = compiled
        self._vocabulary = vocabulary
        self._matcher: LLMatcher = compiled.begin()
        self._tracker = Tracker(compiled.table)
        self._end_ids = np.array(sorted(end_ids), np.intp)
        self._trigger = trigger
        self._forbids_trigger = forbids_trigger
        self._path: list[int] | None = None
        """Tokens of the way out from here, where they were needed."""
        self._taken: list[int] = []
        """Tokens that came while the grammar held."""
        self._bits = np.zeros(vocabulary.size // 64 + 1, np.uint64)
        self._dense: tuple[bytes, Ids] | None = None
        """The last mask in which many bits were set, and its tokens."""
        self.is_started = trigger is None
        """The grammar holds: there is no trigger, or it has come."""
        self.was_cut = False
        """A token was replaced because the tokens ran out, or the mask engine gave up."""
        self.gave_up = False
        """The mask engine reached a limit of its own: only the way out is left."""

    def shortest(self, field: str = "grammar") -> int:
        """Return how many tokens complete the output, in the shortest way that is known.

        Raises RequestError, about the grammar's source in `field`, when the vocabulary cannot spell it.
        """
        if not self.is_started:
            return 0
        path = self._way_out()
        if path is None:
            raise RequestError(f"the model's vocabulary cannot spell an output of {field}", field=field)
        if not self._compiled.is_ours and not self._leads_out(path):
            raise RequestError(
                f"{field}: its shortest output cannot be written: text is cut greedily, and one terminal "
                "takes what belongs to the next; let what follows a terminal begin with other characters",
                field=field,
            )
        return len(path)

    @property
    def may_end(self) -> bool:
        """The output is complete here, though it may be able to go on."""
        if self.gave_up:
            return self._tracker.need() == 0
        return not self.is_started or self._matcher.is_accepting()

    @property
    def must_end(self) -> bool:
        """The output is complete and nothing can follow."""
        if self.gave_up:
            return self._tracker.need() == 0
        return self.is_started and self._matcher.is_stopped() and self._matcher.is_accepting()

    def allowed(self, left: int) -> Ids | None:
        """Return the tokens that may come next, ascending, when `left` more may be produced; None for all,
        an empty array where the output is complete and can only end.
        """
        if not self.is_started:
            if not self._forbids_trigger and self._fits_after_trigger(left):
                return None
            assert self._trigger is not None, "without one the grammar holds from the start"
            return self._vocabulary.all_but(self._trigger)
        if not self.gave_up:
            ids = self._masked()
            if ids.size:
                return ids
            self._give_up()
        path = self._way_out()
        if path is None:
            raise EngineError("the vocabulary cannot spell the rest of the output")
        return np.array(path[:1], np.intp)

    def _masked(self) -> Ids:
        """Return the tokens that the mask engine allows; none when it gave up."""
        if not self._compute_mask(self._matcher) and not self._compute_mask_anew():
            return np.zeros(0, np.intp)
        # The engine's own end of text is none of the model's; which of those may come is decided here.
        self._set_bits(np.array([self._vocabulary.size]), False)
        self._set_bits(self._end_ids, self.may_end)
        return self._ids()

    def _compute_mask(self, matcher: LLMatcher) -> bool:
        # The engine counts in words of 32 bits, one token more than the model has.
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._vocabulary.size // 32 * 4 + 4)
        return not matcher.is_error()

    def _compute_mask_anew(self) -> bool:
        """Compute the mask with a matcher that no other output has filled, and leave it to the next ones."""
        fresh = self._compiled.fresh()
        matcher = fresh.deep_copy()
        if not matcher.consume_tokens(self._taken):
            return False
        if not self._compute_mask(matcher):
            return False
        self._matcher = matcher
        self._compiled.matcher = fresh
        return True

    def _set_bits(self, token_ids: Ids, value: bool) -> None:
        for token_id in token_ids.tolist():
            word, bit = token_id >> 6, np.uint64(1 << (token_id & 63))
            self._bits[word] = self._bits[word] | bit if value else self._bits[word] & ~bit

    def _ids(self) -> Ids:
        """Return the tokens whose bits are set: by words where few are, remembered where many are."""
        words = np.flatnonzero(self._bits)
        if 4 * words.size < self._bits.size:
            flags = np.unpackbits(self._bits[words].view(np.uint8), bitorder="little")
            places = np.flatnonzero(flags)
            return (words[places >> 6] << 6) + (places & 63)
        # Inside of a string nearly every token may come, and the mask is the same for many tokens.
        key = self._bits.tobytes()
        if self._dense is None or self._dense[0] != key:
            flags = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
            self._dense = (key, np.flatnonzero(flags))
        return self._dense[1]

    def take(self, token_id: int, left: int) -> int | None:
        """Add the token chosen from `allowed`, or the one that leads out in time, and return it; None when
        the output is complete and no token could follow that leaves it so.

        `left` counts this token and all that may follow it; the output can always be completed within them
        if it could be before.
        """
        if not self.is_started:
            if token_id == self._trigger:
                self.is_started = True
                self._advance(token_id)
            return token_id
        mark, path = self._tracker.mark(), self._path
        is_known = self._move(token_id)
        if not is_known:  # the two halves disagree: a bug of ours, and no reason to break the promise
            self._give_up()
        self._path = path[1:] if path and path[0] == token_id else None
        if not is_known or not self._can_end_within(left - 1):
            self._tracker.back_to(mark)
            self._path = path
            self.was_cut = True
            path = self._way_out()
            if path is None:
                raise EngineError("the vocabulary cannot spell the rest of the output")
            if not path:
                return None
            token_id, self._path = path[0], path[1:]
            if not self._move(token_id):
                raise EngineError(f"the grammar's way out is no way (token {token_id})")
        self._taken.append(token_id)
        if not self.gave_up and not self._matcher.consume_token(token_id):
            self._give_up()
        return token_id

    def validate(self, token_ids: Sequence[int]) -> int:
        """Return how many of `token_ids` could come next, one after the other; changes nothing."""
        if not self.is_started:
            for index, token_id in enumerate(token_ids):
                if token_id == self._trigger:
                    return index
            return len(token_ids)
        # By the tracker: what the mask engine is asked counts against its limits, and whether somebody
        # guesses ahead must not decide when they are reached.
        mark, count = self._tracker.mark(), 0
        for token_id in token_ids:
            if not self._move(token_id):
                break
            count += 1
        self._tracker.back_to(mark)
        return count

    def _advance(self, token_id: int) -> None:
        if not self._move(token_id) or not self._matcher.consume_token(token_id):
            raise EngineError(f"the grammar does not begin with its trigger {token_id}")
        self._taken.append(token_id)

    def _move(self, token_id: int) -> bool:
        piece = self._vocabulary.pieces[token_id]
        return self._tracker.advance(piece) if piece else self._tracker.advance_token(token_id)

    def _fits_after_trigger(self, left: int) -> bool:
        path = self._way_out()
        return path is not None and len(path) <= left

    def _can_end_within(self, left: int) -> bool:
        """Say whether `left` tokens complete the output; finds out as cheaply as it can."""
        if not self._compiled.is_ours:
            return self._has_proven_way(left)
        need = self._tracker.need()
        if need <= left and self._vocabulary.spells_every_byte:
            return True
        if self._path is not None:
            return len(self._path) <= left
        if need > left * self._vocabulary.longest:
            return False
        pieces = self._tracker.shortest()
        count = self._vocabulary.count_greedily(pieces)
        if count is not None and count <= left:
            return True
        self._path = self._vocabulary.spell(pieces)
        return self._path is not None and len(self._path) <= left

    def _has_proven_way(self, left: int) -> bool:
        """Say the same of a caller's own terminals, which may swallow parts of the shortest text."""
        if self._path is None:
            path = self._vocabulary.spell(self._tracker.shortest())
            if path is None or len(path) > left or not self._leads_out(path):
                return False
            self._path = path
        return len(self._path) <= left

    def _leads_out(self, path: Sequence[int]) -> bool:
        """Say whether the output is complete after these tokens."""
        mark = self._tracker.mark()
        is_out = all(map(self._move, path)) and self._tracker.need() == 0
        self._tracker.back_to(mark)
        return is_out

    def _way_out(self) -> list[int] | None:
        if self._path is None:
            self._path = self._vocabulary.spell(self._tracker.shortest())
        return self._path

    def _give_up(self) -> None:
        logger.warning("event=grammar_engine_gave_up tokens=%d", len(self._taken))
        self.gave_up = self.was_cut = True
