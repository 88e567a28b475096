"""Every exception that bise raises on purpose.

Tree (exit code for the command line in brackets; everything else is a bug and exits 1):

    BiseError
    ├── UserError [2]          the caller can fix it: the message says what is wrong and the way out
    │   ├── ConfigError        a configuration field has a bad value
    │   ├── ModelFileError     a model file is malformed, incomplete or unsupported
    │   ├── RequestError       a request cannot be honoured as asked
    │   │   ├── ContextOverflowError   prompt + max_tokens exceed the context
    │   │   └── ContentPolicyError     a prompt or an answer breaks one of the key's guardrails
    │   ├── ReceiptError       a receipt is malformed, or cannot be made or replayed as asked
    │   ├── MemoryPlanError    the work does not fit the memory that was granted
    │   ├── ModelNotFoundError no such model, alias or adapter is served
    │   ├── AuthenticationError    no key, or one that is wrong, expired or revoked
    │   ├── PermissionDeniedError  the key is good but not for this
    │   ├── NotFoundError          no such object, or it is someone else's
    │   ├── ConflictError          the object's state does not allow what is asked
    │   └── RateLimitError         the key has used up one of its limits
    ├── StoreError [1]         the database or its files cannot be read or written for now
    ├── HubError [1]           a hub failed, lied or could not be reached
    ├── QueueFullError [1]     the engine refuses work for now
    ├── ModelBusyError [1]     a model cannot be loaded or unloaded while others run
    └── EngineError [1]        the engine or the model failed while it ran
        ├── NonFiniteError     the model produced NaN or infinity
        └── OutOfMemoryError   the machine or the device had no memory left for a step
"""


class BiseError(Exception):
    """Root of all deliberate errors; `str(error)` is one line for a person."""

    code = "internal_error"
    exit_code = 1

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.field = field
        """The offending field, file or flag, when there is one."""


class UserError(BiseError):
    """A mistake of the caller, with the way out in the message."""

    code = "invalid_request"
    exit_code = 2


class ConfigError(UserError):
    """A configuration value is missing, of the wrong type or out of range."""

    code = "invalid_config"


class ModelFileError(UserError):
    """A model file is malformed, incomplete, unsupported or does not match its configuration."""

    code = "invalid_model_file"


class RequestError(UserError):
    """A generation request cannot be honoured as asked."""


class ContextOverflowError(RequestError):
    """The prompt and the tokens asked for do not fit the context."""

    code = "context_overflow"


class ContentPolicyError(RequestError):
    """A prompt or an answer breaks one of the key's guardrails; the message names the rule, not the text."""

    code = "content_policy_violation"


class MemoryPlanError(UserError):
    """The memory needed is more than the memory granted."""

    code = "out_of_memory_plan"


class ReceiptError(UserError):
    """A receipt is malformed, or cannot be made or replayed as asked."""

    code = "invalid_receipt"


class AuthenticationError(UserError):
    """No key was given, or it is unknown, expired or revoked."""

    code = "invalid_api_key"


class PermissionDeniedError(UserError):
    """The key is good, but it may not do this."""

    code = "permission_denied"


class NotFoundError(UserError):
    """There is no such object, or it belongs to someone else (nobody is told which)."""

    code = "not_found"


class ConflictError(UserError):
    """The object is in a state that does not allow what is asked."""

    code = "conflict"


class RateLimitError(UserError):
    """A key has used up one of its limits."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s
        """Seconds until the same request can pass; None when it never can."""


class StoreError(BiseError):
    """The database or its files cannot be read or written for now."""

    code = "store_unavailable"


class HubError(BiseError):
    """A hub of models failed, could not be reached, or sent what nobody should take."""

    code = "hub_error"


class QueueFullError(BiseError):
    """The engine's queue is full; try again later."""

    code = "queue_full"

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s
        """Seconds after which a place is expected, from the rate at which requests finish."""


class ModelNotFoundError(UserError):
    """No model, alias or adapter of that name is served."""

    code = "model_not_found"


class ModelBusyError(BiseError):
    """A model must wait for running ones before it can be loaded or unloaded; try again later."""

    code = "model_busy"


class EngineError(BiseError):
    """The engine failed while it ran."""

    code = "engine_error"


class NonFiniteError(EngineError):
    """The model's logits contain NaN or infinity, so the weights or the arithmetic are broken."""

    code = "non_finite_logits"


class OutOfMemoryError(EngineError):
    """The machine or the device had no memory left for a step; its requests ended, others go on."""

    code = "out_of_memory"


def quoted(value: object, limit: int = 80) -> str:
    """Return a value from a file as printable, bounded text for a message: control characters are escaped."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
