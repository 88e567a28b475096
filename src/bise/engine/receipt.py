"""Receipts: a small JSON file that says what made an output, and lets anyone make it again and compare.

A receipt names the model by the hash of its files, the version of bise and of its arithmetic, the parameters
with the seed, the adapter by its hash, the prompt and the grammar (in full, or only as hashes) and the hash
of the output: every token id and the bits of its log-prob. It holds no text of the answer. `docs/receipts.md`
lists the fields.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, cast

from bise import __version__
from bise.engine.request import Request, SamplingParams, TokenLogprob
from bise.errors import ModelFileError, ReceiptError, RequestError, quoted
from bise.grammar.spec import GrammarKind, GrammarSpec
from bise.jsonfile import kind_of, read_json_object
from bise.model.packed import content_hash

if TYPE_CHECKING:
    from bise.engine.load import LoadedModel
    from bise.model.source import ModelSource
    from bise.text.tokenizer import Tokenizer

NUMERICS_VERSION = 1
"""Raised when a change of kernels, sampling or packing changes the bits of some output; a test holds it."""

_FORM = 2
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which model, by content."""

    name: str
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterIdentity:
    """Which LoRA adapter, by content."""

    name: str
    sha256: str
    """Of its configuration and weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What made an output."""

    bise: str
    """Version of bise."""
    numerics: int
    """Version of its arithmetic."""
    processor: str
    """Widest instruction set of the machine: numpy's exp, and with it the last bit of a log-prob, differs
    between those with AVX-512 and those without."""
    model: ModelIdentity
    quant: str
    kv: str
    params: SamplingParams
    """With the seed that was used."""
    continuation: bool
    adapter: AdapterIdentity | None
    grammar: GrammarSpec | None
    """None for none, and when it was left out with the prompt."""
    grammar_sha256: str | None
    salt: str
    """Random hex that goes into the hashes, so that guessing a prompt takes this very file."""
    prompt_sha256: str
    prompt_ids: tuple[int, ...] | None
    """None when the prompt was left out."""
    num_tokens: int
    finish_reason: str
    output_sha256: str
    checks: str | None
    """Four hex digits per token, each over all tokens up to it; None when the prompt was left out."""


def identify(source: ModelSource, tokenizer: Tokenizer) -> ModelIdentity:
    """Return the identity of a model; reads its files."""
    return ModelIdentity(
        name=source.name or source.path.name,
        weights_sha256=content_hash(source),
        config_sha256=_sha256(json.dumps(_set_fields(source.config), sort_keys=True).encode()),
        tokenizer_sha256=tokenizer_hash(tokenizer),
    )


def receipt_params(params: SamplingParams, room: int) -> SamplingParams:
    """Return `params` with the log-probs that a receipt covers, and with a number of tokens that does not
    depend on the context of the engine, `room` tokens here.
    """
    return replace(
        params,
        logprobs=params.logprobs or 0,
        max_tokens=room if params.max_tokens is None else params.max_tokens,
    )


def make_receipt(
    loaded: LoadedModel,
    request: Request,
    logprobs: Sequence[TokenLogprob],
    finish_reason: str,
    *,
    keeps_prompt: bool = True,
    adapter: AdapterIdentity | None = None,
) -> Receipt:
    """Return the receipt of an output, given by its tokens' log-probs; `request` has `receipt_params` and a
    seed. `adapter` is for adapters that may be unloaded by now.

    Raises ReceiptError for requests that have no output, or whose prompt depends on the engine's context.
    """
    for name in ("truncate", "pooling"):
        if getattr(request, name) is not None:
            raise ReceiptError(f"a receipt cannot vouch for a request with '{name}'", field=name)
    assert request.params.seed is not None, "without its seed a request cannot be replayed"
    salt = secrets.token_hex(16)
    grammar = request.grammar
    return Receipt(
        bise=__version__,
        numerics=NUMERICS_VERSION,
        processor=_processor(),
        model=loaded.identity(),
        quant=loaded.quant,
        kv=loaded.kv,
        params=replace(request.params, logprobs=0),
        continuation=request.continuation,
        adapter=adapter or adapter_identity(loaded, request.adapter),
        grammar=grammar if keeps_prompt else None,
        grammar_sha256=None if grammar is None else _grammar_hash(salt, grammar),
        salt=salt,
        prompt_sha256=_prompt_hash(salt, request.token_ids),
        prompt_ids=request.token_ids if keeps_prompt else None,
        num_tokens=len(logprobs),
        finish_reason=finish_reason,
        output_sha256=_output_hash(salt, logprobs),
        # From a check per token the output could be guessed token by token; the prompt's ids tell it anyway.
        checks=_checks(salt, logprobs) if keeps_prompt else None,
    )


