"""Quality numbers against a plain computation, the 4-bit search, calibrated rounding, and the card."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bise.config import ModelConfig
from bise.errors import ConfigError
from bise.kernels.cpu import CpuOps, arena, packed_size
from bise.kernels.dequant import dequantize
from bise.model.checkpoint import open_model
from bise.model.importance import column_importance
from bise.model.source import ModelSource
from bise.model.transformer import Transformer, weight_shapes
from bise.quant.calibration import ObservingOps, round_with_feedback
from bise.quant.card import bundled_text
from bise.quant.quality import Network, compare, hidden_states

CODES = 4.5 / 8  # bytes per weight of both 4-bit formats


def tiny_config():
    return ModelConfig(
        family="mistral",
        dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=50,
        norm_eps=1e-5, rope_theta=1e4, max_context=512, windows=(40, None), tied_embeddings=True,
    )  # fmt: skip


def tiny_weights(config, seed, noise=0.0):
    rng, extra = np.random.default_rng(seed), np.random.default_rng(99)
    found = {}
    for name, shape in weight_shapes(config).items():
        values = 1 + 0.1 * rng.standard_normal(shape) if len(shape) == 1 else rng.standard_normal(shape) / 6
        found[name] = (values + noise * extra.standard_normal(shape)).astype(np.float32)
    return found


def network(config, weights, ops):
    handles = {n: ops.vector(w) if w.ndim == 1 else ops.weight(w) for n, w in weights.items()}
    return Network(Transformer(config, handles, ops), ops)


def plain_log_probs(config, weights, row):
    torch = pytest.importorskip("torch")
    from bise.kernels.torch import TorchOps
    from bise.model.batch import training_batch

    ops = TorchOps(torch.float64)
    model = Transformer(config, {n: ops.weight(w) for n, w in weights.items()}, ops)
    with torch.no_grad():
        logits = model.logits(model.forward(training_batch(np.array([row], np.int32), 2)))
    return torch.log_softmax(logits, -1).numpy()


def test_quality_equals_a_plain_float64_computation_over_the_whole_text():
    config = tiny_config()
    first, second = tiny_weights(config, 1), tiny_weights(config, 1, noise=0.01)
    rows = [np.random.default_rng(i).integers(0, 50, n).tolist() for i, n in enumerate((150, 64, 65, 1))]
    ops = CpuOps(1)
    got = compare(network(config, first, ops), network(config, second, ops), rows)
    divergences, losses, agreed = [], [[], []], []
    for row in rows:
        p, q = (plain_log_probs(config, w, row) for w in (first, second))
        divergences += (np.exp(p) * (p - q)).sum(1).tolist()
        agreed += (p.argmax(1) == q.argmax(1)).tolist()
        for loss, values in zip(losses, (p, q), strict=True):
            loss += (-values[np.arange(len(row) - 1), row[1:]]).tolist()
    assert got.positions == 280
    assert got.predicted_tokens == 276
    assert got.kl_mean == pytest.approx(np.mean(divergences), rel=1e-4)
    assert got.kl_p99 == pytest.approx(np.quantile(divergences, 0.99), rel=1e-4)
    assert got.top1_agreement == np.mean(agreed)
    assert got.perplexity_reference == pytest.approx(np.exp(np.mean(losses[0])), rel=1e-6)
    assert got.perplexity == pytest.approx(np.exp(np.mean(losses[1])), rel=1e-6)


def test_a_model_is_at_no_distance_from_itself_and_threads_change_no_digit():
    config = tiny_config()
    weights, other = tiny_weights(config, 2), tiny_weights(config, 2, noise=0.02)
    rows = [list(range(40))]
    one, two = CpuOps(1), CpuOps(2)
    same = compare(network(config, weights, one), network(config, weights, one), rows)
    assert same.kl_mean == 0
    assert same.top1_agreement == 1
    assert same.perplexity == same.perplexity_reference
    results = [compare(network(config, weights, o), network(config, other, o), rows) for o in (one, two)]
    assert results[0] == results[1]


@pytest.mark.parametrize("rows", [[], [[3]], [[1, 50]], [[]]])
def test_a_text_that_cannot_be_measured_on_is_refused(rows):
    config = tiny_config()
    ops = CpuOps(1)
    model = network(config, tiny_weights(config, 3), ops)
    with pytest.raises(ConfigError):
        compare(model, model, rows)


# The search


def packed_values(packed_format, x, importance=None, threads=1):
    ops = CpuOps(threads)
    memory = arena(packed_size(packed_format, *x.shape))
    assert ops.pack_floats(packed_format, x, memory, importance)
    return ops.unpack(ops.packed(packed_format, *x.shape, memory)), bytes(memory)


def rounded_to_nearest(x):
    blocks = x.reshape(-1, 32)
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = (top / -8).astype(np.float16).astype(np.float32)
    return (scale * np.clip(np.rint(blocks / scale), -8, 7)).reshape(x.shape)


def relative_error(x, values):
    return float(np.square(values - x, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum())


DRAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "heavy tails": lambda rng, shape: rng.standard_t(4, shape),
}


@pytest.mark.parametrize(("packed_format", "most"), [("q4", 0.95), ("n4", 0.80), ("z4", 0.75)])
@pytest.mark.parametrize("draw", DRAWS)
def test_the_search_beats_rounding_to_nearest(draw, packed_format, most):
    x = (0.02 * DRAWS[draw](np.random.default_rng(4), (64, 1024))).astype(np.float32)
    found, packed = packed_values(packed_format, x)
    assert len(packed) == x.size * CODES
    assert relative_error(x, found) < most * relative_error(x, rounded_to_nearest(x))


@pytest.mark.parametrize("packed_format", ["q8", "q4", "n4", "z4"])
def test_packed_bytes_do_not_depend_on_threads(packed_format):
    x = np.random.default_rng(5).standard_normal((100, 331)).astype(np.float32)
    assert packed_values(packed_format, x)[1] == packed_values(packed_format, x, threads=3)[1]


@pytest.mark.parametrize("packed_format", ["q4", "n4", "z4"])
def test_an_important_column_gets_the_smaller_error(packed_format):
    x = np.random.default_rng(6).standard_normal((256, 64)).astype(np.float32)
    importance = np.ones(64, np.float32)
    importance[7] = 1000
    plain, weighted = (packed_values(packed_format, x, i)[0] for i in (None, importance))
    even = packed_values(packed_format, x, np.full(64, 4, np.float32))[0]
    assert (even == plain).all()
    assert relative_error(x[:, 7], weighted[:, 7]) < 0.5 * relative_error(x[:, 7], plain[:, 7])


@pytest.mark.parametrize("packed_format", ["q8", "q4", "n4", "z4"])
def test_zeros_stay_zero_and_what_no_scale_can_hold_is_refused(packed_format):
    x = np.zeros((17, 40), np.float32)
    assert (packed_values(packed_format, x)[0] == 0).all()
    for bad in (np.nan, np.inf, -np.inf, 3e38, 9e6 * 2):
        x[16, 39] = bad
        ops = CpuOps(1)
        assert not ops.pack_floats(packed_format, x, arena(packed_size(packed_format, *x.shape)))


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, np.inf])
def test_importance_must_be_positive(bad):
    x = np.ones((16, 32), np.float32)
    with pytest.raises(ValueError, match="importance"):
        CpuOps(1).pack_floats("n4", x, arena(packed_size("n4", 16, 32)), np.full(32, bad, np.float32))


# Importance without data


def importance_of(config, weights, name):
    class Values:
        format = "F32"

        def __init__(self, values):
            self.shape, self.size_bytes = values.shape, values.nbytes
            self.floats = lambda start, stop: values[start:stop]

    tensors = {key: Values(values) for key, values in weights.items()}
    return column_importance(ModelSource(path=Path("x"), kind="test", config=config, tensors=tensors), name)


def test_importance_follows_the_size_of_what_a_matrix_reads():
    """Against inputs drawn at random: what `wo` and `w2` read, measured, ranks columns as the weights do."""
    config = tiny_config()
    weights = tiny_weights(config, 9)
    rng = np.random.default_rng(10)
    for maker in ("wv", "w1", "w3"):
        weights[f"layers.1.{maker}"] *= np.exp(rng.standard_normal(len(weights[f"layers.1.{maker}"])))[
            :, None
        ]
    x = rng.standard_normal((4000, 64)).astype(np.float32)
    values = (x * weights["layers.1.attn_norm"]) @ weights["layers.1.wv"].T
    values = values.reshape(-1, 2, 1, 16).repeat(2, axis=2).reshape(-1, 64)
    inner = x * weights["layers.1.ffn_norm"]
    gate, up = (inner @ weights[f"layers.1.{name}"].T for name in ("w1", "w3"))
    for name, inputs in (("wo", values), ("w2", gate / (1 + np.exp(-gate)) * up)):
        found = importance_of(config, weights, f"layers.1.{name}")
        want = np.sqrt(np.square(inputs).mean(0))
        assert found.shape == want.shape
        assert np.corrcoef(np.log(found), np.log(want))[0, 1] > 0.95


def test_matrices_whose_inputs_nothing_is_known_of_have_columns_alike():
    config = tiny_config()
    weights = tiny_weights(config, 9)
    assert importance_of(config, weights, "layers.0.wq") is None
    assert importance_of(config, weights, "tok_embeddings") is None
    weights["layers.0.wv"][:] = 0
    assert importance_of(config, weights, "layers.0.wo") is None


# Calibration


def test_feedback_lowers_the_error_of_the_outputs_below_that_of_the_search():
    rng = np.random.default_rng(7)
    inputs = (rng.standard_normal((400, 20)) @ rng.standard_normal((20, 128))).astype(np.float32)
    inputs += 0.3 * rng.standard_normal(inputs.shape).astype(np.float32)
    fresh = inputs[200:]
    weight = rng.standard_normal((48, 128)).astype(np.float32)
    blocks = round_with_feedback(weight, inputs[:200].T @ inputs[:200], CpuOps(1))
    fed = dequantize("IQ4_NL", blocks.reshape(48, -1))
    searched = packed_values("n4", weight)[0]
    errors = [np.square(fresh @ (values - weight).T).mean() for values in (fed, searched)]
    assert errors[0] < 0.6 * errors[1]


def test_observed_moments_are_those_of_the_inputs_and_the_network_stays_the_same():
    config = tiny_config()
    weights = tiny_weights(config, 8)
    ops = ObservingOps(1)
    observed = network(config, weights, ops)
    ids = np.arange(45, dtype=np.int32)
    plain = list(hidden_states(network(config, weights, CpuOps(1)), ids))
    seen = list(hidden_states(observed, ids))
    for got, want in zip(seen, plain, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    first = ops.norm(
        ops.embed(ops.weight(weights["tok_embeddings"]), ids), weights["layers.0.attn_norm"], 1e-5
    )
    probe = ObservingOps(1)
    handle = probe.weight(weights["layers.0.wq"])
    probe.linear(first[:20], [handle])
    probe.linear(first[20:], [handle])
    np.testing.assert_allclose(probe.moments(handle)[0], first.T @ first, rtol=1e-4, atol=1e-3)


# The card


def check_bits(packed):
    """4.5 bits per weight, as Q4_K; where 256 does not divide the columns, Q4_K pads them and takes
    more bits than z4, whose last header stands over fewer blocks.
    """
    divided = set()
    for name, tensor in packed.tensors.items():
        if len(tensor.shape) == 2 and name.startswith("layers."):
            rows, columns = tensor.shape
            bits, q4_k = 8 * tensor.size_bytes / (rows * columns), 4.5 * -(-columns // 256) * 256 / columns
            assert bits == q4_k if columns % 256 == 0 else 4.5 < bits < q4_k
            divided.add(columns % 256 == 0)
    assert divided == {True, False}  # brise has both


def test_the_card_beside_a_packed_model_says_what_was_measured(tmp_path, monkeypatch):
    from bise.cli.app import bise
    from bise.hub.embedded import embedded_path

    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    text = tmp_path / "short.txt"
    text.write_text(bundled_text("evaluation").content[:400])
    out = tmp_path / "out"
    args = ["quantize", str(embedded_path()), "--quant", "q4", "--out", str(out), "--text", str(text)]
    done = CliRunner().invoke(bise, args)
    assert done.exit_code == 0, done.output
    card = json.loads((out / "quality.json").read_text())
    assert set(card) == {
        "card_version", "bise_version", "command", "model", "model_sha256", "quant", "formats",
        "calibration_text", "bits_per_weight", "bits_per_weight_layers", "text", "reference", "quality",
        "not_measured",
    }  # fmt: skip
    check_bits(open_model(out))
    assert 4.5 < card["bits_per_weight_layers"] < 4.52
    assert card["text"]["name"] == "short.txt"
    assert len(card["text"]["sha256"]) == len(card["model_sha256"]) == 64
    assert card["not_measured"] is None
    assert 0 < card["quality"]["kl_mean"] < 0.1
    assert card["quality"]["top1_agreement"] > 0.8
    page = (out / "QUALITY.md").read_text()
    assert card["text"]["sha256"] in page
    assert f"{card['quality']['kl_mean']:.5f}" in page


def test_a_reference_that_does_not_fit_is_said_so_on_the_card(tmp_path, monkeypatch):
    from bise.cli.app import bise
    from bise.hub.embedded import embedded_path
    from bise.quant import card as card_module

    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(card_module, "available_memory", lambda: 1 << 20)
    out = tmp_path / "out"
    done = CliRunner().invoke(bise, ["quantize", str(embedded_path()), "--quant", "q8", "--out", str(out)])
    assert done.exit_code == 0, done.output
    card = json.loads((out / "quality.json").read_text())
    assert card["quality"] is None
    assert "GiB" in card["not_measured"]
    assert card["not_measured"] in (out / "QUALITY.md").read_text()


def test_the_bundled_texts_share_no_sentence():
    one, two = (
        {s.strip() for s in bundled_text(n).content.replace("\n", ". ").split(". ") if len(s) > 20}
        for n in ("calibration", "evaluation")
    )
    assert one
    assert two
    assert not one & two
