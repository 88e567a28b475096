"""Messages and tools to prompt ids: the contract of chat templates, and the choice of one for a model.

Owns the rules that hold for every template. Knows nothing of how a format spells its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bise.text.tokenizer import Tokenizer

Message = Mapping[str, object]
"""A message in OpenAI form: role, content, tool_calls, tool_call_id, name."""
Tool = Mapping[str, object]
"""A tool in OpenAI form: {"type": "function", "function": {"name", "description", "parameters"}}."""


class ChatTemplate(Protocol):
    """The chat format of one model."""

    @property
    def name(self) -> str:
        """The format for people, such as `v7-tekken` or `jinja`."""
        ...

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        continue_final: bool = False,
    ) -> list[int]:
        """Return the prompt ids of a conversation, BOS included, ready for the assistant's turn.

        `continue_final`: the last message is the assistant's beginning, which the model goes on with.
        Raises RequestError naming the place (`messages[3].role`) for what the format cannot say.
        """
        ...


def load_template(path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat format of a model directory.

    In this order: the version that Mistral's own tokenizer file names; `bise_template` in
    tokenizer_config.json (a version such as `v7-tekken`); a Jinja template in chat_template.jinja or
    tokenizer_config.json. Raises ModelFileError when the model has none (`bise generate` continues plain
    text with any model) or the template is malformed.
    """
    from bise.text.template_files import load_directory_template

    return load_directory_template(path, tokenizer)


def template_from_gguf(metadata: Mapping[str, object], tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat format of a GGUF file, its tokenizer.chat_template; ModelFileError when it has none."""
    from bise.text.template_files import load_gguf_template

    return load_gguf_template(metadata, tokenizer)
