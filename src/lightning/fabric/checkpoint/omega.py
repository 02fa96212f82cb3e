"""OmegaConf containers in a checkpoint.

Interpolations such as ``${model.width}`` are kept. Those that call a resolver (``${oc.env:HOME}``, ``${eval:...}``) run
code when the value is read, so a file must not bring them along: reading puts the value that they had at the time of
saving in their place, and what is left of them becomes plain text.
"""

from __future__ import annotations

import enum
import pathlib
import re
from typing import Any

from lightning.fabric.checkpoint.classes import CannotBuild
from lightning.fabric.checkpoint.kinds import Kind

PLAIN = (str, int, float, bool, bytes, type(None), enum.Enum, pathlib.Path)


def calls_resolver(text: str) -> bool:
    """Whether an interpolation in ``text`` calls a function, as opposed to pointing to another value.

    Example::

        >>> calls_resolver("${model.width}"), calls_resolver("${host}:${port}"), calls_resolver("${oc.env:HOME}")
        (False, False, True)
    """
    depth = 0
    for token in re.findall(r"\$\{|[{}:]", text):
        if token in ("${", "{"):
            depth += token == "${" or depth > 0
        elif token == "}":
            depth = max(depth - 1, 0)
        elif depth:
            return True
    return False


def holds_resolver_calls(content: Any) -> bool:
    if isinstance(content, dict):
        return any(holds_resolver_calls(value) for value in content.values())
    if isinstance(content, list):
        return any(holds_resolver_calls(value) for value in content)
    return isinstance(content, str) and calls_resolver(content)


def as_text(content: Any) -> Any:
    """``content`` with every interpolation escaped, so that it reads as the text it is."""
    if type(content) is dict:
        return {key: as_text(value) for key, value in content.items()}
    if type(content) is list:
        return [as_text(value) for value in content]
    if type(content) is str:
        # an odd number of backslashes before "${" already escapes it
        return re.sub(r"(\\*)\$\{", lambda match: match[0] if len(match[1]) % 2 else match[1] + "\\${", content)
    return content


def check_plain(content: Any) -> None:
    if type(content) is dict:
        content = list(content.values())
    if type(content) is list:
        for value in content:
            check_plain(value)
    elif not isinstance(content, PLAIN):
        raise ValueError(f"a {type(content).__name__} in an OmegaConf container")


def write(config: Any) -> tuple[dict[str, Any], Any]:
    from omegaconf import OmegaConf

    flags = {"readonly": OmegaConf.is_readonly(config), "struct": OmegaConf.is_struct(config)}
    if config._is_none() or config._is_missing() or config._is_interpolation():
        raise CannotBuild("an OmegaConf container that is None, missing or an interpolation as a whole can't be stored")
    content = OmegaConf.to_container(config, resolve=False)
    resolved = None
    if holds_resolver_calls(content):
        try:
            resolved = OmegaConf.to_container(config, resolve=True)
        except Exception:  # a resolver may raise anything, here and when the user reads the value
            resolved = None
    return flags, {"content": content, "resolved": resolved}


def read(details: dict[str, Any], stored: Any) -> Any:
    try:
        from omegaconf import OmegaConf
    except ImportError:
        raise CannotBuild("install omegaconf before loading") from None
    content = stored["content"]
    if type(content) not in (dict, list):
        raise ValueError("an OmegaConf container is a dict or a list")
    if holds_resolver_calls(content):
        content = as_text(content if stored["resolved"] is None else stored["resolved"])
    check_plain(content)
    config = OmegaConf.create(content)
    OmegaConf.set_readonly(config, details["readonly"])
    OmegaConf.set_struct(config, details["struct"])
    return config


OMEGACONF = Kind("omegaconf", write, read)