def replay_request(
    receipt: Receipt,
    prompt_ids: tuple[int, ...] | None = None,
    *,
    grammar: GrammarSpec | None = None,
    adapter: str | None = None,
) -> Request:
    """Return the request to run again, with the adapter that is loaded as `adapter`.

    `prompt_ids` and `grammar` are for receipts that were made without them. Raises ReceiptError when one is
    missing or is not the one of the receipt.
    """
    token_ids = receipt.prompt_ids if prompt_ids is None else prompt_ids
    if token_ids is None:
        raise ReceiptError("the receipt was made without its prompt; give it with --prompt", field="prompt")
    if _prompt_hash(receipt.salt, token_ids) != receipt.prompt_sha256:
        raise ReceiptError("the prompt is not the one the receipt was made for", field="prompt")
    grammar = receipt.grammar if grammar is None else grammar
    if grammar is None and receipt.grammar_sha256 is not None:
        raise ReceiptError(
            "the receipt was made without its grammar; give it with --json-schema, --regex, --choice or "
            "--grammar",
            field="grammar",
        )
    if (None if grammar is None else _grammar_hash(receipt.salt, grammar)) != receipt.grammar_sha256:
        raise ReceiptError("the grammar is not the one the receipt was made for", field="grammar")
    return Request(
        token_ids=token_ids,
        params=receipt.params,
        continuation=receipt.continuation,
        grammar=grammar,
        adapter=adapter,
    )


def model_differences(receipt: Receipt, loaded: LoadedModel, adapter: str | None = None) -> list[str]:
    """Return one phrase per part of the model, and of the adapter loaded as `adapter`, that is not the
    receipt's; nothing to replay if there are any.
    """
    found = loaded.identity()
    parts = (
        ("weights", receipt.model.weights_sha256, found.weights_sha256),
        ("configuration", receipt.model.config_sha256, found.config_sha256),
        ("tokenizer", receipt.model.tokenizer_sha256, found.tokenizer_sha256),
    )
    told = [
        f"the model's {part} differ{'' if part == 'weights' else 's'}: SHA-256 {expected[:12]}... in the "
        f"receipt, {actual[:12]}... here"
        for part, expected, actual in parts
        if expected != actual
    ]
    return told + _adapter_differences(receipt.adapter, adapter_identity(loaded, adapter))


def _adapter_differences(wanted: AdapterIdentity | None, here: AdapterIdentity | None) -> list[str]:
    if wanted is None:
        return [] if here is None else ["the receipt is of the model without an adapter; leave --adapter out"]
    if here is None:
        return [f"the receipt is of the model with the adapter {quoted(wanted.name)}; --adapter DIR loads it"]
    if wanted.sha256 == here.sha256:
        return []
    return [
        f"the adapter differs: SHA-256 {wanted.sha256[:12]}... in the receipt, {here.sha256[:12]}... here"
    ]


def adapter_identity(loaded: LoadedModel, name: str | None) -> AdapterIdentity | None:
    """Return which adapter is loaded as `name`. Raises RequestError when none is."""
    adapter = None if name is None else loaded.engine.adapters.find(name)
    return None if adapter is None or name is None else AdapterIdentity(name=name, sha256=adapter.sha256)


def output_difference(receipt: Receipt, logprobs: Sequence[TokenLogprob], finish_reason: str) -> str | None:
    """Return where a replayed output differs from the receipt's; None when it is the same to the last bit and
    all that the receipt says of it is true.
    """
    is_same = _output_hash(receipt.salt, logprobs) == receipt.output_sha256
    checks = None if receipt.checks is None else _checks(receipt.salt, logprobs)
    if not is_same and (checks is None or checks != receipt.checks):
        return f"the output differs{_first_difference(receipt, checks)}{_version_note(receipt)}"
    if finish_reason != receipt.finish_reason:
        return f"the output ended by '{finish_reason}', in the receipt by {quoted(receipt.finish_reason)}"
    facts = (
        ("output_sha256", is_same),
        ("checks", checks == receipt.checks),
        ("num_tokens", len(logprobs) == receipt.num_tokens),
    )
    wrong = ", ".join(name for name, is_true in facts if not is_true)
    return f"the receipt contradicts itself: of this output it has a wrong {wrong}" if wrong else None


