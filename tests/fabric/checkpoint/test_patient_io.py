"""Saves that are tried again: what stays meanwhile, when they are given up, and who hears of it."""

from __future__ import annotations

import errno
import os
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.fabric.checkpoint.background import BackgroundCheckpointIO, PatientCheckpointIO
from lightning.fabric.checkpoint.io import TorchCheckpointIO, load

pytestmark = pytest.mark.filterwarnings("ignore:.*was not saved.*The run goes on")


class Full(TorchCheckpointIO):
    """A disk that has no room for some files, until it is given some."""

    def __init__(self, *paths: str) -> None:
        self.refused = set(paths)
        self.tries: list[str] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.tries.append(str(path))
        if path in self.refused:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


def patient(disk: Full, kind: type[BackgroundCheckpointIO] = PatientCheckpointIO, pause: float = 0.01) -> Any:
    writer = kind(disk)
    writer.retries, writer.first_pause, writer.longest_pause = True, pause, pause
    return writer


def checkpoint(step: int) -> dict[str, Any]:
    return {"global_step": step, "w": torch.full((10,), float(step))}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


KINDS = pytest.mark.parametrize("kind", [PatientCheckpointIO, AsyncCheckpointIO])


@KINDS
def test_failure_is_a_warning_with_path_and_number_and_the_state_of_then_is_saved_later(kind: type[BackgroundCheckpointIO]) -> None:
    disk = Full("b.ckpt")
    writer = patient(disk, kind)
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    data = checkpoint(2)
    told = rf"'b\.ckpt' was not saved: No space left on device \(errno {errno.ENOSPC}\)\. The run goes on"
    with pytest.warns(UserWarning, match=told):  # noqa: PT031 (one of them warns, depending on the kind)
        writer.save_checkpoint(data, "b.ckpt")
        data["w"].zero_()
        writer.remove_checkpoint("a.ckpt")
        until(lambda: disk.tries.count("b.ckpt") > 3)
        writer.poll()
    assert os.listdir() == ["a.ckpt"]
    assert writer.is_pending("b.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        writer.poll()
    disk.refused.clear()
    until(lambda: not writer.is_pending("b.ckpt"))
    assert torch.equal(load("b.ckpt")["w"], torch.full((10,), 2.0))
    assert os.listdir() == ["b.ckpt"]  # and what had to stay went
    writer.teardown()


@KINDS
def test_newer_save_does_not_wait_and_the_older_one_gets_another_try(kind: type[BackgroundCheckpointIO]) -> None:
    disk = Full("b.ckpt")
    writer = patient(disk, kind, pause=30)
    writer.save_checkpoint(checkpoint(1), "b.ckpt")
    until(lambda: writer._pausing)
    began = time.monotonic()
    disk.refused.clear()
    writer.save_checkpoint(checkpoint(2), "c.ckpt")
    writer.wait()
    assert time.monotonic() - began < 10
    assert disk.tries == ["b.ckpt", "c.ckpt", "b.ckpt"]
    assert [load(name)["global_step"] for name in ("b.ckpt", "c.ckpt")] == [1, 2]


@KINDS
def test_save_that_a_newer_one_replaces_is_given_up(kind: type[BackgroundCheckpointIO]) -> None:
    disk = Full("last.ckpt")
    writer = patient(disk, kind, pause=30)
    writer.save_checkpoint(checkpoint(1), "last.ckpt")
    until(lambda: writer._pausing)
    disk.refused.clear()
    writer.save_checkpoint(checkpoint(2), "last.ckpt")
    writer.wait()
    assert disk.tries == ["last.ckpt"] * 2
    assert load("last.ckpt")["global_step"] == 2


@KINDS
def test_one_older_save_at_most_is_kept(kind: type[BackgroundCheckpointIO]) -> None:
    disk = Full("a.ckpt", "b.ckpt", "c.ckpt")
    writer = patient(disk, kind, pause=30)
    for step, name in enumerate(("a.ckpt", "b.ckpt", "c.ckpt")):
        writer.save_checkpoint(checkpoint(step), name)
        until(lambda: writer._pausing)
    assert [writer.is_pending(name) for name in ("a.ckpt", "b.ckpt", "c.ckpt")] == [False, True, True]
    disk.refused.clear()
    writer.teardown()  # a last try, at once
    assert sorted(os.listdir()) == ["b.ckpt", "c.ckpt"]


@KINDS
@pytest.mark.parametrize("end", ["wait", "teardown"])
def test_save_that_fails_to_the_end_is_an_error_then(kind: type[BackgroundCheckpointIO], end: str) -> None:
    writer = patient(Full("a.ckpt"), kind, pause=30)
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.remove_checkpoint("old.ckpt")
    with pytest.raises(OSError, match=r"'a\.ckpt' was not saved: No space left") as info:
        getattr(writer, end)()
    assert info.value.errno == errno.ENOSPC
    writer.teardown()
    writer.save_checkpoint(checkpoint(2), "b.ckpt")  # as any other
    writer.teardown()
    assert os.listdir() == ["b.ckpt"]


def test_removal_that_waited_in_vain_is_no_business_of_the_next_run() -> None:
    Path("old.ckpt").touch()
    writer = patient(Full("a.ckpt"), pause=30)
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.remove_checkpoint("old.ckpt")
    with pytest.raises(OSError):
        writer.teardown()
    writer.save_checkpoint(checkpoint(2), "b.ckpt")
    writer.teardown()
    assert sorted(os.listdir()) == ["b.ckpt", "old.ckpt"]


@KINDS
def test_other_errors_are_raised(kind: type[BackgroundCheckpointIO]) -> None:
    class Broken(Full):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            raise ZeroDivisionError

    writer = patient(Broken(), kind)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 (one of them raises, depending on the kind)
        writer.save_checkpoint(checkpoint(1), "a.ckpt")
        writer.wait()
    writer.teardown()


@KINDS
def test_action_that_needs_the_file_waits_for_it_and_holds_back_those_after_it(kind: type[BackgroundCheckpointIO]) -> None:
    disk = Full("b.ckpt")
    writer = patient(disk, kind, pause=30)
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.save_checkpoint(checkpoint(2), "b.ckpt")
    done: list[str] = []
    writer.after_saves("last.ckpt", lambda: os.path.exists("b.ckpt") and done.append("link"))
    writer.remove_checkpoint("a.ckpt")
    writer.save_checkpoint(checkpoint(3), "other.ckpt")  # somebody else's
    until(lambda: not writer.is_pending("other.ckpt"))
    assert done == []
    assert sorted(os.listdir()) == ["a.ckpt", "other.ckpt"]
    disk.refused.clear()
    writer.save_checkpoint(checkpoint(2), "b.ckpt")
    writer.teardown()
    assert done == ["link"]
    assert sorted(os.listdir()) == ["b.ckpt", "other.ckpt"]


def test_nothing_is_copied_as_long_as_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = patient(Full())
    monkeypatch.setattr(writer._staging, "stage", lambda data: pytest.fail("copied"))
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.teardown()
    assert os.listdir() == ["a.ckpt"]


def test_files_can_be_read_while_a_save_waits_for_its_next_try() -> None:
    disk = Full("b.ckpt")
    writer = patient(disk, pause=30)
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.save_checkpoint(checkpoint(2), "b.ckpt")
    assert writer.load_checkpoint("a.ckpt")["global_step"] == 1
    disk.refused.clear()
    writer.teardown()


def test_patience_outlives_pickling() -> None:
    copied = pickle.loads(pickle.dumps(PatientCheckpointIO(TorchCheckpointIO())))
    assert type(copied) is PatientCheckpointIO
    assert copied.retries
    assert isinstance(copied.checkpoint_io, TorchCheckpointIO)


def test_removal_that_is_refused_is_a_warning_too() -> None:
    class Clinging(Full):
        def remove_checkpoint(self, path: Any) -> None:
            raise OSError(errno.EACCES, "Permission denied", path)

    writer = patient(Clinging())
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.remove_checkpoint("a.ckpt")
    with pytest.warns(UserWarning, match=r"'a\.ckpt' could not be removed: Permission denied .*The run goes on, and it stays"):
        writer.poll()
    writer.teardown()
    impatient = AsyncCheckpointIO(Clinging())
    with pytest.raises(OSError, match="Permission denied"):
        impatient.remove_checkpoint("a.ckpt")


@KINDS
def test_link_that_failed_is_made_at_the_end_and_holds_back_removals_until_then(kind: type[BackgroundCheckpointIO]) -> None:
    disk = Full()
    writer = patient(disk, kind)
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.wait()
    disk.refused.add("b.ckpt")
    writer.save_checkpoint(checkpoint(2), "b.ckpt")
    outcomes = [OSError(errno.ENOSPC, "No space left on device"), None]
    left: list[list[str]] = []

    def link() -> None:
        left.append(sorted(os.listdir()))
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    writer.after_saves("last.ckpt", link)
    writer.remove_checkpoint("a.ckpt")
    disk.refused.clear()
    until(lambda: not outcomes[1:] and not writer._thread.is_alive())
    assert sorted(os.listdir()) == ["a.ckpt", "b.ckpt"]
    with pytest.warns(UserWarning, match=r"'last\.ckpt' could not be removed or changed: No space left"):
        writer.wait()
    assert left == [["a.ckpt", "b.ckpt"]] * 2
    assert os.listdir() == ["b.ckpt"]
    writer.teardown()
