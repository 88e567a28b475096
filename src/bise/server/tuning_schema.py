"""Fine-tuning jobs over the wire: OpenAI's form and Mistral's older one, in and out.

Owns what each field means for `bise tune`; what cannot be honoured is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from bise.errors import RequestError
from bise.server.body import Absent, PartModel, WireModel
from bise.store.tuning import TuningEvent, TuningJob

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BASE_LR = {"lora": 1e-3, "dpo": 1e-4}
"""What a learning_rate_multiplier of 1 means: the command line's own default."""
_MISTRAL = {
    "waiting": "QUEUED", "queued": "QUEUED", "running": "RUNNING", "pausing": "RUNNING", "paused": "QUEUED",
    "cancelling": "CANCELLATION_REQUESTED", "succeeded": "SUCCESS", "failed": "FAILED",
    "cancelled": "CANCELLED",
}  # fmt: skip
_OPENAI = {"waiting": "queued", "pausing": "running", "cancelling": "running"}
"""Where OpenAI's name differs from ours."""
Auto = Literal["auto"]


class Hyperparameters(PartModel):
    """OpenAI's."""

    n_epochs: Auto | int | None = None
    batch_size: Auto | int | None = None
    learning_rate_multiplier: Auto | float | int | None = None
    beta: Auto | float | int | None = None

    @model_validator(mode="after")
    def _check(self) -> Hyperparameters:
        for name, low, high in (
            ("n_epochs", 1, 1000), ("batch_size", 1, 65536), ("learning_rate_multiplier", 1e-4, 1e4),
            ("beta", 0.001, 100),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"{name} must be from {low:g} to {high:g}")
        return self


class MethodSettings(PartModel):
    """What a method of OpenAI's form carries."""

    hyperparameters: Hyperparameters | None = None


class Method(PartModel):
    """OpenAI's choice of a method; reinforcement is not part of this server."""

    type: Literal["supervised", "dpo"]
    supervised: MethodSettings | None = None
    dpo: MethodSettings | None = None


class OpenAiJob(WireModel):
    """POST /v1/fine_tuning/jobs in OpenAI's form."""

    model: str = Field(min_length=1, max_length=512)
    training_file: str = Field(min_length=1, max_length=64)
    validation_file: str | None = Field(None, max_length=64)
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: str | None = Field(None, max_length=64)
    seed: int | None = Field(None, ge=0, lt=1 << 32)
    integrations: Absent = None
    metadata: dict[str, str] | None = Field(None, max_length=16)


class TrainingFile(PartModel):
    """A file of a job in Mistral's form."""

    file_id: str = Field(min_length=1, max_length=64)
    weight: float | int | None = None


class TrainingParameters(PartModel):
    """Mistral's hyperparameters."""

    training_steps: int | None = Field(None, ge=1, le=1_000_000)
    learning_rate: float | None = Field(None, gt=0, le=1)
    weight_decay: float | None = Field(None, ge=0, le=10)
    warmup_fraction: float | None = Field(None, ge=0, le=0.9)
    epochs: float | None = Field(None, gt=0, le=1000)
    seq_len: int | None = Field(None, ge=100, le=1 << 24)
    fim_ratio: Literal[0] | None = None


class MistralJob(WireModel):
    """POST /v1/fine_tuning/jobs in Mistral's form."""

    model: str = Field(min_length=1, max_length=512)
    hyperparameters: TrainingParameters
    training_files: list[TrainingFile] = Field(min_length=1, max_length=100)
    validation_files: list[str] | None = Field(None, max_length=100)
    suffix: str | None = Field(None, max_length=64)
    integrations: Absent = None
    auto_start: bool | None = None
    invalid_sample_skip_percentage: Literal[0] | None = None
    job_type: Literal["completion"] | None = None
    repositories: Absent = None
    classifier_targets: Absent = None