def receipt_body(receipt: Receipt) -> dict[str, Any]:
    """Return what the file of a receipt holds."""
    return {"receipt": _FORM, **_plain(receipt)}


def write_receipt(receipt: Receipt, path: Path) -> None:
    """Write a receipt to a new file that only its owner can read. Raises ReceiptError when it exists."""
    value = receipt_body(receipt)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ReceiptError(
            f"the receipt {path} cannot be written: {error.strerror}", field=str(path)
        ) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=True, allow_nan=False) + "\n")


def read_receipt(path: Path) -> Receipt:
    """Read a receipt. Raises ReceiptError naming the field when it is none or was made by another form."""
    try:
        value = read_json_object(path, max_bytes=_MAX_BYTES)
    except ModelFileError as error:
        raise ReceiptError(str(error), field=error.field) from error
    form = value.pop("receipt", None)
    if form == 1:  # from before receipts knew adapters and grammars
        value |= {"adapter": None, "grammar": None, "grammar_sha256": None}
    elif form != _FORM:
        raise ReceiptError(
            f"{path}: is no receipt of form {_FORM} (its 'receipt' is {kind_of(form)})", field="receipt"
        )
    parts = _typed(path, value, _KINDS)
    ids = parts["prompt_ids"]
    if ids is not None and not all(type(token_id) is int and 0 <= token_id < 1 << 31 for token_id in ids):
        raise ReceiptError(f"{path}: 'prompt_ids' must be whole numbers from 0 to 2^31", field="prompt_ids")
    parts["prompt_ids"] = None if ids is None else tuple(ids)
    parts["model"] = ModelIdentity(**_typed(path, parts["model"], dict.fromkeys(_MODEL_FIELDS, (str,))))
    parts["params"] = _params(path, parts["params"])
    if parts["adapter"] is not None:
        parts["adapter"] = AdapterIdentity(
            **_typed(path, parts["adapter"], dict.fromkeys(_ADAPTER_FIELDS, (str,)))
        )
    if parts["grammar"] is not None:
        parts["grammar"] = _grammar(path, parts["grammar"])
    return Receipt(**parts)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of what a vocabulary means: the bytes of every token, and where texts end."""
    digest = hashlib.sha256()
    digest.update(repr((tokenizer.vocab_size, tokenizer.bos_id, tokenizer.space_prefix)).encode())
    digest.update(repr(sorted(tokenizer.stop_ids)).encode())
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token_id)
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()


_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "bise": (str,),
        "numerics": (int,),
        "processor": (str,),
        "model": (dict,),
        "quant": (str,),
        "kv": (str,),
        "params": (dict,),
        "continuation": (bool,),
        "adapter": (dict, NoneType),
        "grammar": (dict, NoneType),
        "grammar_sha256": (str, NoneType),
        "salt": (str,),
        "prompt_sha256": (str,),
        "prompt_ids": (list, NoneType),
        "num_tokens": (int,),
        "finish_reason": (str,),
        "output_sha256": (str,),
        "checks": (str, NoneType),
    }
)
_MODEL_FIELDS = ("name", "weights_sha256", "config_sha256", "tokenizer_sha256")
_ADAPTER_FIELDS = ("name", "sha256")
_GRAMMAR_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"kind": (str,), "source": (str,), "strict": (bool,), "field": (str,), "trigger": (str, NoneType)}
)


def _typed(path: Path, value: dict[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Return `value` when it has exactly the fields of `kinds`, each of its kind."""
    for name in (*kinds, *value):
        if name not in kinds or name not in value:
            raise ReceiptError(
                f"{path}: a receipt {'has no' if name in value else 'needs'} {quoted(name)}", field=name
            )
    for name, allowed in kinds.items():
        # A bool is an int to Python, and never one in a receipt.
        if type(value[name]) not in allowed:
            raise ReceiptError(f"{path}: {name!r} must not be {kind_of(value[name])}", field=name)
    return dict(value)


