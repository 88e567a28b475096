"""Matrix products with weights of 4, 8, 16 or 32 bits: which kernel is launched how."""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from bise.kernels.dequant import IQ4_VALUES
from bise.kernels.panels import SUPER_COLUMNS, TILE_COLUMNS, TILE_ROWS
from bise.kernels.triton import EXACT
from bise.kernels.triton.launches import Card, Launch, launch_of, least_rows_of, with_norm
from bise.kernels.triton.products import matmul
from bise.kernels.triton.tiles import Tiles

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Triton's name of each compute type."""

MOST_EXPERTS = TILE_ROWS
"""Experts of a layer that the kernel can choose among."""

_ARRIVALS = 1 << 16


class Slots(IntEnum):
    """Which rows a program computes."""

    ROWS = 0
    """Neighbours."""
    SINGLE = 1
    """One (row, rank), with the matrix of its expert."""
    SORTED = 2
    """A list, all of one expert."""


class After(IntEnum):
    """What happens to a product."""

    STORE = 0
    GATE = 1
    """silu(first matrix) * second matrix, in the compute type."""
    ADD = 2
    """Added to the residual stream, whose squares are summed per 64 columns for the next norm."""
    MIX = 3
    """As ADD, after the experts of a row have been added in the order of their rank."""
    ROUTE = 4
    """The best experts of each row and their shares."""


@dataclass(frozen=True, slots=True)
class Normed:
    """What a norm needs: rows of the residual stream, sums of their squares per 64 columns, weights, eps."""

    values: Tensor
    """[T, E] float32."""
    squares: Tensor
    """[T, E / 64] float32."""
    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """Experts of rows, one slot for each (row, rank)."""

    experts: Tensor
    """int32 [slots], or [programs] where `slots` lists theirs."""
    slots: Tensor | None = None
    """int32 [programs * rows]: a slot, or -1."""
    rows: int = 1
    """Slots of a program."""


@dataclass(frozen=True, slots=True)
class _Task:
    """What becomes of a product."""

    after: After
    num_slots: int
    out: Tensor | None = None
    second: Tiles | None = None
    residual: Tensor | None = None
    squares: Tensor | None = None
    chosen: Chosen | None = None
    shares: Tensor | None = None
    slots_per_row: int = 1
    top_k: int = 1

    def operands(self) -> tuple[Tensor | None, ...]:
        """Return residual stream, its squares, slots, experts and shares."""
        chosen = self.chosen
        slots, experts = (None, None) if chosen is None else (chosen.slots, chosen.experts)
        return self.residual, self.squares, slots, experts, self.shares


