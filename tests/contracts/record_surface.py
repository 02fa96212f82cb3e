"""Write surface.json, the public names of Lightning 2.6.6 and how they are called, from a full listing.

    python tests/contracts/record_surface.py LISTING

The listing has, under ``documented``, for each module and name a ``kind``; the ``parameters`` of functions; and of classes
``init``, ``methods`` and ``attributes``. A parameter is ``[name, kind, default]``, where a kind is ``pk`` (by position or
keyword), ``ko`` (keyword only), ``*`` or ``**``, and a default is source text or null. Under ``importable`` it has names by module.

Here a signature is written as Python does. Methods stand grouped by signature, a name that is the same in several modules
stands once, and a class that has all that another one has says so instead of repeating it.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "surface.json"


def signature(parameters: list[list[Any]] | None) -> str | None:
    """``a, b=1, *, c`` for a list of parameters; a default that has no source text is written ``_``."""
    if parameters is None:
        return None
    parts: list[str] = []
    for name, kind, default in parameters:
        if kind == "ko" and not any(part.startswith("*") for part in parts):
            parts.append("*")
        text = name if kind in ("pk", "ko") else kind + name
        if default is not None:
            text += "=_" if "<" in default else f"={default}"
        parts.append(text)
    text = ", ".join(parts)
    ast.parse(f"def function({text}): ...")
    return text


def members(facts: dict[str, Any]) -> set[tuple[str, str | None]]:
    """Methods with their signatures, and attributes, of a class."""
    methods = {(f"{name}()", signature(parameters)) for name, parameters in facts["methods"].items()}
    return methods | {(name, None) for name in facts["attributes"]}


def compact(facts: dict[str, Any], classes: dict[str, set[tuple[str, str | None]]]) -> Any:
    """The facts of one name; a class says which of the former ones it contains, then what it has besides."""
    if facts["kind"] == "function":
        return {"function": signature(facts["parameters"])}
    if facts["kind"] != "class":
        return {"value": True}
    own = members(facts)
    like = max((name for name in classes if classes[name] <= own), key=lambda name: len(classes[name]), default=None)
    rest = own - classes[like] if like else own
    methods: dict[str, list[str]] = {}
    for name, text in sorted(rest, key=str):
        if name.endswith("()"):
            methods.setdefault("?" if text is None else text, []).append(name[:-2])
    short: dict[str, Any] = {"class": signature(facts["init"])}
    if like and classes[like]:
        short["like"] = like
    if methods:
        short["methods"] = {text: " ".join(names) for text, names in methods.items()}
    attributes = sorted(name for name, _ in rest if not name.endswith("()"))
    if attributes:
        short["attributes"] = " ".join(attributes)
    return short


def main(listing: Path) -> None:
    """Read the listing, write the facts."""
    full = json.loads(listing.read_text())
    known: dict[str, str] = {}
    classes: dict[str, set[tuple[str, str | None]]] = {}
    names: dict[str, dict[str, Any]] = {}
    for module, found in sorted(full["documented"].items()):
        for name, facts in sorted(found.items()):
            path = f"{module}.{name}"
            first = known.setdefault(json.dumps([name, facts]), path)
            names.setdefault(module, {})[name] = {"same": first} if first != path else compact(facts, classes)
            if facts["kind"] == "class" and first == path:
                classes[path] = members(facts)
    paths = {module: " ".join(sorted(found)) for module, found in sorted(full["importable"].items())}
    TARGET.write_text(json.dumps({"names": names, "paths": paths}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
