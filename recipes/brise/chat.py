"""Conversations as token ids in Mistral's V7 tekken template: `<s>[INST]user[/INST]assistant</s>...`.

Owns the template and the loss mask. Control tokens come from their ids alone; text is encoded by an encoder
that knows no control token, so that no text can forge one.
"""

from dataclasses import dataclass
from pathlib import Path

from mixture import CONTROL_TOKENS, Message, RecipeError
from tokenizers import Tokenizer

CONTROL_IDS = {token: index for index, token in enumerate(CONTROL_TOKENS)}
BOS = CONTROL_IDS["<s>"]
EOS = CONTROL_IDS["</s>"]
PAD = CONTROL_IDS["<pad>"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and, for each, whether the model is to learn to say it."""

    ids: list[int]
    learned: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


class ChatEncoder:
    """Text and conversations to ids and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer whose first ids are `CONTROL_TOKENS`; it will read control strings as text."""
        for token, index in CONTROL_IDS.items():
            if tokenizer.token_to_id(token) != index:
                raise RecipeError(f"the tokenizer has no {token} at id {index}; train it with tokenizer.py")
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> "ChatEncoder":
        """Read a `tokenizer.json`."""
        if not path.is_file():
            raise RecipeError(f"{path} is missing; run tokenizer.py first")
        return cls(Tokenizer.from_file(str(path)))

    def texts(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of plain texts, without begin or end."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`; control tokens are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def document(self, text: str) -> list[int]:
        """Return `<s>text</s>`."""
        return [BOS, *self.texts([text])[0], EOS]

    def chat(self, messages: list[Message], system: str | None = None) -> Encoded:
        """Return a conversation; assistant turns and their `</s>` are learned.

        Example: user "Hi", assistant "Yo" gives `<s> [INST] Hi [/INST] Yo </s>`, learned 0 0 0 0 1 1.
        A conversation that ends with the user's turn is a prompt.
        """
        pieces = self.texts([system or "", *(message["content"] for message in messages)])
        ids, learned = [BOS], [False]

        def add(more: list[int], learn: bool) -> None:
            ids.extend(more)
            learned.extend([learn] * len(more))

        if system is not None:
            add([CONTROL_IDS["[SYSTEM_PROMPT]"], *pieces[0], CONTROL_IDS["[/SYSTEM_PROMPT]"]], False)
        for message, piece in zip(messages, pieces[1:], strict=True):
            if message["role"] == "user":
                add([CONTROL_IDS["[INST]"], *piece, CONTROL_IDS["[/INST]"]], False)
            else:
                add([*piece, EOS], True)
        return Encoded(ids, learned)
