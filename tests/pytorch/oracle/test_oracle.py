"""What users see of a run is what the recorded facts of the reference say, but for the differences in ``intended``.

``record.py`` writes the facts; ``scenarios`` says what they are of.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest

from lightning.pytorch.dispatch import SAVED_AT

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from intended import IN_FILE, INTENDED  # noqa: E402
from scenarios import SCENARIOS, plain  # noqa: E402

TOLERANCE = 1e-6


def expected_facts(scenario: str) -> Any:
    """The recorded facts, with what is intended of ours put in their place."""
    facts = savers_last(json.loads((HERE / "facts" / f"{scenario}.json").read_text()))
    for (name, *keys), (_, value) in INTENDED.items():
        if name != scenario:
            continue
        if value is IN_FILE:
            value = json.loads((HERE / "ours" / f"{scenario}.json").read_text())
            for key in keys:
                value = value[key]
            value = savers_last(value)
        if not keys:
            assert list(differences(facts, value)), f"the intended difference of {scenario} is none"
            return value
        place = facts
        for key in keys[:-1]:
            place = place[key]
        assert list(differences(place.get(keys[-1]), value)), f"the intended difference of {name}: {keys} is none"
        place[keys[-1]] = value
    return facts


def savers_last(facts: Any) -> Any:
    """The facts with checkpoint callbacks after the module, where they save: a checkpoint must hold what the module's hook did."""
    if isinstance(facts, dict):
        return {key: savers_last(value) for key, value in facts.items()}
    if not isinstance(facts, list):
        return facts
    lines = list(facts)
    for i in range(len(lines) - 1):
        for hook in SAVED_AT:
            pair = (f"ckpt.{hook}(", f"module.{hook}(")
            if all(isinstance(line, str) and part in line for line, part in zip(lines[i : i + 2], pair)):
                lines[i : i + 2] = lines[i + 1], lines[i]
    return lines


def differences(expected: Any, actual: Any, where: str = "") -> Iterator[str]:
    """One line, or one diff, for each place in which the two differ."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in expected | actual:
            if key not in expected or key not in actual:
                yield f"{where}/{key}: {'only in ours' if key in actual else 'missing in ours'}: {actual.get(key, expected.get(key))!r}"
            else:
                yield from differences(expected[key], actual[key], f"{where}/{key}")
    elif isinstance(expected, list) and isinstance(actual, list):
        if expected and actual and all(isinstance(item, str) for item in expected + actual):
            diff = list(unified_diff(expected, actual, "reference", "ours", lineterm="", n=2))
            if diff:
                yield "\n".join([f"{where}:", *diff])
        elif len(expected) != len(actual):
            yield f"{where}: {len(expected)} items {expected!r}, ours has {len(actual)} {actual!r}"
        else:
            for index, (one, other) in enumerate(zip(expected, actual)):
                yield from differences(one, other, f"{where}/{index}")
    elif isinstance(expected, float) or isinstance(actual, float):
        numbers = isinstance(expected, (int, float)) and isinstance(actual, (int, float))
        if not numbers or not math.isclose(expected, actual, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{where}: {expected!r}, ours {actual!r}"
    elif expected != actual or type(expected) is not type(actual):
        yield f"{where}: {expected!r}, ours {actual!r}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_facts_agree_with_the_reference(scenario: str) -> None:
    expected = expected_facts(scenario)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = json.loads(json.dumps(plain(SCENARIOS[scenario]())))
    found = list(differences(expected, actual))
    assert not found, "\n".join(found)


def test_every_scenario_has_facts_and_all_facts_a_scenario() -> None:
    assert {file.stem for file in (HERE / "facts").glob("*.json")} == set(SCENARIOS)


def test_every_intended_difference_names_a_scenario_and_a_reason() -> None:
    assert {name for name, *_ in INTENDED} <= set(SCENARIOS)
    assert all(reason for reason, _ in INTENDED.values())


def test_checkpoint_callbacks_come_before_the_module_in_the_reference() -> None:
    facts = json.loads((HERE / "facts" / "fit_with_validation.json").read_text())
    assert savers_last(facts) != facts
    assert savers_last(["a ckpt.on_validation_end()", "a module.on_validation_end()", "b"])[1] == "a ckpt.on_validation_end()"


def test_differences_are_found_in_every_kind_of_fact() -> None:
    assert not list(differences({"a": [1, 2.0, "x"]}, {"a": [1, 2.0 + 1e-9, "x"]}))
    for expected, actual in [(1, True), (1.0, 1.1), (["a"], ["b"]), ({"a": 1}, {}), ([1], [1, 2]), ("nan", 1.0), (None, 0)]:
        assert list(differences(expected, actual)), (expected, actual)
