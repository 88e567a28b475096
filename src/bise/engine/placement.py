"""Where a model is to run: this processor through the native extension, or a device through torch.

Plain values; what they mean on this machine is `device.py`'s business, what fits is `split.py`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from bise.engine.memory import checked_kv_format
from bise.errors import ConfigError

DTYPES = ("auto", "f32", "f16", "bf16")
OFFLOADS = ("auto", "none", "layers", "compute", "copy")

_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?")
_KV_FORMATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class Placement:
    """A device, the type that products are computed in, and what stays in RAM; raises ConfigError for what
    does not exist.
    """

    device: str = "cpu"
    """`cpu`, `mps`, `cuda` or `cuda:N`."""
    dtype: str = "auto"
    """One of `DTYPES`. auto: the native extension's own on cpu, bf16 elsewhere."""
    offload: str = "auto"
    """What stays in RAM where the device cannot hold a model. none: nothing, it is refused. layers: the first
    layers, computed by the processor. compute: some experts of each layer, computed by the processor. copy:
    some experts, copied to the device when they are wanted. auto: the fastest of these by the plan."""
    layers: int | None = None
    """Layers that the device holds, the last ones; None: as many as fit."""
    memory: int | None = None
    """Bytes that the model may take on the device; None: what is free."""

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device must be cpu, mps, cuda or cuda:N, got '{self.device}'", field="device")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got '{self.dtype}'", field="dtype")
        if self.offload not in OFFLOADS:
            raise ConfigError(
                f"offload must be one of {', '.join(OFFLOADS)}, got '{self.offload}'", field="offload"
            )
        if self.layers is not None and self.offload not in ("auto", "layers"):
            raise ConfigError(
                f"gpu-layers and --offload {self.offload} exclude each other; leave one away",
                field="gpu-layers",
            )
        for field, given in (
            ("offload", self.offload != "auto"),
            ("gpu-layers", self.layers is not None),
            ("device-memory", self.memory is not None),
        ):
            if given and self.is_native:
                raise ConfigError(
                    f"{field} is for a device with memory of its own; give --device cuda, or leave --{field} "
                    "away",
                    field=field,
                )

    @property
    def is_native(self) -> bool:
        """True where the native extension computes."""
        return self.device == "cpu" and self.dtype == "auto"

    @property
    def is_cuda(self) -> bool:
        """True for a CUDA device (a ROCm one has the same name)."""
        return self.device.startswith("cuda")

    @property
    def is_tiled(self) -> bool:
        """True where Triton's kernels run and weights lie in their tiles: PyTorch for CUDA brings them."""
        return self.is_cuda and (find_spec("triton") is not None or find_spec("torch") is None)

    @property
    def shares_memory(self) -> bool:
        """True where the device's memory is RAM."""
        return not self.is_cuda

    @property
    def may_offload(self) -> bool:
        """True when a part may stay in RAM: on a device that has memory of its own, or a limit."""
        if self.offload == "none":
            return False
        return self.is_cuda or self.memory is not None or self.offload != "auto"

    @property
    def compute_format(self) -> str:
        """f32, f16 or bf16, off the native extension."""
        return "bf16" if self.dtype == "auto" else self.dtype

    def kv_format(self, kv: str, quant: str) -> str:
        """Return the KV format that `kv` means here; ConfigError for one that the device does not store."""
        if self.is_native:
            return checked_kv_format(kv, quant)
        chosen = self.compute_format if kv == "auto" else checked_kv_format(kv, quant)
        formats = (*_KV_FORMATS, "q8") if self.is_tiled else _KV_FORMATS
        if chosen not in formats:
            raise ConfigError(
                f"kv must be one of auto, {', '.join(formats)} on {self.device} with PyTorch, got '{kv}'",
                field="kv",
            )
        return chosen


NATIVE = Placement()
"""This processor, through the native extension."""