def openai_spec(body: OpenAiJob) -> dict[str, Any]:
    """Return what a job in OpenAI's form asks for: files, options of `bise tune run`, what to say again."""
    kind = "supervised" if body.method is None else body.method.type
    chosen = None if body.method is None else (body.method.dpo if kind == "dpo" else body.method.supervised)
    inner = None if chosen is None else chosen.hyperparameters
    if inner is not None and body.hyperparameters is not None:
        raise RequestError(
            "hyperparameters are given twice: once alone, once in method", field="hyperparameters"
        )
    own = inner or body.hyperparameters or Hyperparameters()
    if own.beta is not None and kind != "dpo":
        raise RequestError("beta belongs to the method dpo", field="beta")
    method = "dpo" if kind == "dpo" else "lora"
    options: dict[str, Any] = {"method": method}
    for name, option in (("n_epochs", "epochs"), ("batch_size", "batch"), ("beta", "beta")):
        value = getattr(own, name)
        if value not in (None, "auto"):
            options[option] = value
    if own.learning_rate_multiplier not in (None, "auto"):
        options["lr"] = _BASE_LR[method] * float(own.learning_rate_multiplier)
    if body.seed is not None:
        options["seed"] = body.seed
    said = {
        name: getattr(own, name) or "auto" for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
    }
    if kind == "dpo":
        said["beta"] = own.beta or "auto"
    return {
        "training_files": [body.training_file],
        "validation_files": [] if body.validation_file is None else [body.validation_file],
        "options": options, "hyperparameters": said, "kind": kind, "suffix": checked_suffix(body.suffix),
        "seed": body.seed or 0, "metadata": body.metadata, "auto_start": True,
    }  # fmt: skip


def mistral_spec(body: MistralJob) -> dict[str, Any]:
    """Return what a job in Mistral's form asks for; see `openai_spec`."""
    for number, file in enumerate(body.training_files):
        if file.weight not in (None, 1):
            raise RequestError(
                "files are weighed equally here: leave it out", field=f"training_files[{number}].weight"
            )
    own = body.hyperparameters
    names = {
        "training_steps": "steps", "learning_rate": "lr", "weight_decay": "weight-decay",
        "warmup_fraction": "warmup", "epochs": "epochs", "seq_len": "max-tokens",
    }  # fmt: skip
    options: dict[str, Any] = {"method": "lora"}
    options |= {option: value for name, option in names.items() if (value := getattr(own, name)) is not None}
    return {
        "training_files": [file.file_id for file in body.training_files],
        "validation_files": body.validation_files or [],
        "options": options, "hyperparameters": own.model_dump(exclude_none=True), "kind": "supervised",
        "suffix": checked_suffix(body.suffix), "seed": 0, "metadata": None,
        "auto_start": body.auto_start is not False,
    }  # fmt: skip


def checked_suffix(suffix: str | None) -> str | None:
    """Return a name for the result; RequestError for one that no request could ask for."""
    return checked_name("suffix", suffix) if suffix else None


def checked_name(field: str, name: str) -> str:
    """Return a name for an adapter; RequestError for one that is not plain enough to be asked for."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{field} must be 1 to 64 letters, digits, dots, hyphens and underscores, not a mark at first",
            field=field,
        )
    return name


def model_name(job: TuningJob) -> str | None:
    """Return the name under which a job's result is served; None until it is."""
    is_there = job.status == "succeeded" and not (job.result or {}).get("is_deleted")
    return f"{job.model}:{job.adapter}" if is_there else None


