"""BISE_HOME/config.toml: what options are when neither the command line nor the environment sets them.

One table per verb, one key per option: `[serve]`, then `port = 8001`. Every mistake is refused with the file
and the field.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import click

from bise.config import bise_home
from bise.errors import ConfigError

NAME = "config.toml"
MAX_BYTES = 1 << 20


def config_path() -> Path:
    """Return where the configuration file is looked for."""
    return bise_home() / NAME


def read_config() -> dict[str, dict[str, Any]]:
    """Return the file's tables; {} when there is no file. ConfigError when it is not sound TOML."""
    path = config_path()
    if not path.exists():
        return {}
    import tomllib

    from bise.diskfile import read_bounded
    from bise.errors import ModelFileError

    try:
        tables = tomllib.loads(read_bounded(path, MAX_BYTES).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ModelFileError) as error:
        raise ConfigError(f"{path}: {error}", field=str(path)) from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} is outside of a table; write it under [VERB]", field=name)
    return tables


def defaults_of(verb: str, command: click.Command, table: dict[str, Any]) -> dict[str, Any]:
    """Return a verb's table by the names that click uses; ConfigError names the file and a bad field."""
    path = config_path()
    names = {name: parameter for parameter in command.params for name in _names(parameter)}
    values: dict[str, Any] = {}
    context = click.Context(command, info_name=verb)
    for key, value in table.items():
        parameter = names.get(key.replace("_", "-"))
        if parameter is None:
            known = ", ".join(sorted(name for name in names if name != "help"))
            raise ConfigError(f"{path}: [{verb}] has no option {key}; known: {known}", field=key)
        try:
            parameter.type_cast_value(context, cast(Any, _checked(parameter, value)))
        except click.UsageError as error:
            raise ConfigError(
                f"{path}: [{verb}] {key}: {plain_kinds(error.message.rstrip('.'))}", field=key
            ) from error
        values[parameter.name] = value
    return values


def plain_kinds(message: str) -> str:
    """Return a message of click with its names of number types said plainly."""
    whole = re.sub(r"is not a valid integer( range)?", "is not a whole number", message)
    return re.sub(r"is not a valid float( range)?", "is not a number", whole)


def _checked(parameter: click.Parameter, value: object) -> object:
    """Refuse what click would convert silently: a string for a switch, one value for a list, a table."""
    is_many = parameter.multiple or parameter.nargs != 1
    if is_many != isinstance(value, list) or isinstance(value, dict):
        raise click.BadParameter("must be a list" if is_many else "must be one value")
    if isinstance(parameter.type, click.types.BoolParamType) != isinstance(value, bool):
        raise click.BadParameter("must be true or false" if not isinstance(value, bool) else "is no switch")
    return value


def _names(parameter: click.Parameter) -> list[str]:
    """Return the names that an option has in the file: its long ones."""
    long = [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]
    return long or [(parameter.name or "").replace("_", "-")]
