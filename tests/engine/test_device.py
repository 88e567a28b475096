"""Models on devices that torch drives: the same text as the native extension's, refusals with a way out.

The device is torch on the processor here: the code is the same, its memory is RAM.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bise.engine.device import HEADROOM, free_bytes
from bise.engine.fleet import Fleet
from bise.engine.load import load_model
from bise.engine.model_spec import ModelSpec
from bise.engine.placement import Placement
from bise.engine.request import Request, SamplingParams
from bise.engine.split import Split
from bise.engine.swap import SwapSpace
from bise.errors import ConfigError, MemoryPlanError
from bise.hub.registry import resolve
from bise.model.checkpoint import open_model

torch = pytest.importorskip("torch")


ON_TORCH = Placement("cpu", "f32")
SPLIT = Placement("cpu", "f32", layers=2)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products: threads only get in the way of the tests beside this one."""
    torch.set_num_threads(1)


def ask(loaded, text="The small boat", count=12, **fields):
    """Return the next tokens that the model finds likeliest, and what the request was charged."""
    prompt = (loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text))
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    done = loaded.engine.submit(Request(token_ids=prompt, params=params, **fields)).result()
    return list(done.token_ids), done.usage


def answer(**options):
    loaded = load_model(resolve(None), threads=1, context=128, threaded=False, **options)
    try:
        return ask(loaded)[0]
    finally:
        loaded.close()


@pytest.mark.parametrize("quant", ["none", "q8", "q4"])
def test_the_torch_backend_writes_what_the_native_extension_writes(quant):
    native = answer(quant=quant, kv="f32")
    assert answer(quant=quant, placement=Placement("cpu", "f32")) == native
    assert len(native) == 12


@pytest.mark.parametrize(
    ("device", "dtype", "field"),
    [("gpu", "auto", "device"), ("cuda:x", "auto", "device"), ("cpu", "int8", "dtype")],
)
def test_unknown_devices_and_types_are_refused_by_name(device, dtype, field):
    with pytest.raises(ConfigError) as caught:
        Placement(device, dtype)
    assert caught.value.field == field


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_an_absent_device_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"cuda is not there.*--device cpu"):
        load_model(resolve(None), placement=Placement("cuda"))


@pytest.mark.parametrize("option", [{"kv": "q8"}])
def test_what_a_device_cannot_do_yet_is_refused(option):
    with pytest.raises(ConfigError) as caught:
        load_model(resolve(None), placement=Placement("cpu", "f32"), **option)
    assert caught.value.field == next(iter(option))


