"""Losses, gradients, runs that resume, results that other programs read."""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bise.errors import ConfigError, EngineError, NonFiniteError, UserError
from bise.model.checkpoint import open_model
from bise.model.lora import BASE_HASH, open_adapter
from bise.model.packed import content_hash
from bise.text.turns import LearnedText
from bise.train import job
from bise.train.job import run_directory, run_job
from bise.train.loop import Schedule, Training
from bise.train.network import Network, read_weights, torch_ops
from bise.train.objective import NextToken, Preference, passes
from bise.train.parameters import FullParameters, LoraParameters, adaptable
from bise.train.parity import require_parity
from bise.train.quantised import FrozenMatrix
from bise.train.settings import JobSettings
from bise.train.whole import WholeModel

SETTINGS = JobSettings(
    rank=4, held_back=0.2, schedule=Schedule(epochs=4, batch=4, checkpoint_steps=2, lr=0.01)
)


def texts(count: int = 5, seed: int = 0) -> list[LearnedText]:
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(5, 40, count):
        ids = tuple(int(token) for token in rng.integers(20, 4000, length))
        found.append(LearnedText(ids, (False, False, *(True,) * (length - 2))))
    return found


def samples(count: int = 5):
    return [(text,) for text in texts(count)]


def training_of(trainable, schedule, train, run):
    return Training(
        trainable.params, NextToken(trainable.network, trainable.loras), schedule, train, [],
        run=run, fingerprint="", report=lambda event: None,
    )  # fmt: skip


def lora(path: Path, dtype: str = "f64") -> LoraParameters:
    parameters = LoraParameters(
        open_model(path),
        torch_ops(dtype, "cpu"),
        rank=3,
        alpha=6,
        targets=("wq", "wv", "wo", "w1", "w2"),
        seed=1,
    )
    generator = torch.Generator().manual_seed(2)
    for name, param in parameters.params.items():
        param.data = param.data.double() if dtype == "f64" else param.data
        if name.endswith(".b"):
            param.data += torch.randn(param.shape, generator=generator) * 0.05
    return parameters


def train(model: Path, data: Path, out: Path, settings=SETTINGS, *, resume=False, stop_at=None):
    events = []

    def should_stop():
        return stop_at is not None and sum(event["event"] == "step" for event in events) >= stop_at

    result = run_job(model, data, out, settings, resume=resume, report=events.append, should_stop=should_stop)
    return result, events


def test_texts_packed_into_one_pass_have_the_losses_that_each_has_alone(tiny_dir):
    parameters = lora(tiny_dir)
    packed = parameters.network.token_losses(texts(), parameters.loras())
    alone = torch.cat([parameters.network.token_losses([text], parameters.loras()) for text in texts()])
    assert packed.dtype == torch.float64
    assert torch.allclose(packed, alone, rtol=0, atol=1e-12)


def test_no_text_sees_its_neighbour(tiny_dir):
    parameters = lora(tiny_dir)
    first, second = texts(2)
    changed = LearnedText(tuple(token + 1 for token in first.ids), first.learned)
    after = [
        parameters.network.token_losses([text, second])[-sum(second.learned) :] for text in (first, changed)
    ]
    assert torch.equal(*after)


