"""Models on devices that torch drives: the same text as the native extension's, refusals with a way out."""

import pytest

from bise.engine.device import free_bytes
from bise.engine.fleet import Fleet
from bise.engine.load import load_model
from bise.engine.model_spec import ModelSpec
from bise.engine.placement import Placement
from bise.engine.request import Request, SamplingParams
from bise.errors import ConfigError, MemoryPlanError
from bise.hub.registry import resolve

torch = pytest.importorskip("torch")


def answer(**options):
    loaded = load_model(resolve(None), threads=1, context=128, threaded=False, **options)
    try:
        prompt = (loaded.tokenizer.bos_id, *loaded.tokenizer.encode("The small boat"))
        request = Request(
            token_ids=prompt, params=SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        )
        return [token for delta in loaded.engine.submit(request) for token in delta.token_ids]
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
    monkeypatch.setattr("bise.engine.load.free_bytes", lambda placement: 1 << 20)
    with pytest.raises(MemoryPlanError):
        load_model(resolve(None), placement=Placement("cpu", "f32"))
    assert free_bytes(Placement("cpu", "f32")) != 1 << 20


def test_a_fleet_plans_and_serves_a_model_on_a_device():
    spec = ModelSpec(name="m", path=resolve(None), quant="q8", context=128, placement=Placement("cpu", "f32"))
    with Fleet([spec], 1 << 30) as fleet:
        plan = fleet.cards()[0].plan
        assert plan is not None
        assert plan.kv_format == "f32"
        with fleet.use("m") as loaded:
            assert loaded.ops is not None
            assert loaded.ops.name == "torch"
