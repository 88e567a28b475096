"""The `bise` command: finds the verb, turns every error into one line and an exit code.

A verb's module is imported only when that verb runs, so `bise --help` stays instant.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib import import_module

import click

from bise import __version__
from bise.cli.config_file import config_path, defaults_of, plain_kinds, read_config
from bise.config import colour_wanted, debug_enabled
from bise.errors import BiseError, ConfigError

VERBS = {
    "chat": "Talk to a model; the embedded one when none is named.",
    "generate": "Continue a prompt.",
    "serve": "Serve models over Mistral's and OpenAI's API.",
    "inspect": "Show what a model file holds and what it costs to run.",
    "replay": "Run the request of a receipt again and compare every token and log-prob.",
    "score": "Give the log-probs and perplexity of texts or chats.",
    "embed": "Turn texts into unit vectors.",
    "quantize": "Pack a model into 4 or 8 bits on disk.",
    "tune": "Fine-tune a model on your own examples.",
    "plan": "Tell what fits in memory and how fast it can be.",
    "bench": "Measure prefill and decode speed on this machine.",
    "keys": "Make, list, limit and revoke API keys.",
    "accounts": "Show and limit the people who sign in to the assistant.",
    "usage": "Tell who used what: requests, tokens, time, energy and cost.",
    "prices": "Show or change the price book.",
    "backup": "Save, check and restore keys, ledger, chats, files, secret and configuration.",
    "models": "List the models on this machine, hosted ones and known aliases; fetch, check, remove them.",
    "config": "Show the configuration that counts.",
    "doctor": "Check this machine and this installation.",
}
"""Every verb with the first line of its help; the module `bise.cli.<verb>` holds its `command`."""


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the page."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the verb, its defaults from the configuration file; None when there is none."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"bise.cli.{cmd_name}").command
        if tables := read_config():
            if unknown := tables.keys() - VERBS.keys():
                raise ConfigError(
                    f"{config_path()}: [{min(unknown)}] is no command of bise", field=min(unknown)
                )
            ctx.default_map = {cmd_name: defaults_of(cmd_name, command, tables.get(cmd_name, {}))}
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="State lives under BISE_HOME. `bise COMMAND --help` tells more.",
)
@click.version_option(__version__, prog_name="bise", message="%(prog)s %(version)s")
def bise() -> None:
    """Run Mistral-family models on the machine you own.

    MODEL is a directory (safetensors), a .gguf file or an alias; without one, the small embedded model
    answers.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 our fault, 2 the user's, 130 interrupted, 141 reader gone."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    Prints one line per error, and a traceback only with BISE_DEBUG=1.
    """
    try:
        return _run(args)
    except BrokenPipeError:
        return _close_output(128 + signal.SIGPIPE)
    except OSError as error:  # standard output is full or gone
        return _close_output(_complain(_internal(error), 1, error))


def _run(args: list[str] | None) -> int:
    if not debug_enabled():
        # Errors are told in one line below; only `bise serve` keeps a log beside them.
        logging.getLogger("bise").handlers[:] = [logging.NullHandler()]
    try:
        # Not bise.main(): it would turn a closed pipe into exit code 1.
        colour = None if colour_wanted() else False
        arguments = sys.argv[1:] if args is None else args
        with bise.make_context("bise", arguments, color=colour, auto_envvar_prefix="BISE") as context:
            bise.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        sys.stdout.flush()
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "bise"
        return _complain(f"{_usage_text(error)} (see `{command} --help`)", 2, error)
    except click.ClickException as error:
        return _complain(error.format_message(), 2, error)
    except (KeyboardInterrupt, click.Abort):
        _say("")
        return 128 + signal.SIGINT
    except BiseError as error:
        return _complain(str(error), error.exit_code, error)
    except OSError:
        raise
    except Exception as error:  # the root of the main thread: whatever arrives here is a bug or the machine's
        return _complain(_internal(error), 1, error)


def _usage_text(error: click.UsageError) -> str:
    return plain_kinds(" ".join(error.format_message().split()).rstrip("."))


def _internal(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory: try --quant q4, a shorter --context or a smaller model"
    return f"internal error, please report it: {type(error).__name__}: {text} (BISE_DEBUG=1 shows where)"


def _complain(message: str, code: int, error: BaseException) -> int:
    if debug_enabled():
        import traceback

        traceback.print_exception(error)
    _say(f"bise: error: {message}")
    return code


def _say(line: str) -> None:
    try:
        click.echo(line, err=True)
    except OSError:  # standard error is closed: nobody is left to tell
        return


def _close_output(code: int) -> int:
    # The interpreter flushes stdout once more at exit; it would complain about the closed pipe there.
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(devnull, stream.fileno())
        except (OSError, ValueError):
            continue
    return code