def test_weights_that_do_not_fit_the_device_are_refused_before_they_are_read(monkeypatch):
    def never(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("bise.engine.load.free_bytes", lambda placement: 1 << 20)
    monkeypatch.setattr("bise.engine.device.stream_packed", never)
    with pytest.raises(MemoryPlanError, match=r"on cpu, where 0\.0 GiB are free"):
        load_model(resolve(None), placement=ON_TORCH)
    assert free_bytes(ON_TORCH) != 1 << 20


def test_what_is_free_counts_what_pytorch_keeps_of_models_that_are_gone(monkeypatch):
    kept = {"bytes": 6 << 30}
    monkeypatch.setattr("bise.engine.device.require_device", lambda placement: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.update(bytes=0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((8 << 30) - kept["bytes"], 8 << 30))
    assert free_bytes(Placement("cuda")) == (8 << 30) - HEADROOM
    assert free_bytes(Placement("cuda", memory=1 << 30)) == 1 << 30


def test_a_fleet_plans_and_serves_a_model_on_a_device():
    spec = ModelSpec(name="m", path=resolve(None), quant="q8", context=128, placement=Placement("cpu", "f32"))
    with Fleet([spec], 1 << 30) as fleet:
        plan = fleet.cards()[0].plan
        assert plan is not None
        assert plan.kv_format == "f32"
        with fleet.use("m") as loaded:
            assert loaded.ops is not None
            assert loaded.ops.name == "torch"


def test_a_draft_model_guesses_on_the_device_and_changes_nothing():
    plain = answer(quant="q8", placement=ON_TORCH)
    assert answer(quant="q8", placement=ON_TORCH, draft=resolve(None)) == plain
    assert answer(quant="q8", placement=SPLIT, draft=resolve(None)) == answer(quant="q8", placement=SPLIT)


@pytest.mark.parametrize("placement", [ON_TORCH, SPLIT], ids=["whole", "split"])
def test_prefixes_outlast_a_restart_on_a_device_and_serve_no_other_place(tmp_path, placement):
    text = "The small boat went out on the big sea. " * 4
    options = {"threads": 1, "context": 256, "threaded": False, "quant": "q8", "prefix_cache_dir": tmp_path}
    found = []
    for _ in range(2):
        loaded = load_model(resolve(None), placement=placement, **options)
        found.append(ask(loaded, text))
        loaded.close()
    (first, cold), (second, warm) = found
    assert (cold.cached_tokens, second) == (0, first)
    assert warm.cached_tokens >= 32
    other = load_model(resolve(None), placement=Placement("cpu", "f32", layers=3), **options)
    assert ask(other, text)[1].cached_tokens == 0
    other.close()


@pytest.mark.parametrize("placement", [ON_TORCH, SPLIT], ids=["whole", "split"])
def test_sequences_that_were_swapped_out_of_a_device_go_on_where_they_were(placement, monkeypatch):
    monkeypatch.setattr(SwapSpace, "observe", lambda *_: None)

    def crowd(**options):
        loaded = load_model(
            resolve(None), threads=1, context=96, threaded=False, quant="q8", placement=placement, **options
        )
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        handles = [
            loaded.engine.submit(Request(token_ids=(1, *range(10 * i + 5, 10 * i + 25)), params=params))
            for i in range(3)
        ]
        found = [handle.result().token_ids for handle in handles]
        swap, stats = loaded.engine._memory.swap, loaded.engine.stats()
        loaded.close()
        return found, swap.num_saved if swap else 0, stats.num_preemptions

    undisturbed, saved, preempted = crowd(max_sequences=3)
    assert (saved, preempted) == (0, 0)
    swapped, saved, preempted = crowd(swap_bytes=1 << 26)
    assert saved == preempted > 0
    assert swapped == undisturbed


def test_a_block_of_keys_and_values_crosses_from_a_device_and_back():
    from bise.kernels.torch import TorchOps

    ops = TorchOps(torch.bfloat16)
    pages = ops.pages(3, 2, 16, "bf16")
    for tensor in (pages.k, pages.v):
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    content = b"".join(part.tobytes() for part in ops.read_block(pages, 1))
    ops.write_block(pages, 2, np.frombuffer(content, np.uint8))
    for tensor in (pages.k, pages.v):
        assert torch.equal(tensor[32:64], tensor[64:96])
        assert not torch.equal(tensor[:32], tensor[64:96])


def test_embeddings_of_a_device_that_computes_in_16_bits_are_unit_vectors():
    loaded = load_model(
        resolve(None), threads=1, context=128, threaded=False, placement=Placement("cpu", "bf16")
    )
    request = Request(token_ids=(1, 5, 6), params=SamplingParams(max_tokens=0), pooling="mean")
    vector = loaded.engine.submit(request).result().embedding
    loaded.close()
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)


def test_a_fleet_loads_a_model_with_the_split_that_it_planned():
    spec = ModelSpec(name="m", path=resolve(None), quant="q8", context=128, placement=SPLIT, threads=1)
    with Fleet([spec], 1 << 30) as fleet:
        plan = fleet.cards()[0].plan
        assert plan is not None
        layers = open_model(resolve(None)).config.num_layers
        assert plan.split == Split(mode="layers", host_layers=layers - SPLIT.layers)
        whole = Fleet([ModelSpec(name="m", path=resolve(None), quant="q8", context=128, placement=ON_TORCH)])
        assert plan.size_bytes < whole.cards()[0].plan.size_bytes
        with fleet.use("m") as loaded:
            assert loaded.ops is not None
            assert loaded.ops.name == "split"


def test_no_tensor_of_64_bit_floats_is_made_on_a_device_that_computes_in_16():
    """A Metal device has none: an op that made one would fail there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoWideFloats(TorchDispatchMode):
        """Fails like a device without float64, whose tensors come from RAM in a type that it has."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else [out]:
                assert getattr(each, "dtype", None) != torch.float64, func
            return out

    with NoWideFloats():
        assert len(answer(quant="q4", placement=Placement("cpu", "bf16"))) == 12
    with NoWideFloats(), pytest.raises(AssertionError):
        torch.ones(1).double()


PEAK = """
import numpy as np, torch
from bise.config import ModelConfig
from bise.engine.device import make_ops, place_weights
from bise.engine.placement import Placement
from bise.engine.split import Split
from bise.engine.swap import SwapSpace
from bise.model import stream
from bise.model.source import ModelSource
from bise.model.transformer import weight_shapes
from pathlib import Path

class Flat:
    format = "BF16"
    def __init__(self, shape):
        self.shape = shape
        self.size_bytes = 2 * int(np.prod(shape))
    def floats(self, start, stop):
        return np.ones((stop - start, *self.shape[1:]), np.float32)
    def raw(self, start, stop):
        return np.full((stop - start, 2 * self.shape[1]), 63, np.uint8)

config = ModelConfig(family="mistral", dim=512, num_layers=16, num_heads=8, num_kv_heads=8, head_dim=64,
                     hidden_dim=2048, vocab_size=1024, max_context=64)
source = ModelSource(path=Path("x"), kind="shape", config=config, name="x",
                     tensors={name: Flat(shape) for name, shape in weight_shapes(config).items()})
stream.CACHE_MINIMUM_BYTES = 1 << 40
placement = Placement("cpu", "bf16")
def peak():
    status = Path("/proc/self/status").read_text()  # rusage begins with what the parent had
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
ops = make_ops(placement)
ops.packed("bf16", 16, 32, np.zeros(1024, np.uint8))
before = peak()
weights = place_weights(source, "bf16", ops, Split(), 1, None)
size = sum(w.numel() * w.element_size() for w in weights.values())
print(size, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no record of the peak here")
def test_weights_reach_a_device_without_a_second_copy_of_the_model_in_ram():
    # Every matrix in pages of its own, which go back when it does: the holes an allocator leaves between
    # matrices, 7 to 66 MB from one run to the next, are no copy of ours.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=100, env=environment
    )
    assert done.returncode == 0, done.stderr
    size, growth = map(int, done.stdout.split())
    assert size > 120 << 20
    # The device is RAM here: the weights themselves, two matrices of 2 MiB on their way and what checks them
    # (8 MB were measured). A second copy would be as much again.
    assert size <= growth < size + (16 << 20)
