"""Imports point one way: the layers of docs/design.md, read from the import statements of the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

# What each part may import, besides itself. A part is a package or module right below ``fabric`` or ``pytorch``.
FABRIC_LAYERS = {
    "utilities": "",
    "accelerators": "utilities",
    "precision": "utilities",
    "quantization": "precision utilities",
    "checkpoint": "utilities",
    "collectives": "utilities",
    "loggers": "utilities",
    "plugins": "accelerators precision quantization checkpoint collectives utilities",
    "launchers": "plugins utilities",
    "uneven": "collectives plugins utilities",
    "stacks": "",
    "side_channel": "stacks launchers utilities",
    "watchdog": "side_channel stacks launchers",
    "strategies": "watchdog side_channel uneven launchers plugins accelerators precision checkpoint collectives utilities",
    "runtime": "strategies launchers accelerators precision quantization checkpoint collectives plugins utilities",
    "wrappers": "strategies precision utilities",
    "arguments": "wrappers strategies precision utilities",
    "services": "arguments wrappers strategies utilities",
    "fabric": "services arguments wrappers runtime strategies utilities",
}
# Every part of ``pytorch`` may import ``fabric`` as well.
PYTORCH_LAYERS = {
    "utilities": "",
    "clock": "",
    "core": "utilities",
    "callbacks": "clock core utilities",
    "loggers": "core utilities",
    "profilers": "core utilities",
    "demos": "core utilities",
    "dispatch": "callbacks core utilities",
    "metric_entry": "core utilities",
    "reduction": "metric_entry core utilities",
    "delivery": "utilities",
    "metrics": "delivery reduction metric_entry core utilities",
    "position": "core utilities",
    "data": "position dispatch callbacks core utilities",
    "resume": "apart packed metrics metric_entry core utilities",
    "window": "callbacks",
    "apart": "packed",
    "packed": "",
    "checkpoint": "apart window resume position dispatch callbacks core utilities",
    "ckpt_path": "callbacks core utilities",
    "loops": "clock resume position reduction metrics metric_entry data checkpoint dispatch callbacks core utilities",
    "trainer": "loops ckpt_path resume delivery metrics metric_entry data checkpoint dispatch callbacks loggers profilers core utilities",
    "accelerators": "",
    "strategies": "",
    "plugins": "",
    "overrides": "",
}

# Modules that stand lower than their package: names without dependencies of their own.
LOWER = {
    "lightning.pytorch.trainer.states": "the enums of stages, which callbacks compare with",
    "lightning.pytorch.loops.progress": "the cursor: plain data, which is the checkpoint's",
}

# Imports inside functions that point the other way, each with its reason. A trailing dot stands for a whole package.
EXCEPTIONS = {
    ("lightning.fabric.precision", "lightning.fabric.quantization."): "a precision by name, from a library loaded on demand",
    ("lightning.fabric.utilities.consolidate_checkpoint", "lightning.fabric.checkpoint."): "a command, whose path is documented",
    (
        "lightning.pytorch.utilities.model_helpers",
        "lightning.pytorch.core.",
    ): "is_overridden is told instances, and looks up their base class",
    ("lightning.pytorch.utilities.model_helpers", "lightning.pytorch.callbacks."): "the same",
    ("lightning.pytorch.utilities.compile", "lightning.pytorch.core."): "tells whether it was given a LightningModule",
}

# Never imported: their objects are recognized where somebody else has imported them.
FOREIGN = ("torchmetrics", "lightning_utilities", "lightning_fabric", "pytorch_lightning")


@dataclass(frozen=True)
class Import:
    """``source`` imports ``target``, at the top of the file or inside a function."""

    source: str
    target: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def imports_of(module: Any, known: set[str]) -> Iterator[Import]:
    """The imports of one module that run; those under ``if TYPE_CHECKING:`` don't."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                yield from visit(ast.Module(child.orelse, []), inside)
            elif isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(module.name, name.name, child.lineno, inside)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module.place}:{child.lineno}: write imports from the root of the package"
                for name in child.names:
                    submodule = f"{child.module}.{name.name}"
                    yield Import(module.name, submodule if submodule in known else str(child.module), child.lineno, inside)
            else:
                yield from visit(child, inside)

    return visit(module.tree, False)


@pytest.fixture(scope="module")
def imports(modules: list[Any]) -> list[Import]:
    """All imports that run, anywhere in the package."""
    known = {module.name for module in modules}
    return [found for module in modules for found in imports_of(module, known)]


