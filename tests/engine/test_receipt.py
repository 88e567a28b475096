"""Receipts of the embedded model: the same output confirms them, and every difference is named."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("bise._native", reason="the native extension is not built")

from bise.engine.load import load_model
from bise.engine.receipt import (
    NUMERICS_VERSION,
    make_receipt,
    model_differences,
    output_difference,
    read_receipt,
    receipt_params,
    replay_request,
    write_receipt,
)
from bise.engine.request import Request, SamplingParams
from bise.errors import ReceiptError
from bise.grammar.spec import GrammarSpec
from bise.hub.registry import resolve


def write_adapter(path, config, seed):
    """Write an adapter in PEFT's format, for the output matrices of attention."""
    rng = np.random.default_rng(seed)
    path.mkdir()
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{half}.weight": rng.standard_normal(
            shape, np.float32
        )
        for layer in range(config.num_layers)
        for half, shape in (("A", (2, config.q_dim)), ("B", (config.dim, 2)))
    }
    save_file(weights, path / "adapter_model.safetensors")


PARAMS = SamplingParams(
    temperature=0.8, seed=5, max_tokens=12, stop=("zebra",), logit_bias={7: 1.5}, ignore_eos=True
)


@pytest.fixture(scope="module")
def loaded():
    model = load_model(resolve(None), threads=1, context=128, threaded=False)
    yield model
    model.close()


@pytest.fixture(scope="module")
def made(loaded):
    """A request, its output and its receipt."""
    prompt = (1, *loaded.tokenizer.encode("The secret word"))
    request = Request(token_ids=prompt, params=receipt_params(PARAMS, 100), continuation=True)
    done = loaded.engine.submit(request).result()
    return request, done, make_receipt(loaded, request, done.logprobs, done.finish_reason.value)


def replayed(loaded, receipt, prompt_ids=None):
    done = loaded.engine.submit(replay_request(receipt, prompt_ids)).result()
    return output_difference(receipt, done.logprobs, done.finish_reason.value)


def test_a_receipt_from_its_file_confirms_the_output(loaded, made, tmp_path):
    path = tmp_path / "receipt.json"
    write_receipt(made[2], path)
    receipt = read_receipt(path)
    assert receipt == made[2]
    assert receipt.numerics == NUMERICS_VERSION
    assert model_differences(receipt, loaded) == []
    assert replayed(loaded, receipt) is None


def test_only_the_owner_can_read_a_receipt_and_nothing_is_overwritten(made, tmp_path):
    path = tmp_path / "receipt.json"
    write_receipt(made[2], path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ReceiptError, match="cannot be written: File exists"):
        write_receipt(made[2], path)


def test_a_receipt_without_its_prompt_tells_nothing_of_it_and_takes_it_again(loaded, made, tmp_path):
    request, done, _ = made
    receipt = make_receipt(loaded, request, done.logprobs, done.finish_reason.value, keeps_prompt=False)
    path = tmp_path / "receipt.json"
    write_receipt(receipt, path)
    value = json.loads(path.read_text())
    assert value["prompt_ids"] is None
    assert value["checks"] is None
    assert replayed(loaded, read_receipt(path), request.token_ids) is None
    with pytest.raises(ReceiptError, match="give it with --prompt"):
        replay_request(receipt)
    with pytest.raises(ReceiptError, match="not the one the receipt was made for"):
        replay_request(receipt, (*request.token_ids, 9))


def test_no_text_is_in_a_receipt(made, tmp_path):
    path = tmp_path / "receipt.json"
    write_receipt(made[2], path)
    text = path.read_text()
    assert "secret" not in text
    assert made[1].text.split()[0] not in json.dumps(json.loads(text)["checks"])


def test_two_receipts_of_one_output_share_no_hash(loaded, made):
    request, done, first = made
    second = make_receipt(loaded, request, done.logprobs, done.finish_reason.value)
    assert first.prompt_sha256 != second.prompt_sha256
    assert first.output_sha256 != second.output_sha256