def openai_body(job: TuningJob) -> dict[str, Any]:
    """Return a job as OpenAI's client reads it."""
    spec, result = job.spec, job.result or {}
    status = _OPENAI.get(job.status, job.status)
    if job.status == "running" and "steps" not in result:
        status = "validating_files"
    said = spec["hyperparameters"]
    shared = {name: said.get(name, "auto") for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
    inner = shared | ({"beta": said["beta"]} if "beta" in said else {})
    estimate = result.get("estimated_finish") if status == "running" else None
    return {
        "id": job.id, "object": "fine_tuning.job", "created_at": int(job.created_at),
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "model": job.model, "fine_tuned_model": model_name(job), "organization_id": job.owner,
        "status": status,
        "hyperparameters": shared, "training_file": spec["training_files"][0],
        "validation_file": next(iter(spec["validation_files"]), None),
        "result_files": result.get("result_files", []),
        "trained_tokens": result.get("trained_tokens") if job.is_over else None, "error": job.error,
        "user_provided_suffix": spec["suffix"], "seed": spec["seed"], "integrations": [],
        "estimated_finish": None if estimate is None else int(estimate), "metadata": spec["metadata"],
        "method": {"type": spec["kind"], spec["kind"]: {"hyperparameters": inner}},
    }  # fmt: skip


def mistral_body(job: TuningJob) -> dict[str, Any]:
    """Return a job as Mistral's client reads it, without its events and checkpoints."""
    spec, result = job.spec, job.result or {}
    status = _MISTRAL[job.status]
    if job.status == "failed" and (job.error or {}).get("code") == "invalid_training_file":
        status = "FAILED_VALIDATION"
    if job.status == "running" and "steps" not in result:
        status = "VALIDATING"
    options = spec["options"]
    return {
        "id": job.id, "object": "job", "job_type": "completion", "auto_start": spec["auto_start"],
        "model": job.model, "status": status, "created_at": int(job.created_at),
        "modified_at": int(job.modified_at), "training_files": spec["training_files"],
        "validation_files": spec["validation_files"],
        "hyperparameters": {
            "training_steps": options.get("steps", result.get("steps")),
            "learning_rate": options.get("lr", _BASE_LR["lora"]),
            "weight_decay": options.get("weight-decay", 0.0),
            "warmup_fraction": options.get("warmup", 0.05), "epochs": options.get("epochs"),
            "seq_len": options.get("max-tokens"),
        },
        "fine_tuned_model": model_name(job), "suffix": spec["suffix"], "integrations": [], "repositories": [],
        "trained_tokens": result.get("trained_tokens") if job.is_over else None,
        "metadata": {"estimated_start_time": None, "expected_duration_seconds": None, "cost": None},
    }  # fmt: skip


def openai_event(event: TuningEvent) -> dict[str, Any]:
    """Return an event as OpenAI's client reads it."""
    kind = "metrics" if event.kind == "metrics" else "message"
    level = "error" if event.data.get("status") == "failed" else "info"
    return {
        "id": f"ftevent-{event.job_id}-{event.number}", "object": "fine_tuning.job.event",
        "created_at": int(event.at), "level": level, "message": event.message,
        "type": kind, "data": event.data,
    }  # fmt: skip


def checkpoint_adapter(job: TuningJob, step: int) -> str:
    """Return the name of a checkpoint's adapter; no suffix that anyone can ask for has its mark."""
    return f"{job.adapter}@step-{step}"


def openai_checkpoint(job: TuningJob, event: TuningEvent) -> dict[str, Any]:
    """Return a checkpoint as OpenAI's client reads it."""
    step = event.data["step"]
    metrics = {name: event.data[name] for name in ("step", "train_loss", "valid_loss")}
    return {
        "id": f"ftckpt-{event.job_id}-{event.number}", "object": "fine_tuning.job.checkpoint",
        "created_at": int(event.at),
        "fine_tuned_model_checkpoint": f"{job.model}:{checkpoint_adapter(job, step)}",
        "fine_tuning_job_id": job.id, "metrics": metrics, "step_number": step,
    }  # fmt: skip


def mistral_event(event: TuningEvent) -> dict[str, Any]:
    """Return an event as Mistral's client reads it."""
    return {"name": event.message, "created_at": int(event.at), "data": event.data}


def mistral_checkpoint(event: TuningEvent) -> dict[str, Any]:
    """Return a checkpoint as Mistral's client reads it."""
    metrics: Mapping[str, Any] = {name: event.data[name] for name in ("train_loss", "valid_loss")}
    return {"metrics": metrics, "step_number": event.data["step"], "created_at": int(event.at)}


def event_number(event_id: str, job_id: str) -> int:
    """Return the number of an event from its id; RequestError for one of no event of this job."""
    text = event_id.removeprefix("ftevent-").removeprefix("ftckpt-").removeprefix(f"{job_id}-")
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise RequestError("after must be the id of one of this job's events", field="after")
    return int(text)
