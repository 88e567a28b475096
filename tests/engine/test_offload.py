"""Models from files that do not fit their device: experts computed or copied, adapters, what is told of it.

The device is torch on the processor, with a limit.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bise.engine.device import make_ops, place_weights
from bise.engine.fleet import Fleet
from bise.engine.load import load_model
from bise.engine.model_spec import AdapterSpec, ModelSpec
from bise.engine.placement import Placement
from bise.engine.request import Request, SamplingParams
from bise.engine.split import Sizes, Split
from bise.errors import MemoryPlanError, ModelFileError
from bise.model.checkpoint import open_model
from bise.server.metrics import Metrics

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
sized = importlib.import_module("sized_model")
sys.path.pop(0)

MIXTURE = sized.Size(dim=64, layers=3, heads=4, kv_heads=2, hidden=96, vocab=400, experts=8, max_context=256)
DENSE = sized.Size(dim=64, layers=3, heads=4, kv_heads=2, hidden=96, vocab=400, max_context=256)
WHOLE = Placement("cpu", "f32")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


@pytest.fixture
def mixture(tmp_path):
    return sized.write(tmp_path, MIXTURE)


def limited(path: Path, offload: str, experts: int, context: int = 64) -> Placement:
    """Return a device that has room for so many experts beside everything else."""
    sizes = Sizes(open_model(path), "q8", WHOLE, "f32")
    bare = Split(mode=offload, experts=(0,) * MIXTURE.layers, num_experts=MIXTURE.experts)
    room = sizes.need(bare, context, 1).device + experts * sizes.experts[0].device
    return Placement("cpu", "f32", offload=offload, memory=room)


def load(path, placement, **options):
    return load_model(path, quant="q8", threads=1, context=64, threaded=False, placement=placement, **options)


def ask(loaded, adapter=None, count=20):
    # At random: a text that repeats itself is guessed ahead, in steps whose sizes depend on the time of day.
    params = SamplingParams(temperature=1, seed=1, max_tokens=count, logprobs=0, ignore_eos=True)
    ids = tuple(np.random.default_rng(1).integers(300, 400, 24).tolist())
    done = loaded.engine.submit(Request(token_ids=ids, params=params, adapter=adapter)).result()
    return list(done.token_ids), [token.logprob for token in done.logprobs]


def answer(path, placement):
    loaded = load(path, placement)
    try:
        return ask(loaded), loaded
    finally:
        loaded.close()


def test_copied_experts_answer_with_the_bits_of_a_device_that_holds_them_all(mixture):
    whole, _ = answer(mixture, WHOLE)
    split, loaded = answer(mixture, limited(mixture, "copy", 11))
    assert split == whole
    assert "3 to 4 of 8 experts of each layer on cpu, the last used ones" in loaded.notes[-1]
    counts = loaded.expert_counts()
    assert 0 < counts.found < counts.wanted
    assert counts.guessed_right <= counts.guessed < counts.copied
    # Every wanted expert was there, or copied because it was wanted.
    assert counts.copied == counts.wanted - counts.found + counts.guessed
    expert = 3 * MIXTURE.dim * MIXTURE.hidden * 8.5 / 8
    assert counts.copied_bytes == counts.copied * expert


def test_experts_that_stay_in_ram_are_computed_there_within_the_tolerance_of_two_backends(mixture):
    (_, wanted), _ = answer(mixture, WHOLE)
    (_, found), loaded = answer(mixture, limited(mixture, "compute", 11))
    assert 0 < np.abs(np.array(found) - wanted).max() < 0.01
    assert "are computed by the processor" in loaded.notes[-1]
    assert loaded.expert_counts().copied == 0


def test_guesses_bring_experts_before_they_are_wanted(mixture, monkeypatch):
    from bise.kernels.experts import PlacedExperts

    placement = limited(mixture, "copy", 15)
    _, guessing = answer(mixture, placement)
    monkeypatch.setattr(PlacedExperts, "expect", lambda self, guessed: None)
    _, plain = answer(mixture, placement)
    assert guessing.expert_counts().wanted == plain.expert_counts().wanted
    assert guessing.expert_counts().found > plain.expert_counts().found


def test_a_device_without_room_for_one_expert_of_each_layer_cannot_copy(mixture):
    with pytest.raises(MemoryPlanError, match=r"on cpu, where 0\.0 GiB are free"):
        load(mixture, limited(mixture, "copy", 2))


def test_experts_are_told_at_the_command_line_and_to_prometheus(mixture, capsys):
    from bise.cli.app import run

    placement = limited(mixture, "copy", 11)
    options = ["--dtype", "f32", "--offload", "copy", "--device-memory", str(placement.memory)]
    asked = ["-p", "t1", "-n", "4", "--quant", "q8", "--context", "64", "--threads", "1", "--json"]
    assert run(["generate", str(mixture), *options, *asked]) == 0
    told = json.loads(capsys.readouterr().out)["experts"]
    assert told["hit_rate"] == told["found"] / told["wanted"]
    _, loaded = answer(mixture, placement)
    page = Metrics().page({"m": loaded}).decode()
    assert f'bise_experts_wanted{{model="m"}} {float(loaded.expert_counts().wanted)}' in page


@pytest.mark.parametrize("quant", ["none", "bf16"])
def test_floats_reach_a_device_as_they_are_stored_without_a_cache(tmp_path, monkeypatch, quant):
    source = open_model(sized.write(tmp_path, MIXTURE))
    ops = make_ops(Placement("cpu", "bf16"))
    monkeypatch.setattr("bise.model.stream.CACHE_MINIMUM_BYTES", 0)
    direct = place_weights(source, quant, ops, Split(), 1, None)
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr("bise.engine.device.has_rows", lambda source, quant: False)
    packed = place_weights(source, quant, ops, Split(), 1, None)
    assert direct.keys() == packed.keys()
    assert all(torch.equal(direct[name], packed[name]) for name in direct)


def test_a_float_that_is_none_is_refused_on_its_way_to_a_device(tmp_path):
    path = sized.write(tmp_path, DENSE)
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2:] = b"\xc0\x7f"  # NaN, the last value of the head
    file.write_bytes(raw)
    with pytest.raises(ModelFileError, match="output has a value that is NaN"):
        load_model(path, quant="bf16", context=64, threaded=False, placement=WHOLE)


def write_adapter(path: Path) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["v_proj", "up_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    weights = {}
    for layer in range(DENSE.layers):
        for name, rows in (("self_attn.v_proj", 32), ("mlp.up_proj", DENSE.hidden)):
            stem = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{stem}.lora_A.weight"] = rng.standard_normal((4, 64)).astype(np.float32)
            weights[f"{stem}.lora_B.weight"] = rng.standard_normal((rows, 4)).astype(np.float32)
    save_file(weights, path / "adapter_model.safetensors")
    return path


def test_a_fleet_serves_split_models_with_adapters_that_lie_where_their_layers_do(tmp_path):
    adapters = (AdapterSpec(name="x", path=write_adapter(tmp_path / "x")),)
    fields = {"path": sized.write(tmp_path, DENSE), "quant": "none", "context": 64, "threads": 1}
    found = {}
    for name, placement in (("native", Placement()), ("split", Placement("cpu", "f32", layers=1))):
        spec = ModelSpec(name="m", placement=placement, adapters=adapters, **fields)
        with Fleet([spec]) as fleet:
            for model in ("m", "m:x"):
                lease = fleet.acquire(model)
                found[name, model] = ask(lease.loaded, lease.adapter)[1]
                lease.release()
    for model in ("m", "m:x"):
        assert np.allclose(found["split", model], found["native", model], atol=1e-4)
    assert np.abs(np.array(found["split", "m"]) - found["split", "m:x"]).max() > 1e-3
