"""What training minimises: the loss of the next token over learned texts, or DPO over preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from bise.kernels.torch import TorchLora
from bise.text.turns import LearnedText
from bise.train.network import Network

Sample = tuple[LearnedText, ...]
"""One text to learn, or the chosen and the rejected answer of a pair."""


class Objective(Protocol):
    """Losses of samples, to be averaged."""

    def losses(self, samples: Sequence[Sample]) -> Tensor:
        """Return the losses of some samples, differentiable: `count` of each."""
        ...

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Compute what is needed of samples before training changes anything."""
        ...

    def count(self, sample: Sample) -> int:
        """Return how many losses a sample gives."""
        ...

    def metrics(self, losses: Tensor) -> Mapping[str, float]:
        """Return what else losses without a gradient tell."""
        ...


class NextToken:
    """Cross-entropy in nats of every learned token."""

    def __init__(self, network: Network, loras: Callable[[], Mapping[str, TorchLora]]) -> None:
        self._network, self._loras = network, loras

    def losses(self, samples: Sequence[Sample]) -> Tensor:
        """See `Objective.losses`."""
        return self._network.token_losses([text for sample in samples for text in sample], self._loras())

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Do nothing."""

    def count(self, sample: Sample) -> int:
        """Return the learned tokens."""
        return sum(sum(text.learned) for text in sample)

    def metrics(self, losses: Tensor) -> Mapping[str, float]:
        """Return nothing."""
        return {}


class Preference:
    """Direct preference optimisation, arXiv 2305.18290: -log sigmoid(beta (margin - margin of the base)).

    The margin is the log-prob of the chosen answer less that of the rejected one. The base is the model
    without its adapter, so it costs no memory.
    """

    def __init__(
        self, network: Network, loras: Callable[[], Mapping[str, TorchLora]], *, beta: float
    ) -> None:
        self._network, self._loras, self._beta = network, loras, beta
        self._base: dict[Sample, float] = {}

    def losses(self, samples: Sequence[Sample]) -> Tensor:
        """See `Objective.losses`: one of each pair."""
        self.prepare(samples)
        margins = self._margins(samples, self._loras())
        base = torch.tensor(
            [self._base[sample] for sample in samples], dtype=margins.dtype, device=margins.device
        )
        return -functional.logsigmoid(self._beta * (margins - base))

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Compute the base's margins, each alone: their bits must not depend on the company."""
        for sample in samples:
            if sample not in self._base:
                with torch.no_grad():
                    self._base[sample] = float(self._margins([sample], {}))

    def count(self, sample: Sample) -> int:
        """Return 1: pairs weigh the same, however long they are."""
        return 1

    def metrics(self, losses: Tensor) -> Mapping[str, float]:
        """Return the share of pairs whose chosen answer has gained on the rejected one."""
        return {"accuracy": float((losses < torch.log(torch.tensor(2.0))).double().mean())}

    def _margins(self, samples: Sequence[Sample], loras: Mapping[str, TorchLora]) -> Tensor:
        texts = [text for sample in samples for text in sample]
        losses = self._network.token_losses(texts, loras)
        parts = torch.split(losses, [sum(text.learned) for text in texts])  # pyright: ignore[reportUnknownMemberType]
        sums = torch.stack([part.sum() for part in parts])
        return sums[1::2] - sums[0::2]


def tokens_of(sample: Sample) -> int:
    """Return the tokens of a sample."""
    return sum(len(text.ids) for text in sample)


def passes(samples: Sequence[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    """Yield the samples in order, as many at a time as `max_tokens` tokens hold, at least one."""
    group: list[Sample] = []
    tokens = 0
    for sample in samples:
        if group and tokens + tokens_of(sample) > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(sample)
        tokens += tokens_of(sample)
    if group:
        yield group
