"""String enums that compare in any case of letters."""

from __future__ import annotations

import json
import pickle
from enum import Enum

import pytest

from lightning.fabric.utilities.enums import LightningEnum


class Mode(LightningEnum):
    FAST_RUN = "fast-run"
    SLOW = "slow"


class Other(Enum):
    SLOW = "slow"
    NUMBER = 1


@pytest.mark.parametrize("other", ["slow", "SLOW", "Slow", Mode.SLOW, Other.SLOW])
def test_members_equal_their_value_in_any_case(other: object) -> None:
    member = Mode.SLOW
    assert other == member
    assert member == other
    assert not other != member  # noqa: SIM202
    assert not member != other  # noqa: SIM202


@pytest.mark.parametrize("other", ["fast", Mode.FAST_RUN, Other.NUMBER, None, 1, b"slow"])
def test_members_differ_from_all_else(other: object) -> None:
    member = Mode.SLOW
    assert other != member
    assert member != other
    assert not member == other  # noqa: SIM201


def test_members_and_their_values_are_the_same_key() -> None:
    assert {"slow": 1}[Mode.SLOW] == 1
    assert {Mode.SLOW: 1}["slow"] == 1
    assert Mode.SLOW in {"slow", "fast"}


def test_members_are_strings() -> None:
    assert isinstance(Mode.SLOW, str)
    assert f"{Mode.SLOW} {Mode.SLOW!s}" == "slow slow"
    assert "a" + Mode.SLOW == "aslow"
    assert json.dumps(Mode.SLOW) == '"slow"'


@pytest.mark.parametrize("text", ["fast-run", "FAST_RUN", "fast_run", "Fast-Run"])
def test_a_member_is_found_by_name_or_value(text: str) -> None:
    assert Mode.from_str(text) is Mode.FAST_RUN


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'fastest' is not one of \['fast-run', 'slow'\]"):
        Mode.from_str("fastest")


def test_members_survive_pickling() -> None:
    assert pickle.loads(pickle.dumps(Mode.SLOW)) is Mode.SLOW
