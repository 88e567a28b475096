"""Which prefixes of which texts have their keys and values in cached or held blocks.

A trie of whole blocks over the pools of all window groups. A node is found by SHA-256, chained over (previous
hash, tokens of the block) from a salt that names model, adapter, KV format and tenant; whoever finds it also
compares its parent and its tokens, so that an equal hash alone never serves another text. It knows neither
arrays nor sequences.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from bise.cache.pool import BlockPool
from bise.cache.table import ABSENT, BlockTable, first_visible
from bise.kernels import BLOCK_SIZE

NODES_PER_BLOCK = 8
"""Nodes that are remembered per block of all pools. A windowed group keeps the nodes of blocks that are gone,
because a prefix is only known by all of its tokens; this bounds them."""


class Node:
    """One block of tokens after one particular prefix; shared by everyone whose text begins so."""

    __slots__ = ("blocks", "key", "num_users", "parent", "tokens")

    def __init__(self, key: bytes, parent: Node | None, tokens: bytes, num_groups: int) -> None:
        self.key = key
        self.parent = parent
        """The node of the block before; None at the root of a salt, which has no tokens."""
        self.tokens = tokens
        """The block's tokens as int32."""
        self.blocks = [ABSENT] * num_groups
        """Physical block per window group, or -1."""
        self.num_users = 0
        """Nodes after this one, and sequences that stand on it."""


class Match(NamedTuple):
    """A prefix that need not be computed."""

    num_tokens: int
    """Whole blocks only."""
    nodes: tuple[Node, ...]
    """One per block of the prefix."""
    firsts: tuple[int, ...]
    """Per window group: the first logical block that is there and needed; all after it are there."""


NO_MATCH = Match(0, (), ())


def salt_of(*parts: str) -> bytes:
    """Return the hash from which the chain of a text starts; different parts never give the same salt.

    Example: salt_of("ab", "c") differs from salt_of("a", "bc"), since each part brings its length.
    """
    digest = hashlib.sha256(b"bise prefix 1")
    for part in parts:
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()


def block_hash(previous: bytes, tokens: bytes) -> bytes:
    """Return the key of a block: SHA-256 over the key of the block before and the tokens (int32)."""
    return hashlib.sha256(previous + tokens).digest()


