"""What of a model lies on its device and what in RAM: sizes from headers alone, and the choice between ways.

A model that fits lies on the device. Of one that does not, either the first layers stay in RAM and are
computed by the processor, or, in a mixture, experts do: computed there, or copied when they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from bise.cache.pages import kv_block_bytes
from bise.cache.table import blocks_needed
from bise.engine.memory import DEFAULT_CONTEXT, STEP_TOKENS, gibibytes, packed_formats, scratch_bytes
from bise.engine.placement import Placement
from bise.errors import ConfigError, MemoryPlanError
from bise.kernels import SPLIT_SIZE
from bise.kernels.cpu import packed_size
from bise.kernels.panels import FLOAT_FORMATS, PANEL_FORMATS, device_parts
from bise.model.source import ModelSource

RECORDED_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of the decode steps that `graphs.py` records: a step is padded by a half at most."""

OFFLOAD_CONTEXT = 4096
"""Tokens that are planned for where a model does not fit its device whole and nobody asks for a context."""

_ALIGNMENT = 64
_PLAIN_VALUE_BYTES = 14
"""Per value of a quantised matrix while plain torch multiplies it out: codes, levels and products."""

Place = Literal["device", "host", "held"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where the weights of a model lie."""

    mode: str = "none"
    """`none`: all on the device; `layers`, `compute`, `copy`: see `Placement.offload`."""
    host_layers: int = 0
    """The first layers, which are in RAM with their keys and values; with any, the embeddings are too."""
    experts: tuple[int, ...] = ()
    """Experts of each layer that the device holds at once; empty: all."""
    num_experts: int = 0
    """Experts of a layer."""

    def place(self, name: str) -> Place:
        """Return where a weight lies: `held` is in RAM in the device's form."""
        parts = name.split(".")
        if parts[0] != "layers":
            return "host" if name == "tok_embeddings" and self.host_layers else "device"
        layer = int(parts[1])
        if layer < self.host_layers:
            return "host"
        if parts[2] != "experts" or not self.experts or self.experts[layer] >= self.num_experts:
            return "device"
        if self.mode == "copy":
            return "held"
        return "device" if int(parts[3]) < self.experts[layer] else "host"


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second that decide where experts and layers are best."""

    device_bytes_s: float
    """The device reads its own memory."""
    bus_bytes_s: float
    """From RAM to the device."""
    host_bytes_s: float
    """The processor's threads together read RAM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitNeed:
    """Bytes that a model takes on its device and in RAM at their peaks."""

    weights: int
    kv: int
    scratch: int
    loading: int
    """What taking panels apart needs beside the weights; gone before keys, values and steps appear."""
    host_weights: int = 0
    host_kv: int = 0
    host_scratch: int = 0
    beside: int = 0
    """What another model takes on the device."""

    @property
    def device(self) -> int:
        """On the device."""
        return self.beside + self.weights + max(self.kv + self.scratch, self.loading)

    @property
    def host(self) -> int:
        """In RAM beyond the process itself."""
        return self.host_weights + self.host_kv + self.host_scratch


@dataclass(frozen=True, slots=True)
class _Bytes:
    """One weight, or several together, in both forms."""

    device: int = 0
    host: int = 0
    held: int = 0
    """In RAM in the device's form."""

    def __add__(self, other: _Bytes) -> _Bytes:
        return _Bytes(self.device + other.device, self.host + other.host, self.held + other.held)


class Sizes:
    """The bytes of a model's parts, and what each split makes of them."""

    def __init__(self, source: ModelSource, quant: str, placement: Placement, kv_format: str) -> None:
        self.config = config = source.config
        self.formats = packed_formats(source, quant)
        self._placement = placement
        self._kv_format = kv_format
        self.layers = [_Bytes()] * config.num_layers
        self.experts = [_Bytes()] * config.num_layers
        """Of one expert of each layer."""
        self.table = self.head = self.norm = _Bytes()
        self._largest = self._most_unpacked = 0
        for name, tensor in source.tensors.items():
            size = self._size(name, tensor.shape, tensor.format)
            if name == "tok_embeddings":
                self.table = size
            elif name == "output":
                self.head = size
            elif name == "norm":
                self.norm = size
            elif ".experts." not in name:
                self.layers[int(name.split(".")[1])] += size
            elif ".experts.0." in name:
                self.experts[int(name.split(".")[1])] += size
                # Those of a layer are put behind one another, a matrix of each at a time.
                self._largest = max(self._largest, config.num_experts * size.device)

    def _size(self, name: str, shape: tuple[int, ...], stored: str) -> _Bytes:
        if len(shape) == 1:
            width = 4 if self._placement.is_tiled else self._float_bytes
            return _Bytes(width * shape[0], 4 * shape[0])
        packed_format = self.formats[name]
        parts = device_parts(
            packed_format, *shape, float_bytes=self._float_bytes, is_tiled=self._placement.is_tiled
        )
        own = sum(parts)
        is_kept = stored.lower() == packed_format and packed_format in ("f32", self._placement.compute_format)
        self._largest = max(self._largest, copies_in_loading(packed_format, is_kept=is_kept) * own)
        if packed_format not in FLOAT_FORMATS:
            self._most_unpacked = max(self._most_unpacked, shape[0] * shape[1])
        host = -(-packed_size(packed_format, *shape) // _ALIGNMENT) * _ALIGNMENT
        # PyTorch rounds memory that a CUDA device fetches itself up to powers of two.
        held = sum(1 << (part - 1).bit_length() for part in parts) if self._placement.is_cuda else own
        return _Bytes(own, host, held)

    @property
    def _float_bytes(self) -> int:
        return 4 if self._placement.compute_format == "f32" else 2

    def layer_kv(self, layer: int, context: int, sequences: int) -> int:
        """Return the bytes of the keys and values of one layer."""
        config = self.config
        window = config.windows[layer]
        group = config.window_groups.index(window)
        block = kv_block_bytes(config, group, self._kv_format) // config.windows.count(window)
        return sequences * blocks_needed(context, window, STEP_TOKENS) * block

    def need(self, split: Split, context: int, sequences: int) -> SplitNeed:
        """Return what a split takes on both sides."""
        first, count = split.host_layers, self.config.num_layers
        own, host = self.norm + self.head, _Bytes()
        if self.config.tied_embeddings or not first:
            own += self.table
        if first:
            host += self.table
        device, ram = own.device, host.host
        for layer in range(count):
            expert, total = self.experts[layer], self.config.num_experts
            here = split.experts[layer] if split.experts else total
            if layer < first:
                ram += self.layers[layer].host + total * expert.host
                continue
            device += self.layers[layer].device + here * expert.device
            if split.mode == "copy" and here < total:
                ram += total * expert.held
            else:
                ram += (total - here) * expert.host
        kv = [self.layer_kv(layer, context, sequences) for layer in range(count)]
        rows = min(STEP_TOKENS, sequences * context)
        computes = first or (split.mode == "compute" and any(n < split.num_experts for n in split.experts))
        return SplitNeed(
            weights=device,
            kv=sum(kv[first:]),
            scratch=self.device_scratch(rows, context, sequences),
            loading=self._largest,
            host_weights=ram,
            host_kv=sum(kv[:first]),
            host_scratch=scratch_bytes(self.config, self.formats, rows, sequences) if computes else 0,
        )

    def device_scratch(self, rows: int, context: int, sequences: int) -> int:
        """Return the bytes of a step of `rows` tokens on the device, doubled for what its allocator keeps."""
        config, few = self.config, self._float_bytes
        slots = rows * (config.experts_per_token or 1)
        wide = config.q_dim + 2 * config.kv_dim
        attention = rows * (4 * wide + (4 + few) * config.q_dim)
        feed_forward = slots * ((8 + few) * config.hidden_dim + 4 * config.dim)
        splits = sequences * -(-context // SPLIT_SIZE) * config.q_dim * 4
        step = rows * (8 + few) * config.dim + max(attention + splits, feed_forward)
        # Twice as many sequences have a seat; prompts are scored 64 rows at a time.
        logits = 2 * 4 * config.vocab_size * max(2 * sequences, 64)
        if self._placement.is_tiled:
            # Each recorded step keeps its logits; kernels look cosines and sines of all positions up.
            others = 4 * config.vocab_size * sum(recorded_rows(max(2 * sequences, 8)))
            others += 4 * config.head_dim * (1 << (context - 1).bit_length())
        else:
            others = _PLAIN_VALUE_BYTES * self._most_unpacked
        return 2 * (step + logits) + others

    # Ways

    def by_layers(self, num_on_device: int) -> Split:
        """Return the split with the last layers on the device."""
        return Split(
            mode="layers",
            host_layers=self.config.num_layers - num_on_device,
            num_experts=self.config.num_experts,
        )

    def by_experts(self, mode: str, room: int) -> Split | None:
        """Return the split whose experts on the device take at most `room` bytes, spread evenly; None where
        the device must hold one of each layer and cannot.
        """
        total, count = self.config.num_experts, self.config.num_layers
        each = max((size.device for size in self.experts), default=0)
        number = min(max(room, 0) // max(each, 1), total * count)
        if mode == "copy" and number < count:
            return None
        low, more = divmod(number, count)
        spread = tuple(low + (layer < more) for layer in range(count))
        return Split(mode=mode, experts=spread, num_experts=total)

    def decode_seconds(self, split: Split, context: int, rates: Rates, sequences: int = 1) -> float:
        """Return the least time of a step that gives each of `sequences` sequences a token: weights, keys and
        values over their rates, one place after the other. Experts are taken to be wanted equally often.
        """
        config = self.config
        head = self.table if config.tied_embeddings else self.head
        device, host, bus = float(head.device), 0.0, 0.0
        wanted = 0.0
        if config.is_moe:
            missed = (1 - config.experts_per_token / config.num_experts) ** sequences
            wanted = config.num_experts * (1 - missed)
        for layer in range(config.num_layers):
            kv, expert = self.layer_kv(layer, context, sequences), self.experts[layer]
            if layer < split.host_layers:
                host += self.layers[layer].host + kv + wanted * expert.host
                continue
            found = split.experts[layer] / config.num_experts if split.experts else 1.0
            device += self.layers[layer].device + kv
            if split.mode == "copy":
                device += wanted * expert.device
                bus += wanted * (1 - found) * expert.device
            else:
                device += wanted * found * expert.device
                host += wanted * (1 - found) * expert.host
        return device / rates.device_bytes_s + bus / rates.bus_bytes_s + host / rates.host_bytes_s


@dataclass(frozen=True, slots=True)
class Choice:
    """A split and what it means."""

    split: Split
    context: int
    need: SplitNeed
    notes: tuple[str, ...] = ()
    """One line for people where not everything is on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser:
    """Chooses a split within what is free; see `choose`."""

    sizes: Sizes
    placement: Placement
    sequences: int
    device_free: int | None
    """Bytes that the model may take on the device; None: no bound is known."""
    host_free: int | None
    """Bytes of RAM beyond the process itself."""
    rates: Callable[[], Rates]
    """Asked only where several ways fit."""
    beside: Callable[[int], int] | None = None
    """The device's bytes that another model takes for a context of so many tokens."""

    def whole(self, context: int) -> Choice:
        """Return the choice of having everything on the device."""
        return self._choice(Split(), context)

    def _choice(self, split: Split, context: int) -> Choice:
        need = self.sizes.need(split, context, self.sequences)
        if self.beside is not None:
            need = replace(need, beside=self.beside(context))
        return Choice(split, context, need)

    def with_context(self, choice: Choice, context: int) -> Choice:
        """Return the same split for another context."""
        return replace(self._choice(choice.split, context), notes=choice.notes)

    def fits(self, need: SplitNeed) -> bool:
        """True when both sides hold what they must."""
        device = self.device_free is None or need.device <= self.device_free
        return device and (self.host_free is None or need.host <= self._host_left(need))

    def _host_left(self, need: SplitNeed) -> int:
        assert self.host_free is not None
        return self.host_free - (need.device if self.placement.shares_memory else 0)

    def choose(self, context: int | None) -> Choice:
        """Return the fastest split that fits `context` tokens (None: 4,096, or what the model can).

        Everything on the device where that fits. Raises MemoryPlanError when nothing does, ConfigError for a
        way that the model does not know.
        """
        config, placement = self.sizes.config, self.placement
        tokens = min(config.max_context, OFFLOAD_CONTEXT) if context is None else context
        if placement.layers is None:
            choice = self._whole(tokens, is_fixed=context is not None)
            if choice is not None:
                return choice
        if placement.offload in ("compute", "copy") and not config.is_moe:
            raise ConfigError(
                f"offload {placement.offload} is for mixtures of experts, this model is none; "
                "use --offload layers",
                field="offload",
            )
        ways = [self._choice(split, tokens) for split in self._ways(tokens)]
        found = [
            replace(way, notes=(self._note(way.split, way.need),)) for way in ways if self.fits(way.need)
        ]
        if not found:
            raise self._refusal(self._least(tokens), "no split of it fits either")
        if len(found) == 1:
            return found[0]
        rates = self.rates()
        return min(found, key=lambda each: self.sizes.decode_seconds(each.split, tokens, rates))

    def _whole(self, tokens: int, *, is_fixed: bool) -> Choice | None:
        """Return everything on the device; None where a part of it should stay in RAM. Where nothing may, a
        context that nobody asked for is halved first.
        """
        choice = self.whole(tokens)
        while not self.fits(choice.need):
            if self.placement.may_offload:
                return None
            if is_fixed or choice.context <= STEP_TOKENS:
                is_ram = self.placement.shares_memory and self.placement.offload != "none"
                reason = "its memory is RAM" if is_ram else "--offload auto leaves a part in RAM"
                raise self._refusal(choice, reason)
            choice = self.whole(choice.context // 2)
        return choice

    def check(self, split: Split, context: int) -> Choice:
        """Return a split that was chosen before; MemoryPlanError when it does not fit any more."""
        choice = self._choice(split, context)
        if not self.fits(choice.need):
            raise self._refusal(choice, "less is free than when it was planned")
        return replace(choice, notes=(self._note(split, choice.need),) if split.mode != "none" else ())

    def _ways(self, tokens: int) -> Iterator[Split]:
        """Yield the best split of each kind that may be used."""
        config, placement = self.sizes.config, self.placement
        if placement.layers is not None:
            if not 1 <= placement.layers <= config.num_layers:
                raise ConfigError(
                    f"gpu-layers must be from 1 to {config.num_layers} (this model's layers), got "
                    f"{placement.layers}",
                    field="gpu-layers",
                )
            yield Split() if placement.layers == config.num_layers else self.sizes.by_layers(placement.layers)
            return
        free = self.device_free or 0
        if config.is_moe:
            bare = Split(mode="copy", experts=(0,) * config.num_layers, num_experts=config.num_experts)
            room = free - self._choice(bare, tokens).need.device
            for mode in ("compute", "copy"):
                split = self.sizes.by_experts(mode, room) if placement.offload in ("auto", mode) else None
                if split is not None and room >= 0:
                    yield split
        if placement.offload in ("auto", "layers"):
            for number in range(config.num_layers - 1, 0, -1):
                split = self.sizes.by_layers(number)
                if self._choice(split, tokens).need.device <= free:
                    yield split
                    return

    def _least(self, tokens: int) -> Choice:
        """Return what takes the least of the device, for a message."""
        if self.placement.layers is not None:
            split = self.sizes.by_layers(self.placement.layers)
        elif self.placement.offload in ("compute", "copy"):
            count = self.sizes.config.num_layers
            split = Split(
                mode=self.placement.offload,
                experts=(int(self.placement.offload == "copy"),) * count,
                num_experts=self.sizes.config.num_experts,
            )
        else:
            split = self.sizes.by_layers(1)
        return self._choice(split, tokens)

    def _refusal(self, choice: Choice, reason: str) -> MemoryPlanError:
        need, where = choice.need, self.placement.device
        device = "an unknown amount" if self.device_free is None else gibibytes(max(self.device_free, 0))
        told = f"{gibibytes(need.device)} on {where}, where {device} are free"
        if need.host:
            left = "an unknown amount" if self.host_free is None else gibibytes(max(self._host_left(need), 0))
            told += f", and {gibibytes(need.host)} of RAM, where {left} are"
        return MemoryPlanError(
            f"this model needs {told}, for a context of {choice.context} tokens ({reason}); try --quant q4, "
            "a smaller --context, or a smaller model",
            field="model",
        )

    def _note(self, split: Split, need: SplitNeed) -> str:
        count, where = self.sizes.config.num_layers, self.placement.device
        if not split.experts:
            if not split.host_layers:
                return f"all {count} layers on {where}"
            return (
                f"{count - split.host_layers} of {count} layers on {where}, the first {split.host_layers} in "
                f"RAM ({gibibytes(need.host)}) and computed there"
            )
        low, high = min(split.experts), max(split.experts)
        some = f"{low}" if low == high else f"{low} to {high}"
        how = (
            "the others are computed by the processor"
            if split.mode == "compute"
            else "the last used ones; the others are copied there when they are wanted"
        )
        return (
            f"{some} of {split.num_experts} experts of each layer on {where}, {how} "
            f"({gibibytes(need.host)} of RAM)"
        )


def copies_in_loading(packed_format: str, *, is_kept: bool) -> int:
    """Return how often a matrix is on the device at once, at most, while it is put into tiles there: as it
    comes, its codes in their new order, padded, in tiles; floats that are not kept also in their own type.
    """
    layout = PANEL_FORMATS.get(packed_format)
    if layout is None:
        return 4 if is_kept else 6
    if layout.stored_bits == 8 and layout.low_bits < 8:  # put together from planes
        return 8
    return 5 if layout.nested else 4


def recorded_rows(most: int) -> list[int]:
    """Return the numbers of rows for which decode steps of at most `most` rows are recorded."""
    most = min(most, RECORDED_ROWS[-1])
    return [rows for rows in RECORDED_ROWS if rows < most] + [most]


def with_longer_context(chooser: Chooser, choice: Choice) -> Choice:
    """Return a choice with the longest context of the model's own and 32,768, halved until keys, values and
    steps take half of what the device has beside the weights; a note tells a shorter one than the model's.
    """
    own = chooser.sizes.config.max_context
    tokens = min(own, DEFAULT_CONTEXT)
    while tokens > choice.context:
        longer = chooser.with_context(choice, tokens)
        need, free = longer.need, chooser.device_free
        left = None if free is None else free - need.weights - need.beside
        if chooser.fits(need) and (left is None or need.kv + need.scratch <= left // 2):
            choice = longer
            break
        tokens //= 2
    if choice.context == own:
        return choice
    told = f"context {choice.context} of the model's {own} tokens; --context N asks for another"
    return replace(choice, notes=(*choice.notes, told))