def part_of(name: str) -> tuple[str, str] | None:
    """``("fabric", "utilities")`` for ``lightning.fabric.utilities.seed``; None outside of the two packages' parts."""
    pieces = name.split(".")
    return (pieces[1], pieces[2]) if len(pieces) > 2 and pieces[:1] == ["lightning"] else None


def is_excepted(found: Import) -> bool:
    if found.target in LOWER:
        return True
    return found.in_function and any(found.source == source and found.target.startswith(target) for source, target in EXCEPTIONS)


def points_down(found: Import) -> bool:
    """Whether an import between two parts of the package is one that the layers allow."""
    source, target = part_of(found.source), part_of(found.target)
    if source is None or target is None or source == target:
        return True
    layers = {"fabric": FABRIC_LAYERS, "pytorch": PYTORCH_LAYERS}
    if source[0] != target[0]:
        return source[0] == "pytorch"
    return target[1] in layers[source[0]][source[1]].split()


def test_every_part_of_the_package_has_a_layer(modules: list[Any]) -> None:
    parts = {part for part in (part_of(module.name) for module in modules) if part is not None}
    layered = {("fabric", part) for part in FABRIC_LAYERS} | {("pytorch", part) for part in PYTORCH_LAYERS}
    assert parts - layered == set(), "say in this file what the new parts may import"
    assert layered - parts == set(), "these parts are gone: take them out of this file"


def test_layers_have_no_circles() -> None:
    for layers in (FABRIC_LAYERS, PYTORCH_LAYERS):
        below: dict[str, set[str]] = {}
        remaining = {part: set(allowed.split()) for part, allowed in layers.items()}
        while remaining:
            free = [part for part, allowed in remaining.items() if allowed <= below.keys()]
            assert free, f"these may import each other: {sorted(remaining)}"
            for part in free:
                below[part] = remaining.pop(part)


def test_imports_point_down(imports: list[Import]) -> None:
    wrong = [str(found) for found in imports if not points_down(found) and not is_excepted(found)]
    assert wrong == []


def test_fabric_never_imports_pytorch(imports: list[Import]) -> None:
    wrong = [
        str(found)
        for found in imports
        if found.source.startswith("lightning.fabric") and (found.target == "lightning" or found.target.startswith("lightning.pytorch"))
    ]
    assert wrong == []


def test_callbacks_reach_the_trainer_through_its_attributes_only(imports: list[Import]) -> None:
    private = ("lightning.pytorch.trainer", "lightning.pytorch.loops", "lightning.pytorch.dispatch", "lightning.pytorch.metrics")
    wrong = [
        str(found)
        for found in imports
        if found.source.startswith("lightning.pytorch.callbacks.") and found.target.startswith(private) and found.target not in LOWER
    ]
    assert wrong == []


def test_packages_of_the_same_part_import_modules_and_not_the_package(imports: list[Import]) -> None:
    # `from lightning.pytorch import X` inside the package works only while that package is loaded already.
    roots = ("lightning", "lightning.pytorch", "lightning.fabric")
    wrong = [str(found) for found in imports if found.target in roots and found.source not in roots]
    assert wrong == []


def test_lower_modules_import_nothing_above_them(imports: list[Import]) -> None:
    wrong = [
        str(found)
        for found in imports
        if found.source in LOWER and found.target.startswith("lightning.pytorch.") and found.target not in LOWER
    ]
    assert wrong == []


def test_foreign_packages_are_never_imported(imports: list[Import]) -> None:
    wrong = [str(found) for found in imports if found.target.split(".")[0] in FOREIGN]
    assert wrong == []


def test_import_paths_that_fabric_owns_hold_no_code(modules: list[Any]) -> None:
    owned = ("lightning.pytorch.accelerators", "lightning.pytorch.strategies", "lightning.pytorch.plugins")
    checked = [module for module in modules if module.name.startswith(owned)]
    assert checked
    code = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.While, ast.With)
    wrong = [f"{m.place}:{node.lineno}" for m in checked for node in ast.walk(m.tree) if isinstance(node, code)]
    assert wrong == []


def test_exceptions_are_still_needed(imports: list[Import]) -> None:
    upward = [found for found in imports if not points_down(found)]
    unused = [pair for pair in EXCEPTIONS if not any(f.source == pair[0] and f.target.startswith(pair[1]) for f in upward)]
    unused += [(name, "") for name in LOWER if not any(f.target == name for f in upward)]
    assert unused == []
