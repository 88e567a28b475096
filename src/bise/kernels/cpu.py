"""The CPU backend: numpy arrays in, the native extension underneath. Sole importer of `_native`.

Weights are packed panels (docs/formats.md); activations are float32 rows, quantised inside to int8 with one
scale per 32 columns when the weight is quantised. Results are the same bits for any batch, chunk, thread
count and instruction set (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from bise import _native
from bise.errors import ConfigError
from bise.formats import KV_FORMATS
from bise.kernels import BLOCK_SIZE, AttentionMeta

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Packed = _native.Packed
Bank = tuple["_native.Experts", int]
CpuLora = tuple["_native.Packed", "_native.Packed", np.float32]

PACKED_FORMATS: dict[str, int] = {name: number for number, name in enumerate(_native.formats)}
"""Packed formats by name; the number is the native one."""

_KV_KINDS = {"f32": 0, "f16": 1, "bf16": 2, "q8": 3, "q16": 4}
_EVERYTHING = 1 << 40  # a window wider than any context
_HUGE_PAGE = 2 << 20
_LINE = 64


def detected_isas() -> tuple[str, ...]:
    """Return the instruction sets this processor can run, best first."""
    return tuple(_native.detected_isas().split())


def packed_format_of(ggml_id: int) -> str | None:
    """Return the packed format that holds a GGUF block type without loss, None when there is none."""
    number = _native.format_of(ggml_id)
    return None if number < 0 else _native.formats[number]


def packed_size(packed_format: str, num_rows: int, num_columns: int) -> int:
    """Return the bytes of a packed matrix [num_rows, num_columns], padding included."""
    return _native.packed_bytes(PACKED_FORMATS[packed_format], num_rows, num_columns)


def narrowest_float(array: Floats) -> str:
    """Return the narrowest float format that holds every value of `array` unchanged: bf16, f16 or f32."""
    if not (array.view(np.uint32) & 0xFFFF).any():
        return "bf16"
    with np.errstate(over="ignore"):
        return "f16" if np.array_equal(array.astype(np.float16).astype(np.float32), array) else "f32"


def arena(size_bytes: int) -> Bytes:
    """Return zeroed memory for packed weights, in huge pages where it fills one and they are granted."""
    if not 0 < size_bytes < _HUGE_PAGE:
        return _native.arena(size_bytes)
    # An adapter is a hundred small matrices: with a huge page for each it took 230 MB instead of 4.
    memory = np.zeros(size_bytes + 2 * _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size_bytes]


def read_rate(memory: Bytes, threads: int) -> float:
    """Return the bytes per second at which `threads` threads together read `memory` once (1 MiB at least)."""
    return _native.read_rate(memory, threads)


def arithmetic_rate(*, floats: bool, threads: int, seconds: float) -> float | None:
    """Return the operations per second, two per multiply-add, of the instruction set's 8-bit dot product or
    float multiply-add on `threads` threads; None where the instruction set has no such loop.
    """
    return _native.arithmetic_rate(floats, threads, seconds) or None


class CpuPages(_native.Pages):
    """K and V pages of one layer, and the memory behind them block by block."""

    def __init__(
        self,
        num_blocks: int,
        kind: int,
        num_kv_heads: int,
        head_dim: int,
        k: Bytes,
        v: Bytes,
        k_scale: Floats,
        v_scale: Floats,
    ) -> None:
        super().__init__(kind, num_kv_heads, head_dim, k, v, k_scale, v_scale)
        self.blocks = [
            array.view(np.uint8).reshape(num_blocks, -1) for array in (k, v, k_scale, v_scale) if array.size
        ]
        """Bytes of every block [num_blocks, ...]: keys, values, and where there are, their scales."""


class CpuOps:
    """Ops on this machine's processor; see `bise.kernels.Ops` for the contracts."""

    name = "cpu"
    takes_masks = False

    def __init__(self, threads: int = 1) -> None:
        """Start `threads` - 1 worker threads. The instruction set is the best one, or BISE_ISA.

        Raises ConfigError when BISE_ISA names one that cannot run here.
        """
        try:
            self._native = _native.Context(threads)
        except RuntimeError as error:
            raise ConfigError(str(error), field="BISE_ISA") from None

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return self._native.isa

    @property
    def threads(self) -> int:
        """Threads in use, the caller's included."""
        return self._native.threads

    def layer(self, index: int) -> CpuOps:
        """See `Ops.layer`."""
        return self

    # Packing

    def weight(self, array: Floats) -> Packed:
        """See `Ops.weight`: keep the values as they are, in float32."""
        return self.quantized(array, "f32")

    def quantized(self, array: Floats, packed_format: str) -> Packed:
        """Return a float matrix [N, K] packed as f32, f16, bf16, q8, q4, n4 or z4."""
        array = np.ascontiguousarray(array, np.float32)
        memory = arena(packed_size(packed_format, *array.shape))
        if not self.pack_floats(packed_format, array, memory):
            raise ConfigError(
                f"a weight has a value that {packed_format} cannot hold (NaN, infinite or too large)"
            )
        return self.packed(packed_format, array.shape[0], array.shape[1], memory)

    def packed(self, packed_format: str, num_rows: int, num_columns: int, memory: Bytes) -> Packed:
        """Return the matrix whose panels lie in `memory`, which stays alive with it."""
        return Packed(PACKED_FORMATS[packed_format], num_rows, num_columns, memory)

    def pack_floats(
        self, packed_format: str, rows: Floats, out: Bytes, importance: Floats | None = None
    ) -> bool:
        """Write rows [n, K] as panels to `out`; False when a value is not finite or does not fit.

        q4, n4 and z4 search the scales with the smallest squared error, weighed per column by `importance`
        [K] (positive) where it is given.
        """
        return self._native.pack_floats(PACKED_FORMATS[packed_format], rows, out, importance)

    def pack_blocks(self, ggml_id: int, raw: Bytes, num_columns: int, out: Bytes) -> bool:
        """Write rows of GGUF blocks [n, bytes per row] as panels to `out`; False when a scale is not
        finite.
        """
        return self._native.pack_blocks(ggml_id, raw, num_columns, out)

    def unpack(self, matrix: Packed) -> Floats:
        """Return the dequantised values [N, K] of a packed matrix."""
        out = np.empty(matrix.shape, np.float32)
        self._native.unpack(matrix, out)
        return out

    # Ops

    def vector(self, array: Floats) -> Floats:
        """See `Ops.vector`."""
        return np.ascontiguousarray(array, np.float32)

    def pages(self, num_blocks: int, num_kv_heads: int, head_dim: int, kv_format: str) -> CpuPages:
        """See `Ops.pages`. Memory is taken from the system as blocks are first written."""
        slots = num_blocks * BLOCK_SIZE * num_kv_heads
        size = slots * head_dim * KV_FORMATS[kv_format].value_bytes
        scales = slots if KV_FORMATS[kv_format].scale_bytes else 0
        return CpuPages(
            num_blocks,
            _KV_KINDS[kv_format],
            num_kv_heads,
            head_dim,
            np.zeros(size, np.uint8),
            np.zeros(size, np.uint8),
            np.zeros(scales, np.float32),
            np.zeros(scales, np.float32),
        )

    def read_block(self, pages: CpuPages, block: int) -> list[Bytes]:
        """See `Ops.read_block`."""
        return [array[block] for array in pages.blocks]

    def write_block(self, pages: CpuPages, block: int, content: Bytes) -> None:
        """See `Ops.write_block`."""
        start = 0
        for array in pages.blocks:
            array[block] = content[start : start + array.shape[1]]
            start += array.shape[1]

    def rope(
        self, inv_freq: npt.NDArray[np.float64], positions: npt.NDArray[np.int32], factor: float
    ) -> tuple[Floats, Floats]:
        """See `Ops.rope`."""
        angles = positions[:, None] * inv_freq
        return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)

    def embed(self, table: Packed, token_ids: npt.NDArray[np.int32]) -> Floats:
        """See `Ops.embed`."""
        out = np.empty((len(token_ids), table.shape[1]), np.float32)
        self._native.embed(table, token_ids, out)
        return out

    def norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        """See `Ops.norm`."""
        out = np.empty_like(x)
        self._native.norm(x, None, weight, eps, out)
        return out

    def add_norm(self, x: Floats, y: Floats, weight: Floats, eps: float) -> tuple[Floats, Floats]:
        """See `Ops.add_norm`; the sum takes the place of x."""
        out = np.empty_like(x)
        self._native.norm(x, y, weight, eps, out)
        return x, out

    def sample(
        self, logits: Floats, parameters: npt.NDArray[np.float64], mask: npt.NDArray[np.uint32] | None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """See `engine.candidates.Chooses`; 1 for a row that rounding might decide, 2 for one that is not
        finite.
        """
        assert mask is None
        out = np.empty((2, len(logits)), np.int32)
        self._native.sample(logits, parameters, out)
        return out[0], out[1]

    def together(self, weights: Sequence[Packed]) -> Sequence[Packed]:
        """See `Ops.together`."""
        return weights

    def linear(self, x: Floats, weights: Sequence[Packed]) -> list[Floats]:
        """See `Ops.linear`."""
        rows = x.shape[0]
        outs = [np.empty((rows, weight.shape[0]), np.float32) for weight in weights]
        self._native.linear(x, list(weights), outs)
        return outs

    def attend(
        self,
        q: Floats,
        k: Floats,
        v: Floats,
        rope: tuple[Floats, Floats],
        meta: AttentionMeta,
        pages: _native.Pages | None,
        head_dim: int,
        window: int | None,
    ) -> Floats:
        """See `Ops.attend`; q and k are rotated in place. Needs pages: this backend does not train."""
        assert pages is not None
        assert pages.head_dim == head_dim
        out = np.empty_like(q)
        self._native.attend(
            q,
            k,
            v,
            rope[0],
            rope[1],
            pages,
            meta.q_start,
            meta.q_pos,
            meta.block_table,
            meta.slots,
            window or _EVERYTHING,
            out,
        )
        return out

    def experts(self, experts: Sequence[tuple[Packed, Packed, Packed]]) -> Bank:
        """See `Ops.experts`."""
        return _native.Experts(list(experts)), experts[0][2].shape[0]

    def mlp(self, x: Floats, bank: Bank) -> Floats:
        """See `Ops.mlp`."""
        out = np.empty((x.shape[0], bank[1]), np.float32)
        self._native.mlp(x, bank[0], out)
        return out

    def moe(self, x: Floats, router: Packed, bank: Bank, top_k: int) -> Floats:
        """See `Ops.moe`."""
        out = np.empty((x.shape[0], bank[1]), np.float32)
        self._native.moe(x, router, bank[0], top_k, out)
        return out

    def lora(self, a: Floats, b: Floats, scale: float) -> CpuLora:
        """See `Ops.lora`; half the memory where 16 bits hold every value, the results are the same bits."""
        return self.quantized(a, narrowest_float(a)), self.quantized(b, narrowest_float(b)), np.float32(scale)

    def add_lora(self, y: Floats, x: Floats, lora: CpuLora, rows: npt.NDArray[np.intp]) -> Floats:
        """See `Ops.add_lora`: float products of the rows alone, so that no row knows of another."""
        a, b, scale = lora
        everyone = len(rows) == len(x)
        low = self.linear(x if everyone else x[rows], [a])[0]
        low *= scale
        added = self.linear(low, [b])[0]
        if everyone:
            y += added
        else:
            y[rows] += added
        return y

    def gated(self, gate: Floats, up: Floats) -> Floats:
        """See `Ops.gated`; takes the place of gate. The exponential is taken in float64, rounded once."""
        for start in range(0, len(gate), 32):  # so that the float64 values stay small beside the rest
            rows = slice(start, start + 32)
            wide = gate[rows].astype(np.float64)
            with np.errstate(over="ignore"):  # exp(-x) of a very negative x is infinite, its silu is 0
                wide /= 1.0 + np.exp(-wide)
            wide *= up[rows]
            gate[rows] = wide
        return gate

    def logits(self, x: Floats, head: Packed) -> Floats:
        """See `Ops.logits`."""
        return self.linear(np.ascontiguousarray(x), [head])[0]


class RecordingOps(CpuOps):
    """The ops, noted instead of done; `replay` does them over the same arrays, whose contents may have
    changed.

    Pages and weights must live as long. Adapters are not for it: numpy computes their share.
    """

    def __init__(self, ops: CpuOps) -> None:
        """Note what `ops` is to do."""
        self._program = _native.Program()
        self._native = cast(_native.Context, self._program)  # the same operations by the same names
        self._context = ops._native
        self._angles: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int32], float, Floats, Floats]] = []

    def rope(
        self, inv_freq: npt.NDArray[np.float64], positions: npt.NDArray[np.int32], factor: float
    ) -> tuple[Floats, Floats]:
        """See `Ops.rope`; computed anew before each replay."""
        cos, sin = super().rope(inv_freq, positions, factor)
        self._angles.append((inv_freq, positions, factor, cos, sin))
        return cos, sin

    def replay(self) -> None:
        """Do everything that was noted, in its order."""
        for inv_freq, positions, factor, cos, sin in self._angles:
            cos[:], sin[:] = super().rope(inv_freq, positions, factor)
        self._program.run(self._context)
