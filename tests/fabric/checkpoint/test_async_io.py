"""Saves in the background: what is copied, in which order things happen, and who hears of errors."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.fabric.checkpoint.io import CheckpointIO, TorchCheckpointIO, load
from lightning.fabric.checkpoint.staging import Staging


class Slow(TorchCheckpointIO):
    """Waits in the middle of saves until it is let go; fails if told to."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: BaseException | None = None
        self.log: list[str] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.log.append(f"begin {path}")
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        super().save_checkpoint(checkpoint, path, storage_options)
        self.log.append(f"end {path}")

    def remove_checkpoint(self, path: Any) -> None:
        self.log.append(f"remove {path}")
        super().remove_checkpoint(path)


def checkpoint(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": OrderedDict(w=torch.full((10,), float(step)))}


def test_saved_is_what_was_there_at_the_call() -> None:
    slow = Slow()
    writer = AsyncCheckpointIO(slow)
    data = {**checkpoint(1), "books": {"best": ["a"]}, "path": Path("x")}
    slow.gate.clear()
    writer.save_checkpoint(data, "a.ckpt")
    data["state_dict"]["w"].zero_()
    data["books"]["best"].append("b")
    data["state_dict"]["new"] = 1
    slow.gate.set()
    loaded = writer.load_checkpoint("a.ckpt")  # waits
    assert torch.equal(loaded["state_dict"]["w"], torch.ones(10))
    assert loaded["books"] == {"best": ["a"]}
    assert list(loaded["state_dict"]) == ["w"]
    assert loaded["path"] == Path("x")


def test_save_does_not_wait_for_the_disk_and_one_is_under_way_at_a_time() -> None:
    slow = Slow()
    writer = AsyncCheckpointIO(slow)
    slow.gate.clear()
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    assert not os.path.exists("a.ckpt")
    assert writer.is_pending("a.ckpt")
    threading.Timer(0.2, slow.gate.set).start()
    writer.save_checkpoint(checkpoint(2), "b.ckpt")  # waits for the first
    assert slow.log[:2] == ["begin a.ckpt", "end a.ckpt"]
    writer.teardown()
    assert load("a.ckpt")["global_step"] == 1
    assert load("b.ckpt")["global_step"] == 2
    assert not writer.is_pending("b.ckpt")


def test_removal_happens_once_the_save_before_it_is_on_the_disk() -> None:
    slow = Slow()
    writer = AsyncCheckpointIO(slow)
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.wait()
    slow.gate.clear()
    writer.save_checkpoint(checkpoint(2), "b.ckpt")
    writer.remove_checkpoint("a.ckpt")
    assert os.path.exists("a.ckpt")
    slow.gate.set()
    writer.teardown()
    assert slow.log == ["begin a.ckpt", "end a.ckpt", "begin b.ckpt", "end b.ckpt", "remove a.ckpt"]
    writer.remove_checkpoint("b.ckpt")  # nothing is under way
    assert os.listdir() == []


def test_failed_save_is_told_once_keeps_the_old_checkpoint_and_does_not_harm_the_next() -> None:
    slow = Slow()
    writer = AsyncCheckpointIO(slow)
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.wait()
    slow.error = OSError(errno.ENOSPC, "No space left on device", "b.ckpt")
    writer.save_checkpoint(checkpoint(2), "b.ckpt")
    writer.remove_checkpoint("a.ckpt")
    with pytest.raises(OSError, match=r"'b\.ckpt' was not saved: No space left") as info:
        writer.wait()
    assert info.value.errno == errno.ENOSPC
    writer.poll()
    assert os.listdir() == ["a.ckpt"]
    slow.error = None
    writer.save_checkpoint(checkpoint(3), "c.ckpt")
    writer.teardown()
    assert os.listdir() == ["c.ckpt"]  # and what had to stay could go


def test_error_is_raised_by_the_next_save_which_does_not_begin() -> None:
    slow = Slow()
    writer = AsyncCheckpointIO(slow)
    slow.error = ValueError("odd")
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    with pytest.raises(ValueError, match="odd"):
        writer.save_checkpoint(checkpoint(2), "b.ckpt")
    slow.error = None
    writer.save_checkpoint(checkpoint(3), "c.ckpt")
    writer.teardown()
    assert os.listdir() == ["c.ckpt"]


def test_teardown_raises_the_error_of_the_last_save() -> None:
    writer = AsyncCheckpointIO()
    Path("file").touch()
    writer.save_checkpoint(checkpoint(1), "file/a.ckpt")
    with pytest.raises(OSError, match="was not saved"):
        writer.teardown()
    writer.teardown()


def test_file_that_failed_to_go_and_is_saved_anew_stays() -> None:
    slow = Slow()
    writer = AsyncCheckpointIO(slow)
    slow.error = OSError(errno.EIO, "x")
    writer.save_checkpoint(checkpoint(1), "b.ckpt")
    writer.remove_checkpoint("a.ckpt")  # waits for a save that succeeds
    with pytest.raises(OSError, match="x"):
        writer.wait()
    slow.error = None
    writer.save_checkpoint(checkpoint(2), "a.ckpt")
    writer.teardown()
    assert os.listdir() == ["a.ckpt"]


def test_action_that_fails_holds_back_those_after_it() -> None:
    writer = AsyncCheckpointIO()
    writer.save_checkpoint(checkpoint(1), "a.ckpt")
    writer.wait()
    slow = Slow()
    writer.checkpoint_io = slow
    slow.gate.clear()
    writer.save_checkpoint(checkpoint(2), "b.ckpt")

    def fail() -> None:
        raise OSError(errno.EPERM, "no links here")

    writer.after_saves("last.ckpt", fail)
    writer.remove_checkpoint("a.ckpt")
    slow.gate.set()
    with pytest.raises(OSError, match="no links here"):
        writer.wait()
    assert sorted(os.listdir()) == ["a.ckpt", "b.ckpt"]


def test_interpreter_that_ends_waits_for_the_save() -> None:
    code = (
        "import torch; from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO as A;"
        "A().save_checkpoint({'w': torch.ones(3_000_000)}, 'a.ckpt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(load("a.ckpt")["w"], torch.ones(3_000_000))


def test_plugin_can_be_pickled_and_takes_what_lightning_takes() -> None:
    assert isinstance(pickle.loads(pickle.dumps(AsyncCheckpointIO())), AsyncCheckpointIO)
    copied = pickle.loads(pickle.dumps(AsyncCheckpointIO(TorchCheckpointIO())))
    assert isinstance(copied.checkpoint_io, TorchCheckpointIO)
    assert AsyncCheckpointIO().checkpoint_io is None
    with pytest.raises(TypeError, match="checkpoint_io=3"):
        AsyncCheckpointIO(3)  # type: ignore[arg-type]


def test_other_plugins_save_at_once_and_have_nothing_to_tell() -> None:
    done: list[int] = []
    writer: CheckpointIO = TorchCheckpointIO()
    writer.after_saves("a.ckpt", lambda: done.append(1))
    writer.poll()
    assert done == [1]
    assert not writer.is_pending("a.ckpt")


# ---- copies -----------------------------------------------------------------------------------------------------------


def test_copies_keep_what_tensors_share_and_how_they_lie_in_memory() -> None:
    base = torch.arange(12.0).view(3, 4)
    tree = {"a": base, "b": base.t(), "row": base[1], "again": base, "p": torch.nn.Parameter(torch.ones(2)), "none": None}
    copied = Staging().stage(tree)
    base.zero_()
    assert torch.equal(copied["a"], torch.arange(12.0).view(3, 4))
    assert copied["a"] is copied["again"]
    assert copied["b"].untyped_storage().data_ptr() == copied["a"].untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    assert copied["b"].stride() == tree["b"].stride()
    assert torch.equal(copied["row"], torch.arange(4.0, 8.0))
    assert isinstance(copied["p"], torch.nn.Parameter)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor(True),
        torch.tensor([1 + 2j]).conj(),
        torch.eye(3).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2, requires_grad=True),
    ],
    ids=str,
)
def test_tensors_of_all_kinds_are_copied(tensor: torch.Tensor) -> None:
    copied = Staging().stage({"x": tensor})["x"]
    assert copied is not tensor or tensor.is_meta
    assert (copied.dtype, copied.shape, copied.layout) == (tensor.dtype, tensor.shape, tensor.layout)
    assert copied.requires_grad == tensor.requires_grad
    if not tensor.is_meta:
        dense = torch.Tensor.to_dense
        assert torch.equal(dense(copied.detach()), dense(tensor.detach()))


