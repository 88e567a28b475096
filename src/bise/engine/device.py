"""Where a model runs: this processor through the native extension, or a device through torch.

Everything above the ops is the same code for all of them: definition, scheduler, cache, sampling.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from bise.engine.memory import available_memory, checked_kv_format, packed_formats
from bise.errors import ConfigError
from bise.kernels import Array, Weight
from bise.kernels.cpu import CpuOps, packed_size
from bise.model.pack import Progress
from bise.model.source import ModelSource
from bise.model.stream import stream_packed

if TYPE_CHECKING:
    from bise.kernels.torch import TorchOps

DTYPES = ("auto", "f32", "f16", "bf16")

_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?")
_HEADROOM = 512 << 20
"""Device memory left to the driver, the compiled kernels and the allocator's rounding."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A device and the type that products are computed in; raises ConfigError for what does not exist."""

    device: str = "cpu"
    """`cpu`, `mps`, `cuda` or `cuda:N`."""
    dtype: str = "auto"
    """One of `DTYPES`. auto: the native extension's own on cpu, bf16 elsewhere."""

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device must be cpu, mps, cuda or cuda:N, got '{self.device}'", field="device")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got '{self.dtype}'", field="dtype")

    @property
    def is_native(self) -> bool:
        """True where the native extension computes."""
        return self.device == "cpu" and self.dtype == "auto"

    @property
    def compute_format(self) -> str:
        """f32, f16 or bf16, off the native extension."""
        return "bf16" if self.dtype == "auto" else self.dtype

    def kv_format(self, kv: str, quant: str) -> str:
        """Return the KV format that `kv` means here; ConfigError for one that the device does not store."""
        if self.is_native:
            return checked_kv_format(kv, quant)
        chosen = self.compute_format if kv == "auto" else checked_kv_format(kv, quant)
        if chosen not in ("f32", "f16", "bf16"):
            raise ConfigError(
                f"kv must be auto, f32, f16 or bf16 on {self.device} with PyTorch, got '{kv}'", field="kv"
            )
        return chosen


NATIVE = Placement()
"""This processor, through the native extension."""


def make_ops(placement: Placement) -> TorchOps:
    """Return the ops of a device that torch drives: Triton's kernels on a CUDA device, plain torch elsewhere.

    Raises ConfigError when torch or the device is absent.
    """
    require_device(placement)
    from bise.kernels.grouped import FLOATS
    from bise.kernels.torch import TorchOps

    dtype = FLOATS[placement.compute_format]
    if not placement.device.startswith("cuda") or find_spec("triton") is None:
        return TorchOps(dtype, placement.device)
    from bise.kernels.triton.ops import TritonOps

    return TritonOps(dtype, placement.device)


def require_device(placement: Placement) -> None:
    """Raise ConfigError unless the device, and torch where it needs it, are there."""
    if placement.is_native:
        return
    if find_spec("torch") is None:
        raise ConfigError(
            f"device {placement.device} needs PyTorch; pip install 'bise[torch]', or leave --device and "
            "--dtype away",
            field="device",
        )
    import torch

    if placement.device == "mps" and not torch.backends.mps.is_available():
        raise _absent(placement, "no Metal", torch.__version__)
    if placement.device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(placement.device.partition(":")[2] or 0) >= count:
            raise _absent(placement, f"{count or 'no'} CUDA", torch.__version__)


def _absent(placement: Placement, seen: str, version: str) -> ConfigError:
    return ConfigError(
        f"device {placement.device} is not there: PyTorch {version} sees {seen} device; see `bise doctor`, "
        "or use --device cpu",
        field="device",
    )


def free_bytes(placement: Placement) -> int | None:
    """Return the memory that a model may take on the device; None when it does not tell.

    Raises ConfigError when the device is absent.
    """
    require_device(placement)
    if not placement.device.startswith("cuda"):
        return available_memory()
    import torch

    free, _ = torch.cuda.mem_get_info(torch.device(placement.device))
    return max(free - _HEADROOM, 0)


def device_excess(source: ModelSource, quant: str, placement: Placement) -> int:
    """Return the bytes that the weights take on a device beyond their packed size: scales of two levels are
    multiplied out there, and codes of 5 and 6 bits take a byte. Needs torch unless the placement is native.
    """
    if placement.is_native:
        return 0
    from bise.kernels.grouped import device_bytes

    width = 4 if placement.compute_format == "f32" else 2
    return sum(
        device_bytes(packed_format, *source.tensors[name].shape, float_bytes=width)
        - packed_size(packed_format, *source.tensors[name].shape)
        for name, packed_format in packed_formats(source, quant).items()
    )


def place_weights(
    source: ModelSource, quant: str, ops: TorchOps, threads: int, progress: Progress | None
) -> dict[str, Weight | Array]:
    """Return every weight on the device, by name; in RAM there is one of them at a time."""
    found: dict[str, Weight | Array] = {}
    for slot, panels in stream_packed(source, quant, CpuOps(threads), progress):
        if len(slot.shape) == 1:
            found[slot.name] = ops.vector(panels.view(np.float32))
        else:
            num_rows, num_columns = slot.shape
            found[slot.name] = ops.packed(slot.packed_format, num_rows, num_columns, panels)
    return found
