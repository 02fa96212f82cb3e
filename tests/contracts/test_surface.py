"""The public names are there, and can be called as Lightning 2.6.6 documents.

surface.json has the facts (see record_surface.py). planned.txt lists the modules and names that are not there yet, or not
whole; a line that is no longer true must go. More than is documented is welcome: names, members, parameters.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SURFACE = json.loads((HERE / "surface.json").read_text())
NAMES: dict[str, dict[str, Any]] = SURFACE["names"]
PATHS: dict[str, list[str]] = {module: names.split() for module, names in SURFACE["paths"].items()}
PLANNED = [line for line in (HERE / "planned.txt").read_text().splitlines() if line and not line.startswith("#")]
EMPTY = inspect.Parameter.empty


def wanted_names(module: str) -> list[str]:
    return sorted(NAMES[module]) if module in NAMES else PATHS[module]


def facts_of(path: str) -> dict[str, Any]:
    """The facts of ``module.Name``, with what it has in common with other names filled in."""
    module, _, name = path.rpartition(".")
    facts = NAMES[module][name]
    if "same" in facts:
        return facts_of(facts["same"])
    if "class" not in facts:
        return facts
    base = facts_of(facts["like"]) if "like" in facts else {"methods": {}, "attributes": ""}
    methods = dict(base["methods"])
    for text, names in facts.get("methods", {}).items():
        methods.update(dict.fromkeys(names.split(), text))
    return {"class": facts["class"], "methods": methods, "attributes": f"{base['attributes']} {facts.get('attributes', '')}"}


def differences(path: str, ours: Any) -> Iterator[str]:
    """What of the documented name ``path`` our object lacks."""
    facts = facts_of(path)
    if "function" in facts:
        yield from call_differences(path, facts["function"], ours)
    if "class" not in facts or not inspect.isclass(ours):
        return
    yield from call_differences(path, facts["class"], ours.__init__)
    for name, signature in facts["methods"].items():
        if not hasattr(ours, name):
            yield f"{path}.{name}() is missing"
        elif signature != "?":
            yield from call_differences(f"{path}.{name}", signature, getattr(ours, name))
    annotated = {name for cls in ours.__mro__ for name in vars(cls).get("__annotations__", {})}
    for name in facts["attributes"].split():
        if not hasattr(ours, name) and name not in annotated:
            yield f"{path}.{name} is missing"


def call_differences(path: str, wanted: str | None, function: Callable[..., Any]) -> Iterator[str]:
    """What a call as documented would stumble over: parameters that are missing, elsewhere, or have another default."""
    try:
        ours = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return
    if wanted is None:
        return
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    by_position = [
        p.name for p in ours.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in ("self", "cls")
    ]
    for place, (name, keyword_only, default) in enumerate(parameters_in(wanted)):
        if name not in ours:
            if not takes_any_keyword:
                yield f"{path}: no parameter `{name}`"
            continue
        parameter = ours[name]
        if not keyword_only and parameter.kind is not parameter.KEYWORD_ONLY and by_position.index(name) != place:
            yield f"{path}: parameter `{name}` stands at place {by_position.index(name)} instead of {place}"
        if default is not None and parameter.default is EMPTY:
            yield f"{path}: parameter `{name}` has no default instead of {default}"
        elif default not in (None, "_") and repr(parameter.default) != default:
            yield f"{path}: parameter `{name}` has the default {parameter.default!r} instead of {default}"


def parameters_in(signature: str) -> list[tuple[str, bool, str | None]]:
    """Name, whether keyword only, and source of the default, of each named parameter."""
    function = ast.parse(f"def function({signature}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    missing: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    found = [(a.arg, False, d) for a, d in zip(arguments.args, missing + list(arguments.defaults))]
    found += [(a.arg, True, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    # By way of the value, so that 1e-08 and '"' are written as repr() writes them.
    return [(name, keyword, None if default is None else as_repr(default)) for name, keyword, default in found]


def as_repr(default: ast.expr) -> str:
    try:
        return repr(ast.literal_eval(default))
    except ValueError:
        return ast.unparse(default)


def shortfall(module: str, name: str) -> list[str]:
    """What is missing of one documented name."""
    try:
        ours = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lightning"):
            raise
        return [f"there is no module {error.name}"]
    except AttributeError:
        return [f"{module}.{name} is missing"]
    return list(differences(f"{module}.{name}", ours)) if module in NAMES else []


def promised_names(module: str) -> list[str]:
    return [name for name in wanted_names(module) if module not in PLANNED and f"{module}.{name}" not in PLANNED]


@pytest.mark.parametrize("module", [module for module in sorted({*NAMES, *PATHS}) if promised_names(module)])
def test_module_offers_what_is_documented(module: str) -> None:
    assert [line for name in promised_names(module) for line in shortfall(module, name)] == []


def test_planned_parts_are_part_of_the_documented_surface() -> None:
    known = {*NAMES, *PATHS} | {f"{module}.{name}" for module in {*NAMES, *PATHS} for name in wanted_names(module)}
    assert [line for line in PLANNED if line not in known] == []
    assert sorted(set(PLANNED)) == PLANNED


def done_since_planned() -> list[str]:
    """The lines of planned.txt that are whole by now."""
    done = []
    for line in PLANNED:
        module, _, name = line.rpartition(".")
        paths = [(line, wanted) for wanted in wanted_names(line)] if line in NAMES or line in PATHS else [(module, name)]
        if not any(shortfall(*path) for path in paths):
            done.append(line)
    return done


def test_planned_parts_are_not_there_yet() -> None:
    assert done_since_planned() == [], "these are there now: `python tests/contracts/test_surface.py` takes them out of planned.txt"


def test_every_name_that_a_package_exports_is_there(modules: list[Any]) -> None:
    broken = []
    for module in modules:
        loaded = importlib.import_module(module.name)
        broken += [f"{module.name}.{name}" for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]
    assert broken == []


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b=1, *args, c="x", **kwargs: None, []),
        (lambda a, b=1, c="x", extra=None: None, []),
        (lambda *args, **kwargs: None, []),
        (lambda a, b=1: None, ["f: no parameter `c`"]),
        (
            lambda b=1, a=2, c="x": None,
            ["f: parameter `a` stands at place 1 instead of 0", "f: parameter `b` stands at place 0 instead of 1"],
        ),
        (lambda a, b, c="x": None, ["f: parameter `b` has no default instead of 1"]),
        (lambda a, b=2, c="x": None, ["f: parameter `b` has the default 2 instead of 1"]),
    ],
)
def test_comparison_of_signatures(function: Callable[..., Any], expected: list[str]) -> None:
    assert list(call_differences("f", "a, b=1, *, c='x'", function)) == expected


if __name__ == "__main__":
    done = set(done_since_planned())
    lines = (HERE / "planned.txt").read_text().splitlines()
    (HERE / "planned.txt").write_text("\n".join(line for line in lines if line not in done) + "\n")
    print(f"taken out of planned.txt: {sorted(done)}")
