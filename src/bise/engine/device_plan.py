"""What of a model a device would hold and how fast it would decode, from headers and from stated or measured
rates: nothing is loaded, and without torch nothing is measured either.
"""

from __future__ import annotations

from dataclasses import dataclass

from bise.engine.device import HEADROOM
from bise.engine.placement import Placement
from bise.engine.split import OFFLOAD_CONTEXT, Choice, Chooser, Rates, Sizes, with_longer_context
from bise.errors import MemoryPlanError
from bise.model.source import ModelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """The answer of `bise plan --device`."""

    choice: Choice
    """The split; where nothing fits, everything on the device."""
    refusal: str | None
    """Why nothing fits, in one line; None when the choice does."""
    sequences: int
    device_memory: int
    """Bytes of the device, 512 MiB of which are left to its driver."""
    memory: int
    """Bytes of RAM granted beyond the process."""
    largest_context: int
    """Most tokens per sequence that this split can hold; 0 where nothing fits."""
    rates: Rates
    decode_tokens_s: float | None
    """Ceiling at this context and as many sequences, all together; None where nothing fits."""


def make_device_plan(
    source: ModelSource,
    placement: Placement,
    *,
    quant: str,
    kv: str,
    context: int | None,
    sequences: int,
    device_memory: int,
    memory: int,
    rates: Rates,
) -> DevicePlan:
    """Plan a model on a device of `device_memory` bytes beside `memory` bytes of RAM.

    Raises ConfigError for a context beyond the model's own and for formats or ways that do not exist.
    """
    longest = source.config.max_context
    if context is not None:
        source.config.check_context(context)
    chooser = Chooser(
        sizes=Sizes(source, quant, placement, placement.kv_format(kv, quant)),
        placement=placement,
        sequences=sequences,
        device_free=max(device_memory - HEADROOM, 0),
        host_free=memory,
        rates=lambda: rates,
    )
    refusal, most, speed = None, 0, None
    try:
        choice = chooser.choose(context)
        if context is None:
            choice = with_longer_context(chooser, choice)
        most = _largest_context(chooser, choice, longest)
        speed = sequences / chooser.sizes.decode_seconds(choice.split, choice.context, rates, sequences)
    except MemoryPlanError as error:
        choice, refusal = chooser.whole(context or min(longest, OFFLOAD_CONTEXT)), str(error)
    return DevicePlan(
        choice=choice,
        refusal=refusal,
        sequences=sequences,
        device_memory=device_memory,
        memory=memory,
        largest_context=most,
        rates=rates,
        decode_tokens_s=speed,
    )


def _largest_context(chooser: Chooser, choice: Choice, longest: int) -> int:
    low, high = choice.context, longest
    while low < high:
        middle = (low + high + 1) // 2
        if chooser.fits(chooser.with_context(choice, middle).need):
            low = middle
        else:
            high = middle - 1
    return low
