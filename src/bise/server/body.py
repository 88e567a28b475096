"""JSON bodies: read, bounded, parsed strictly and validated against a wire model, off the event loop.

An unknown field is ignored and logged once; whatever else is wrong is a 400 that names the field.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Annotated, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from bise.errors import ModelFileError
from bise.jsonfile import parse_json
from bise.server.faults import fault
from bise.server.problem import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request

    from bise.server.service import Service

logger = logging.getLogger(__name__)

_INLINE_BYTES = 16 << 10
"""Bodies up to this size are parsed at once; a thread would cost more."""


class WireModel(BaseModel):
    """A request as it comes over the wire: exact types, no coercion, null means absent, extras kept apart."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class PartModel(WireModel):
    """An object inside a request. It takes no fields that nobody here knows: every one of them would change
    what its neighbours mean.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def _refuse_value(value: object) -> None:
    if value not in (None, []):
        raise ValueError("is not supported by this server; leave it out")


Absent = Annotated[None, BeforeValidator(_refuse_value)]
"""A field that would change the answer and cannot be honoured here: any value is refused."""

M = TypeVar("M", bound=WireModel)

_ELSEWHERE = """
    messages prompt input suffix instructions system prefix echo n best_of stop stop_sequences stop_token_ids
    temperature top_p top_k min_p typical_p presence_penalty frequency_penalty repetition_penalty logit_bias
    seed random_seed min_tokens max_tokens max_completion_tokens max_output_tokens ignore_eos logprobs
    top_logprobs prompt_logprobs response_format tools tool_choice functions function_call safe_prompt
    guardrails adapter receipt
    truncate truncate_prompt_tokens truncation chat_template chat_template_kwargs documents prompt_embeds
    continue_final_message guided_json guided_regex guided_choice guided_grammar guided_decoding_backend
    structured_outputs grammar json_schema regex ebnf bad_words allowed_token_ids use_beam_search
    length_penalty mirostat mirostat_tau mirostat_eta dry_multiplier thinking_token_budget
"""
ELSEWHERE = frozenset(_ELSEWHERE.split())
"""Fields that change answers, or what comes with them, here on another route or on other servers: never
ignored.
"""


async def read_json(request: Request, model: type[M]) -> M:
    """Return the validated body of an authenticated request. Raises ApiError 400, 413, 415."""
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    check_content_type(request)
    data = await request.body()
    if len(data) <= _INLINE_BYTES:
        value = _parse(data, model, service)
    else:
        value = await asyncio.get_running_loop().run_in_executor(service.pool, _parse, data, model, service)
    _refuse_elsewhere(value)
    service.note_unknown(request.scope["path"], value)
    return value


def _refuse_elsewhere(body: WireModel) -> None:
    """Refuse a field that other routes or servers honour and that would change this answer."""
    if not {"temperature", "input"} & type(body).model_fields.keys():
        return  # nothing is computed
    for name, value in (body.model_extra or {}).items():
        idle = value is None or value is False or value in ([], {}, "") or (name == "n" and value == 1)
        if name in ELSEWHERE and not idle:
            raise ApiError(
                400, f"{name} is not supported on this route", code="unsupported_field", param=name
            )


def check_content_type(request: Request) -> None:
    """Refuse a body that says it is no JSON, or is compressed."""
    kind, _, rest = request.headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415,
            f"the content type must be application/json, got {kind[:60] or 'none'}",
            code="unsupported_media_type",
        )
    charset = rest.lower().replace('"', "").replace(" ", "")
    if "charset=" in charset and "charset=utf-8" not in charset and "charset=utf8" not in charset:
        raise ApiError(415, "JSON is UTF-8; no other charset is read", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(
            415, "compressed bodies are not read; send them as they are", code="unsupported_media_type"
        )


def _parse(data: bytes, model: type[M], service: Service) -> M:
    limits = service.limits
    if not data.strip():
        raise ApiError(400, "the body is empty; a JSON object is needed", code="invalid_json")
    try:
        value = parse_json(data, "body", max_depth=limits.json_depth, max_values=limits.json_values)
    except ModelFileError as error:
        message = str(error).removeprefix("body: ")
        raise ApiError(400, f"the body {message}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return validate(cast(object, value), model)


def validate(value: object, model: type[M]) -> M:
    """Return `value` as a wire model. Raises ApiError 400 that names the field and what is wrong with it."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        field = errors[0]["loc"][:1]
        # A field of several types has an error for each: the one of the type that was meant says most.
        first = max(
            (entry for entry in errors if entry["loc"][:1] == field),
            key=lambda entry: (not entry["type"].endswith("_type"), len(entry["loc"])),
        )
        place = _place(first["loc"])
        others = len({entry["loc"][:1] for entry in errors}) - 1
        more = f" (and {others} more fields)" if others else ""
        text = fault(first)
        if not place:  # two fields that contradict each other: the message begins with the first one
            name = text.split(" ")[0]
            param = name if name in model.model_fields else None
            raise ApiError(400, f"{text}{more}", code="invalid_request", param=param) from None
        raise ApiError(400, f"{place} {text}{more}", code="invalid_request", param=place) from None


def _place(loc: tuple[int | str, ...]) -> str:
    """Return `tools[0].function` for ("tools", 0, "function"); names of union members are left out."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif (
            part.isidentifier()
            and part.islower()
            and part not in ("str", "int", "float", "bool")
            and "function-" not in part
        ):
            place += f".{part}" if place else part
    return place[:200]
