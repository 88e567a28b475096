"""From rows of logits to what a step adds to one sequence: tokens, text, log-probs, and whether it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bise.engine.candidates import Candidates
from bise.engine.request import FinishReason, TokenLogprob
from bise.engine.sampling import Row, token_logprob
from bise.engine.sequence import Sequence


@dataclass(slots=True)
class Choice:
    """What was chosen in one step for one sequence, in order."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    text: str = ""
    reason: FinishReason | None = None
    """Why the sequence ends with this step; None when it goes on."""
    match: str | int | None = None
    """The stop string or stop token that ended it."""
    error: Exception | None = None
    """What went wrong at the token after `token_ids`; those before it stand."""


def choose(sequence: Sequence, logits: Candidates, draft: tuple[int, ...] = ()) -> Choice:
    """Choose tokens from 1 + guesses rows of logits [V], or take those that a device chose from them, one
    after the other while the guesses come true.

    Each is chosen with all before it accepted, exactly as if none had been guessed: penalties, min_tokens,
    stop strings and draws see the same history.
    """
    choice = Choice()
    try:
        for row, guess in zip(logits, (*draft, None), strict=True):
            _choose_one(sequence, row, choice)
            if choice.reason is not None or choice.token_ids[-1] != guess:
                break
    except Exception as error:  # whatever fails here ends this sequence; the engine tells its caller
        choice.error = error
    return choice


def _choose_one(sequence: Sequence, logits: Row | int, choice: Choice) -> None:
    """Choose one token from a row of logits [V], unless a device did, and test whether it ends the text."""
    params, grammar = sequence.params, sequence.grammar
    was_free = grammar is not None and not grammar.is_started
    token_id = _next_token(sequence, logits)
    if token_id is None:
        choice.reason = FinishReason.LENGTH
        return
    if params.logprobs is not None and not isinstance(logits, int):
        choice.logprobs.append(token_logprob(logits, token_id, params.logprobs))
    sequence.token_ids.append(token_id)
    sequence.sampler.accept(token_id)
    choice.token_ids.append(token_id)
    if sequence.prediction is not None:
        sequence.prediction.follow(token_id)
    if not sequence.first_token_s:
        sequence.first_token_s = time.perf_counter()
    stream = sequence.stream
    if token_id in sequence.stop_ids:
        choice.reason, choice.match = FinishReason.STOP, token_id
    elif stream is not None:
        choice.text += stream.push((token_id,))
        if was_free and grammar is not None and grammar.is_started:
            choice.text += stream.release()
        if stream.stopped is not None:
            choice.reason, choice.match = FinishReason.STOP, stream.stopped
    if choice.reason is None:
        choice.reason = _end_of_output(sequence)
    if choice.reason is not None and grammar is not None and grammar.was_cut:
        # Complete, but not as the model would have gone on.
        choice.reason = FinishReason.LENGTH


def _next_token(sequence: Sequence, logits: Row | int) -> int | None:
    """Return the next token; None where a grammar's output is complete and no token may be left to follow."""
    position, grammar = len(sequence.token_ids), sequence.grammar
    if grammar is None:
        if isinstance(logits, int):
            return logits
        return sequence.sampler.choose(logits, position, sequence.num_output)
    left = sequence.max_tokens - sequence.num_output
    if isinstance(logits, int):
        token_id = logits
    else:
        allowed = grammar.allowed(left)
        if allowed is not None and not allowed.size:
            return None
        token_id = sequence.sampler.choose(logits, position, sequence.num_output, allowed)
    return token_id if token_id in sequence.stop_ids else grammar.take(token_id, left)


def _end_of_output(sequence: Sequence) -> FinishReason | None:
    """Return why a sequence ends that neither a stop token nor a stop string ended; None when it goes on."""
    if sequence.grammar is not None and sequence.grammar.must_end:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.num_output >= sequence.max_tokens else None
