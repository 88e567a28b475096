"""The chat loop: asks the model, keeps the conversation, obeys slash commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from bise.cli.answer import Answer, ask, ask_until_interrupted, ignore_text
from bise.cli.output import aside, complain, on_terminal, write_json, write_text
from bise.cli.session import chat_ids, model_name
from bise.cli.transcript import Transcript
from bise.config import bise_home, colour_wanted, state_directory
from bise.errors import BiseError, ContextOverflowError, UserError

if TYPE_CHECKING:
    from bise.engine.load import LoadedModel
    from bise.engine.request import SamplingParams

HELP = """\
/help            this page
/system [TEXT]   show or set the system prompt (/system - removes it)
/reset           forget the conversation, keep the system prompt
/save NAME       save the conversation (a bare name goes under BISE_HOME/chats)
/load NAME       go on with a saved conversation
/exit            leave (so does Ctrl-D)
Ctrl-C stops an answer. End a line with \\ to go on in the next one, or write \"\"\" before and after a block.
A line that starts with a space is sent as it is, slash and all."""

HISTORY_LINES = 2000


class Leave(Exception):
    """The person wants to leave."""


class Chat:
    """One conversation with one model."""

    def __init__(
        self,
        loaded: LoadedModel,
        params: SamplingParams,
        *,
        system: str | None = None,
        as_json: bool = False,
        adapter: str | None = None,
    ) -> None:
        self.loaded = loaded
        self.params = params
        self.transcript = Transcript(system=system)
        self.as_json = as_json
        self.adapter = adapter
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/exit": self._exit,
        }

    def reply(self, message: str, *, interruptible: bool = False) -> Answer:
        """Ask `message`, stream the answer out, keep both; a message that cannot be asked leaves no trace."""
        from bise.engine.request import Request

        self.transcript.add("user", message)
        try:
            token_ids = chat_ids(self.loaded, self.transcript.messages())
            request = Request(token_ids=token_ids, params=self.params, adapter=self.adapter)
            run = ask_until_interrupted if interruptible else ask
            answer = run(self.loaded, request, ignore_text if self.as_json else write_text)
        except ContextOverflowError as error:
            self.transcript.drop_last()
            if not self.transcript.turns:
                raise
            raise ContextOverflowError(
                f"{error}; /reset starts afresh, /save NAME keeps this one", field=error.field
            ) from error
        except BaseException:
            self.transcript.drop_last()
            raise
        self._finish(answer)
        if answer.text:
            self.transcript.add("assistant", answer.text)
        else:  # an empty turn is no turn: most chat formats cannot say it
            self.transcript.drop_last()
            aside("(no answer; the question is not kept)")
        return answer

    def _finish(self, answer: Answer) -> None:
        if self.as_json:
            head = {"role": "assistant", "content": answer.text, "token_ids": answer.token_ids}
            write_json(head | answer.report() | {"model": model_name(self.loaded), "seed": self.params.seed})
            return
        write_text("\n")
        if answer.finish_reason == "length":
            why = (
                "--max-tokens"
                if self.params.max_tokens == len(answer.token_ids)
                else "the context is full; /reset"
            )
            aside(f"(cut off after {len(answer.token_ids)} tokens: {why})")
        if answer.finish_reason == "abort":
            aside("(stopped)")
        if on_terminal(sys.stderr):
            aside(answer.speed_line(self.loaded.engine.max_context))

    def command(self, line: str) -> None:
        """Obey a slash command; UserError for one that does not exist; Leave for /exit."""
        name, _, argument = line.partition(" ")
        action = self._commands.get("/exit" if name in ("/quit", "/bye") else name)
        if action is None:
            raise UserError(
                f"there is no {name}; /help lists the commands, a space before the slash sends it as text"
            )
        action(argument.strip())

    def _help(self, _: str) -> None:
        click.echo(HELP, err=True)

    def _system(self, argument: str) -> None:
        if argument:
            self.transcript.system = None if argument == "-" else argument
        aside(f"system prompt: {self.transcript.system or 'none'}")

    def _reset(self, _: str) -> None:
        self.transcript.reset()
        aside("(new conversation)")

    def _save(self, argument: str) -> None:
        aside(f"saved {self.transcript.save(argument)}")

    def _load(self, argument: str) -> None:
        path = self.transcript.load(argument)
        aside(f"loaded {path}: {len(self.transcript.turns)} turns")

    def _exit(self, _: str) -> None:
        raise Leave


def run_lines(chat: Chat, stream: BinaryIO) -> None:
    """Answer each line of a pipe in turn; the first line that cannot be honoured ends it with its number."""
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of standard input is not UTF-8 (byte {error.start})") from error
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                chat.command(line)
            else:
                chat.reply(line)
        except Leave:
            return
        except UserError as error:
            raise UserError(f"line {number} of standard input: {error}", field=error.field) from error


def run_terminal(chat: Chat, *, keep_history: bool) -> None:
    """Talk with a person until Ctrl-D or /exit; errors are told and the conversation goes on."""
    aside("/help lists the commands, Ctrl-D leaves")
    with line_editor(bise_home() / "chat_history" if keep_history else None):
        while True:
            try:
                message = read_message(_prompt)
                if message.startswith("/"):
                    chat.command(message)
                elif message.strip():
                    chat.reply(message, interruptible=True)
            except (EOFError, Leave):
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                aside("\n(Ctrl-D leaves)")
            except BiseError as error:
                complain(str(error))


def _prompt(continued: bool) -> str:
    text = "  … " if continued else "bise> "
    # 1 and 2 tell readline which bytes take no room on the screen; a terminal alone would show them.
    coloured = colour_wanted() and "readline" in sys.modules
    shown = f"\x01\x1b[1;36m\x02{text}\x01\x1b[0m\x02" if coloured else text
    try:
        return input(shown)
    except UnicodeDecodeError as error:
        raise UserError("that line is not UTF-8") from error


def read_message(read_line: Callable[[bool], str]) -> str:
    """Return one message: a line, lines joined by a trailing backslash, or a block between triple quotes.

    `read_line(continued)` returns one line without its newline and raises EOFError at the end.
    """
    line = read_line(False)
    if line.startswith('"""'):
        return "\n".join(_block(line[3:], read_line))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line(True))
    return "\n".join(lines)


def _block(first: str, read_line: Callable[[bool], str]) -> Iterator[str]:
    line, opening = first, True
    while not line.rstrip().endswith('"""'):
        if line or not opening:
            yield line
        line, opening = read_line(True), False
    if rest := line.rstrip()[:-3]:
        yield rest


@contextmanager
def line_editor(history: Path | None) -> Generator[None]:
    """Give `input` line editing, and a history kept in `history` (mode 0600; None keeps nothing)."""
    try:
        import readline
    except ImportError:  # this Python was built without it: plain input still works
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    readline.parse_and_bind("set enable-bracketed-paste on")
    if history is not None and history.is_file():
        try:
            readline.read_history_file(history)
        except OSError as error:
            aside(f"note: {history} cannot be read ({error.strerror}); starting without history")
    try:
        yield
    finally:
        if history is not None:
            _save_history(history, readline.write_history_file)


def _save_history(history: Path, write: Callable[[str], None]) -> None:
    try:
        state_directory()
        history.touch(mode=0o600)
        write(str(history))
    except OSError as error:
        aside(f"note: {history} cannot be written ({error.strerror}); this session's lines are not kept")