def test_gradients_are_those_of_finite_differences(tiny_dir):
    parameters = lora(tiny_dir)
    parameters.network.token_losses(texts(2), parameters.loras()).sum().backward()
    rng = np.random.default_rng(4)
    for param in parameters.params.values():
        row, column = (int(rng.integers(size)) for size in param.shape)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                param[row, column] += step
                values.append(float(parameters.network.token_losses(texts(2), parameters.loras()).sum()))
                param[row, column] -= step
        slope = (values[0] - values[1]) / 2e-5
        assert float(param.grad[row, column]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_full_gradients_in_float32_are_those_of_float64(tiny_dir):
    source = open_model(tiny_dir)
    grads = []
    for dtype in (torch.float64, torch.float32):
        weights = {name: w.requires_grad_() for name, w in read_weights(source, "cpu", dtype).items()}
        network = Network(
            source.config, weights, torch_ops("f64" if dtype == torch.float64 else "f32", "cpu")
        )
        network.token_losses(texts(3)).sum().backward()
        grads.append({name: weight.grad.double() for name, weight in weights.items()})
    for name, exact in grads[0].items():
        assert torch.linalg.vector_norm(grads[1][name] - exact) <= 1e-4 * torch.linalg.vector_norm(exact), (
            name
        )


def test_an_adapter_equals_the_dense_update_of_its_product(tiny_dir):
    parameters = lora(tiny_dir)
    source = open_model(tiny_dir)
    weights = read_weights(source, "cpu", torch.float64)
    for name, (a, b, scale) in parameters.loras().items():
        weights[name] = weights[name] + scale * (b @ a).detach()
    dense = Network(source.config, weights, torch_ops("f64", "cpu")).token_losses(texts())
    plain = Network(source.config, read_weights(source, "cpu", torch.float64), torch_ops("f64", "cpu"))
    adapted = parameters.network.token_losses(texts(), parameters.loras())
    # The adapter's own products are rounded nowhere: float64 in, float64 out.
    assert torch.allclose(adapted, dense, rtol=0, atol=1e-10)
    assert not torch.allclose(adapted, plain.token_losses(texts()), atol=1e-3)


# The adapter cannot move the random embeddings that are its output too, so it stays a little less sure.
@pytest.mark.parametrize(("method", "bound"), [("lora", 0.3), ("full", 0.1)])
def test_one_batch_is_learned_by_heart(method, bound, tiny_dir, tmp_path):
    source, ops = open_model(tiny_dir), torch_ops("f32", "cpu")
    if method == "lora":
        trainable = LoraParameters(
            source, ops, rank=16, alpha=32, targets=("wq", "wv", "wo", "w1", "w2", "w3"), seed=0
        )
    else:
        trainable = FullParameters(source, ops)
    schedule = Schedule(epochs=240, batch=2, lr=0.01)
    training = training_of(trainable, schedule, samples(2), tmp_path)
    before = training.loss_of(samples(2))
    assert training.run(lambda: False)
    assert before > 7
    assert training.loss_of(samples(2)) < bound


def test_what_an_adapter_changes_by_default_is_all_that_the_engine_can_adapt(tiny_dir):
    dense = open_model(tiny_dir).config
    assert adaptable(replace(dense, num_experts=4, experts_per_token=2)) == ("wq", "wk", "wv", "wo")
    assert set(adaptable(dense)) == {"wq", "wk", "wv", "wo", "w1", "w2", "w3"}
    with pytest.raises(ConfigError, match="'w9' cannot be adapted here; what can: wq, wk"):
        LoraParameters(
            open_model(tiny_dir), torch_ops("f32", "cpu"), rank=2, alpha=4, targets=("w9",), seed=0
        )


def test_passes_hold_at_most_the_tokens_asked_for():
    groups = list(passes(samples(9), 60))
    assert [sample for group in groups for sample in group] == samples(9)
    assert all(len(group) == 1 or sum(len(text.ids) for (text,) in group) <= 60 for group in groups)


def test_a_job_makes_an_adapter_that_is_bound_to_its_base(tiny_dir, data_path, tmp_path):
    result, events = train(tiny_dir, data_path, tmp_path / "out")
    assert result.parity < 1e-3
    source = open_model(tiny_dir)
    file = open_adapter(tmp_path / "out", source.config)
    assert file.base_sha256 == content_hash(source)
    assert file.rank == 4
    assert {event["event"] for event in events} == {"started", "step", "evaluation", "checkpoint"}
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert (evaluations[0]["step"], evaluations[0]["loss"]) == (0, result.loss_before)
    assert result.best_loss < result.loss_before
    assert (tmp_path / "out" / "loss.svg").read_text().startswith("<svg")
    assert not run_directory(tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(method, tiny_dir, data_path, tmp_path):
    settings = replace(SETTINGS, method=method)
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    train(tiny_dir, data_path, tmp_path / "whole", settings)
    for number, stop_at in enumerate((1, 3, 6)):
        out = tmp_path / f"parts{number}"
        assert train(tiny_dir, data_path, out, settings, stop_at=stop_at)[0] is None
        assert not out.exists()
        train(tiny_dir, data_path, out, settings, resume=True)
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_is_resumed_with_the_same_settings_only(tiny_dir, data_path, tmp_path):
    out = tmp_path / "out"
    train(tiny_dir, data_path, out, stop_at=2)
    with pytest.raises(ConfigError, match="--resume"):
        train(tiny_dir, data_path, out)
    with pytest.raises(UserError, match="other settings"):
        train(tiny_dir, data_path, out, replace(SETTINGS, rank=8), resume=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_loads_the_adapter_and_computes_the_same(tiny_dir, data_path, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    train(tiny_dir, data_path, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_dir, dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    source = open_model(tiny_dir)
    ids = texts(1)[0].ids
    probe = LearnedText(ids, (False, *(True,) * (len(ids) - 1)))
    whole = WholeModel(source, tmp_path / "out")
    weights = {name: torch.from_numpy(whole.values(name)) for name in whole.shapes}
    merged = Network(source.config, weights, torch_ops("f32", "cpu"))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
        theirs = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        assert torch.allclose(theirs, merged.token_losses([probe]), atol=1e-4)


def test_a_learning_rate_that_blows_up_stops_with_one_line(tiny_dir, tmp_path):
    trainable = FullParameters(open_model(tiny_dir), torch_ops("f32", "cpu"))
    with torch.no_grad():
        trainable.params["norm"][0] = float("nan")
    training = training_of(trainable, Schedule(), samples(), tmp_path)
    with pytest.raises(NonFiniteError, match="lower --lr"):
        training.run(lambda: False)


def test_an_adapter_that_the_engine_computes_otherwise_is_not_published():
    assert require_parity([-1.0, -2.0], [-1.0, -2.0 + 1e-5]) == pytest.approx(1e-5)
    for wrong in (-2.01, float("nan")):
        with pytest.raises(EngineError, match="not published"):
            require_parity([-1.0, -2.0], [-1.0, wrong])


def test_data_with_a_bad_line_is_not_trained_on(tiny_dir, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(UserError, match="line 1: messages"):
        train(tiny_dir, path, tmp_path / "out")
    assert not run_directory(tmp_path / "out").exists()


def test_the_published_settings_are_json(tiny_dir, data_path, tmp_path):
    train(tiny_dir, data_path, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary["settings"]["rank"] == 4
    assert summary["result"]["steps"] > 0
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert BASE_HASH == "bise.base_sha256"


def pairs(count: int = 4):
    """Return pairs of answers to the same beginnings."""
    found = []
    for first, second in zip(texts(count, 1), texts(count, 2), strict=True):
        ids = (*first.ids[:3], *second.ids)
        found.append((first, LearnedText(ids, (False,) * 3 + (True,) * len(second.ids))))
    return found


@pytest.mark.parametrize("pass_tokens", [30, 100, 4096])
def test_gradients_added_up_over_passes_are_those_of_one_pass(pass_tokens, tiny_dir):
    parameters = lora(tiny_dir)
    objective = NextToken(parameters.network, parameters.loras)
    total = sum(objective.count(sample) for sample in samples())
    grads = []
    for most in (10_000, pass_tokens):
        for param in parameters.params.values():
            param.grad = None
        for group in passes(samples(), most):
            (objective.losses(group).sum() / total).backward()
        grads.append({name: param.grad.clone() for name, param in parameters.params.items()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_computing_again_gives_the_bits_of_keeping(method, tiny_dir):
    grads = []
    for recompute in (False, True):
        source, ops = open_model(tiny_dir), torch_ops("f32", "cpu")
        trainable = (
            FullParameters(source, ops, recompute=recompute)
            if method == "full"
            else LoraParameters(
                source, ops, rank=4, alpha=8, targets=("wq", "w2"), seed=1, recompute=recompute
            )
        )
        losses = trainable.network.token_losses(texts(3), trainable.loras())
        losses.sum().backward()
        grads.append([losses.detach(), *(param.grad for param in trainable.params.values())])
    assert all(torch.equal(kept, again) for kept, again in zip(*grads, strict=True))


def test_preferences_begin_at_the_base_and_are_learned(tiny_dir, tmp_path):
    source, ops = open_model(tiny_dir), torch_ops("f32", "cpu")
    trainable = LoraParameters(source, ops, rank=8, alpha=16, targets=("wq", "wv", "w2"), seed=0)
    objective = Preference(trainable.network, trainable.loras, beta=0.5)
    training = Training(
        trainable.params, objective, Schedule(epochs=40, batch=4, lr=0.01), pairs(), [],
        run=tmp_path, fingerprint="", report=lambda event: None,
    )  # fmt: skip
    assert training.loss_of(pairs()) == pytest.approx(np.log(2), abs=1e-6)
    assert training.run(lambda: False)
    losses = training.losses_of(pairs())
    assert float(losses.mean()) < 0.05
    assert objective.metrics(losses) == {"accuracy": 1.0}


def test_the_loss_of_a_preference_is_the_published_formula(tiny_dir):
    parameters = lora(tiny_dir)
    objective = Preference(parameters.network, parameters.loras, beta=0.3)
    for chosen, rejected in pairs():
        margins = []
        for loras in (parameters.loras(), {}):
            sums = [
                -parameters.network.token_losses([text], loras).sum().detach() for text in (chosen, rejected)
            ]
            margins.append(float(sums[0] - sums[1]))
        expected = -np.log(1 / (1 + np.exp(-0.3 * (margins[0] - margins[1]))))
        assert float(objective.losses([(chosen, rejected)]).detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.1)])
def test_a_frozen_matrix_is_near_and_small_and_passes_gradients_on(bits, bound):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((96, 128)).astype(np.float32)
    matrix = FrozenMatrix(values, bits, "cpu")
    opened = matrix.to(torch.float32)
    assert torch.linalg.vector_norm(opened - torch.from_numpy(values)) <= bound * np.linalg.norm(values)
    assert matrix.size_bytes * 8 <= (bits + 1) * values.size
    ops = torch_ops("f64", "cpu")
    x = torch.from_numpy(rng.standard_normal((5, 128))).requires_grad_()
    (y,) = ops.linear(x, [matrix])
    y.square().sum().backward()
    wide = matrix.to(torch.float64)
    assert torch.allclose(y, x @ wide.T, rtol=1e-12)
    assert torch.allclose(x.grad, 2 * (x @ wide.T) @ wide, rtol=1e-10)
    with pytest.raises(ConfigError, match="multiple of 32"):
        FrozenMatrix(values[:, :100], bits, "cpu")


def test_nothing_open_is_kept_of_a_frozen_matrix():
    matrix = FrozenMatrix(np.ones((64, 64), np.float32), 4, "cpu")
    kept = []
    x = torch.ones(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        torch_ops("f32", "cpu").linear(x, [matrix])
    assert (64, 64) not in [tuple(shape) for shape in kept]


@pytest.mark.parametrize(("base", "dtype"), [("q8", "f32"), ("q4", "f32"), ("none", "bf16")])
def test_an_adapter_is_learned_over_a_base_in_few_bits(base, dtype, frozen_dir, tmp_path):
    data = tiny_data(tmp_path)
    settings = replace(SETTINGS, base=base, dtype=dtype)
    result, events = train(frozen_dir, data, tmp_path / "out", settings)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < losses[0] - 0.5
    assert result.parity < 1e-3


@pytest.fixture(scope="session")
def frozen_dir(tmp_path_factory):
    """A tiny model whose rows are whole blocks of 32."""
    import tiny_model

    return tiny_model.write_tiny_model(tmp_path_factory.mktemp("frozen") / "model", hidden_dim=64)


def tiny_data(tmp_path):
    import tiny_model

    return tiny_model.write_data(tmp_path / "data.jsonl")


def write_pairs(path: Path, count: int = 12) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n}?"}],
            "chosen": [{"role": "assistant", "content": "A number, sir."}],
            "rejected": [{"role": "assistant", "content": "Who cares."}],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_preference_pairs_make_an_adapter_and_resume_bit_equal(tiny_dir, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    settings = replace(SETTINGS, method="dpo")
    _, events = train(tiny_dir, data, tmp_path / "whole", settings)
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert evaluations[-1]["accuracy"] == 1.0
    assert evaluations[-1]["loss"] < np.log(2)
    assert train(tiny_dir, data, tmp_path / "parts", settings, stop_at=3)[0] is None
    train(tiny_dir, data, tmp_path / "parts", settings, resume=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_method_is_refused_data_that_it_does_not_learn(tiny_dir, data_path, tmp_path):
    with pytest.raises(UserError, match="needs them"):
        train(tiny_dir, data_path, tmp_path / "out", replace(SETTINGS, method="dpo"))
    with pytest.raises(UserError, match="--method dpo learns"):
        train(tiny_dir, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out")
    with pytest.raises(ConfigError, match="few bits"):
        replace(SETTINGS, method="full", base="q4")


def test_a_file_of_its_own_is_evaluated_on_and_ends_a_run_that_gets_no_better(tiny_dir, data_path, tmp_path):
    validation = tmp_path / "validation.jsonl"
    validation.write_text(json.dumps({"text": "zebra quartz vex"}) + "\n")
    events = []
    settings = replace(SETTINGS, schedule=Schedule(epochs=60, batch=4, lr=0.05, evaluations=60, patience=2))
    result = run_job(
        tiny_dir, data_path, tmp_path / "out", settings,
        resume=False, report=events.append, should_stop=lambda: False, validation=validation,
    )  # fmt: skip
    (started,) = (event for event in events if event["event"] == "started")
    assert (started["texts"], started["held_back"]) == (12, 1)
    losses = [event["loss"] for event in events if event["event"] == "evaluation"]
    assert result.steps < started["steps"]
    assert result.best_loss == min(losses)
    assert losses[-2:] == [loss for loss in losses[-2:] if loss >= result.best_loss]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("x\n")
    with pytest.raises(UserError, match=r"bad\.jsonl: line 1"):
        run_job(
            tiny_dir, data_path, tmp_path / "other", settings,
            resume=False, report=events.append, should_stop=lambda: False, validation=bad,
        )  # fmt: skip


def test_two_processes_do_not_train_in_one_directory(tiny_dir, data_path, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "LOCK_WAIT_S", 0.3)
    run = run_directory(tmp_path / "out")
    run.mkdir()
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process trains"):
            train(tiny_dir, data_path, tmp_path / "out", resume=True)
