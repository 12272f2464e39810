"""HTML and SVG from nested calls. Text is escaped unless it is markup already, so that no caller can forget it."""

from __future__ import annotations

from html import escape

from prdp_fast.core.visible import visible

VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})  # elements without a closing tag
INLINE = frozenset({"a", "bdi", "b", "code", "em", "label", "span", "strong", "tspan"})  # space beside them would be seen


class Markup(str):
    """Text that is markup, and is not escaped again."""


def text(value: object) -> Markup:
    """Any text as the content of an element, invisible characters written out."""
    return value if isinstance(value, Markup) else Markup(escape(visible(value, lines=True)))


def join(*parts: object) -> Markup:
    return Markup("".join(text(part) for part in parts if part is not None and part != ""))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """An element. None and empty strings in the content are nothing.

    Args:
        attributes: `class_` is class, `aria_label` is aria-label. None or False leaves one out; True is one without a value.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(visible(value))}"')
    opening = f"<{' '.join(words)}>"
    if name in VOID:
        return Markup(f"{opening}\n")
    return Markup(f"{opening}{join(*content)}</{name}>" + ("" if name in INLINE else "\n"))
