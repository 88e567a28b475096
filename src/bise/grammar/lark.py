"""The part of Lark's language that callers may write grammars in; everything else is refused by its line.

Rules (lower case) and terminals (upper case), `|`, groups, `?`, `*`, `+`, `~n`, `~n..m`, `{n,m}`, `[...]`
for an optional part, strings with an `i` flag, regular expressions, ranges `"a".."z"`, comments, `%ignore`.
GBNF's `::=` is read as `:`, with `root` for `start`, and its classes as they are.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NoReturn

from bise.errors import RequestError, quoted
from bise.grammar.pattern import MAX_SIZE, parse_pattern
from bise.grammar.regex import Alt, Chars, Regex, Repeat, Seq, matches_empty, ranges, seq, size, unedged
from bise.grammar.regex import text as literal
from bise.grammar.symbols import Builder, Symbol

_TOKEN = re.compile(
    r"(?P<space>[ \t\r]+|(?:\#|//)[^\n]*)|(?P<line>\n)|(?P<string>\"(?:[^\"\\\n]|\\.)*\")(?P<fold>i?)"
    r"|(?P<regex>/(?:[^/\\\n\[]|\\.|\[(?:[^\]\\\n]|\\.)*\])+/)(?P<flags>[a-z]*)"
    r"|(?P<class>\[\^?(?:[^\]\\\n\"-]|\\.){0,200}-(?:[^\]\\\n\"]|\\.){0,200}\])|(?P<dots>\.\.)"
    r"|(?P<count>\{\d{1,7}(?:,(?:\d{1,7})?)?\})|(?P<number>\d{1,7})|(?P<directive>%[a-z]+)"
    r"|(?P<name>[a-zA-Z_][a-zA-Z0-9_-]*)|(?P<define>::=|:)|(?P<sign>[|()\[\]?*+~])"
)
_MAX_DEPTH = 40


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int
    flags: str = ""


@dataclass(frozen=True, slots=True)
class _Name:
    """A rule or a terminal that is used."""

    name: str
    line: int


@dataclass(frozen=True, slots=True)
class _Node:
    """Something built of parts: `seq`, `alt` or `repeat`."""

    kind: str
    parts: tuple[_Part, ...]
    low: int = 1
    high: int | None = 1


_Part = _Name | _Node | Regex


def lark_rule(source: str, builder: Builder, field: str) -> Symbol:
    """Return the rule `start` (or `root`) of a grammar; RequestError names the line of what is refused."""
    return _Reader(source, builder, field).start()


class _Reader:
    """Reads one grammar: definitions first, rules and terminals from them on demand."""

    def __init__(self, source: str, builder: Builder, field: str) -> None:
        self._field = field
        self._builder = builder
        self._tokens = self._split(source)
        self._at = 0
        self._definitions: dict[str, _Part] = {}
        self._ignored: list[_Part] = []
        self._rules: dict[str, int] = {}
        self._terminals: dict[str, Regex] = {}
        self._symbols: dict[str, Symbol] = {}
        self._unmade: list[tuple[int, str]] = []
        """Rules that are used and hold nothing yet, so that no call is as deep as rules lead to rules."""
        while self._at < len(self._tokens):
            self._definition()

    def start(self) -> Symbol:
        name = "start" if "start" in self._definitions else "root"
        if name not in self._definitions:
            raise RequestError(f"{self._field} has no rule named start", field=self._field)
        first = self._symbol(_Name(name, 0))
        while self._unmade:
            self._make(*self._unmade.pop())
        gap = self._gap()
        return first if gap is None else self._builder.rule((gap, first))

    def _refuse(self, line: int, reason: str) -> NoReturn:
        raise RequestError(f"{self._field}, line {line}: {reason}", field=self._field)

    # Reading.

    def _split(self, source: str) -> list[_Token]:
        tokens: list[_Token] = []
        place, line = 0, 1
        while place < len(source):
            match = _TOKEN.match(source, place)
            if match is None:
                self._refuse(line, f"{quoted(source[place : place + 20])} cannot be read")
            self._builder.budget.spend(1)
            kind = next(
                name for name, value in match.groupdict().items() if value and name not in ("fold", "flags")
            )
            if kind == "directive" and match[kind] != "%ignore":
                self._refuse(line, f"{match[kind]} is not supported; known: %ignore")
            place = match.end()
            if kind == "line":
                tokens.append(_Token("line", "", line))
                line += 1
            elif kind != "space":
                tokens.append(_Token(kind, match[kind], line, match["fold"] or match["flags"] or ""))
        return tokens

    def _peek(self, *, over_lines: bool = False) -> _Token:
        """Return the next token; `end` where the definition ends: at a line that does not go on with `|`."""
        place = self._at
        while place < len(self._tokens) and self._tokens[place].kind == "line":
            place += 1
        token = self._tokens[place] if place < len(self._tokens) else _Token("end", "", 0)
        if place > self._at and not over_lines and token.text != "|":
            return _Token("end", "", token.line)
        return token

    def _take(self, *, over_lines: bool = False) -> _Token:
        token = self._peek(over_lines=over_lines)
        while self._at < len(self._tokens) and self._tokens[self._at].kind == "line":
            self._at += 1
        self._at += 1
        return token

    def _definition(self) -> None:
        token = self._take(over_lines=True)
        if token.kind == "end":
            self._at = len(self._tokens)
            return
        if token.kind == "directive":
            self._ignored.append(self._alternatives(0))
            return
        if token.kind == "sign" and token.text == "?":  # Lark: no node of its own in the tree
            token = self._take()
        if token.kind != "name" or self._take().kind != "define":
            self._refuse(token.line, f"{quoted(token.text)} begins no definition (name: ...)")
        if token.text in self._definitions:
            self._refuse(token.line, f"{token.text} is defined twice")
        self._definitions[token.text] = self._alternatives(0)
        rest = self._peek()
        if rest.kind != "end":
            self._refuse(rest.line, f"{quoted(rest.text)} cannot stand here")

    def _alternatives(self, depth: int) -> _Part:
        if depth > _MAX_DEPTH:
            self._refuse(self._peek().line, f"nests more than {_MAX_DEPTH} groups")
        options = [self._sequence(depth)]
        while self._peek(over_lines=depth > 0).text == "|":
            self._take(over_lines=True)
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _Node("alt", tuple(options))

    def _sequence(self, depth: int) -> _Part:
        parts: list[_Part] = []
        while True:
            token = self._peek(over_lines=depth > 0)
            if token.kind in ("end", "define") or token.text in ("|", ")", "]"):
                break
            parts.append(self._repeated(self._atom(depth), depth))
        return parts[0] if len(parts) == 1 else _Node("seq", tuple(parts))

    def _atom(self, depth: int) -> _Part:
        token = self._take(over_lines=depth > 0)
        if token.kind == "string":
            return self._string(token)
        if token.kind in ("regex", "class"):
            return self._regex(token)
        if token.kind == "name":
            return _Name(token.text, token.line)
        if token.text not in ("(", "["):
            self._refuse(token.line, f"{quoted(token.text or 'the end')} cannot stand here")
        inner = self._alternatives(depth + 1)
        closing = self._take(over_lines=True)
        if closing.text != {"(": ")", "[": "]"}[token.text]:
            self._refuse(token.line, f"{token.text} is not closed")
        return inner if token.text == "(" else _Node("repeat", (inner,), 0, 1)

    def _unquoted(self, token: _Token) -> str:
        try:
            value = json.loads(token.text)
        except ValueError:
            self._refuse(token.line, f"{quoted(token.text)} has an escape that JSON does not know")
        assert isinstance(value, str)
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
            self._refuse(token.line, "a string holds half of a surrogate pair")
        return value

    def _string(self, token: _Token) -> _Part:
        value = self._unquoted(token)
        if self._peek().kind == "dots":
            self._take()
            following = self._take()
            last = self._unquoted(following) if following.kind == "string" else ""
            if not (len(value) == len(last) == 1 and value <= last):
                self._refuse(token.line, "a range needs two single characters in order")
            return Chars(ranges([(ord(value), ord(last))]))
        if "i" not in token.flags:
            return literal(value)
        folded = ({letter, letter.lower(), letter.upper()} for letter in value)
        return Seq(
            tuple(Chars(ranges((ord(one), ord(one)) for one in both if len(one) == 1)) for both in folded)
        )

    def _regex(self, token: _Token) -> _Part:
        if token.flags:
            self._refuse(token.line, f"the flags {token.flags} are not supported")
        source = token.text[1:-1].replace("\\/", "/") if token.kind == "regex" else token.text
        node = unedged(parse_pattern(source, f"{self._field}, line {token.line}"))
        if node is None:
            self._refuse(token.line, "^ and $ have no meaning inside of a terminal")
        return node

    def _repeated(self, part: _Part, depth: int) -> _Part:
        token = self._peek(over_lines=depth > 0)
        counts = {"?": (0, 1), "*": (0, None), "+": (1, None)}.get(token.text)
        if token.kind == "count":
            low, _, high = token.text.strip("{}").partition(",")
            counts = (int(low), int(high) if high else None if "," in token.text else int(low))
        elif token.text == "~":
            self._take()
            counts = self._count()
            return self._counted(part, counts, token.line)
        if counts is None:
            return part
        self._take(over_lines=depth > 0)
        return self._counted(part, counts, token.line)

    def _count(self) -> tuple[int, int]:
        first = self._take()
        if first.kind != "number":
            self._refuse(first.line, "~ needs a count")
        if self._peek().kind != "dots":
            return int(first.text), int(first.text)
        self._take()
        last = self._take()
        return int(first.text), int(last.text) if last.kind == "number" else -1

    def _counted(self, part: _Part, counts: tuple[int, int | None], line: int) -> _Part:
        low, high = counts
        if high is not None and high < low:
            self._refuse(line, "the upper count of a repetition is below the lower one")
        return _Node("repeat", (part,), low, high)

    # Building.

    def _symbol(self, use: _Name) -> Symbol:
        if use.name not in self._definitions:
            self._refuse(use.line, f"{use.name} is not defined")
        found = self._symbols.get(use.name)
        if found is not None:
            return found
        if use.name.upper() == use.name:
            symbol = self._lexeme(use.name, self._terminal(use, ()))
            self._symbols[use.name] = symbol
            return symbol
        rule = self._symbols[use.name] = self._builder.rule()
        self._unmade.append((rule, use.name))
        return rule

    def _make(self, rule: int, name: str) -> None:
        part = self._definitions[name]
        options = part.parts if isinstance(part, _Node) and part.kind == "alt" else (part,)
        for option in options:
            self._builder.define(rule, self._sequence_of(option))

    def _sequence_of(self, part: _Part) -> tuple[Symbol, ...]:
        if isinstance(part, _Node) and part.kind == "seq":
            return tuple(symbol for one in part.parts for symbol in self._sequence_of(one))
        if isinstance(part, _Node) and part.kind == "alt":
            return (self._builder.rule(*map(self._sequence_of, part.parts)),)
        if isinstance(part, _Node):
            inner = self._sequence_of(part.parts[0])
            item = inner[0] if len(inner) == 1 else self._builder.rule(inner)
            return self._builder.repeated(item, part.low, part.high)
        if isinstance(part, _Name):
            return (self._symbol(part),)
        return (self._lexeme(f"{part!r}", part),) if part != Seq(()) else ()

    def _lexeme(self, name: str, node: Regex) -> Symbol:
        """Return what stands for a terminal: what is ignored after it, and nothing if it may be empty."""
        self._builder.budget.spend(len(name) // 8)
        terminal = self._builder.expression(f"lark {name}", node)
        gap = self._gap()
        symbols: tuple[Symbol, ...] = (terminal,) if gap is None else (terminal, gap)
        if len(symbols) == 1 and not matches_empty(node):
            return terminal
        return self._builder.rule(symbols, *([()] if matches_empty(node) else []))

    def _gap(self) -> int | None:
        """Return the rule of at most one ignored text; None where nothing is ignored."""
        if not self._ignored:
            return None
        if "" not in self._rules:
            self._rules[""] = -1
            nodes = [self._expression(part, ()) for part in self._ignored]
            terminal = self._builder.expression("lark ignored", Alt(tuple(nodes)))
            self._rules[""] = self._builder.rule((), (terminal,))
        return self._rules[""]

    def _terminal(self, use: _Name, way: tuple[str, ...]) -> Regex:
        if use.name in way:
            self._refuse(use.line, f"the terminal {use.name} contains itself; only rules may")
        if len(way) > _MAX_DEPTH:
            self._refuse(use.line, f"{way[0]} leads to {use.name} through more than {_MAX_DEPTH} terminals")
        if use.name not in self._definitions:
            self._refuse(use.line, f"{use.name} is not defined")
        found = self._terminals.get(use.name)
        if found is None:
            found = self._terminals[use.name] = self._expression(
                self._definitions[use.name], (*way, use.name)
            )
            if size(found) > MAX_SIZE:
                self._refuse(use.line, f"the terminal {use.name} grows beyond {MAX_SIZE} characters")
        return found

    def _expression(self, part: _Part, way: tuple[str, ...]) -> Regex:
        if isinstance(part, _Name):
            if part.name.upper() != part.name:
                self._refuse(part.line, f"a terminal cannot hold the rule {part.name}")
            return self._terminal(part, way)
        if not isinstance(part, _Node):
            return part
        inner = [self._expression(one, way) for one in part.parts]
        if part.kind == "seq":
            return seq(*inner) if inner else Seq(())
        return Alt(tuple(inner)) if part.kind == "alt" else Repeat(inner[0], part.low, part.high)
