"""Tool calls."""

from bise.grammar.symbols import Builder, Symbol
from bise.grammar.spec import GrammarSpec
from bise.grammar.vocabulary import Vocabulary


def tool_rule(spec: GrammarSpec, builder: Builder, vocabulary: Vocabulary) -> Symbol:
    raise NotImplementedError