def test_memory_is_used_again_and_not_kept_when_it_is_not_needed() -> None:
    staging = Staging()
    first = staging.stage({"a": torch.ones(100), "b": torch.ones(100), "c": torch.ones(7)})
    places = {tensor.untyped_storage().data_ptr() for tensor in first.values()}
    second = staging.stage({"a": torch.zeros(100), "b": torch.zeros(100)})
    assert {tensor.untyped_storage().data_ptr() for tensor in second.values()} <= places
    assert sum(len(storages) for storages in staging.used.values()) == 2
    assert not staging.free


def test_other_values_are_copied_deeply_and_containers_keep_their_kind() -> None:
    class Odd:
        def __init__(self) -> None:
            self.values = [1]

    state = OrderedDict(a=1)
    state._metadata = {"version": 2}  # type: ignore[attr-defined]
    odd, cycle = Odd(), []  # type: ignore[var-annotated]
    cycle.append(cycle)
    copied = Staging().stage({"odd": odd, "state": state, "cycle": cycle, "tuple": ([1], torch.ones(1))})
    odd.values.append(2)
    assert copied["odd"].values == [1]
    assert type(copied["state"]) is OrderedDict
    assert copied["state"]._metadata == {"version": 2}
    assert copied["cycle"][0] is copied["cycle"]
    assert copied["tuple"][0] == [1]


PROGRAM = """
import errno, time, torch
from lightning.fabric import Fabric
from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.fabric.checkpoint.io import TorchCheckpointIO

class Full(TorchCheckpointIO):
    def save_checkpoint(self, *args, **kwargs):
        time.sleep(0.3)
        raise OSError(errno.ENOSPC, "No space left on device")

def main():
    fabric = Fabric(accelerator="cpu", plugins=[AsyncCheckpointIO(Full())])
    fabric.launch()
    fabric.save("last.ckpt", {"step": 7})

main()  # nothing that saves is left when it ends
"""


def test_program_that_ends_tells_the_error_of_its_last_save(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "last.ckpt' was not saved: No space left on device" in done.stderr, done
