"""Where a model's chat format is written: Mistral's versions, bise's own key, Jinja sources.

Owns the order of preference and the limits on what is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from bise.errors import ModelFileError
from bise.jsonfile import kind_of, read_bytes, read_json_object
from bise.text.mistral_template import MistralTemplate
from bise.text.pieces import PieceTokenizer
from bise.text.template import ChatTemplate
from bise.text.tokenizer import Tokenizer

_MAX_TEMPLATE_BYTES = 1 << 20
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
_MALFORMED = "template"
"""`field` of the errors of a template that is there but bad; a missing one has `chat_template`."""
_WAY_OUT = "use `bise generate`, which continues plain text"


def load_directory_template(path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """See `bise.text.template.load_template`."""
    if isinstance(tokenizer, PieceTokenizer) and tokenizer.chat_format:
        return MistralTemplate(tokenizer, tokenizer.chat_format, model_settings=tokenizer.model_settings)
    file = path / "tokenizer_config.json"
    config = read_json_object(file) if file.exists() else {}
    named = config.get("bise_template")
    if named is not None:
        if not isinstance(named, str):
            raise ModelFileError(
                f"{file}: bise_template must be a string, not {kind_of(named)}", field="bise_template"
            )
        return MistralTemplate(tokenizer, named)
    separate = path / "chat_template.jinja"
    if separate.exists():
        source, tool_source, name = (
            _decoded(read_bytes(separate, max_bytes=_MAX_TEMPLATE_BYTES), separate),
            None,
            separate,
        )
    else:
        source, tool_source = _sources(config.get("chat_template"), file)
        name = file
    if source is None:
        raise ModelFileError(f"{path}: the model has no chat template; {_WAY_OUT}", field="chat_template")
    from bise.text.jinja_template import JinjaTemplate

    template = JinjaTemplate(
        tokenizer, source, str(name), special_tokens=_special_tokens(config), tool_source=tool_source
    )
    template.check()
    return template


def load_gguf_template(metadata: Mapping[str, object], tokenizer: Tokenizer) -> ChatTemplate:
    """See `bise.text.template.template_from_gguf`."""
    key = "tokenizer.chat_template"
    source = metadata.get(key)
    if source is None:
        raise ModelFileError(f"{key} is missing: the model has no chat template; {_WAY_OUT}", field=key)
    _check_source(source, key)
    named = {token_id: text for text, token_id in tokenizer.controls.items()}
    eos = metadata.get(
        "tokenizer.ggml.eos_token_id", 2 if metadata.get("tokenizer.ggml.model") == "llama" else None
    )
    special = {
        kind: text
        for kind, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", eos))
        if isinstance(token_id, int) and (text := named.get(token_id))
    }
    tool_source = metadata.get(f"{key}.tool_use")
    if tool_source is not None:
        _check_source(tool_source, f"{key}.tool_use")
    from bise.text.jinja_template import JinjaTemplate

    template = JinjaTemplate(
        tokenizer,
        cast(str, source),
        key,
        special_tokens=special,
        tool_source=cast(str | None, tool_source),
        adds_bos=tokenizer.adds_bos,
    )
    template.check()
    return template


def _decoded(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{file}: is not UTF-8 (byte {error.start})", field=str(file)) from error


def _sources(value: object, file: Path) -> tuple[str | None, str | None]:
    """Return the default template and the one for tools: a string, or a list of {"name", "template"}."""
    if value is None:
        return None, None
    if isinstance(value, str):
        _check_source(value, f"{file}: chat_template")
        return value, None
    if not isinstance(value, list):
        raise ModelFileError(
            f"{file}: chat_template must be a string or an array, not {kind_of(value)}", field=_MALFORMED
        )
    named: dict[str, str] = {}
    for index, entry in enumerate(cast(list[object], value)):
        fields = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
        name = fields.get("name")
        if not isinstance(name, str):
            raise ModelFileError(f"{file}: chat_template[{index}].name must be a string", field=_MALFORMED)
        _check_source(fields.get("template"), f"{file}: chat_template[{index}].template")
        named[name] = cast(str, fields["template"])
    if named and "default" not in named:
        raise ModelFileError(f"{file}: chat_template has no entry named default", field=_MALFORMED)
    return named.get("default"), named.get("tool_use")


def _check_source(value: object, name: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ModelFileError(f"{name} must be a template as text, not {kind_of(value)}", field=_MALFORMED)
    if len(value) > _MAX_TEMPLATE_BYTES:
        raise ModelFileError(
            f"{name} has {len(value)} characters; at most {_MAX_TEMPLATE_BYTES} make sense",
            field=_MALFORMED,
        )


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Return bos_token, eos_token, ... as text; their form was checked when the tokenizer was read."""
    tokens: dict[str, str] = {}
    for kind in _NAMED:
        value = config.get(kind)
        if isinstance(value, dict):
            value = cast(dict[str, object], value).get("content")
        if isinstance(value, str):
            tokens[kind] = value
    return tokens