class PrefixCache:
    """Finds and keeps the blocks of prefixes; the pools evict them by least recent use."""

    def __init__(self, pools: Sequence[BlockPool], windows: Sequence[int | None]) -> None:
        """Watch `pools`, one per window group."""
        self._pools = tuple(pools)
        self._windows = tuple(windows)
        self._roots: dict[bytes, Node] = {}
        self._nodes: dict[bytes, Node] = {}
        self._holders: list[dict[int, Node]] = [{} for _ in pools]
        """Per group: the node of each kept block."""
        self._max_nodes = NODES_PER_BLOCK * sum(pool.num_blocks for pool in pools)
        for group, pool in enumerate(pools):
            pool.on_evict(partial(self._lose, group))

    @property
    def num_nodes(self) -> int:
        """Blocks of text that are remembered, with or without keys and values."""
        return len(self._nodes)

    def match(self, salt: bytes, token_ids: Sequence[int], limit: int) -> Match:
        """Return the longest prefix of `token_ids`, up to `limit` tokens, for which every group has what the
        next position needs: a full group all blocks, a windowed one those of the last window.

        Example: blocks of 32, window 48, blocks 1 and 2 are there, block 0 slid out. A prefix of 96 tokens
        (next query 96 sees 49 .. 96) needs blocks 1 and 2 and is found; one of 64 (next query 64 sees
        17 .. 64) would need block 0.
        """
        nodes = self._walk(salt, token_ids, limit)
        runs = [0] * len(self._pools)
        found, firsts = 0, (0,) * len(self._pools)
        for length, node in enumerate(nodes, 1):
            for group, block in enumerate(node.blocks):
                runs[group] = 0 if block == ABSENT else runs[group] + 1
            needed = tuple(first_visible(length * BLOCK_SIZE, window) for window in self._windows)
            if all(run >= length - first for run, first in zip(runs, needed, strict=True)):
                found, firsts = length, needed
        return Match(found * BLOCK_SIZE, tuple(nodes[:found]), firsts) if found else NO_MATCH

    def num_shared(self, match: Match, group: int, given: Mapping[int, int]) -> int:
        """Return how many of a match's blocks somebody holds already, so that taking them costs nothing,
        once `given` ownerships per block have been given up.
        """
        if not match.nodes:
            return 0
        pool = self._pools[group]
        blocks = [node.blocks[group] for node in match.nodes[match.firsts[group] :]]
        return sum(pool.num_owners(block) > given.get(block, 0) for block in blocks)

    def adopt(self, match: Match, salt: bytes, tables: Sequence[BlockTable]) -> Node:
        """Make new, empty tables, one per group, further owners of the blocks of a match, and return the node
        to stand on: where `extend` goes on. Give it back with `release`.
        """
        if not match.nodes:
            return self.root(salt)
        tail = match.nodes[-1]
        for group, (table, first) in enumerate(zip(tables, match.firsts, strict=True)):
            table.adopt(first, [node.blocks[group] for node in match.nodes[first:]])
        tail.num_users += 1
        return tail

    def root(self, salt: bytes) -> Node:
        """Return the node to stand on before the first block."""
        root = self._roots.setdefault(salt, Node(salt, None, b"", len(self._pools)))
        root.num_users += 1
        return root

    def node_of(self, group: int, block: int) -> Node:
        """Return the node that a kept block belongs to."""
        return self._holders[group][block]

    def extend(self, tail: Node, token_ids: Sequence[int], blocks: Sequence[int]) -> Node | None:
        """Remember the full block after `tail`: its 32 tokens and, per group, the physical block that holds
        their keys and values, or -1 where it slid out.

        Returns the node to stand on now, None where there is no room for it; `tail` is given back either way.
        Where the same text is there already its blocks stay, and ours remain their owner's alone.
        """
        tokens = array("i", token_ids).tobytes()
        key = block_hash(tail.key, tokens)
        node = self._nodes.get(key)
        if node is None and self._has_room():
            node = Node(key, tail, tokens, len(self._pools))
            self._nodes[key] = node
            tail.num_users += 1
        if node is None or node.parent is not tail or node.tokens != tokens:
            self.release(tail)  # no room, or two texts of one hash, of which the first one keeps it
            return None
        node.num_users += 1
        for group, block in enumerate(blocks):
            if block != ABSENT and node.blocks[group] == ABSENT:
                node.blocks[group] = block
                self._holders[group][block] = node
                self._pools[group].keep(block)
        self.release(tail)
        return node

    def release(self, tail: Node) -> None:
        """Stop standing on a node."""
        tail.num_users -= 1
        self._prune(tail)

    def disown(self, tables: Iterable[BlockTable]) -> None:
        """Serve no block that `tables`, one per group, hold any more: their content is in doubt."""
        for group, table in enumerate(tables):
            for block in table.held:
                self.drop(group, block)

    def drop(self, group: int, block: int) -> None:
        """Serve a block no more, if it is served at all."""
        if block in self._holders[group]:
            self._lose(group, block)
            self._pools[group].forget(block)

    def check_integrity(self, tails: Iterable[Node] = ()) -> None:
        """Assert that nodes, blocks and pools agree, and that every node is needed: by a block, by a node
        after it, or by one of `tails`, the nodes that sequences stand on, listed once per sequence.
        """
        users = Counter(id(node) for node in tails)
        for node in self._nodes.values():
            assert node.parent is not None, "a root is among the nodes"
            users[id(node.parent)] += 1
        for filed in (self._roots, self._nodes):
            for key, node in filed.items():
                assert node.key == key, "a node is filed under another key"
                assert node.num_users == users.pop(id(node), 0), "users are miscounted"
                assert node.num_users or any(block != ABSENT for block in node.blocks), "a node is left over"
        assert not users, "a node is in use, but not filed"
        for group, holders in enumerate(self._holders):
            filed_blocks = [node.blocks[group] for node in self._nodes.values()]
            assert sorted(block for block in filed_blocks if block != ABSENT) == sorted(holders)
            assert all(node.blocks[group] == block for block, node in holders.items())
            assert set(self._pools[group].cached) <= set(holders), "a cached block is known to nobody"

    def _walk(self, salt: bytes, token_ids: Sequence[int], limit: int) -> list[Node]:
        """Return the nodes of the longest known prefix, every token of it compared."""
        nodes: list[Node] = []
        last = self._roots.get(salt)
        for start in range(0, limit - BLOCK_SIZE + 1, BLOCK_SIZE):
            if last is None:
                break
            tokens = array("i", token_ids[start : start + BLOCK_SIZE]).tobytes()
            node = self._nodes.get(block_hash(last.key, tokens))
            if node is None or node.parent is not last or node.tokens != tokens:
                break
            nodes.append(node)
            last = node
        return nodes

    def _lose(self, group: int, block: int) -> None:
        node = self._holders[group].pop(block)
        node.blocks[group] = ABSENT
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Drop a node that has neither blocks nor users, and then those before it that it was the use of."""
        while not node.num_users and all(block == ABSENT for block in node.blocks):
            parent = node.parent
            if parent is None:
                del self._roots[node.key]
                return
            del self._nodes[node.key]
            parent.num_users -= 1
            node = parent

    def _has_room(self) -> bool:
        """Make room for one more node, by evicting cached blocks if need be; False when that is in vain."""
        while len(self._nodes) >= self._max_nodes:
            pool = max(self._pools, key=_num_cached)
            if not pool.num_cached:
                return False
            pool.evict_oldest()
        return True


def _num_cached(pool: BlockPool) -> int:
    return pool.num_cached
