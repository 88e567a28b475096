"""--device and its companions as a user meets them: one line for a mistake, plans, models in two places."""

import importlib.util
import json
import sys

import pytest

from bise.hub.registry import resolve
from bise.model.checkpoint import open_model
from bise.plan import MachineLimits

LIMITS = MachineLimits(read_bytes_s=34e9, int8_ops_s=930e9, float_ops_s=220e9)


def refusal(result):
    """Return the one line of a refusal."""
    assert result.code == 2, (result.code, result.err)
    assert result.out == ""
    assert len(result.error_lines) == 1
    return result.error_lines[0]


@pytest.mark.parametrize("verb", [("generate", "-p", "hi"), ("chat", "-m", "hi"), ("embed", "-t", "hi")])
def test_an_absent_device_is_one_line(cli, home, verb, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device cuda is not there" in refusal(cli(*verb, "--device", "cuda"))


def test_an_index_beyond_the_devices_is_one_line(cli, home, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = refusal(cli("generate", "-p", "hi", "--device", "cuda:2"))
    assert "device cuda:2 is not there" in line
    assert "2 CUDA device(s)" in line


def test_a_device_without_torch_tells_what_to_install(cli, home, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("bise.engine.device.find_spec", lambda name: None if name == "torch" else real(name))
    line = refusal(cli("generate", "-p", "hi", "--device", "cuda"))
    assert "needs PyTorch; pip install 'bise[torch]'" in line


def test_a_type_that_the_device_does_not_compute_is_one_line(cli, home, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    line = refusal(cli("generate", "-p", "hi", "--device", "cuda", "--dtype", "bf16"))
    assert "dtype bf16 needs a device of compute capability 8.0, cuda has 7.5; use --dtype f16" in line


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--device", "gpu"), "device must be cpu, mps, cuda or cuda:N, got 'gpu'"),
        (("--device-memory", "1GiB"), "device-memory is for a device"),
        (("--gpu-layers", "3"), "gpu-layers is for a device"),
        (("--device", "cuda", "--gpu-layers", "3", "--offload", "copy"), "exclude each other"),
        (("--dtype", "f32", "--gpu-layers", "99"), "gpu-layers must be from 1 to "),
        (("--dtype", "f32", "--offload", "compute", "--device-memory", "1MB"), "this model is none"),
        (("--dtype", "f32", "--device-memory", "1MB", "--offload", "none"), "on cpu, where 0.0 GiB are free"),
        (("--dtype", "f32", "--receipt", "r.json"), "--receipt is for bise's own kernels"),
        (("--dtype", "f32", "--kv", "q16"), "kv must be one of auto, f32, f16, bf16 on cpu"),
    ],
)
def test_options_that_cannot_be_honoured_are_one_line(cli, home, options, wanted):
    pytest.importorskip("torch")
    assert wanted in refusal(cli("generate", "-p", "hi", *options))


@pytest.mark.parametrize("layers", ["many", "-1", "1.5"])
def test_a_number_of_layers_that_is_none_is_a_mistake(cli, home, layers):
    result = cli("generate", "-p", "hi", "--device", "cuda", f"--gpu-layers={layers}")
    assert result.code == 2
    assert "is not a number of layers, nor auto" in result.err


def test_a_split_model_writes_what_the_whole_one_writes_and_tells_its_split(cli, home):
    pytest.importorskip("torch")
    command = ("generate", "brise", "-p", "The small boat", "-n", "12", "--temperature", "0", "--quant", "q8")
    whole = cli(*command)
    split = cli(*command, "--dtype", "f32", "--gpu-layers", "2")
    assert (split.code, split.out) == (0, whole.out)
    layers = open_model(resolve(None)).config.num_layers
    assert f"2 of {layers} layers on cpu, the first {layers - 2} in RAM" in split.err


@pytest.fixture
def plan(cli, monkeypatch):
    """Run `bise plan` on a machine of known limits that has no torch."""
    monkeypatch.setattr("bise.bench.limits.measure_limits", lambda threads: LIMITS)
    monkeypatch.setattr("bise.engine.placement.find_spec", lambda name: None)
    monkeypatch.setattr("bise.engine.device.find_spec", lambda name: None)
    return lambda *args: cli("plan", *args)


def test_a_plan_for_a_card_that_is_not_here_tells_split_speed_and_what_it_assumes(plan, home):
    result = plan(
        "mixtral-8x7b", "--quant", "q4", "--device", "cuda", "--device-memory", "24GiB", "--memory", "64GiB"
    )
    assert result.code == 0, result.err
    lines = dict(line.split(None, 1) for line in result.out.splitlines())
    assert "of 8 experts of each layer on cuda" in lines["split"]
    assert lines["verdict"] == "fits"
    assert lines["speed"].startswith("decode ")
    assert lines["from"] == (
        "device 1,000 GB/s (assumed), bus 25 GB/s (assumed), RAM 34 GB/s (measured here)"
    )


def test_a_plan_as_json_has_both_sides_and_stated_rates(plan, home):
    result = plan(
        "mistral-7b", "--device", "cuda", "--device-memory", "24GiB", "--context", "4096", "--json",
        "--device-bandwidth", "936", "--bus-bandwidth", "12.5", "--quant", "bf16",
    )  # fmt: skip
    told = json.loads(result.out)
    assert told["fits"] is True
    assert told["split"]["mode"] == "none"
    assert told["bytes"]["kv"] == 512 << 20
    assert told["rates"]["device_bytes_s"] == 936e9
    assert told["rates"]["bus_origin"] == "stated"
    assert told["decode_tokens_per_s"] == pytest.approx(936e9 / 14.77e9, rel=0.01)


def test_a_plan_needs_no_torch(home):
    import subprocess

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from bise.cli.app import run\n"
        "sys.exit(run(['plan', 'mistral-7b', '--device', 'cuda', '--device-memory', '24GiB']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "everything on cuda" in done.stdout


def test_bandwidths_without_a_device_are_refused(plan, home):
    assert "need --device" in refusal(plan("mistral-7b", "--bus-bandwidth", "10"))
