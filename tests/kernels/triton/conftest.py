"""What tests without a GPU need: a tape that replays commands as a device would, and an interpreter with
bf16.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


class Tape(TorchDispatchMode):
    """Notes every kernel and every torch operation, with the memory it worked on, and can do them all again.

    What Python computed in between is not done again, as a CUDA graph would not: a step that looks at a value
    or takes a number from the host replays the old one.
    """

    SILENT = (
        "empty", "view", "slice", "select", "split", "split_with_sizes", "narrow", "unsqueeze", "detach",
        "alias", "expand", "unbind", "as_strided", "_unsafe_view", "t", "transpose", "reshape", "permute",
        "lift_fresh",
    )  # fmt: skip
    """Make no command on a device."""

    def __init__(self):
        super().__init__()
        self.kernels: list[str] = []
        self.operations: list[str] = []
        self._done = []
        self._in_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self._in_kernel:
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "item", "nonzero"), f"{name} waits for the device"
            if name not in self.SILENT:
                self.operations.append(name)
                self._done.append(("op", func, args, kwargs or {}, out))
        return out

    def record(self, run):
        """See `bise.engine.graphs.Recorder`."""
        with self.running():
            found = run()
        done = list(self._done)
        return found, lambda: self._replay(done)

    @contextmanager
    def running(self):
        from triton.runtime.interpreter import GridExecutor

        plain, tape = GridExecutor.__call__, self

        def noted(executor, *args, **kwargs):
            tape.kernels.append(executor.fn.__name__)
            tape._done.append(("kernel", plain, executor, args, kwargs))
            tape._in_kernel = True
            try:
                return plain(executor, *args, **kwargs)
            finally:
                tape._in_kernel = False

        self.kernels, self.operations, self._done = [], [], []
        GridExecutor.__call__ = noted
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = plain

    def _replay(self, done):
        for kind, func, args, kwargs, rest in done:
            if kind == "kernel":
                func(args, *kwargs, **rest)
                continue
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(rest), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [each for each in out if isinstance(each, torch.Tensor)] if isinstance(out, (tuple, list)) else []


@pytest.fixture
def tape():
    return Tape()


def to_bf16(values):
    """Return float32 [..] as the bits of bf16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    """Return bits of bf16 as float32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.fixture
def bf16(monkeypatch):
    """Teach the interpreter bf16, which it keeps as bits: it cuts off where a GPU rounds, and multiplies
    bits.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16:
            wide = interpreter.TensorHandle(from_bf16(src.data), tl.float32)
            return wide if target == tl.float32 else cast(self, wide, dst_type)
        if target == tl.bfloat16:
            wide = src if source == tl.float32 else cast(self, src, tl.float32)
            return interpreter.TensorHandle(to_bf16(wide.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(from_bf16(each.data), tl.float32) for each in (a, b))
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    add, fma = builder.create_fadd, builder.create_fma

    def create_fadd(self, a, b):
        if a.dtype.scalar != tl.bfloat16:
            return add(self, a, b)
        return interpreter.TensorHandle(to_bf16(from_bf16(a.data) + from_bf16(b.data)), tl.bfloat16)

    def create_fma(self, a, b, c):
        if a.dtype.scalar != tl.bfloat16:
            return fma(self, a, b, c)
        wide = from_bf16(a.data).astype(np.float64) * from_bf16(b.data) + from_bf16(c.data)
        return interpreter.TensorHandle(to_bf16(wide), tl.bfloat16)

    def get_bf16(self, value):  # Triton 3.7 has none
        return interpreter.TensorHandle(to_bf16(np.array([value])), tl.bfloat16)

    monkeypatch.setattr(builder, "get_bf16", get_bf16, raising=False)
    monkeypatch.setattr(builder, "create_fadd", create_fadd)
    monkeypatch.setattr(builder, "create_fma", create_fma)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(
        builder, "create_fp_to_fp", lambda self, src, dst_type, _: cast_impl(self, src, dst_type)
    )
