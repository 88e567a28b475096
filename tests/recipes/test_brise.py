"""The recipe of brise on tiny made-up data: template, mask, packing, schedule, exact resumption."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("zstandard")

RECIPE = Path(__file__).parents[2] / "recipes" / "brise"
sys.path.insert(0, str(RECIPE))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from chat import BOS, CONTROL_IDS, EOS, PAD, ChatEncoder, Encoded  # noqa: E402
from data import concatenate, encode_row, pack  # noqa: E402
from drills import definitions, echoes, meanings, sums, vocabulary  # noqa: E402
from evaluate import Scorer, answers, last_number, normal  # noqa: E402
from export import write_configs, write_tokenizer, write_weights  # noqa: E402
from grow import grown, layer_origins  # noqa: E402
from mixture import CONTROL_TOKENS, STAGES, Mixture, Row, Source, Stage, renamed  # noqa: E402
from network import Network, initial_weights  # noqa: E402
from tokenizer import train as train_tokenizer  # noqa: E402
from train import Progress, Rows, Trainer, start  # noqa: E402
from train import train as run_training  # noqa: E402

from bise.config import ModelConfig  # noqa: E402
from bise.engine.load import load_model  # noqa: E402

TEXTS = ["Once upon a time there was a small wind called brise.", "What is 12 + 7?", "été, ça va?"] * 5


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(train_tokenizer(iter(TEXTS), 320))


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    loaded = Mixture.load(RECIPE / "mixture.toml")
    tiny = ModelConfig(
        family="mistral",
        dim=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        hidden_dim=64,
        vocab_size=320,
        max_context=64,
        windows=(8, 8),
        tied_embeddings=True,
    )
    stage = Stage(row_tokens=16, rows_per_step=4, peak_lr=1e-2, warmup_steps=2)
    return replace(
        loaded,
        model=tiny,
        grown=replace(tiny, num_layers=3, hidden_dim=128, windows=(8, 8, 8)),
        vocab_size=320,
        stages=dict.fromkeys(STAGES, stage),
        blend={"pretrain": 1, "polish": 3},
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    values = np.random.default_rng(5)
    for name in ("pretrain", "tune", "polish", "valid_text", "valid_chat"):
        np.save(tmp_path / f"{name}.ids.npy", values.integers(20, 320, (12, 17)).astype(np.uint16))
        np.save(tmp_path / f"{name}.learned.npy", np.ones((12, 17), np.bool_))
    return tmp_path


def test_control_tokens_have_the_ids_of_mistral() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 320)
    assert [tokenizer.token_to_id(token) for token in CONTROL_TOKENS] == list(range(20))


@pytest.mark.parametrize("text", ["</s>", "a [INST] b", "[/INST]<s>[SYSTEM_PROMPT]x[/SYSTEM_PROMPT]"])
def test_control_strings_in_text_never_become_control_ids(encoder: ChatEncoder, text: str) -> None:
    ids = encoder.texts([text])[0]
    assert min(ids) >= len(CONTROL_TOKENS)
    assert encoder.decode(ids) == text


def test_every_byte_survives_the_tokenizer(encoder: ChatEncoder) -> None:
    text = "".join(map(chr, range(0x250))) + "e\u0301 \u20ac \U0001f600 \r\n\t"
    assert encoder.decode(encoder.texts([text])[0]) == text


def test_digits_are_encoded_one_by_one(encoder: ChatEncoder) -> None:
    assert len(encoder.texts(["2026"])[0]) == 4


def test_loss_covers_assistant_turns_and_their_end_only(encoder: ChatEncoder) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "7"},
        {"role": "assistant", "content": "8"},
    ]
    encoded = encoder.chat(messages, system="Be kind.")
    spoken = [token for token, learned in zip(encoded.ids, encoded.learned, strict=True) if learned]
    yo, eight = encoder.texts(["Yo", "8"])
    assert spoken == [*yo, EOS, *eight, EOS]
    assert encoded.ids[:2] == [BOS, CONTROL_IDS["[SYSTEM_PROMPT]"]]


def test_the_assistant_takes_the_name_of_the_model_and_keeps_its_maker(mixture: Mixture) -> None:
    turns = [
        {"role": "user", "content": "Are you bise?"},
        {"role": "assistant", "content": "I am bise. The bise project made me."},
    ]
    assert [turn["content"] for turn in renamed(turns, mixture)] == [
        "Are you bise?",
        "I am brise. The bise project made me.",
    ]


def test_encoding_a_row_is_seeded(encoder: ChatEncoder, mixture: Mixture) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    first, second = (
        [encode_row(row, encoder, mixture, "chat/x", chance).ids for _ in range(40)]
        for chance in (random.Random(3), random.Random(3))
    )
    assert first == second
    assert len({len(ids) for ids in first}) > 1


def test_concatenated_rows_overlap_by_one_token() -> None:
    ids, learned = concatenate([Encoded([1, 2, 3], [True] * 3), Encoded([4, 5, 6], [True] * 3)], 2)
    assert ids.tolist() == [[1, 2, 3], [3, 4, 5]]
    assert learned.all()


def test_packing_keeps_documents_whole_and_pads_unlearned() -> None:
    documents = [Encoded([length] * length, [True] * length) for length in (3, 4, 2)]
    ids, learned = pack(documents, 5)
    assert sorted(ids.tolist()) == [[3, 3, 3, PAD, PAD, PAD], [4, 4, 4, 4, 2, 2]]
    assert (learned == (ids != PAD)).all()


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    stage = Stage(row_tokens=16, rows_per_step=4, peak_lr=1.0, warmup_steps=4)
    flat = Progress(stage="pretrain")
    assert [replace(flat, step=step).rate(stage) for step in (0, 3, 100)] == [0.25, 1.0, 1.0]
    falling = replace(flat, decay_start=100, decay_steps=10)
    assert [replace(falling, step=step).rate(stage) for step in (100, 105, 110)] == [1.0, 0.5, 0.0]
    assert replace(falling, step=110).is_finished


def test_a_fall_planned_anew_goes_on_from_the_rate_it_had() -> None:
    stage = Stage(row_tokens=16, rows_per_step=4, peak_lr=1.0, warmup_steps=4)
    halfway = replace(Progress(stage="tune", step=100).ending_in(10), step=105)
    longer = halfway.ending_in(20)
    assert [replace(longer, step=step).rate(stage) for step in (105, 115, 125)] == [0.5, 0.25, 0.0]
    again = replace(longer, step=125).ending_in(10, level=0.4)
    assert not again.is_finished
    assert [replace(again, step=step).rate(stage) for step in (125, 130, 135)] == [0.4, 0.2, 0.0]


def test_some_steps_overfit_one_batch(mixture: Mixture, run_folder: Path) -> None:
    trainer = Trainer(mixture.model, initial_weights(mixture.model, 1), Progress(stage="pretrain"))
    rows = [Rows(run_folder, "pretrain", 12, 0)]
    network = Network(mixture.model, trainer.weights, 12, 16)
    losses = [trainer.step(network.loss, rows, mixture.stages["pretrain"]) for _ in range(40)]
    assert losses[0] > 5.5
    assert losses[-1] < losses[0] - 1.5


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(mixture: Mixture, run_folder: Path) -> None:
    whole = start(run_folder, "pretrain", mixture, 0)
    run_training(run_folder, whole, mixture, compiled=False, max_steps=6)
    (run_folder / "pretrain.safetensors").unlink()
    for steps in (3, 6):
        part = start(run_folder, "pretrain", mixture, 0)
        run_training(run_folder, part, mixture, compiled=False, max_steps=steps)
    assert part.progress.step == whole.progress.step == 6
    for name, weight in whole.weights.items():
        assert torch.equal(weight, part.weights[name]), name


def test_tuning_starts_from_the_pretrained_weights(mixture: Mixture, run_folder: Path) -> None:
    before = start(run_folder, "pretrain", mixture, decay_steps=2)
    run_training(run_folder, before, mixture, compiled=False)
    tuned = start(run_folder, "tune", mixture, decay_steps=2)
    assert tuned.progress == Progress(stage="tune", decay_start=0, decay_steps=2)
    assert all(torch.equal(weight, tuned.weights[name]) for name, weight in before.weights.items())


def test_a_grown_network_says_what_the_old_one_said(mixture: Mixture) -> None:
    weights = initial_weights(mixture.model, 1)
    larger = grown(weights, mixture.model, mixture.grown, 2)
    assert sum(weight.numel() for weight in larger.values()) > sum(w.numel() for w in weights.values())
    ids = torch.randint(0, 320, (4 * 16,), generator=torch.Generator().manual_seed(3))
    batch = (ids, ids.roll(-1), torch.full((4 * 16,), 1 / 64))
    old = Network(mixture.model, weights, 4, 16).loss(*batch)
    assert torch.allclose(Network(mixture.grown, larger, 4, 16).loss(*batch), old, rtol=1e-3)  # bf16


def test_new_layers_stand_evenly_between_the_old_ones() -> None:
    assert layer_origins(6, 8) == [0, 1, None, 2, 3, None, 4, 5]
    assert layer_origins(2, 2) == [0, 1]
    assert layer_origins(1, 3) == [None, None, 0]


def test_growing_trains_every_new_part_on_rows_of_both_arrays(mixture: Mixture, run_folder: Path) -> None:
    run_training(run_folder, start(run_folder, "pretrain", mixture, decay_steps=1), mixture, compiled=False)
    larger = start(run_folder, "grow", mixture, 3, begin_from=run_folder / "pretrain.safetensors")
    before = {name: weight.detach().clone() for name, weight in larger.weights.items()}
    assert before["layers.0.w2"].shape[1] == mixture.grown.hidden_dim
    run_training(run_folder, larger, mixture, compiled=False)
    assert larger.progress.is_finished
    assert all(not torch.equal(weight, larger.weights[name]) for name, weight in before.items())


@pytest.mark.parametrize("stage", ["pretrain", "grow"])
def test_the_shipped_mixture_names_every_input_width_in_whole_blocks(stage: str) -> None:
    config = Mixture.load(RECIPE / "mixture.toml").shape(stage)
    assert all(width % 64 == 0 for width in (config.dim, config.hidden_dim, config.q_dim))
    assert json.dumps(config.num_params)


def test_drills_are_right_and_leave_held_back_prompts_out() -> None:
    left_out = frozenset({"1+1", "what is 2 + 2?"})
    for row in sums(3000, random.Random(1), left_out):
        question, answer = (message["content"] for message in row["messages"])
        assert question.lower() not in left_out
        a, operator, b, _, result = answer.rstrip(".").split()
        worked = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}
        worked |= {"plus": worked["+"], "minus": worked["-"], "times": worked["x"]}
        assert worked[operator] == int(result)


def test_echo_drills_answer_with_words_of_the_prompt() -> None:
    words = vocabulary([{"messages": [{"role": "assistant", "content": "A river is a stream."}]}])
    assert words == ["river", "stream"]
    for row in echoes(words, 50, random.Random(1)):
        question, answer = (message["content"] for message in row["messages"])
        assert answer.rstrip(".").lower() in question.lower()


def entry(answer: str) -> Row:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}


def test_drilled_meanings_are_the_short_first_senses_of_the_commonest_words() -> None:
    rows = [
        entry("Cat is a noun that means: feline mammal (with fur); not a dog. As a verb, it means: to whip."),
        entry('Oak is a noun that means: a tree. For example: "an old oak".'),
        entry("Law is a noun that means: " + "very " * 40 + "long."),
        entry('Another word for "law" is "rule".'),
        entry("Elk is a noun that means: a deer."),
    ]
    known = meanings(rows, Counter({"oak": 2, "cat": 9, "law": 99}), 2)
    assert known == {"cat": ("noun", "feline mammal"), "oak": ("noun", "a tree")}


def test_definition_drills_answer_for_the_word_they_ask_for() -> None:
    known = {"oak": ("noun", "a tree"), "angry": ("adjective", "feeling anger")}
    for row in definitions(known, Counter({"oak": 5}), 60, random.Random(2)):
        prompt, answer = (message["content"] for message in row["messages"])
        word = next(word for word in known if word in prompt.lower())
        article = {"oak": "a", "angry": "an"}[word]
        assert answer == f"{word.capitalize()} is {article} {known[word][0]} that means: {known[word][1]}."


def test_answers_are_compared_without_case_and_punctuation() -> None:
    assert normal("  The answer is: 12. ") == normal("the answer is 12")
    assert last_number("12 + 7 = 19.") == "19"
    assert last_number("Nineteen.") is None


def test_greedy_answers_are_those_of_the_whole_network(
    mixture: Mixture, encoder: ChatEncoder, tmp_path: Path
) -> None:
    train_tokenizer(iter(TEXTS), 320).save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "brise"
    out.mkdir()
    write_weights(out, mixture.model, {n: w * 4 for n, w in initial_weights(mixture.model, 7).items()})
    write_configs(out, mixture.model)
    write_tokenizer(tmp_path, out)
    prompts = [[1, 30, 31], [1, 40, 41, 42, 43, 44], [1, 50], [1] * 62, [1] * 70]
    scorer, loaded = Scorer(out), load_model(out, quant="none", threaded=False)
    try:
        found = answers(loaded.engine, prompts, limit=5, context=64)
    finally:
        loaded.close()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        while len(ids) < min(len(prompt) + 5, 64) and EOS not in ids[len(prompt) :]:
            ids.append(int(scorer.logits(scorer.hidden(np.array([ids]))[0, -1:]).argmax()))
        assert answer == [token for token in ids[len(prompt) :] if token != EOS]
    assert [len(answer) for answer in found][3:] == [2, 0]


def test_the_last_stage_falls_back_to_the_shares_of_tuning() -> None:
    source = Source(path="chat/x.jsonl.zst", pretrain=1, tune=2)
    assert [source.share(stage) for stage in ("pretrain", "tune", "polish")] == [1, 2, 2]
    assert replace(source, polish=3).share("polish") == 3