def _params(path: Path, value: dict[str, Any]) -> SamplingParams:
    """Return the parameters of a receipt; fields that this bise does not know are refused."""
    known = {field.name for field in fields(SamplingParams)}
    for name in value:
        if name not in known:
            raise ReceiptError(f"{path}: this bise knows no parameter {quoted(name)}", field=name)
    bias = cast("object", value.get("logit_bias", {}))
    try:
        changes: dict[str, Any] = {
            "logit_bias": {
                int(token_id): number for token_id, number in cast("dict[str, float]", bias).items()
            },
            "stop": stop if isinstance(stop := value.get("stop", ()), str) else tuple(stop),
            "stop_token_ids": tuple(value.get("stop_token_ids", ())),
        }
        return SamplingParams(**value | changes)
    except (RequestError, TypeError, ValueError, AttributeError) as error:
        raise ReceiptError(f"{path}: params: {error}", field="params") from error


def _grammar(path: Path, value: dict[str, Any]) -> GrammarSpec:
    """Return the grammar of a receipt; whether it is one is found out when it is compiled."""
    fields = _typed(path, value, _GRAMMAR_KINDS)
    try:
        fields["kind"] = GrammarKind(fields["kind"])
        return GrammarSpec(**fields)
    except (RequestError, ValueError) as error:
        raise ReceiptError(f"{path}: grammar: {error}", field="grammar") from error


def _plain(value: object) -> dict[str, Any]:
    """Return a dataclass as JSON values, fields at their default included."""
    return json.loads(json.dumps(asdict(cast("Any", value))))


def _set_fields(value: object) -> object:
    """Return a configuration as JSON values without what is at its default, so that a field that a later
    version adds changes nothing.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _set_fields(getattr(value, field.name))
            for field in fields(value)
            if field.default is MISSING or getattr(value, field.name) != field.default
        }
    return list(cast("tuple[object, ...]", value)) if isinstance(value, tuple) else value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _prompt_hash(salt: str, token_ids: Sequence[int]) -> str:
    return _sha256(f"prompt {salt} ".encode() + struct.pack(f"<{len(token_ids)}q", *token_ids))


def _grammar_hash(salt: str, grammar: GrammarSpec) -> str:
    # What errors call it is no part of what it says.
    parts = [grammar.kind.value, grammar.source, grammar.strict, grammar.trigger]
    return _sha256(f"grammar {salt} ".encode() + json.dumps(parts).encode())


def _token_bytes(entry: TokenLogprob) -> bytes:
    return struct.pack("<qd", entry.token_id, entry.logprob)


def _output_hash(salt: str, logprobs: Sequence[TokenLogprob]) -> str:
    return _sha256(f"output {salt} ".encode() + b"".join(map(_token_bytes, logprobs)))


def _checks(salt: str, logprobs: Sequence[TokenLogprob]) -> str:
    digest = hashlib.sha256(f"checks {salt} ".encode())
    found: list[str] = []
    for entry in logprobs:
        digest.update(_token_bytes(entry))
        found.append(digest.hexdigest()[:4])
    return "".join(found)


def _first_difference(receipt: Receipt, found: str | None) -> str:
    if found is None or receipt.checks is None:
        return ""
    shorter = min(len(found), len(receipt.checks))
    first = next(
        (at for at in range(0, shorter, 4) if found[at : at + 4] != receipt.checks[at : at + 4]), shorter
    )
    return f" at token {first // 4} (of {receipt.num_tokens}, counted from 0)"


def _version_note(receipt: Receipt) -> str:
    if (receipt.bise, receipt.numerics, receipt.processor) == (__version__, NUMERICS_VERSION, _processor()):
        return ""
    return (
        f"; the receipt is of bise {quoted(receipt.bise)}, numerics {receipt.numerics}, "
        f"{quoted(receipt.processor)}, this is {__version__}, numerics {NUMERICS_VERSION}, {_processor()!r}"
    )


def _processor() -> str:
    from bise.kernels.cpu import detected_isas

    return detected_isas()[0]