def test_the_first_token_that_differs_is_named(made):
    _, done, receipt = made
    reason = done.finish_reason.value
    changed = list(done.logprobs)
    changed[7] = replace(changed[7], token_id=changed[7].token_id + 1)
    assert output_difference(receipt, changed, reason) == (
        "the output differs at token 7 (of 12, counted from 0)"
    )
    assert "at token 5 (of 12" in output_difference(receipt, done.logprobs[:5], reason)


def test_one_bit_of_a_log_prob_is_a_difference(made):
    _, done, receipt = made
    changed = list(done.logprobs)
    changed[3] = replace(changed[3], logprob=changed[3].logprob * (1 + 2**-52))
    assert "at token 3" in output_difference(receipt, changed, done.finish_reason.value)


def test_an_end_for_another_reason_is_a_difference(made):
    _, done, receipt = made
    assert output_difference(receipt, done.logprobs, "stop") == (
        "the output ended by 'stop', in the receipt by 'length'"
    )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_tokens": 5}, "num_tokens"),
        ({"checks": ""}, "checks"),
        ({"output_sha256": "0" * 64}, "output_sha256"),
        ({"output_sha256": "0" * 64, "num_tokens": 1}, "output_sha256, num_tokens"),
    ],
)
def test_a_receipt_whose_parts_contradict_one_another_confirms_nothing(made, change, names):
    _, done, receipt = made
    told = output_difference(replace(receipt, **change), done.logprobs, done.finish_reason.value)
    assert told == f"the receipt contradicts itself: of this output it has a wrong {names}"


def test_a_difference_names_the_versions_where_they_differ(made):
    _, done, receipt = made
    other = replace(receipt, bise="9.9", numerics=99)
    assert output_difference(other, done.logprobs, done.finish_reason.value) is None
    told = output_difference(other, done.logprobs[:5], done.finish_reason.value)
    assert "the receipt is of bise '9.9', numerics 99, " in told


def test_each_part_of_another_model_is_named(loaded, made):
    receipt = made[2]
    for part, phrase in (("weights", "weights differ:"), ("config", "configuration differs:")):
        model = replace(receipt.model, **{f"{part}_sha256": "0" * 64})
        (told,) = model_differences(replace(receipt, model=model), loaded)
        assert phrase in told
        assert "000000000000... in the receipt" in told


SCHEMA = GrammarSpec.json_schema({"type": "object", "properties": {"word": {"type": "string"}}})


@pytest.mark.parametrize(
    "grammar", [SCHEMA, GrammarSpec.regex("[a-z]{3,9}"), GrammarSpec.choice(["yes", "no"])], ids=str
)
def test_an_output_that_a_grammar_held_is_confirmed(loaded, made, tmp_path, grammar):
    params = receipt_params(replace(PARAMS, stop=()), 100)
    request = replace(made[0], grammar=grammar, params=params)
    done = loaded.engine.submit(request).result()
    receipt = make_receipt(loaded, request, done.logprobs, done.finish_reason.value)
    write_receipt(receipt, tmp_path / "receipt.json")
    assert read_receipt(tmp_path / "receipt.json") == receipt
    assert replayed(loaded, read_receipt(tmp_path / "receipt.json")) is None
    free = replace(receipt, grammar=None, grammar_sha256=None)
    assert "the output differs" in replayed(loaded, free), "the grammar decides nothing"


def test_a_grammar_that_was_left_out_is_asked_for_and_must_be_the_same(loaded, made, tmp_path):
    request = replace(made[0], grammar=SCHEMA, params=receipt_params(replace(PARAMS, stop=()), 100))
    done = loaded.engine.submit(request).result()
    receipt = make_receipt(loaded, request, done.logprobs, done.finish_reason.value, keeps_prompt=False)
    write_receipt(receipt, tmp_path / "receipt.json")
    assert "word" not in (tmp_path / "receipt.json").read_text()
    receipt = read_receipt(tmp_path / "receipt.json")
    again = replay_request(receipt, request.token_ids, grammar=replace(SCHEMA, field="other"))
    assert loaded.engine.submit(again).result().logprobs == done.logprobs
    with pytest.raises(ReceiptError, match="made without its grammar"):
        replay_request(receipt, request.token_ids)
    with pytest.raises(ReceiptError, match="grammar is not the one"):
        replay_request(receipt, request.token_ids, grammar=GrammarSpec.json_object())
    with pytest.raises(ReceiptError, match="grammar is not the one"):
        replay_request(made[2], grammar=SCHEMA)


