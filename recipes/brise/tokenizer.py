"""Train the tokenizer of brise: a byte-level BPE in the Hugging Face `tokenizer.json` form.

Owns the vocabulary (control tokens first, then 256 bytes, then merges) and the text it is learned
from. Knows nothing of token arrays or of training.

    python recipes/brise/tokenizer.py --data DATA --run RUN
"""

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from mixture import CONTROL_TOKENS, Mixture, Source, read_rows, row_texts
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Word pattern of Mistral's tekken tokenizers (digits one by one), so that the text path is shared."""


def untrained() -> Tokenizer:
    """Return a byte-level BPE without normaliser (bytes survive unchanged) and without merges."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(  # type: ignore[assignment]  # stubs of tokenizers lack the setter
        [
            Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()  # type: ignore[assignment]  # as above
    return tokenizer


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens from `texts`; ids 0 to 19 are the control tokens of Mistral."""
    tokenizer = untrained()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for index, token in enumerate(CONTROL_TOKENS):
        assert tokenizer.token_to_id(token) == index, token
    assert all(tokenizer.token_to_id(byte) is not None for byte in ByteLevel.alphabet())
    return tokenizer


def sample(mixture: Mixture, data: Path) -> Iterator[str]:
    """Yield the texts the tokenizer is learned from: every source, cut to its share, seeded."""

    def one(source: Source) -> Iterator[str]:
        rows = list(read_rows(data / source.path))
        random.Random(f"{mixture.seed}:tokenizer:{source.path}").shuffle(rows)
        share = source.tokenizer
        for _ in range(int(share)):
            yield from itertools.chain.from_iterable(row_texts(row) for row in rows)
        for row in rows[: round(len(rows) * (share % 1.0))]:
            yield from row_texts(row)

    for source in mixture.sources:
        if source.tokenizer > 0:
            yield from one(source)


def main() -> None:
    """Train on the bundle and write `tokenizer.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the training bundle (holds DATA.md)"
    )
    parser.add_argument("--run", type=Path, required=True, help="folder for everything that training writes")
    parser.add_argument("--mixture", type=Path, default=Path(__file__).with_name("mixture.toml"))
    args = parser.parse_args()
    mixture = Mixture.load(args.mixture)
    args.run.mkdir(parents=True, exist_ok=True)
    tokenizer = train(sample(mixture, args.data), mixture.vocab_size)
    tokenizer.save(str(args.run / "tokenizer.json"))
    print(f"wrote {args.run / 'tokenizer.json'} with {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
