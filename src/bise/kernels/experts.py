"""Experts of a layer that do not all fit on the device: computed where they lie, or brought when needed.

Two ways, and neither lets the result depend on what ran before:

- an expert has its place from the start: those on the device are computed there, those in RAM by the
  processor (matrices come as the processor's own and the device's own);
- all experts are computed on the device: they lie in RAM in the device's form, some fit a few slots there,
  and the longest unused gives way (matrices come as `Held`). The experts that the next layer is going to want
  are guessed with its router from the rows at hand, and travel while this layer computes.

Outputs are added in the order of rank on the device, whoever computed them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bise.kernels import Array, Experts, Weight
from bise.kernels.counts import ExpertCounts
from bise.kernels.cpu import CpuOps, Packed
from bise.kernels.torch import TorchOps

Matrices = tuple[Any, Any, Any]
"""Gate, up and down of one expert, as tensors or as values made of tensors."""


@dataclass(frozen=True, slots=True)
class Held:
    """A matrix of an expert in RAM, in the form that the device computes with."""

    matrix: Any
    num_slots: int
    """Experts of its layer that the device holds at once, at least one."""


def with_tensors(matrix: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a matrix each of whose tensors was changed."""
    if isinstance(matrix, Tensor):
        return change(matrix)
    found = {each.name: getattr(matrix, each.name) for each in fields(matrix)}
    return replace(
        matrix, **{name: change(value) for name, value in found.items() if isinstance(value, Tensor)}
    )


def hold(matrix: Any, num_slots: int) -> Held:
    """Return a matrix of the device in RAM, where a CUDA device can fetch it while it computes."""

    def keep(tensor: Tensor) -> Tensor:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return out.copy_(tensor)

    return Held(with_tensors(matrix, keep), num_slots)


def staging(size_bytes: int, device: torch.device) -> npt.NDArray[np.uint8]:
    """Return memory for bytes on their way to a device, from where a CUDA device fetches them itself. It is
    used again once nobody holds it.
    """
    memory = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return memory.numpy()  # pyright: ignore[reportUnknownMemberType]


def tensors_of(matrices: Iterable[Any]) -> list[Tensor]:
    """Return the tensors that matrices are made of, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for matrix in matrices:
        with_tensors(matrix, note)
    return found


class Lane:
    """Copies to one device: beside what it computes where it has streams, else at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        """Return a moment: everything that the device was told to compute so far is done then."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], after: Any) -> Any:
        """Copy tensors from RAM, not before the moment `after` (None: this one); return the moment at which
        they are there.
        """
        if self._stream is None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)
            return None
        before = self.mark() if after is None else after
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
                target.record_stream(self._stream)  # let go meanwhile, it is nobody's before the copy ends
            return self._stream.record_event()

    def wait(self, moment: Any) -> None:
        """Let the device compute nothing more before a moment."""
        if self._stream is not None and moment is not None:
            torch.cuda.current_stream(self._device).wait_event(moment)


class _Slot:
    """Room for one expert on the device."""

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices
        self.tensors = tensors_of(matrices)
        self.arrived: Any = None
        self.used: Any = None
        self.is_guess = False


class ExpertSlots:
    """The experts of a layer in RAM, and slots on the device for the last used of them."""

    def __init__(self, ops: TorchOps, held: Sequence[Matrices], num_slots: int, counts: ExpertCounts) -> None:
        """Take `num_slots` slots, empty at first; `held` are the matrices of each expert in RAM."""
        self._held = [tensors_of(matrices) for matrices in held]
        self._size = sum(tensor.numel() * tensor.element_size() for tensor in self._held[0])
        self._lane = Lane(ops.device)
        self._counts = counts

        def room(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device=ops.device, pin_memory=False)

        empty = [tuple(with_tensors(matrix, room) for matrix in held[0]) for _ in range(num_slots)]
        self._free = [_Slot((gate, up, down)) for gate, up, down in empty]
        self._by_expert: OrderedDict[int, _Slot] = OrderedDict()
        """Longest unused first."""

    def __contains__(self, expert: object) -> bool:
        return expert in self._by_expert

    def bring(self, expert: int, keep: Container[int], *, is_guess: bool = False) -> bool:
        """Start an expert's way to the device; False when every slot holds one of `keep`."""
        slot = self._by_expert.get(expert)
        if slot is None:
            slot = self._emptied(keep)
            if slot is None:
                return False
            slot.arrived = self._lane.copy(self._held[expert], slot.tensors, slot.used)
            slot.is_guess = is_guess
            self._by_expert[expert] = slot
            self._counts.copied += 1
            self._counts.guessed += is_guess
            self._counts.copied_bytes += self._size
        elif not is_guess:
            self._counts.guessed_right += slot.is_guess
            slot.is_guess = False
        self._by_expert.move_to_end(expert)
        return True

    def _emptied(self, keep: Container[int]) -> _Slot | None:
        if self._free:
            return self._free.pop()
        for expert in self._by_expert:
            if expert not in keep:
                return self._by_expert.pop(expert)
        return None

    def take(self, expert: int) -> Matrices:
        """Return the matrices of an expert that was brought; what is computed from now on finds them."""
        slot = self._by_expert[expert]
        self._lane.wait(slot.arrived)
        return slot.matrices

    def leave(self, expert: int) -> None:
        """Note that the device was told all that it is to compute with an expert now."""
        self._by_expert[expert].used = self._lane.mark()


