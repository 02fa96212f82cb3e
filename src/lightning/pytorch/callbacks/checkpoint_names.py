"""File names of checkpoints: templates with metrics in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any

from torch import Tensor

_FORMATTER = Formatter()


def fields(template: str) -> Iterator[tuple[str, str | None, str, str | None]]:
    """The parts of ``template``: literal text, then the metric's name, format and conversion, None where no field follows.

    Raises:
        ValueError: if braces do not match, or a field has no name.
    """
    try:
        parts = list(_FORMATTER.parse(template))
    except ValueError as error:
        raise ValueError(f"The checkpoint file name {template!r} is not a valid template: {error}") from None
    for literal, name, spec, conversion in parts:
        if name == "":
            raise ValueError(
                f"The checkpoint file name {template!r} has a field without a name; write e.g. `{{epoch}}` or `{{val_loss:.2f}}`."
            )
        yield literal, name, spec or "", conversion


def check(template: str) -> None:
    """Raise the ValueError of :func:`fill` if the template itself is broken.

    Example::

        >>> check("{epoch")
        Traceback (most recent call last):
        ValueError: The checkpoint file name '{epoch' is not a valid template: expected '}' before end of string
    """
    for _ in fields(template):
        pass


def fill(template: str, metrics: Mapping[str, Any], equals: str = "=", insert_names: bool = True) -> str:
    """Put the values of ``metrics`` in the place of the template's fields.

    Names may hold any characters but braces, ``:`` and ``!``; a metric that is not there counts as 0.

    Args:
        template: text with fields such as ``{epoch:02d}`` or ``{val/loss:.2f}``.
        metrics: values by name, tensors of one element or numbers.
        equals: what stands between a name and its value.
        insert_names: whether a field becomes ``name=value`` or only the value.

    Raises:
        ValueError: if the template is broken, or a format does not suit its value.

    Example::

        >>> fill("{epoch:02d}-{val/loss:.2f}", {"epoch": 3, "val/loss": 0.123})
        'epoch=03-val/loss=0.12'
        >>> fill("e{epoch}-loss{val/loss:.2f}", {"epoch": 3}, insert_names=False)
        'e3-loss0.00'
    """
    filled = []
    for literal, name, spec, conversion in fields(template):
        filled.append(literal)
        if name is None:
            continue
        value = metrics.get(name, 0)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        try:
            width = fill(spec, metrics, insert_names=False) if "{" in spec else spec
            text = _FORMATTER.format_field(_FORMATTER.convert_field(value, conversion), width)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"The checkpoint file name {template!r} formats {name!r} with {spec!r}, which does not suit its value {value!r}: {error}. "
                "Change the format: `d` takes whole numbers only, `.2f` takes any number."
            ) from None
        filled.append(f"{name}{equals}{text}" if insert_names else text)
    return "".join(filled)


def pattern(template: str, join: str, extension: str, equals: str = "=", insert_names: bool = True) -> re.Pattern[str]:
    """A pattern for every path that :func:`fill` can make of ``template``, with or without a version suffix.

    Example::

        >>> bool(pattern("{epoch}-last", "-", ".ckpt").fullmatch("epoch=3-last-v1.ckpt"))
        True
        >>> bool(pattern("last", "-", ".ckpt").fullmatch("at-last.ckpt"))
        False
    """
    parts = []
    for literal, name, _, _ in fields(template):
        parts.append(re.escape(literal))
        if name is not None:
            parts.append((re.escape(name + equals) if insert_names else "") + ".*")
    return re.compile("".join(parts) + f"({re.escape(join)}v[0-9]+)?" + re.escape(extension))
