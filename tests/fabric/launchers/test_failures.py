"""The first cause among the failures of several ranks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lightning.fabric.launchers import PeerFailure, first_failure, report_failure
from lightning.fabric.launchers.failures import (
    RUN_DIRECTORY,
    RUN_RANK,
    Failure,
    clear_failure,
    explain,
    failures,
    mark_progress,
    progress_of,
    report_exit,
    was_interrupted,
)

GONE = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:44727."


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RUN_DIRECTORY, str(tmp_path))
    monkeypatch.setenv(RUN_RANK, "0")
    return tmp_path


def fails(monkeypatch: pytest.MonkeyPatch, rank: int, error: BaseException) -> None:
    monkeypatch.setenv(RUN_RANK, str(rank))
    try:
        raise error
    except BaseException as caught:
        report_failure(caught)


def test_nothing_reported_is_no_failure() -> None:
    assert first_failure() is None
    assert not was_interrupted()


def test_report_holds_rank_time_and_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    fails(monkeypatch, 3, ValueError("bad batch"))
    failure = first_failure()
    assert failure is not None
    assert (failure.rank, failure.kind, failure.message, failure.exit_code) == (3, "ValueError", "bad batch", None)
    assert before <= failure.time <= time.time()
    assert "in fails" in failure.traceback
    assert str(failure) == "rank 3 raised ValueError: bad batch"


def test_earliest_failure_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (2, 0, 1):
        fails(monkeypatch, rank, ValueError(str(rank)))
    assert [failure.rank for failure in failures()] == [2, 0, 1]
    first = first_failure()
    assert first is not None
    assert first.rank == 2


@pytest.mark.parametrize("error", [RuntimeError(GONE), ConnectionResetError("x"), RuntimeError("NCCL error in: x"), PeerFailure()])
def test_error_about_a_peer_gives_way_to_a_cause_that_was_seen_later(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    fails(monkeypatch, 0, error)
    report_exit(1, -9)
    first = first_failure()
    assert first is not None
    assert (first.rank, str(first)[:29]) == (1, "rank 1 was killed by SIGKILL ")


def test_error_about_a_peer_counts_if_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, 1, RuntimeError(GONE))
    fails(monkeypatch, 0, RuntimeError(GONE))
    first = first_failure()
    assert first is not None
    assert first.rank == 1


def test_other_runtime_error_is_a_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    fails(monkeypatch, 0, RuntimeError(GONE))
    first = first_failure()
    assert first is not None
    assert first.rank == 1


def test_what_a_rank_reports_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, 1, ValueError("cause"))
    fails(monkeypatch, 1, KeyError("while handling it"))
    report_exit(1, 1)
    assert [failure.message for failure in failures()] == ["cause"]


def test_caught_failure_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, 1, ValueError("cause"))
    clear_failure()
    assert failures() == []


def test_exit_is_told_by_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, 0, SystemExit(3))
    fails(monkeypatch, 1, SystemExit("no data"))
    fails(monkeypatch, 2, SystemExit())
    assert [failure.exit_code for failure in failures()] == [3, 1, 0]
    report_exit(3, -99)
    assert "was killed by signal 99" in str(failures()[-1])


def test_interruption_by_the_user_is_told_from_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, 1, KeyboardInterrupt())
    report_exit(2, -2)
    assert was_interrupted()
    fails(monkeypatch, 3, ValueError("bad batch"))
    assert not was_interrupted()


def test_report_without_a_run_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_DIRECTORY)
    fails(monkeypatch, 0, ValueError("alone"))
    mark_progress(1)
    clear_failure()
    assert (failures(), progress_of(0)) == ([], -1)
    assert list(tmp_path.iterdir()) == []


def test_report_that_can_not_be_written_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RUN_DIRECTORY, str(tmp_path / "gone"))
    fails(monkeypatch, 1, ValueError("bad batch"))
    assert "ValueError: bad batch" in capsys.readouterr().err


def test_half_a_report_is_passed_over(folder: Path) -> None:
    (folder / "failure-1.json").write_text('{"rank": 1, "ti')
    assert failures() == []


def test_message_names_cause_and_stopped_ranks_and_ends_with_the_traceback() -> None:
    failure = Failure(1, 0.0, "ValueError", "bad batch\nsecond line", "Traceback:\nValueError: bad batch\n")
    assert explain(failure, [0, 1, 2]) == (
        "The run failed: rank 1 raised ValueError: bad batch.\nStopped while still running: ranks 0, 2.\n\n"
        "On rank 1, the first to fail:\nTraceback:\nValueError: bad batch"
    )
    assert str(PeerFailure(failure)).startswith("The run failed: rank 1")
    assert PeerFailure(failure).rank == 1


def test_error_without_arguments_tells_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "left no error" in str(PeerFailure())
    fails(monkeypatch, 2, ValueError("bad batch"))
    assert "rank 2 raised ValueError: bad batch" in str(PeerFailure())


def test_progress_is_counted_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_of(1) == -1
    monkeypatch.setenv(RUN_RANK, "1")
    mark_progress(0)
    assert progress_of(1) == 0
    mark_progress(2)
    assert (progress_of(1), progress_of(0)) == (2, -1)
