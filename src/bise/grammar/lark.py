"""Lark grammars."""

from bise.grammar.symbols import Builder, Symbol


def lark_rule(source: str, builder: Builder, field: str) -> Symbol:
    raise NotImplementedError
