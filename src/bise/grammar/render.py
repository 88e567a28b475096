"""A grammar in the Lark dialect of the mask engine. Nothing a caller wrote gets there unread."""

from __future__ import annotations

from bise.grammar.symbols import Control, Symbol, Terminal
from bise.grammar.tracker import Table


def rendered(table: Table) -> str:
    """Return the text of a grammar, its start rule named `start`."""
    names: dict[Terminal, str] = {}
    # Without this the engine forces its own tokens for text that can only go one way, where the model should
    # choose among all spellings.
    lines = ['%llguidance {"no_forcing": true}']

    def name(symbol: Symbol) -> str:
        if isinstance(symbol, int):
            if symbol not in seen:
                seen.add(symbol)
                left.append(symbol)
            return "start" if symbol == table.start else f"r{symbol}"
        if isinstance(symbol, Control):
            return f"<[{symbol.token_id}]>"
        return names.setdefault(symbol, f"T{len(names)}")

    seen, left = {table.start}, [table.start]
    while left:
        number = left.pop()
        spelled = [" ".join(map(name, symbols)) or '""' for symbols in table.alternatives(number)]
        lines.append(f"{name(number)}: {' | '.join(spelled)}")
    lines += [f"{spelling}: {terminal.spelling}" for terminal, spelling in names.items()]
    return "\n".join(lines) + "\n"
