"""`bise config`: the configuration that counts, and where each value comes from."""

from __future__ import annotations

from typing import Any, cast

import click
from click.core import ParameterSource

from bise.cli.config_file import config_path, defaults_of, read_config
from bise.cli.output import aside, write_json, write_table
from bise.errors import UserError

_SOURCES = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.DEFAULT: "default",
}


@click.group("config")
def command() -> None:
    """Show the configuration that counts.

    Values come from the command line, else from the environment (BISE_SERVE_PORT for `bise serve --port`),
    else from BISE_HOME/config.toml ([serve], port = 8001), else from the defaults.
    """


@command.command("show", context_settings={"ignore_unknown_options": True})
@click.argument("verb", default="serve", metavar="[VERB]")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[FLAGS]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(verb: str, flags: tuple[str, ...], as_json: bool) -> None:
    """Print every option of VERB (serve), its value and where it comes from; FLAGS as VERB would get them."""
    rows = effective(verb, list(flags))
    if as_json:
        write_json({"file": str(config_path()), "verb": verb, "options": rows}, indent=2)
        return
    write_table(
        ["OPTION", "VALUE", "FROM"], [[row["option"], _shown(row["value"]), row["source"]] for row in rows]
    )
    note = "" if config_path().exists() else " (there is none)"
    aside(f"file: {config_path()}{note}")


def effective(verb: str, flags: list[str]) -> list[dict[str, Any]]:
    """Return each option of a verb with its value and source, as the verb itself would see them."""
    from bise.cli.app import bise

    target = bise.get_command(click.Context(bise), verb)
    if target is None or isinstance(target, click.Group):
        raise UserError(f"{verb!r} is no command that takes options; try `bise config show serve`")
    parent = click.Context(bise, info_name="bise", auto_envvar_prefix="BISE")
    defaults = defaults_of(verb, target, read_config().get(verb, {}))
    with target.make_context(verb, flags, parent=parent, default_map=defaults) as context:
        rows: list[dict[str, Any]] = []
        for parameter in target.params:
            if parameter.name == "help":
                continue
            source = context.get_parameter_source(parameter.name)
            value = cast(Any, context.params.get(parameter.name))
            rows.append(
                {
                    "option": parameter.opts[-1] if parameter.param_type_name == "option" else parameter.name,
                    "value": [*cast(tuple[Any, ...], value)] if isinstance(value, tuple) else value,
                    "source": _SOURCES.get(source, "default") if source else "default",
                }
            )
    return rows


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "-"
    return " ".join(map(str, cast(list[Any], value))) if isinstance(value, list) else str(value)