@pytest.fixture
def tuned(loaded, tmp_path):
    """The directory of an adapter, loaded as `tuned`."""
    write_adapter(tmp_path / "tuned", loaded.source.config, seed=1)
    loaded.load_adapter("tuned", tmp_path / "tuned")
    yield tmp_path / "tuned"
    loaded.unload_adapter("tuned")


def test_an_output_made_with_an_adapter_is_confirmed_with_the_same_one_alone(loaded, made, tuned, tmp_path):
    request = replace(made[0], adapter="tuned")
    done = loaded.engine.submit(request).result()
    receipt = make_receipt(loaded, request, done.logprobs, done.finish_reason.value)
    write_receipt(receipt, tmp_path / "receipt.json")
    receipt = read_receipt(tmp_path / "receipt.json")
    assert model_differences(receipt, loaded, "tuned") == []
    again = loaded.engine.submit(replay_request(receipt, adapter="tuned")).result()
    assert output_difference(receipt, again.logprobs, again.finish_reason.value) is None
    assert "the output differs" in replayed(loaded, receipt), "the adapter decides nothing"
    assert "--adapter DIR loads it" in model_differences(receipt, loaded)[0]
    assert "leave --adapter out" in model_differences(made[2], loaded, "tuned")[0]
    write_adapter(tmp_path / "other", loaded.source.config, seed=2)
    loaded.load_adapter("other", tmp_path / "other")
    assert "the adapter differs" in model_differences(receipt, loaded, "other")[0]
    loaded.unload_adapter("other")


def test_a_receipt_from_before_adapters_and_grammars_is_read(loaded, made, tmp_path):
    path = tmp_path / "receipt.json"
    write_receipt(made[2], path)
    value = json.loads(path.read_text())
    for name in ("adapter", "grammar", "grammar_sha256"):
        del value[name]
    path.write_text(json.dumps(value | {"receipt": 1}))
    assert read_receipt(path) == made[2]


def test_a_request_whose_prompt_the_engine_shortens_gets_no_receipt(loaded, made):
    request, done, _ = made
    with pytest.raises(ReceiptError, match="'truncate'"):
        make_receipt(loaded, replace(request, truncate="oldest"), done.logprobs, "stop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"receipt": 3}, "no receipt of form 2"),
        ({"adapter": {"name": "a"}}, "a receipt needs 'sha256'"),
        ({"grammar": {"kind": "x"}}, "a receipt needs 'source'"),
        (
            {"grammar": {"kind": "x", "source": "", "strict": False, "field": "", "trigger": None}},
            "grammar: ",
        ),
        ({"extra": 1}, "a receipt has no 'extra'"),
        ({"kv": None}, "'kv' must not be null"),
        ({"numerics": True}, "'numerics' must not be"),
        ({"prompt_ids": [1, "a"]}, "'prompt_ids' must be whole numbers"),
        ({"prompt_ids": [1, 1 << 70]}, "'prompt_ids' must be whole numbers"),
        ({"params": {"warmth": 2}}, "knows no parameter 'warmth'"),
        ({"params": {"temperature": 99}}, "params: temperature must be a number"),
        ({"params": {"logit_bias": 3}}, "params: "),
        ({"params": {"stop": "abc"}}, "params: stop must be a list"),
        ({"params": {"stop": [5]}}, "params: stop must hold strings"),
        ({"model": {"name": "x"}}, "a receipt needs 'weights_sha256'"),
    ],
)
def test_what_is_no_receipt_is_refused_with_the_field(made, tmp_path, change, message):
    path = tmp_path / "receipt.json"
    write_receipt(made[2], path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ReceiptError, match=message):
        read_receipt(path)


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(ReceiptError, match="does not exist"):
        read_receipt(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ReceiptError, match=r"bad\.json"):
        read_receipt(tmp_path / "bad.json")
