"""Follows an output through a grammar and knows, at every byte, the shortest way to an end.

Earley's algorithm over terminals (CACM 13(2), 1970), with costs: each set of items also keeps what it takes
at least to finish every rule that is open, so that the way out is read off and never searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from bise.grammar.automaton import UNREACHABLE, Budget
from bise.grammar.symbols import Control, Grammar, State, Symbol, Terminal

Item: TypeAlias = tuple[int, int]
"""(place in `Table.symbols`, set in which the rule began)."""
Piece: TypeAlias = bytes | int
"""Text, or the id of a control token."""
Lexemes: TypeAlias = tuple[tuple[Terminal, State], ...]

MAX_SHORTEST = 10_000
"""Bytes that the shortest text of a language may have."""
_END = -1


class Table:
    """A grammar laid out flat, with the least cost of every rule; shared by all outputs of one grammar."""

    def __init__(self, grammar: Grammar, budget: Budget) -> None:
        """Lay out `grammar`. Raises RequestError when the language is empty or its shortest text is too
        long.
        """
        self.symbols: list[Symbol | None] = []
        """Symbol after each place; None at the end of an alternative."""
        self.owners: list[int] = []
        """Rule of each place."""
        self.begins: list[list[int]] = []
        """First places of each rule's alternatives."""
        for number, alternatives in enumerate(grammar.rules):
            self.begins.append([])
            for symbols in alternatives:
                self.begins[-1].append(len(self.symbols))
                self.symbols += [*symbols, None]
                self.owners += [number] * (len(symbols) + 1)
        self.start = grammar.start
        self.costs = [UNREACHABLE] * len(grammar.rules)
        """Fewest bytes of each rule; a control token counts as one."""
        self.best = [_END] * len(grammar.rules)
        """First place of the alternative that costs least."""
        self._spread_costs(budget)
        self._prune()
        self.nullable = self._nullable(budget)
        self.rests = self._rest_costs()

    def _symbol_cost(self, symbol: Symbol) -> int:
        if isinstance(symbol, int):
            return self.costs[symbol]
        return 1 if isinstance(symbol, Control) else symbol.rest(symbol.start)

    def _spread_costs(self, budget: Budget) -> None:
        """Lower the costs until nothing changes; each round that changes a rule looks at its users again."""
        users = self._users()
        left = list(range(len(self.costs) - 1, -1, -1))
        queued = set(left)
        while left:
            number = left.pop()
            queued.discard(number)
            for begin in self.begins[number]:
                place, total = begin, 0
                while (symbol := self.symbols[place]) is not None and total < UNREACHABLE:
                    budget.spend(1)
                    total += self._symbol_cost(symbol)
                    place += 1
                if total < self.costs[number]:
                    self.costs[number], self.best[number] = total, begin
                    left += users[number] - queued
                    queued |= users[number]

    def _prune(self) -> None:
        """Drop the alternatives that derive nothing."""
        for number, begins in enumerate(self.begins):
            self.begins[number] = [begin for begin in begins if self._is_possible(begin)]

    def _is_possible(self, place: int) -> bool:
        while (symbol := self.symbols[place]) is not None:
            if self._symbol_cost(symbol) >= UNREACHABLE:
                return False
            place += 1
        return True

    def alternatives(self, number: int) -> list[list[Symbol]]:
        """Return the alternatives of a rule that derive something."""
        found: list[list[Symbol]] = []
        for place in self.begins[number]:
            found.append([])
            while (symbol := self.symbols[place]) is not None:
                found[-1].append(symbol)
                place += 1
        return found

    def _nullable(self, budget: Budget) -> list[bool]:
        """Return which rules derive the empty text; each one found looks at its users again."""
        nullable = [False] * len(self.costs)
        users = self._users()
        left = list(range(len(self.costs)))
        while left:
            number = left.pop()
            budget.spend(1)
            if not nullable[number] and any(self._vanishes(begin, nullable) for begin in self.begins[number]):
                nullable[number] = True
                left += users[number]
        return nullable

    def _users(self) -> list[set[int]]:
        """Return, per rule, the rules that name it."""
        users: list[set[int]] = [set() for _ in self.costs]
        for place, symbol in enumerate(self.symbols):
            if isinstance(symbol, int):
                users[symbol].add(self.owners[place])
        return users

    def _vanishes(self, place: int, nullable: Sequence[bool]) -> bool:
        while (symbol := self.symbols[place]) is not None:
            if not isinstance(symbol, int) or not nullable[symbol]:
                return False
            place += 1
        return True

    def _rest_costs(self) -> list[int]:
        """Return, per place, the fewest bytes to the end of its alternative."""
        rests = [0] * len(self.symbols)
        for place in range(len(self.symbols) - 1, -1, -1):
            symbol = self.symbols[place]
            if symbol is not None:
                rests[place] = min(UNREACHABLE, rests[place + 1] + self._symbol_cost(symbol))
        return rests

    def shortest(self, place: int) -> list[Piece]:
        """Return the shortest text from `place` to the end of its alternative."""
        pieces: list[Piece] = []
        left = [place]
        while left:
            place = left.pop()
            symbol = self.symbols[place]
            if symbol is None:
                continue
            left.append(place + 1)
            if isinstance(symbol, int):
                left.append(self.best[symbol])
            else:
                pieces.append(
                    symbol.token_id if isinstance(symbol, Control) else symbol.shortest(symbol.start)
                )
        return pieces


