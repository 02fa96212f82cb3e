"""Files and functions stay short enough to be read."""

from __future__ import annotations

import ast
from typing import Any

LONGEST_FILE = 600
LONGEST_FUNCTION = 70  # lines of the body, without signature and docstring

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_files_are_short(modules: list[Any]) -> None:
    long = {module.place: lines for module in modules if (lines := len(module.text.splitlines())) > LONGEST_FILE}
    assert long == {}


def test_functions_are_short(modules: list[Any]) -> None:
    long = {
        f"{module.place}:{node.lineno} {node.name}": lines
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, Function) and (lines := body_length(node)) > LONGEST_FUNCTION
    }
    assert long == {}


def test_length_of_a_function_leaves_out_signature_and_docstring() -> None:
    source = 'def f(\n    a,\n):\n    """One\n\n    two.\n    """\n    b = a\n\n    return b\n'
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert body_length(function) == 3


def test_every_module_says_what_it_is_for(modules: list[Any]) -> None:
    silent = [module.place for module in modules if not ast.get_docstring(module.tree)]
    assert silent == []