class PlacedExperts:
    """The experts of one layer, wherever they lie."""

    def __init__(
        self, host: CpuOps, device: TorchOps, experts: Sequence[tuple[Weight, Weight, Weight]]
    ) -> None:
        """Take the matrices of each expert: the processor's, the device's, or all of them `Held`."""
        self.host = host
        self.device = device
        self.counts = ExpertCounts()
        self.follower: PlacedExperts | None = None
        """The bank of the next layer, where its experts lie in several places too."""
        self.router: Weight | None = None
        """Known since the first step."""
        self.slots: ExpertSlots | None = None
        self.in_ram: dict[int, Experts] = {}
        self._fixed: dict[int, Experts] = {}
        if isinstance(experts[0][0], Held):
            held = [(gate.matrix, up.matrix, down.matrix) for gate, up, down in experts]
            self.slots = ExpertSlots(device, held, experts[0][0].num_slots, self.counts)
            return
        for index, matrices in enumerate(experts):
            if isinstance(matrices[0], Packed):
                self.in_ram[index] = host.experts([matrices])
            else:
                self._fixed[index] = device.experts([matrices])

    def is_on_device(self, expert: int) -> bool:
        """True when an expert can be computed on the device without a copy."""
        return expert in self._fixed or (self.slots is not None and expert in self.slots)

    def on_device(self, wanted: Sequence[int], run: Callable[[int, Experts], None]) -> None:
        """Call `run` with the bank of each wanted expert that the device computes, those there first.

        Copies start as long as there are slots that nobody waits for; each computed expert frees its own.
        """
        if self.slots is None:
            for expert in wanted:
                run(expert, self._fixed[expert])
            return
        slots = self.slots
        left = deque(sorted(wanted, key=lambda expert: expert not in slots))
        ready: deque[int] = deque()
        while left or ready:
            while left and slots.bring(left[0], ready):
                ready.append(left.popleft())
            run(ready[0], self.device.experts([slots.take(ready[0])]))
            slots.leave(ready.popleft())

    def expect(self, guessed: npt.NDArray[np.integer[Any]]) -> None:
        """Bring the experts that a step is likely to want soon, the most wanted first, while room is left."""
        if self.slots is None:
            return
        experts, counts = np.unique(guessed, return_counts=True)
        order = [int(expert) for expert in experts[np.argsort(-counts, kind="stable")]]
        for expert in order:
            if not self.slots.bring(expert, order, is_guess=True):
                return


def _tensor(x: Any) -> Tensor:
    """Return rows as a tensor; those of Triton's kernels may wait for whoever takes them."""
    return x if isinstance(x, Tensor) else x.tensor()


def run_experts(x: Array, router: Weight, bank: PlacedExperts, top_k: int) -> Tensor:
    """Return what `Ops.moe` returns, of rows x [T, E] on the device."""
    device, follower = bank.device, bank.follower
    x = _tensor(x)
    bank.router = router
    chosen, share = device.route(x, router, top_k)
    choices = [chosen]
    if follower is not None and follower.slots is not None and follower.router is not None:
        choices.append(device.route(x, follower.router, top_k)[0])
    known: npt.NDArray[np.int64] = torch.stack(choices).cpu().numpy()  # the one wait for the device
    wanted = [int(expert) for expert in np.unique(known[0])]
    bank.counts.wanted += len(wanted)
    bank.counts.found += sum(bank.is_on_device(expert) for expert in wanted)
    parts = torch.zeros(len(x), top_k, x.shape[1], dtype=device.residual, device=x.device)
    in_ram = [expert for expert in wanted if expert in bank.in_ram]
    rows_in_ram = x.float().cpu().numpy() if in_ram else None

    def places(expert: int) -> tuple[npt.NDArray[np.intp], Tensor, Tensor]:
        rows, ranks = np.nonzero(known[0] == expert)
        return rows, torch.as_tensor(rows, device=x.device), torch.as_tensor(ranks, device=x.device)

    def run(expert: int, matrices: Experts) -> None:
        _, rows, ranks = places(expert)
        parts[rows, ranks] = _tensor(device.mlp(x[rows], matrices))

    bank.on_device([expert for expert in wanted if expert not in bank.in_ram], run)
    for expert in in_ram:
        assert rows_in_ram is not None
        numbers, rows, ranks = places(expert)
        out = bank.host.mlp(np.ascontiguousarray(rows_in_ram[numbers]), bank.in_ram[expert])
        parts[rows, ranks] = torch.from_numpy(out).to(x.device, parts.dtype)  # pyright: ignore[reportUnknownMemberType]
    if follower is not None and len(known) > 1:
        follower.expect(known[1])
    return device.mix(parts, share)