class _Set:
    """Items that hold after a terminal; never changed once made."""

    __slots__ = ("after", "ends", "lexemes", "need", "outer", "scans", "tokens", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[int, list[Item]] = {}
        """Rule -> items that wait for it."""
        self.scans: dict[Terminal, list[Item]] = {}
        self.tokens: dict[int, list[Item]] = {}
        self.outer: dict[int, tuple[int, Item]] = {}
        """Rule that began here -> (what follows it at least, the item that it hands back to)."""
        self.after: dict[Terminal | int, tuple[int, Item]] = {}
        """Terminal or token -> (what follows it at least, the item after it)."""
        self.ends = False
        """The text may end here."""
        self.need = UNREACHABLE
        """Fewest bytes from here to an end."""
        self.lexemes: Lexemes = ()
        """What may stand next, at its beginning."""


class Tracker:
    """One output on its way. `advance` moves on, `mark` and `back_to` return to a state."""

    __slots__ = ("_chart", "_lexemes", "_table")

    def __init__(self, table: Table) -> None:
        self._table = table
        self._chart: list[_Set] = []
        self._lexemes: Lexemes = ()
        """Terminals under way since the last set; () between two."""
        items = [(begin, 0) for begin in table.begins[table.start]]
        self._chart.append(self._closed(items))

    def mark(self) -> tuple[int, Lexemes]:
        """Return the state, for `back_to`."""
        return len(self._chart), self._lexemes

    def back_to(self, mark: tuple[int, Lexemes]) -> None:
        """Return to an earlier state."""
        del self._chart[mark[0] :]
        self._lexemes = mark[1]

    def advance(self, data: bytes) -> bool:
        """Take bytes; False, with nothing changed, where the grammar has no such text."""
        mark = self.mark()
        for byte in data:
            if not self._step(byte):
                self.back_to(mark)
                return False
        return True

    def advance_token(self, token_id: int) -> bool:
        """Take a control token; False, with nothing changed, where the grammar has none."""
        mark = self.mark()
        if self._lexemes and not self._finish_terminal():
            return False
        items = self._chart[-1].tokens.get(token_id)
        if items is None:
            self.back_to(mark)
            return False
        self._chart.append(self._closed([(place + 1, origin) for place, origin in items]))
        return True

    def need(self) -> int:
        """Return the fewest bytes that make the text complete, 0 where it is; a control token counts as
        one.
        """
        last = self._chart[-1]
        if not self._lexemes:
            return last.need
        return min(terminal.rest(state) + last.after[terminal][0] for terminal, state in self._lexemes)

    def shortest(self) -> list[Piece]:
        """Return the shortest text that makes the output complete."""
        last = self._chart[-1]
        if not self._lexemes:
            if last.ends and last.need == 0:
                return []
            symbol = min(last.after, key=lambda key: self._first_cost(last, key))
            piece = symbol if isinstance(symbol, int) else symbol.shortest(symbol.start)
            return [piece, *self._way_out(last.after[symbol][1])]
        terminal, state = min(
            self._lexemes, key=lambda lexeme: lexeme[0].rest(lexeme[1]) + last.after[lexeme[0]][0]
        )
        return [terminal.shortest(state), *self._way_out(last.after[terminal][1])]

    def _first_cost(self, items: _Set, symbol: Terminal | int) -> int:
        own = 1 if isinstance(symbol, int) else symbol.rest(symbol.start)
        return own + items.after[symbol][0]

    def _way_out(self, item: Item) -> list[Piece]:
        pieces: list[Piece] = []
        while True:
            place, origin = item
            pieces += self._table.shortest(place)
            owner = self._table.owners[place]
            found = self._chart[origin].outer.get(owner)
            if found is None or found[1][0] == _END:
                return pieces
            item = found[1]

    def _step(self, byte: int) -> bool:
        lexemes = self._lexemes
        if lexemes:
            moved = _moved(lexemes, byte)
            if moved:
                self._lexemes = moved
                return True
            if not self._finish_terminal():
                return False
        self._lexemes = _moved(self._chart[-1].lexemes, byte)
        return bool(self._lexemes)

    def _finish_terminal(self) -> bool:
        """End the terminal under way where it is; False when no one may end here."""
        last = self._chart[-1]
        items = [
            (place + 1, origin)
            for terminal, state in self._lexemes
            if terminal.rest(state) == 0
            for place, origin in last.scans[terminal]
        ]
        if not items:
            return False
        self._chart.append(self._closed(items))
        self._lexemes = ()
        return True

    def _closed(self, items: list[Item]) -> _Set:
        """Return the set of what follows from `items`, which is about to become the chart's next."""
        table, chart, index = self._table, self._chart, len(self._chart)
        made = _Set()
        seen = set(items)
        left = list(seen)
        left.sort()
        for item in left:
            place, origin = item
            symbol = table.symbols[place]
            follow: Sequence[Item] = ()
            if symbol is None:
                owner = table.owners[place]
                if origin == 0 and owner == table.start:
                    made.ends = True
                if origin < index:
                    follow = [(parent + 1, began) for parent, began in chart[origin].waiting.get(owner, ())]
            elif isinstance(symbol, int):
                waiting = made.waiting.get(symbol)
                if waiting is None:
                    made.waiting[symbol] = [item]
                    follow = [(begin, index) for begin in table.begins[symbol]]
                else:
                    waiting.append(item)
                if table.nullable[symbol]:
                    follow = [*follow, (place + 1, origin)]
            elif isinstance(symbol, Control):
                made.tokens.setdefault(symbol.token_id, []).append(item)
            else:
                made.scans.setdefault(symbol, []).append(item)
            for new in follow:
                if new not in seen:
                    seen.add(new)
                    left.append(new)
        self._price(made, index)
        made.lexemes = tuple((terminal, terminal.start) for terminal in made.scans)
        return made

    def _price(self, made: _Set, index: int) -> None:
        """Fill in what each open rule and each next terminal of a set still costs."""
        rests, owners = self._table.rests, self._table.owners
        outer = made.outer
        if index == 0:
            outer[self._table.start] = (0, (_END, 0))
        inner: dict[int, list[tuple[int, Item]]] = {}
        changed: list[int] = [self._table.start] if index == 0 else []
        for number, items in made.waiting.items():
            for place, origin in items:
                after = (place + 1, origin)
                if origin == index:
                    inner.setdefault(owners[place], []).append((number, after))
                    continue
                cost = rests[place + 1] + self._chart[origin].outer[owners[place]][0]
                if number not in outer or cost < outer[number][0]:
                    outer[number] = (cost, after)
                    changed.append(number)
        while changed:
            owner = changed.pop()
            for number, after in inner.get(owner, ()):
                cost = rests[after[0]] + outer[owner][0]
                if number not in outer or cost < outer[number][0]:
                    outer[number] = (cost, after)
                    changed.append(number)
        for scans in (made.scans, made.tokens):
            for symbol, items in scans.items():
                cost, after = min(
                    (rests[place + 1] + self._outer(made, index, owners[place], origin), (place + 1, origin))
                    for place, origin in items
                )
                made.after[symbol] = (cost, after)
        made.need = (
            0
            if made.ends
            else min((self._first_cost(made, symbol) for symbol in made.after), default=UNREACHABLE)
        )

    def _outer(self, made: _Set, index: int, owner: int, origin: int) -> int:
        return (made if origin == index else self._chart[origin]).outer[owner][0]


def _moved(lexemes: Lexemes, byte: int) -> Lexemes:
    return tuple(
        (terminal, after) for terminal, state in lexemes if (after := terminal.step(state, byte)) is not None
    )
