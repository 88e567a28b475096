"""What lies on a device and what in RAM, from headers alone: bytes counted by hand, choices, refusals."""

import dataclasses

import pytest

from bise.config import ModelConfig
from bise.engine.device_plan import make_device_plan
from bise.engine.memory import packed_formats
from bise.engine.placement import Placement
from bise.engine.split import Chooser, Rates, Sizes, Split, recorded_rows
from bise.errors import ConfigError, MemoryPlanError
from bise.plan import known_shape, shape_source

GIB = 1 << 30
RATES = Rates(1000e9, 25e9, 50e9)
DEVICE_BITS = {"z4": 4.5, "n4": 4.5, "q4": 4.5, "q4k": 4.5}


def plan(name="mistral-7b", *, offload="auto", layers=None, **changes):
    options = {"quant": "bf16", "kv": "auto", "context": 4096, "sequences": 1, "device_memory": 24 * GIB,
               "memory": 64 * GIB, "rates": RATES} | changes  # fmt: skip
    placement = Placement("cuda", offload=offload, layers=layers, memory=options["device_memory"])
    source = known_shape(name) if isinstance(name, str) else shape_source("x", name)
    return make_device_plan(source, placement, **options)


def four_bits(name):
    return DEVICE_BITS[packed_formats(known_shape(name), "q4")["layers.0.wq"]]


def small(**changes):
    fields = {"family": "mistral", "dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
              "head_dim": 64, "hidden_dim": 512, "vocab_size": 1024, "max_context": 65536}  # fmt: skip
    return ModelConfig(**(fields | changes))


@pytest.fixture(autouse=True)
def triton_present(monkeypatch):
    """Plan for tiles, as where PyTorch for CUDA is installed."""
    monkeypatch.setattr("bise.engine.placement.find_spec", lambda name: object())


def test_mistral_7b_in_bf16_takes_its_matrices_its_norms_and_its_keys_of_a_24_gib_card():
    found = plan()
    inner = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert found.choice.split == Split()
    assert found.choice.need.weights == 2 * (inner + 2 * 32768 * 4096) + 65 * 4096 * 4
    assert found.choice.need.kv == 4096 * 32 * 2 * 1024 * 2
    assert found.choice.need.host == 0
    assert found.refusal is None
    # Weights but the table, and the keys and values, once per token over a thousand gigabytes per second.
    read = 2 * (inner + 32768 * 4096) + 64 * 4096 * 4 + found.choice.need.kv
    assert found.decode_tokens_s == pytest.approx(1000e9 / read, rel=1e-6)


def test_mixtral_in_four_bits_leaves_experts_in_ram_on_a_24_gib_card():
    bits = four_bits("mixtral-8x7b")
    expert = 3 * 4096 * 14336 * bits / 8
    router = 64 * 4096 * 4  # padded to one tile of rows
    layer = (2 * 4096 * 4096 + 2 * 1024 * 4096) * bits / 8 + router + 2 * 4096 * 4
    rest = 32 * layer + 2 * 32000 * 4096 * 8.5 / 8 + 4096 * 4
    found = plan("mixtral-8x7b", quant="q4", offload="copy")
    need, on_device = found.choice.need, sum(found.choice.split.experts)
    assert need.weights == rest + on_device * expert
    assert need.device <= 24 * GIB - (512 << 20) < need.device + expert
    assert max(found.choice.split.experts) - min(found.choice.split.experts) <= 1
    partial = sum(number < 8 for number in found.choice.split.experts)
    # 28 MiB of codes and 3.5 of scales in each matrix: PyTorch rounds up memory that a device copies from.
    assert need.host_weights == partial * 8 * 3 * (32 << 20) + partial * 8 * 3 * (4 << 20)
    shared = 32 * layer + 32000 * 4096 * 8.5 / 8 + need.kv
    misses = 2 * (1 - on_device / 256) * 32 * expert
    seconds = (shared + 64 * expert) / 1000e9 + misses / 25e9
    assert found.decode_tokens_s == pytest.approx(1 / seconds, rel=1e-6)


def test_misses_are_computed_or_copied_by_what_ram_and_bus_can_do():
    def mode(bus, host):
        rates = Rates(1000e9, bus, host)
        return plan("mixtral-8x7b", quant="q4", device_memory=16 * GIB, rates=rates).choice.split.mode

    assert mode(bus=60e9, host=20e9) == "copy"
    assert mode(bus=12e9, host=80e9) == "compute"


def test_a_dense_model_that_does_not_fit_leaves_its_first_layers_in_ram():
    found = plan("mistral-7b", device_memory=8 * GIB)
    split, need = found.choice.split, found.choice.need
    layer = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    head = 2 * 32768 * 4096
    assert split.mode == "layers"
    on_device = 32 - split.host_layers
    assert need.weights == head + on_device * (layer + 8 * 4096) + 4 * 4096
    assert need.kv == on_device * 4096 * 2 * 1024 * 2
    assert need.host_kv == split.host_layers * 4096 * 2 * 1024 * 2
    assert need.host_weights >= split.host_layers * layer + head
    assert need.device + layer > 8 * GIB - (512 << 20)
    assert found.choice.notes[0].startswith(
        f"{on_device} of 32 layers on cuda, the first {split.host_layers}"
    )


