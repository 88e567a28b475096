"""Options that hold the output of a verb to a grammar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bise.cli.options import text
from bise.errors import ModelFileError, UserError

if TYPE_CHECKING:
    from bise.grammar.spec import GrammarSpec

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path)


def grammar_options(function: F) -> F:
    """Add --json-schema, --regex, --choice and --grammar; `pop_grammar` gathers them."""
    for decorator in (
        click.option("--grammar", type=_FILE, metavar="FILE", help="Write only what a Lark grammar allows."),
        click.option(
            "--choice", multiple=True, type=text, help="Write exactly this or another --choice; repeat it."
        ),
        click.option("--regex", type=text, help="Write only what matches this pattern as a whole."),
        click.option(
            "--json-schema",
            type=_FILE,
            metavar="FILE",
            help="Write only JSON that is valid under this schema.",
        ),
    ):
        function = decorator(function)
    return function


def pop_grammar(values: dict[str, Any]) -> GrammarSpec | None:
    """Take the grammar options out of a command's keyword arguments; None when none was given.

    Raises UserError for a file that cannot be read, UsageError for more than one grammar.
    """
    from bise.grammar.spec import GrammarSpec

    schema, regex = values.pop("json_schema"), values.pop("regex")
    choice, grammar = values.pop("choice"), values.pop("grammar")
    if sum(one not in (None, ()) for one in (schema, regex, choice, grammar)) > 1:
        raise click.UsageError("give one of --json-schema, --regex, --choice and --grammar")
    if schema is not None:
        return GrammarSpec.json_schema_text(_read(schema, "--json-schema"), field="--json-schema")
    if regex is not None:
        return GrammarSpec.regex(regex, field="--regex")
    if choice:
        return GrammarSpec.choice(choice, field="--choice")
    return None if grammar is None else GrammarSpec.lark(_read(grammar, "--grammar"), field="--grammar")


def _read(path: Path, option: str) -> str:
    from bise.grammar.spec import MAX_SOURCE
    from bise.jsonfile import read_bytes

    try:
        return read_bytes(path, max_bytes=4 * MAX_SOURCE).decode()
    except (ModelFileError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UserError(f"{option} {path}: {reason}", field=option) from error
