"""A radix tree over token ids, in which requests find the keys and values of what they begin with.

A node holds the keys and values of its own tokens only, so that requests share what they have in common. A hit copies
nothing: the caches it gives are joined from the nodes' segments, once, when the request's first step is evaluated.

A sliding cache that has dropped positions is held whole, at its last token, and serves only requests that begin with
all of its tokens; before that, it is in segments like the others.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .. import backend
from ..cache import KVCache, QuantizedKVCache, RotatingKVCache, make_cache
from ..errors import RequestError
from ..model import OpenELM
from .options import CacheOptions, check_number
from .prompt_cache import cache_offset
from .segments import Content, Kind, join, kind_of, segment, snapshot

if TYPE_CHECKING:
    from .prefix_disk import Entry, PrefixDisk

# The part of the free memory that a tree may fill by default.
FREE_SHARE = 0.25


class _Node:
    """Tokens `start` to `end` of the sequences that pass through here, and what is held of them."""

    __slots__ = ("children", "content", "file", "holds_whole", "parent", "start", "tokens")

    def __init__(self, tokens: list[int], start: int, parent: _Node | None):
        self.tokens, self.start, self.parent = tokens, start, parent
        self.children: dict[int, _Node] = {}
        self.content: Content | None = None
        self.file: str | None = None  # in the second tier
        self.holds_whole = False  # a whole sliding cache rather than a segment
        if parent is not None:
            parent.children[tokens[0]] = self

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_free(self) -> bool:
        return self.content is None and self.file is None

    def path(self) -> list[int]:
        """All ids from the beginning to the end of this node."""
        return [*(self.parent.path() if self.parent is not None else ()), *self.tokens]


class PrefixTree:
    """Keys and values of earlier requests to one model, for later ones that begin alike; not for several threads.

    Args:
        model: the model that fills the caches.
        max_bytes: the most memory that is held; by default a quarter of what is free when the tree is made
            (`FREE_SHARE`). What was least recently used is dropped first.
        disk: a second tier, which gets what is dropped, and has what an earlier process left there.
    """

    def __init__(self, model: OpenELM, max_bytes: int | None = None, disk: PrefixDisk | None = None):
        if max_bytes is None:
            max_bytes = int(FREE_SHARE * backend.free_memory())
        check_number("--max-bytes", max_bytes, 0, math.inf, "a whole number of bytes, 0 or above", kind=Integral)
        self.config, self.max_bytes, self.nbytes = model.config, max_bytes, 0
        self._roots: dict[tuple[str, Kind], _Node] = {}
        # Every node comes before its parent, so the first one holds what was used longest ago and has no children.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        self._disk = disk
        self._files: dict[str, _Node] = {}  # in the second tier
        if disk is not None:
            disk.removed = self._forget
        self._attach_files()

    def room_needed(self, sizes: Sequence[int]) -> int:
        """The most bytes that may come to be held of caches of these sizes; what is inserted is counted twice, since
        others are dropped only then.
        """
        return max(0, min(self.max_bytes - self.nbytes, sum(sizes))) + max(sizes, default=0)

    def fetch(
        self, tokens: Sequence[int], options: CacheOptions | None = None, *, key: str = ""
    ) -> tuple[list[Any], int]:
        """Caches with the longest held beginning of `tokens`, for the caller to extend, and its length.

        At least one token is left to process. Without a hit the caches are empty.

        Args:
            tokens: all ids of the request.
            options: how the request caches; only caches of the same kind serve it. Caches that are to be quantized
                later (`quantized_kv_start`) are growing until then.
            key: what else the keys and values depend on, such as the name of an adapter.
        """
        kind = self._kind(options or CacheOptions())
        nodes, depth = _match(self._root(key, kind), list(tokens)[: max(0, len(tokens) - 1)])
        found: list[Content] = []
        whole, whole_end, covered = None, 0, 0
        for node in nodes[1:]:
            content = self._content(node)
            if content is not None and node.holds_whole:
                if node.end <= depth:
                    whole, whole_end = content, node.end
            elif content is not None and node.start == covered:
                found.append(content)
                covered = min(node.end, depth)
        self._use(nodes)
        self._shrink()
        if whole is not None and whole_end > covered:
            return join(kind, [whole], whole_end), whole_end
        if not covered:
            return self._empty(kind), 0
        return join(kind, found, covered, room_for=len(tokens) + 1), covered

    def insert(self, tokens: Sequence[int], cache: Sequence[Any], *, key: str = "") -> None:
        """Hold what `cache` has of `tokens` and the tree has not; the caches stay the caller's.

        Args:
            tokens: the ids that the caches have seen; further ones are ignored.
            cache: caches of one sequence, one per layer.
            key: as for `fetch`.

        Raises:
            RequestError: the caches have seen more tokens, or are not of one sequence.
        """
        length = cache_offset(cache, self.config.num_transformer_layers)
        if len(tokens) < length:
            raise RequestError(f"There are {len(tokens)} ids, and the prompt cache has seen {length} tokens.")
        if length == 0:
            return
        kind, held = kind_of(cache[0]), list(tokens)[:length]
        is_whole = isinstance(cache[0], RotatingKVCache) and length > cache[0].keys.shape[2]
        nodes = self._grown(self._root(key, kind), held, ends_here=is_whole)
        if is_whole:
            if nodes[-1].is_free:
                self._give(nodes[-1], snapshot(cache))
        else:
            for node in nodes[1:]:
                if node.is_free or node.holds_whole:
                    self._give(node, segment(cache, node.start, node.end))
        self._use(nodes)
        self._shrink()

    def save(self) -> None:
        """Write what is held to the second tier, such as before the process ends."""
        for node in list(self._order):
            self._write(node)

    def clear(self) -> None:
        """Forget what is in memory; what the second tier has can still be found."""
        self._roots.clear()
        self._order.clear()
        self._files.clear()
        self.nbytes = 0
        self._attach_files()

    def _kind(self, options: CacheOptions) -> Kind:
        if options.max_kv_size is not None:
            return kind_of(make_cache(1, options.max_kv_size)[0])
        if options.kv_bits is not None and options.quantized_kv_start == 0:
            return kind_of(QuantizedKVCache(options.group_size(self.config.head_dim), options.kv_bits))
        return kind_of(KVCache())

    def _empty(self, kind: Kind) -> list[Any]:
        return [join(kind, [], 0)[0] for _ in range(self.config.num_transformer_layers)]

    def _root(self, key: str, kind: Kind) -> _Node:
        if (key, kind) not in self._roots:
            self._roots[key, kind] = _Node([], 0, None)
        return self._roots[key, kind]

    def _attach_files(self) -> None:
        """Put the files of the second tier in their places, and remove those that have none."""
        for entry in self._disk.entries() if self._disk is not None else ():
            if self._disk is not None and not self._attach(entry):
                self._disk.remove(entry.file)

    def _attach(self, entry: Entry) -> bool:
        """Put a file of an earlier process in its place; False if it is of no use there."""
        nodes, depth = _match(self._root(entry.key, entry.kind), entry.tokens)
        last = nodes[-1]
        if depth < last.end and (last.is_free or last.holds_whole):
            last = self._split(last, depth - last.start)
        elif depth < last.end or (depth != entry.start and not entry.is_whole):
            return False  # held by other files in part, or without what comes before it
        if depth < len(entry.tokens):
            last = _Node(entry.tokens[depth:], depth, last)
        if not last.is_free:
            return False
        self._stored(last, entry.file)
        last.holds_whole = entry.is_whole
        return True

    def _stored(self, node: _Node, file: str) -> None:
        """Note that a file of the second tier holds what is or was at a node."""
        node.file = file
        self._files[file] = node

    def _forget(self, file: str) -> None:
        """Note that the second tier has removed a file."""
        node = self._files.pop(file, None)
        if node is not None:
            node.file = None
            self._prune(node)

    def _grown(self, root: _Node, tokens: list[int], ends_here: bool) -> list[_Node]:
        """The nodes along `tokens`, with new ones for what is not there.

        The last one ends where the tokens do if `ends_here` or if it is empty.
        """
        nodes, depth = _match(root, tokens)
        if depth < nodes[-1].end and (depth < len(tokens) or ends_here or nodes[-1].is_free or nodes[-1].holds_whole):
            nodes[-1] = self._split(nodes[-1], depth - nodes[-1].start)
        if depth < len(tokens):
            nodes.append(_Node(tokens[depth:], depth, nodes[-1]))
        return nodes

    def _split(self, node: _Node, count: int) -> _Node:
        """A new node with the first `count` tokens of this one, which keeps the rest, as its child."""
        content = None if node.holds_whole else self._content(node)
        upper = _Node(node.tokens[:count], node.start, node.parent)
        node.tokens, node.start, node.parent = node.tokens[count:], node.start + count, upper
        upper.children[node.tokens[0]] = node
        if content is not None:
            if self._disk is not None and node.file is not None:
                self._disk.remove(node.file)  # written again when the halves are dropped
            self._give(upper, content.part(0, count))
            self._give(node, content.part(count, count + len(node.tokens)))
        elif node.is_free and not node.children:  # its file could not be read
            upper.children.clear()
        return upper

    def _give(self, node: _Node, content: Content) -> None:
        if node.content is not None:
            self.nbytes -= node.content.nbytes
        node.content, node.holds_whole = content, content.is_whole
        self.nbytes += content.nbytes
        self._order.setdefault(node)

    def _content(self, node: _Node) -> Content | None:
        """What is held at a node, read from the second tier if it is there; None if there is nothing."""
        if node.content is None and node.file is not None and self._disk is not None:
            content = self._disk.read(node.file, node.path(), node.start)
            if content is not None:
                self._give(node, content)
        return node.content

    def _use(self, nodes: Sequence[_Node]) -> None:
        """Note that the nodes of a path were used."""
        for node in reversed(nodes[1:]):
            if node in self._order:
                self._order.move_to_end(node)
            if node.file is not None and self._disk is not None:
                self._disk.use(node.file)

    def _shrink(self) -> None:
        """Drop what was least recently used, until the rest fits."""
        while self.nbytes > self.max_bytes:
            node, _ = self._order.popitem(last=False)
            self._write(node)
            assert node.content is not None
            self.nbytes -= node.content.nbytes
            node.content = None
            self._prune(node)

    def _write(self, node: _Node) -> None:
        if node.parent is not None:  # without what comes before it, a file is of no use to a later process
            self._write(node.parent)
        if self._disk is not None and node.file is None and node.content is not None:
            key, kind = next(name for name, root in self._roots.items() if root is _root_of(node))
            file = self._disk.write(node.content, key, kind, node.path(), node.start)
            if file is not None:
                self._stored(node, file)

    def _prune(self, node: _Node) -> None:
        """Remove nodes that hold nothing, from here upwards."""
        while node.parent is not None and not node.children and node.is_free:
            del node.parent.children[node.tokens[0]]
            node = node.parent


def _root_of(node: _Node) -> _Node:
    while node.parent is not None:
        node = node.parent
    return node


def _match(root: _Node, tokens: Sequence[int]) -> tuple[list[_Node], int]:
    """The nodes along which `tokens` run, root first, and how many tokens agree; the last may agree in part."""
    nodes, depth = [root], 0
    while depth < len(tokens) and (child := nodes[-1].children.get(tokens[depth])) is not None:
        nodes.append(child)
        rest = tokens[depth : depth + len(child.tokens)]
        if rest != child.tokens:
            pairs = zip(rest, child.tokens, strict=False)
            return nodes, depth + next((n for n, (a, b) in enumerate(pairs) if a != b), len(rest))
        depth += len(child.tokens)
    return nodes, depth