class Matmul:
    """Launches the kernel for one compute type on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self.card = _card_of(device)
        # Of two bytes each: what takes four would be copied ahead of time, every one into a place of its own.
        short = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        self.levels = torch.tensor(IQ4_VALUES, dtype=short, device=device)
        """Values of the codebook of 4-bit codes."""
        # Zero between launches: whoever arrives last puts back what it counted.
        self._arrived = torch.zeros(_ARRIVALS, dtype=torch.int32, device=device)

    def __call__(self, x: Tensor | Normed, weight: Tiles, *, launch: Launch | None = None) -> Tensor:
        """Return products [T, N padded] in float32 of x [T, K]: `weight.offsets` tell where parts begin."""
        rows = _count(x)
        out = _new(weight, rows, weight.num_blocks * TILE_ROWS, torch.float32)
        self._run(x, weight, _Task(After.STORE, rows, out=out), launch)
        return out

    def gate(
        self,
        x: Tensor | Normed,
        gate: Tiles,
        up: Tiles,
        chosen: Chosen | None = None,
        top_k: int = 1,
        *,
        launch: Launch | None = None,
    ) -> Tensor:
        """Return silu(x gate^T) * (x up^T) [slots, F padded] in the compute type; slot s takes row s / top_k.
        Both matrices have one form.
        """
        slots = _count(x) * top_k
        out = _new(gate, slots, gate.num_blocks * TILE_ROWS, self._dtype)
        task = _Task(After.GATE, slots, out=out, second=up, chosen=chosen, slots_per_row=top_k)
        self._run(x, gate, task, launch)
        return out

    def add(self, x: Tensor, weight: Tiles, residual: Tensor, *, launch: Launch | None = None) -> Tensor:
        """Add products of x [T, K] to `residual` [T, N] in place; return its squares [T, N / 64]."""
        squares = _new(weight, len(x), weight.num_blocks, torch.float32)
        self._run(x, weight, _Task(After.ADD, len(x), residual=residual, squares=squares), launch)
        return squares

    def mix(self, x: Tensor, weight: Tiles, chosen: Chosen, shares: Tensor, residual: Tensor) -> Tensor:
        """Add the experts' products of slots x [T * top_k, K], each times its share [T, top_k], best first,
        to `residual` [T, N] in place; return its squares. One program for each slot.
        """
        squares = _new(weight, len(residual), weight.num_blocks, torch.float32)
        task = _Task(
            After.MIX,
            len(x),
            residual=residual,
            squares=squares,
            chosen=chosen,
            shares=shares,
            top_k=shares.shape[1],
        )
        self._run(x, weight, task)
        return squares

    def slots(self, x: Tensor | Normed, weight: Tiles, chosen: Chosen, top_k: int = 1) -> Tensor:
        """Return products [slots, N padded] in float32, each with the matrix of its expert; slot s takes row
        s / top_k of x [T, K].
        """
        slots = _count(x) * top_k
        out = _new(weight, slots, weight.num_blocks * TILE_ROWS, torch.float32)
        self._run(x, weight, _Task(After.STORE, slots, out=out, chosen=chosen, slots_per_row=top_k))
        return out

    def route(self, x: Tensor | Normed, router: Tiles, top_k: int) -> tuple[Tensor, Tensor]:
        """Return the experts (int32) of each row, best first, ties to the lower one, and the softmax of their
        scores, [T, top_k] each.
        """
        rows = _count(x)
        experts = _new(router, rows, top_k, torch.int32)
        shares = _new(router, rows, top_k, torch.float32)
        self._run(x, router, _Task(After.ROUTE, rows, chosen=Chosen(experts), shares=shares, top_k=top_k))
        return experts, shares

    def _run(self, x: Tensor | Normed, weight: Tiles, task: _Task, launch: Launch | None = None) -> None:
        launch, slots, parts = self._shape(weight, task, launch)
        if isinstance(x, Normed):
            launch = with_norm(launch, self.card)
        splits, blocks = weight.num_splits, weight.num_blocks
        # Two blocks in one program only where nobody waits for anybody.
        apart = task.after is After.MIX or (splits > 1 and launch.apart)
        two = 0
        if task.second is not None:
            two = 1
        elif launch.two_blocks and not apart and task.after is not After.ROUTE:
            two = 2
        grid = (-(-blocks // 2) if two == 2 else blocks, parts, splits if apart else 1)
        assert grid[0] * parts <= _ARRIVALS or not apart
        none = self.levels
        partial = none
        if apart:
            size = splits * (1 if task.second is None else 2) * task.num_slots * blocks * TILE_ROWS
            partial = torch.empty(size, dtype=torch.float32, device=weight.codes.device)
        rows = x if isinstance(x, Normed) else Normed(x, none, none, 0.0)
        assert rows.values.stride(1) == 1
        out_stride = 0 if task.out is None else task.out.stride(0)
        matmul[grid](
            rows.values, rows.squares, rows.weight, *self._arrays(weight),
            *self._between(weight, task.second), none,
            *(none if each is None else each for each in (task.out, partial)), self._arrived,
            *(none if each is None else each for each in task.operands()), rows.eps, task.num_slots,
            *weight.shape, blocks, rows.values.stride(0), out_stride, task.slots_per_row, weight.steps,
            -(-weight.steps // splits), NUM_SPLITS=splits, APART=apart, SLOTS=int(slots),
            AFTER=int(task.after), NORMED=isinstance(x, Normed), TWO=two, TOP_K=task.top_k, ROWS=launch.rows,
            STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages, **self._form(weight),
            **EXACT,
        )  # fmt: skip

    def _form(self, weight: Tiles) -> dict[str, object]:
        """Return the constants that a weight's format gives."""
        return {
            "SQUARES": triton.next_power_of_2(-(-weight.num_columns // TILE_COLUMNS)),
            "EVEN": weight.num_columns % (SUPER_COLUMNS if weight.bits == 4 else TILE_COLUMNS) == 0,
            "BITS": weight.bits,
            "GROUP": weight.group,
            "ZERO": weight.zero,
            "HAS_MIN": weight.minimum is not None,
            "CODEBOOK": weight.codebook,
            "SCALES": int(weight.scales),
            "LEAST": self.card.least_rows,
            "H": TYPES[self._dtype],
            "TO": tl.float32 if self._is_wide(weight) else TYPES[self._dtype],
        }

    def _is_wide(self, weight: Tiles) -> bool:
        """Tell whether products are computed in float32, as those of a float32 weight (the router) are."""
        return torch.float32 in (weight.codes.dtype, self._dtype)

    def _shape(self, weight: Tiles, task: _Task, launch: Launch | None) -> tuple[Launch, Slots, int]:
        """Return the shape of a program, which slots it takes, and how many programs that makes."""
        chosen = None if task.after is After.ROUTE else task.chosen
        slots = Slots.ROWS
        if chosen is not None:
            slots = Slots.SINGLE if chosen.slots is None else Slots.SORTED
        launch = launch or launch_of(
            task.num_slots,
            weight,
            self.card,
            is_wide=self._is_wide(weight),
            is_pair=task.second is not None,
            single=slots is Slots.SINGLE,
            rows=chosen.rows if chosen is not None and slots is Slots.SORTED else None,
        )
        if chosen is None:
            return launch, slots, -(-task.num_slots // launch.rows)
        return launch, slots, len(chosen.experts)

    def _arrays(self, weight: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        none = self.levels
        scale = none if weight.scale is None else weight.scale
        return weight.codes, scale, none if weight.minimum is None else weight.minimum

    def _between(self, first: Tiles, second: Tiles | None) -> list[int]:
        """Return how far it is from the arrays of one weight to those of another, in 16 elements: so the
        compiler knows that both are aligned.
        """
        if second is None:
            return [0, 0, 0]
        pairs = zip(self._arrays(first), self._arrays(second), strict=True)
        return [(other.data_ptr() - one.data_ptr()) // (16 * one.element_size()) for one, other in pairs]


def _card_of(device: torch.device) -> Card:
    """Return what a device is; where there is none, as for the interpreter, an H200."""
    if device.type != "cuda":
        return Card()
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    least = 8 if torch.version.hip is not None else least_rows_of(properties.major, triton.__version__)
    return Card(properties.multi_processor_count, shared, least)


def _count(x: Tensor | Normed) -> int:
    return len(x.values) if isinstance(x, Normed) else len(x)


def _new(weight: Tiles, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, width), dtype=dtype, device=weight.codes.device)
