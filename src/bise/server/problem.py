"""Every refusal as one JSON body that both Mistral's and OpenAI's clients read, with its status and headers.

Owns the table from exceptions to statuses. Messages name fields and numbers, never paths, keys or texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import JSONResponse

from bise.errors import (
    AuthenticationError,
    BiseError,
    ConflictError,
    ContextOverflowError,
    EngineError,
    MemoryPlanError,
    ModelBusyError,
    ModelFileError,
    ModelNotFoundError,
    NotFoundError,
    OutOfMemoryError,
    PermissionDeniedError,
    QueueFullError,
    RateLimitError,
    RequestError,
    StoreError,
    UserError,
)

JSON = "application/json"


class ApiError(Exception):
    """A refusal that HTTP alone knows: its status, its code and what the client may do about it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class _Row:
    kind: type[BiseError]
    status: int
    code: str | None = None
    """None: the exception's own code."""


_TABLE = (
    _Row(AuthenticationError, 401),
    _Row(PermissionDeniedError, 403),
    _Row(ModelNotFoundError, 404),
    _Row(NotFoundError, 404),
    _Row(ConflictError, 409),
    _Row(RateLimitError, 429),
    _Row(QueueFullError, 429),
    _Row(ContextOverflowError, 400, "context_length_exceeded"),
    _Row(RequestError, 400),
    _Row(MemoryPlanError, 400),
    _Row(ModelFileError, 503, "model_unavailable"),
    _Row(ModelBusyError, 503),
    _Row(StoreError, 503),
    _Row(UserError, 400),
    _Row(OutOfMemoryError, 503),
    _Row(EngineError, 500),
)
"""The first row that fits counts."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "overloaded_error",
}


def as_api_error(error: BaseException) -> ApiError:
    """Return the refusal that an exception means; what nobody raised on purpose is a 500 without details."""
    if isinstance(error, ApiError):
        return error
    for row in _TABLE:
        if isinstance(error, row.kind):
            is_of_files = isinstance(error, ModelFileError)  # the way to them is the operator's business
            return ApiError(
                row.status,
                "the model cannot be loaded; the server's log tells why" if is_of_files else str(error),
                code=row.code or error.code,
                param=None if is_of_files else error.field,
                headers=_retry_headers(error, row.status),
            )
    return ApiError(
        500,
        "the server failed on this request; its log tells more",
        code="internal_error",
        headers={"x-should-retry": "false"},
    )


def _retry_headers(error: BiseError, status: int) -> dict[str, str]:
    if isinstance(error, RateLimitError | QueueFullError):
        if error.retry_after_s is None:
            return {"x-should-retry": "false"}
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, ModelBusyError | StoreError | OutOfMemoryError):
        return {"retry-after": "1"}
    if isinstance(error, AuthenticationError):
        return {"www-authenticate": "Bearer"}
    return {"x-should-retry": "false"} if status >= 500 else {}


def type_of(status: int) -> str:
    """Return the kind of error that clients sort by."""
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def error_body(error: ApiError, *, dialect: str = "union") -> dict[str, object]:
    """Return the body of a refusal.

    `union`: Mistral's flat form and OpenAI's nested one in one object. `anthropic`: the form of
    /v1/messages.
    """
    kind = type_of(error.status)
    nested: dict[str, object] = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
    }
    if dialect == "anthropic":
        return {"type": "error", "error": {"type": kind, "message": error.message, "code": error.code}}
    return {"object": "error", **nested, "error": nested}


def error_response(error: BaseException, *, path: str) -> JSONResponse:
    """Return the answer to a request that is refused."""
    refusal = as_api_error(error)
    dialect = "anthropic" if path.startswith("/v1/messages") else "union"
    return JSONResponse(error_body(refusal, dialect=dialect), refusal.status, headers=refusal.headers)