def test_the_largest_context_fits_and_the_next_block_does_not():
    found = plan("mistral-7b", device_memory=16 * GIB, context=64)
    assert found.choice.split == Split()
    assert 64 < found.largest_context < 32768
    assert plan("mistral-7b", device_memory=16 * GIB, context=found.largest_context).choice.split == Split()
    beyond = -(-(found.largest_context + 1) // 32) * 32
    assert plan("mistral-7b", device_memory=16 * GIB, context=beyond).choice.split.mode == "layers"


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("mixtral-8x7b", {"quant": "q8", "memory": 8 * GIB}, "of RAM"),
        ("mixtral-8x7b", {"quant": "q4", "offload": "none"}, "--offload auto"),
        ("mistral-7b", {"layers": 32, "device_memory": 8 * GIB}, "on cuda, where 7.5 GiB are free"),
        ("mixtral-8x7b", {"quant": "q4", "offload": "copy", "device_memory": 4 * GIB}, "on cuda"),
    ],
)
def test_what_fits_in_no_way_is_refused_with_both_amounts(name, changes, wanted):
    found = plan(name, **changes)
    assert wanted in found.refusal
    assert "\n" not in found.refusal
    assert found.largest_context == 0
    assert found.decode_tokens_s is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layers": 33}, "gpu-layers"),
        ({"layers": 0}, "gpu-layers"),
        ({"offload": "copy", "device_memory": 4 * GIB}, "offload"),
        ({"context": 1 << 20}, "context"),
        ({"kv": "q8x"}, "kv"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(changes, field):
    with pytest.raises(ConfigError) as caught:
        plan("mistral-7b", **changes)
    assert caught.value.field == field


def test_ways_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigError, match="exclude each other"):
        Placement("cuda", offload="copy", layers=3)
    with pytest.raises(ConfigError, match="device-memory is for a device"):
        Placement("cpu", memory=GIB)


def test_every_split_accounts_for_every_weight_once():
    config = small(num_experts=4, experts_per_token=2)
    source = shape_source("x", config)
    sizes = Sizes(source, "q8", Placement("cuda"), "bf16")
    whole = sizes.need(Split(), 64, 1)
    for host_layers in range(1, 5):
        need = sizes.need(sizes.by_layers(4 - host_layers), 64, 1)
        assert need.weights == whole.weights - sizes.table.device - sum(
            sizes.layers[i].device + 4 * sizes.experts[i].device for i in range(host_layers)
        )
        assert need.kv + need.host_kv == whole.kv
    for mode in ("compute", "copy"):
        split = sizes.by_experts(mode, 5 * sizes.experts[0].device)
        assert split.experts == (2, 1, 1, 1)
        places = [split.place(f"layers.1.experts.{expert}.w1") for expert in range(4)]
        assert places == (["held"] * 4 if mode == "copy" else ["device", "host", "host", "host"])
        assert split.place("layers.1.wq") == split.place("output") == "device"
    assert sizes.by_experts("copy", 3 * sizes.experts[0].device) is None


def test_a_split_chosen_before_is_refused_once_less_is_free():
    source = shape_source("x", small())
    sizes = Sizes(source, "q8", Placement("cuda"), "bf16")
    need = sizes.need(Split(), 64, 1)
    chooser = Chooser(
        sizes=sizes, placement=Placement("cuda"), sequences=1, device_free=need.device, host_free=GIB,
        rates=lambda: RATES,
    )  # fmt: skip
    assert chooser.check(Split(), 64).need == need
    with pytest.raises(MemoryPlanError, match="less is free"):
        dataclasses.replace(chooser, device_free=need.device - 1).check(Split(), 64)


def test_the_logits_of_every_recorded_step_are_planned_for():
    sizes = Sizes(shape_source("x", small()), "bf16", Placement("cuda"), "bf16")
    wider = Sizes(shape_source("x", small(vocab_size=2048)), "bf16", Placement("cuda"), "bf16")
    assert recorded_rows(8) == [1, 2, 4, 8]
    assert recorded_rows(20) == [1, 2, 4, 8, 12, 16, 20]
    assert recorded_rows(1000)[-2:] == [192, 256]
    for sequences, kept in ((1, 15), (10, 63)):
        more = wider.device_scratch(512, 4096, sequences) - sizes.device_scratch(512, 4096, sequences)
        assert more == 1024 * (16 * 64 + 4 * kept)


def test_the_planned_bytes_are_those_of_the_tensors():
    torch = pytest.importorskip("torch")
    from bise.kernels.cpu import packed_size
    from bise.kernels.experts import tensors_of
    from bise.kernels.grouped import unpack_floats, unpack_panels
    from bise.kernels.panels import PANEL_FORMATS, device_parts
    from bise.kernels.triton.tiles import tile

    for packed_format in (*PANEL_FORMATS, "f32", "bf16"):
        for shape in ((37, 512), (130, 768)):
            memory = torch.zeros(packed_size(packed_format, *shape), dtype=torch.uint8)
            unpack = unpack_panels if packed_format in PANEL_FORMATS else unpack_floats
            plain = unpack(packed_format, *shape, memory)
            for form, is_tiled in ((plain, False), (tile(plain), True)):
                sizes = tuple(tensor.numel() * tensor.element_size() for tensor in tensors_of([form]))
                width = 4 if packed_format == "f32" else 2
                assert sizes == device_parts(packed_format, *shape, float_bytes=width, is_tiled=is_tiled)
