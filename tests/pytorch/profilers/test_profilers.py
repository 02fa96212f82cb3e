"""The profilers' common interface, and the simple profiler's report."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

import lightning.pytorch.profilers as profilers
from lightning.pytorch.profilers import PassThroughProfiler, Profiler, SimpleProfiler
from lightning.pytorch.profilers import simple as simple_module


class Clock:
    """A clock that moves when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(simple_module.time, "perf_counter", clock)
    return clock


class Announce(Profiler):
    """Says what is asked of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.said: list[str] = []

    def start(self, action_name: str) -> None:
        self.said.append(f"start {action_name}")

    def stop(self, action_name: str) -> None:
        self.said.append(f"stop {action_name}")

    def summary(self) -> str:
        return "what was said\n"


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_names_of_the_package() -> None:
    assert all(getattr(profilers, name).__name__ == name for name in profilers.__all__)
    with pytest.raises(AttributeError, match="NoProfiler"):
        profilers.NoProfiler  # noqa: B018


def test_base_class_needs_start_and_stop() -> None:
    with pytest.raises(TypeError, match="start"):
        Profiler()  # type: ignore[abstract]


def test_profile_stops_what_it_started() -> None:
    profiler = Announce()
    with profiler.profile("loading") as name:
        assert name == "loading"
        profiler.said.append("loading")
    assert profiler.said == ["start loading", "loading", "stop loading"]


def test_profile_stops_what_raised() -> None:
    profiler = Announce()
    with pytest.raises(KeyError), profiler.profile("loading"):
        raise KeyError
    assert profiler.said == ["start loading", "stop loading"]


@pytest.mark.parametrize("log_dir", [None, "logs"])
@pytest.mark.parametrize("dirpath", ["out", Path("out")])
def test_report_goes_to_the_file_of_its_stage(dirpath: str | Path, log_dir: str | None) -> None:
    profiler = Announce(dirpath, "profiler")
    for stage in ("fit", "validate", "fit"):
        profiler.setup(stage, log_dir=log_dir)
        profiler.describe()
        profiler.teardown(stage)
    assert files() == ["out/fit-profiler.txt", "out/validate-profiler.txt"]
    assert Path("out/fit-profiler.txt").read_text() == "what was said\n" * 2


def test_report_goes_to_the_log_directory_of_the_trainer() -> None:
    profiler = Announce(filename="profiler")
    profiler.setup("fit", log_dir="logs/version_0")
    profiler.describe()
    assert files() == ["logs/version_0/fit-profiler.txt"]


def test_report_can_go_to_a_remote_directory() -> None:
    import fsspec

    profiler = Announce("memory://reports", "profiler")
    profiler.setup("fit")
    profiler.describe()
    assert fsspec.filesystem("memory").cat("/reports/fit-profiler.txt") == b"what was said\n"


def test_report_of_each_rank_has_its_own_file() -> None:
    profiler = Announce("out", "profiler")
    assert profiler.local_rank == 0
    for rank in (0, 3):
        profiler.setup("fit", local_rank=rank)
        assert profiler.local_rank == rank
        profiler.describe()
    assert files() == ["out/fit-profiler-0.txt", "out/fit-profiler-3.txt"]


@pytest.mark.parametrize("dirpath", [None, "out"])
@pytest.mark.parametrize(("rank", "messages"), [(None, 1), (0, 1), (2, 0)])
def test_report_without_a_filename_goes_to_the_log(
    caplog: pytest.LogCaptureFixture, dirpath: str | None, rank: int | None, messages: int
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.profilers.profiler")
    profiler = Announce(dirpath)
    profiler.setup("fit", local_rank=rank)
    profiler.describe()
    assert caplog.messages == ["what was said\n"] * messages
    assert files() == []


def test_pass_through_profiler_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    profiler = PassThroughProfiler("out", "profiler")
    profiler.setup("fit")
    with profiler.profile("loading"):
        pass
    profiler.stop("never started")
    profiler.describe()
    assert profiler.summary() == ""
    assert files() == []
    assert caplog.messages == []


def test_simple_profiler_records_each_call(clock: Clock) -> None:
    profiler = SimpleProfiler()
    for seconds in (2.0, 3.0):
        with profiler.profile("outer"):
            clock.now += 1
            with profiler.profile("inner"):
                assert profiler.current_actions.keys() == {"outer", "inner"}
                clock.now += seconds
    assert dict(profiler.recorded_durations) == {"inner": [2.0, 3.0], "outer": [3.0, 4.0]}
    assert profiler.current_actions == {}


def test_simple_profiler_refuses_to_start_twice() -> None:
    profiler = SimpleProfiler()
    profiler.start("loading")
    with pytest.raises(ValueError, match="'loading' was started twice"):
        profiler.start("loading")


def test_simple_profiler_refuses_to_stop_what_does_not_run() -> None:
    profiler = SimpleProfiler()
    profiler.start("training")
    with pytest.raises(ValueError, match=r"'loading' was stopped and never started.*'training'"):
        profiler.stop("loading")


def cells(report: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line.startswith("|")]


def recorded(clock: Clock, **kwargs: Any) -> SimpleProfiler:
    profiler = SimpleProfiler(**kwargs)
    clock.now += 1000  # what happens before the run is not part of it
    profiler.setup("fit")
    for name, seconds in (("short", 1.0), ("long", 4.0), ("short", 2.0)):
        with profiler.profile(name):
            clock.now += seconds
    clock.now += 1
    return profiler


def test_simple_report_is_sorted_by_total_time(clock: Clock) -> None:
    report = recorded(clock, extended=False).summary()
    assert report.startswith("FIT Profiler Report\n")
    assert cells(report) == [
        ["Action", "Mean duration (s)", "Total time (s)"],
        ["long", "4.0", "4.0"],
        ["short", "1.5", "3.0"],
    ]


def test_extended_report_adds_calls_and_shares(clock: Clock) -> None:
    report = recorded(clock).summary()
    assert cells(report) == [
        ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"],
        ["Total", "-", "3", "8.0", "100 %"],
        ["long", "4.0", "1", "4.0", "50.0"],
        ["short", "1.5", "2", "3.0", "37.5"],
    ]
    assert len({len(line) for line in report.splitlines() if re.match(r"[|-]", line)}) == 1


@pytest.mark.parametrize("extended", [True, False])
def test_report_of_nothing_is_possible(extended: bool) -> None:
    assert SimpleProfiler(extended=extended).summary().startswith("Profiler Report\n")


def test_second_stage_continues_the_record(clock: Clock) -> None:
    profiler = recorded(clock)
    profiler.setup("test")
    with profiler.profile("short"):
        clock.now += 8
    assert profiler.summary().startswith("TEST Profiler Report")
    assert cells(profiler.summary())[1:3] == [["Total", "-", "4", "16.0", "100 %"], ["short", "3.6667", "3", "11.0", "68.75"]]


def test_trainer_writes_a_report_for_each_of_its_functions() -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    model = BoringModel()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir="root",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_predict_batches=1,
        limit_test_batches=1,
        limit_train_batches=2,
        limit_val_batches=1,
        logger=False,
        max_epochs=1,
        profiler=SimpleProfiler(filename="profiler"),
    )
    trainer.fit(model)
    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    trainer.predict(model)
    assert files() == [f"root/{stage}-profiler.txt" for stage in ("fit", "predict", "test", "validate")]
    report = Path("root/fit-profiler.txt").read_text()
    assert report.startswith("FIT Profiler Report")
    assert "run_training_batch" in report
