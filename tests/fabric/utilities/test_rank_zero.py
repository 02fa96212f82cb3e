"""Functions, messages and warnings on rank 0 only."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightning.fabric.utilities import rank_zero
from lightning.fabric.utilities.rank_zero import (
    RANK_VARIABLES,
    LightningDeprecationWarning,
    rank_from_environment,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)


@pytest.fixture
def on_rank() -> Iterator[Callable[[int], None]]:
    before = rank_zero_only.rank  # type: ignore[attr-defined]
    yield lambda rank: setattr(rank_zero_only, "rank", rank)
    rank_zero_only.rank = before  # type: ignore[attr-defined]


def test_a_function_runs_on_rank_zero_alone(on_rank: Callable[[int], None]) -> None:
    calls = []

    @rank_zero_only
    def record(value: int, *, name: str) -> str:
        """Record it."""
        calls.append((value, name))
        return name

    on_rank(0)
    assert record(1, name="a") == "a"
    on_rank(3)
    assert record(2, name="b") is None
    assert calls == [(1, "a")]
    assert (record.__name__, record.__doc__) == ("record", "Record it.")


def test_other_ranks_get_the_default(on_rank: Callable[[int], None]) -> None:
    on_rank(1)
    assert rank_zero_only(lambda: "a", default="b")() == "b"


def test_methods_are_wrapped_too(on_rank: Callable[[int], None]) -> None:
    class Logger:
        @rank_zero_only
        def log(self, x: int) -> int:
            return x

        @property
        @rank_zero_only
        def name(self) -> str:
            return "n"

    on_rank(0)
    assert (Logger().log(3), Logger().name) == (3, "n")


@pytest.mark.parametrize("name", RANK_VARIABLES)
def test_a_launcher_says_the_rank_through_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in RANK_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    assert rank_from_environment() is None
    monkeypatch.setenv(name, "2")
    assert rank_from_environment() == 2


def test_the_first_variable_counts_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_from_environment() == 5


def test_the_rank_is_known_from_the_import_on() -> None:
    code = "from lightning.fabric.utilities.rank_zero import rank_zero_only; print(rank_zero_only.rank)"
    environment = {"PATH": "", "RANK": "4"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout == "4\n"


@pytest.mark.parametrize(
    ("warn", "category"),
    [(rank_zero_warn, UserWarning), (rank_zero_deprecation, LightningDeprecationWarning)],
)
def test_a_warning_points_at_the_line_that_gave_it(warn: Callable[..., Any], category: type[Warning]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame: Any = inspect.currentframe()
        warn("look here")
        line = frame.f_lineno - 1
    assert [(w.category, str(w.message), w.filename, w.lineno) for w in caught] == [(category, "look here", __file__, line)]


def test_a_warning_takes_a_category_and_can_point_further_out() -> None:
    def inner() -> None:
        rank_zero_warn("look there", category=RuntimeWarning, stacklevel=5)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inner()
    assert caught[0].category is RuntimeWarning
    assert caught[0].lineno == inner.__code__.co_firstlineno + 5


def test_other_ranks_do_not_warn(on_rank: Callable[[int], None]) -> None:
    on_rank(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rank_zero_warn("a")
        rank_zero_deprecation("b")
    assert not caught


def test_deprecations_are_pythons_too() -> None:
    assert issubclass(LightningDeprecationWarning, DeprecationWarning)


@pytest.mark.parametrize(("say", "level"), [(rank_zero_info, logging.INFO), (rank_zero_debug, logging.DEBUG)])
def test_a_message_carries_its_level_arguments_and_place(
    say: Callable[..., Any], level: int, on_rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[logging.LogRecord] = []
    logger = logging.Logger("mine", logging.DEBUG)
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    monkeypatch.setattr(rank_zero, "log", logger)
    say("%d batches", 3)
    on_rank(1)
    say("silence")
    assert [(r.getMessage(), r.levelno, r.pathname) for r in records] == [("3 batches", level, __file__)]


def test_with_the_trainer_imported_messages_go_by_its_name() -> None:
    code = (
        "import logging, lightning.pytorch\n"
        "from lightning.fabric.utilities.rank_zero import rank_zero_info\n"
        "rank_zero_info('shown')\n"
        "logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)\n"
        "rank_zero_info('silenced')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "shown\n"
    assert done.stdout == ""
