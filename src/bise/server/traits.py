"""What a model's vocabulary and chat format let it do; known without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bise.errors import ContextOverflowError

if TYPE_CHECKING:
    from pathlib import Path

    from bise.text.template import ChatTemplate
    from bise.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """Abilities of a model, as its card tells them."""

    chat: bool
    tools: bool
    thinks: bool
    fim: bool
    longest_token: int
    """Bytes of the longest token, so that a text of many bytes is known to have many tokens."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: ChatTemplate | None) -> Traits:
        """Return the abilities of a model with this vocabulary and format; reads the whole vocabulary."""
        controls = tokenizer.controls
        longest = max((len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)), default=1)
        return cls(
            chat=template is not None,
            tools=template is not None and "[TOOL_CALLS]" in controls,
            thinks=template is not None and "[THINK]" in controls and "[/THINK]" in controls,
            fim="[PREFIX]" in controls and "[SUFFIX]" in controls,
            longest_token=max(1, longest),
        )

    @classmethod
    def on_disk(cls, path: Path) -> Traits:
        """Return the abilities of a model that need not be loaded. Raises ModelFileError."""
        from bise.engine.load import load_text
        from bise.model.checkpoint import open_model

        return cls.of(*load_text(open_model(path)))

    def check_size(self, num_bytes: int, context: int) -> None:
        """Raise ContextOverflowError when a text cannot fit whatever its tokens are, before it is encoded."""
        least = num_bytes // self.longest_token
        if least > context:
            raise ContextOverflowError(
                f"a prompt of {num_bytes} bytes has at least {least} tokens and exceeds the context of "
                f"{context} tokens",
                field="max_tokens",
            )
