"""Grow a trained network: more layers and wider feed-forward parts that at first change nothing it says.

What is new writes zeros: the output matrices of a new layer, the columns of `w2` that read new hidden units.
So the grown network computes what the old one did, and training goes on from there instead of from nothing
(the idea of Net2Net, arXiv 1511.05641, and of the blocks of LLaMA Pro, arXiv 2401.02415).
"""

import torch
from network import Weights, initial_weights

from bise.config import ModelConfig


def grown(weights: Weights, old: ModelConfig, new: ModelConfig, seed: int) -> Weights:
    """Return float32 weights of shape `new` that compute the function of `weights`, whose shape is `old`.

    `new` differs from `old` in num_layers and hidden_dim alone, and neither shrinks. New layers stand evenly
    between the old ones, none after the last.
    """
    fresh = initial_weights(new, seed)
    origin = layer_origins(old.num_layers, new.num_layers)
    found: Weights = {}
    for name, drawn in fresh.items():
        if not name.startswith("layers."):
            found[name] = weights[name].clone()
            continue
        _, number, rest = name.split(".", 2)
        before = origin[int(number)]
        if before is None:
            found[name] = torch.zeros_like(drawn) if rest.endswith((".wo", ".w2")) else drawn
            continue
        trained = weights[f"layers.{before}.{rest}"]
        whole = torch.zeros_like(drawn) if rest.endswith(".w2") else drawn
        whole[tuple(slice(size) for size in trained.shape)] = trained
        found[name] = whole
    return found


def layer_origins(old: int, new: int) -> list[int | None]:
    """Return for every layer of the new network the old layer that it goes on from, None for a new one.

    Example: 6 layers grown to 8 give [0, 1, None, 2, 3, None, 4, 5].
    """
    added = new - old
    after = [(index + 1) * old // (added + 1) for index in range(added)]
    origins: list[int | None] = []
    for layer in range(old):
        origins += [None] * after.count(layer)
        origins.append(layer)
    return origins
