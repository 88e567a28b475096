"""The prefix cache on disk, so that it survives a restart: one file per model, KV format and version.

Written whole, beside the old one, and renamed; read once. Every record carries a SHA-256 chained over all
before it, so that nothing is taken from a file that was cut, damaged or put together from two. The file holds
what users wrote, as tokens and as keys and values: it is readable by its owner alone.

    magic, 8 bytes length, JSON header
    per block of text, parents first: index of the block before (-1: the root, then its salt follows), tokens,
        number of keys-and-values blocks; for each of them: window group, age rank, bytes; SHA-256 so far
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from array import array
from collections.abc import Container, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from bise.cache.pages import KVCache
from bise.cache.pool import BlockPool
from bise.cache.prefix import Node, PrefixCache
from bise.cache.table import ABSENT
from bise.diskfile import draft_of, open_regular
from bise.errors import ModelFileError
from bise.kernels import BLOCK_SIZE

logger = logging.getLogger(__name__)

MAGIC = b"bise kv prefixes 1\n"
SALT_BYTES = hashlib.sha256().digest_size
MAX_HEADER_BYTES = 1 << 16
_RECORD = struct.Struct("<iB")
_BLOCK = struct.Struct("<BI")
_TOKEN_BYTES = 4 * BLOCK_SIZE


class _Broken(Exception):
    """The file is not what was written."""


class _Stored(NamedTuple):
    """One block of keys and values to be written."""

    node: Node
    group: int
    rank: int
    """0 for the least recently used."""


class PrefixFile:
    """Saves and restores the cached blocks of one engine."""

    def __init__(
        self, directory: Path, *, model_id: str, kv_format: str, version: str, max_bytes: int
    ) -> None:
        """Use a file in `directory` that is named after model, KV format and version; of at most
        `max_bytes`.
        """
        self.model_id = model_id
        self._identity = {"model": model_id, "kv": kv_format, "version": version}
        key = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        self.path = directory / f"{key[:40]}.kv"
        self._max_bytes = max_bytes

    def save(self, prefix: PrefixCache, pools: Sequence[BlockPool], pages: KVCache) -> int:
        """Write the cached blocks, the most recently used first where the room ends; returns how many. A
        failure is logged: a cache is not worth an error.
        """
        chosen = self._choose(prefix, pools, pages)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = draft_of(self.path)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    self._write(file, chosen, pages)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.warning("event=prefix_file_not_written path=%s reason=%s", self.path, error)
            return 0
        return len(chosen)

    def restore(self, prefix: PrefixCache, pools: Sequence[BlockPool], pages: KVCache) -> int:
        """Fill empty pools with what was saved, as far as it fits; returns the number of blocks. A file that
        is damaged or of something else is ignored as a whole, with one line in the log.
        """
        if not self.path.exists():
            return 0
        taken: list[tuple[int, int, int]] = []
        """(rank, group, block), each with one owner: us."""
        tails: list[Node] = []
        is_sound = False
        try:
            descriptor, size = open_regular(self.path)
            with os.fdopen(descriptor, "rb") as file:
                if size > 2 * self._max_bytes + MAX_HEADER_BYTES:
                    raise _Broken(f"it has {size} bytes, far more than {self._max_bytes}")
                self._read(_Reader(file), prefix, pools, pages, taken, tails)
            is_sound = True
        except (_Broken, OSError, ValueError, ModelFileError) as error:
            logger.warning("event=prefix_file_ignored path=%s reason=%s", self.path, error)
        if not is_sound:
            for _, group, block in taken:
                prefix.drop(group, block)
        for tail in tails:
            prefix.release(tail)
        for _, group, block in sorted(taken):
            pools[group].free(block)
        return len(taken) if is_sound else 0

    def _choose(self, prefix: PrefixCache, pools: Sequence[BlockPool], pages: KVCache) -> list[_Stored]:
        """Return the blocks to write within `max_bytes`, most recently used first."""
        orders = [pool.cached for pool in pools]
        found = [
            _Stored(prefix.node_of(group, block), group, rank)
            for group, order in enumerate(orders)
            for rank, block in enumerate(order)
        ]
        # Ranks count from the newest, so that groups of different sizes go side by side.
        found.sort(key=lambda stored: len(orders[stored.group]) - stored.rank)
        left = self._max_bytes - MAX_HEADER_BYTES
        chosen: list[_Stored] = []
        written: set[int] = set()
        for stored in found:
            lineage = _lineage(stored.node, written)
            left -= pages.block_bytes(stored.group) + _BLOCK.size
            left -= len(lineage) * (_RECORD.size + _TOKEN_BYTES + 2 * SALT_BYTES)
            if left < 0:
                break
            written.update(id(node) for node in lineage)
            chosen.append(stored)
        return chosen

    def _write(self, file: BinaryIO, chosen: Sequence[_Stored], pages: KVCache) -> None:
        header = self._header(pages)
        digest = hashlib.sha256()

        def put(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        put(MAGIC + len(header).to_bytes(8, "little") + header)
        blocks: dict[int, list[_Stored]] = {}
        for stored in chosen:
            blocks.setdefault(id(stored.node), []).append(stored)
        indices: dict[int, int] = {}
        for stored in chosen:
            for node in reversed(_lineage(stored.node, indices)):
                indices[id(node)] = len(indices)
                parent = node.parent
                assert parent is not None
                own = blocks.get(id(node), [])
                put(_RECORD.pack(indices.get(id(parent), -1), len(own)))
                put((parent.key if parent.parent is None else b"") + node.tokens)
                for block in own:
                    put(_BLOCK.pack(block.group, block.rank))
                    put(pages.read_block(block.group, node.blocks[block.group]))
                file.write(digest.digest())

    def _read(
        self,
        reader: _Reader,
        prefix: PrefixCache,
        pools: Sequence[BlockPool],
        pages: KVCache,
        taken: list[tuple[int, int, int]],
        tails: list[Node],
    ) -> None:
        """Take records in, one verified after the other; what was taken is in `taken` and `tails`."""
        self._check_header(reader, pages)
        nodes: list[Node | None] = []
        while (head := reader.take_or_end(_RECORD.size)) is not None:
            parent_index, num_blocks = cast("tuple[int, int]", _RECORD.unpack(head))
            if parent_index >= len(nodes):
                raise _Broken("a block comes before the one it follows")
            salt = reader.take(SALT_BYTES) if parent_index < 0 else b""
            tokens = reader.take(_TOKEN_BYTES)
            contents: list[tuple[int, int, bytes]] = []
            for _ in range(num_blocks):
                group, rank = _BLOCK.unpack(reader.take(_BLOCK.size))
                if group >= len(pools):
                    raise _Broken(f"window group {group} is unknown")
                contents.append((rank, group, reader.take(pages.block_bytes(group))))
            reader.verify()
            blocks = [ABSENT] * len(pools)
            for rank, group, content in contents:
                if pools[group].num_free:
                    blocks[group] = pools[group].allocate()
                    pages.write_block(group, blocks[group], content)
                    taken.append((rank, group, blocks[group]))
            node = self._add(
                prefix, nodes[parent_index] if parent_index >= 0 else prefix.root(salt), tokens, blocks
            )
            nodes.append(node)
            if node is not None:
                tails.append(node)

    def _add(self, prefix: PrefixCache, parent: Node | None, tokens: bytes, blocks: list[int]) -> Node | None:
        if parent is None:
            return None
        if parent.parent is not None:
            parent.num_users += 1  # `extend` gives it back, and others may follow
        return prefix.extend(parent, array("i", tokens), blocks)

    def _check_header(self, reader: _Reader, pages: KVCache) -> None:
        if reader.take(len(MAGIC)) != MAGIC:
            raise _Broken("it does not begin as such a file does")
        header = self._header(pages)
        if reader.take(8 + len(header)) != len(header).to_bytes(8, "little") + header:
            raise _Broken("it belongs to another model, format or version")

    def _header(self, pages: KVCache) -> bytes:
        block_bytes = [pages.block_bytes(group) for group in range(len(pages.num_blocks))]
        return json.dumps({**self._identity, "block_bytes": block_bytes}).encode()


class _Reader:
    """Reads and hashes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise _Broken("it ends too early")
        self._digest.update(data)
        return data

    def take_or_end(self, count: int) -> bytes | None:
        """Return the next bytes, or None at the end of the file."""
        first = self._file.read(1)
        if not first:
            return None
        self._digest.update(first)
        return first + self.take(count - 1)

    def verify(self) -> None:
        if self._file.read(SALT_BYTES) != self._digest.digest():
            raise _Broken("a checksum does not match")


def _lineage(node: Node, known: Container[int]) -> list[Node]:
    """Return a node and those before it up to the root or to one whose id is known, that one left out."""
    found: list[Node] = []
    while node.parent is not None and id(node) not in known:
        found.append(node)
        node = node.parent
    return found
