"""Inputs that are nearly right: a whole file or record of the program's own, with some of it changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, -1, 1, 2, 0.5, 1e-300, 1e300, 1e308, 2**31, 2**63, 2**64, 10**40, float("nan"), float("inf"), -0.0])
TEXTS = st.sampled_from(
    ["", " ", ".", "..", "/", "/etc/passwd", "../../x", "a" * 5000, "\x00", "\x1b[31m", "\u202e", "\ud800", "null", "[", "{}",
     "pipe:cat x", "file:///etc/passwd", "https://user:secret@example.org/x", "${HOME}", "auto", "1e-4", "true"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | TEXTS | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of dicts and lists."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree with one to three values replaced, taken away, added, renamed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        key, what = path[-1], draw(st.sampled_from(["replace", "replace", "remove", "add", "rename", "double"]))
        if what == "replace":
            parent[key] = draw(VALUES)
        elif what == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]) if what == "double" else draw(VALUES))
        elif what == "rename":
            parent[draw(TEXTS | st.text(max_size=8))] = parent.pop(key)
        else:
            parent[draw(TEXTS | st.text(max_size=8))] = copy.deepcopy(parent[key]) if what == "double" else draw(VALUES)
    return tree


@st.composite
def edited(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four pieces flipped, cut out, put in, repeated or made zero."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([1, 1, 2, 8, 64, 512, 1 << 20])))
        what = draw(st.sampled_from(["flip", "cut", "put", "repeat", "zero", "end"]))
        piece = data[start:end]
        if what == "flip":
            piece = bytes([piece[0] ^ (1 << draw(st.integers(0, 7)))]) + piece[1:] if piece else b""
        elif what == "cut":
            piece = b""
        elif what == "put":
            piece = draw(st.binary(max_size=16)) + piece
        elif what == "repeat":
            piece = piece[:4096] * 2
        elif what == "zero":
            piece = bytes(len(piece))
        data = data[:start] if what == "end" else data[:start] + piece + data[end:]
    return data
