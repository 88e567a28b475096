"""Names of files as a hub gives them: which are dangerous, and which of a repository a model needs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from bise.errors import HubError, quoted

MAX_NAME_BYTES = 255
_DEVICES = frozenset(
    (
        *("con", "prn", "aux", "nul", "clock$", "conin$", "conout$"),
        *(f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"),
    )
)
_SMALL = frozenset(
    (
        "config.json", "generation_config.json", "params.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "tekken.json",
        "chat_template.json", "chat_template.jinja", "model.safetensors.index.json",
        "consolidated.safetensors.index.json",
        "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
    )
)  # fmt: skip
_TOKENIZER = re.compile(r"tokenizer\.model\.v[0-9]{1,2}(m[0-9]{1,2})?")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LOCAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def is_repo(name: str) -> bool:
    """Return True for `owner/name` as hubs write it."""
    return _REPO.fullmatch(name) is not None and ".." not in name


def is_revision(name: str) -> bool:
    """Return True for a branch, tag or commit that can stand in an address."""
    return _REVISION.fullmatch(name) is not None and ".." not in name


def is_local_name(name: str) -> bool:
    """Return True for a name that a pulled model can have on this machine."""
    return _LOCAL.fullmatch(name) is not None and _fault(name) is None


def check_names(names: Iterable[object]) -> list[str]:
    """Return the names of a repository's files. Raises HubError when one could lead out of its directory, be
    a device, or be mistaken for another one; one such name makes the whole repository suspect.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise HubError("the hub lists a file whose name is no string; nothing was pulled")
        reason = _fault(name)
        if reason is not None:
            raise HubError(f"the hub lists a file {quoted(name)}, which {reason}; nothing was pulled")
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in seen:
            raise HubError(
                f"the hub lists {quoted(seen[folded])} and {quoted(name)}, which are one file to some disks; "
                "nothing was pulled"
            )
        seen[folded] = name
    return list(seen.values())


def _fault(name: str) -> str | None:
    try:
        data = name.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not name or name.startswith(("/", "~")) or "\\" in name or ":" in name:
        return "is no path inside the repository"
    if not name.isprintable():
        return "has control characters"
    if any(char in '<>"|?*' for char in name):
        return "has characters that some disks forbid"
    if len(data) > 4 * MAX_NAME_BYTES:
        return "is too long"
    for part in name.split("/"):
        if part in ("", ".", "..") or part.endswith((".", " ")) or part.startswith(" "):
            return "is no path inside the repository"
        if len(part.encode()) > MAX_NAME_BYTES:
            return f"has more than {MAX_NAME_BYTES} bytes"
        if part.split(".")[0].strip().casefold() in _DEVICES:
            return "is the name of a device"
    return None


def needed_files(names: Sequence[str]) -> list[str]:
    """Return which of a repository's files a model needs, weights last: safetensors in one layout, tokenizer,
    configuration, licence. Never pickles, never code. Raises HubError when there is no model of this kind.
    """
    plain = [name for name in names if "/" not in name]
    weights = [name for name in plain if name.endswith(".safetensors") and not name.startswith("adapter")]
    hf = [name for name in weights if not name.startswith("consolidated")]
    own = [name for name in weights if name.startswith("consolidated")]
    if hf and "config.json" in plain:
        chosen, other = hf, ("consolidated.safetensors.index.json",)
    elif own and "params.json" in plain:
        chosen, other = own, ("model.safetensors.index.json",)
    else:
        raise HubError(
            "the repository has no model that can be pulled: neither config.json + *.safetensors nor "
            "params.json + consolidated*.safetensors (pickles are never fetched; a .gguf file can be put "
            "under models by hand)"
        )
    small = [n for n in plain if (n in _SMALL or _TOKENIZER.fullmatch(n)) and n not in other]
    return [*sorted(small), *sorted(chosen)]
