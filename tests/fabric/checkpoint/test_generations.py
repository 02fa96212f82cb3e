"""Which checkpoint is the newest whole one, what a seal tells, and what dead processes leave."""

from __future__ import annotations

import io as streams
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.checkpoint import io, seal, sharded, temporary
from lightning.fabric.checkpoint.generations import generation_of, newest_valid, verify
from lightning.fabric.checkpoint.io import DamagedCheckpoint, load, save


def write(path: str, step: int) -> None:
    save({"global_step": step, "state_dict": {"w": torch.full((100,), float(step))}}, path)


def flip(path: str, place: int = -2000) -> None:
    data = bytearray(Path(path).read_bytes())
    data[place] ^= 1
    Path(path).write_bytes(data)


def write_sharded(path: str, step: int) -> None:
    os.mkdir(".new")
    tensor = torch.full((100,), float(step))
    sharded.write_shards({"w": tensor}, ".new")
    sharded.commit({"global_step": step, "state_dict": {"w": sharded.stand_in(tensor, "w")}}, ".new", os.path.abspath(path))


def test_newest_is_the_highest_step_whatever_the_clock_says() -> None:
    write("a.ckpt", 20)
    write("b.ckpt", 10)
    os.utime("a.ckpt", (1, 1))
    assert newest_valid(".") == "./a.ckpt"
    assert newest_valid("*.ckpt") == "a.ckpt"
    assert newest_valid(["b.ckpt"]) == "b.ckpt"


def test_newest_of_one_step_is_the_one_saved_last() -> None:
    write("z.ckpt", 5)
    write("a.ckpt", 5)
    os.utime("a.ckpt", (1, 1))
    assert newest_valid(Path()) == "./a.ckpt" or newest_valid(Path()) == "a.ckpt"


def test_counter_goes_on_from_what_was_read() -> None:
    save({"global_step": 5}, "old.ckpt")
    before = generation_of("old.ckpt")
    assert before is not None
    data = Path("old.ckpt").read_bytes()
    archive = data[: data.rindex(b'{"version"')]
    buffer = streams.BytesIO()
    sealing = seal.Sealing(buffer)
    sealing.write(archive[:-2] + b"\0\0")
    sealing.seal(seal.Generation(5, before.counter + 1000))  # as another process would have written it
    Path("old.ckpt").write_bytes(buffer.getvalue())
    load("old.ckpt")
    save({"global_step": 5}, "new.ckpt")
    assert generation_of("new.ckpt") > generation_of("old.ckpt")  # type: ignore[operator]


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "zeros", "no checkpoint", "sharded"])
def test_damaged_one_is_named_and_the_one_before_it_taken(how: str) -> None:
    write("first.ckpt", 1)
    if how == "sharded":
        write_sharded("second.ckpt", 2)
        flip("second.ckpt/__0_0.distcp", 900)
    else:
        write("second.ckpt", 2)
        whole = Path("second.ckpt").read_bytes()
        if how == "flip":
            flip("second.ckpt")
        else:
            Path("second.ckpt").write_bytes(
                {"cut": whole[:-300], "empty": b"", "zeros": bytes(len(whole)), "no checkpoint": b"<html>"}[how]
            )
    with pytest.warns(UserWarning, match=r"second\.ckpt.*") as caught:
        assert newest_valid(".") == "./first.ckpt"
    assert len(caught) == 1
    assert "first.ckpt is used instead" in str(caught[0].message)


def test_older_damaged_one_is_not_looked_at() -> None:
    write("first.ckpt", 1)
    flip("first.ckpt")
    write("second.ckpt", 2)
    assert newest_valid(".") == "./second.ckpt"


def test_nothing_whole_lists_what_there_is_and_nothing_at_all_is_another_error() -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        newest_valid(".")
    for name in ("a.ckpt", "b.ckpt"):
        write(name, 1)
        flip(name)
    with pytest.raises(DamagedCheckpoint, match=r"None of the 2.*b\.ckpt.*a\.ckpt"):
        newest_valid(".")


def test_hidden_files_of_unfinished_saves_are_no_candidates() -> None:
    write(".x.ckpt", 9)
    write("a.ckpt", 1)
    assert newest_valid(".") == "./a.ckpt"


def test_files_without_a_seal_take_part_by_their_global_step() -> None:
    torch.save({"global_step": 7, "state_dict": {}}, "lightning.ckpt")
    write("ours.ckpt", 5)
    torch.save({"w": torch.ones(2)}, "weights.ckpt")
    assert newest_valid(".") == "./lightning.ckpt"
    assert generation_of("weights.ckpt") is None


class Foreign:
    pass


def test_file_that_only_a_trusting_load_reads_is_a_candidate_of_unknown_generation() -> None:
    torch.save({"global_step": 7, "hyper_parameters": Foreign()}, "last.ckpt")
    assert newest_valid(".") == "./last.ckpt"
    write("ours.ckpt", 0)
    assert newest_valid(".") == "./ours.ckpt"


def test_file_of_zeros_is_no_checkpoint_for_any_reader() -> None:
    """What a power cut leaves; torch takes it for an archive of its oldest releases."""
    Path("zeros.ckpt").write_bytes(bytes(5000))
    for read in (verify, generation_of, load, lambda path: load(path, verify=False), lambda path: load(path, weights_only=False)):
        with pytest.raises(DamagedCheckpoint, match=r"zeros\.ckpt.*5000 bytes.*it begins with zeros"):
            read("zeros.ckpt")  # type: ignore[operator]


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_files_of_the_format_before_archives_take_part(protocol: int) -> None:
    content = {"global_step": 7, "state_dict": {"w": torch.ones(100)}}
    torch.save(content, "old.ckpt", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    write("first.ckpt", 5)
    if protocol == 2:  # the one that torch's safe reader knows
        assert newest_valid(".") == "./old.ckpt"
        whole = Path("old.ckpt").read_bytes()
        Path("old.ckpt").write_bytes(whole[:-50])
        with pytest.warns(UserWarning, match=r"first\.ckpt is used instead: .*old\.ckpt: "):
            assert newest_valid(".") == "./first.ckpt"
    verify("old.ckpt")


def test_those_beside_count_once_one_is_damaged_and_are_not_looked_at_before() -> None:
    for step, name in enumerate(("last.ckpt", "last-v1.ckpt", "other.ckpt", "newer.ckpt")):
        write(name, step)
    lasts = ["last.ckpt", "last-v1.ckpt"]

    def beside() -> Any:
        looked.append(True)
        yield from ("other.ckpt", "newer.ckpt", "last.ckpt")

    looked: list[bool] = []
    assert newest_valid(lasts, beside=beside()) == "last-v1.ckpt"
    assert not looked
    flip("last-v1.ckpt")
    with pytest.warns(UserWarning, match=r"Of the 4 checkpoints found, these.*newer\.ckpt is used instead: last-v1\.ckpt: "):
        assert newest_valid(lasts, beside=beside()) == "newer.ckpt"
    for name in ("last.ckpt", "other.ckpt", "newer.ckpt"):
        flip(name)
    with pytest.raises(DamagedCheckpoint, match=r"None of the 4 .*last-v1.*newer.*other.*last\.ckpt"):
        newest_valid(lasts, beside=beside())


def test_numbers_in_names_count_as_numbers() -> None:
    for name in ("hpc_ckpt_9.ckpt", "hpc_ckpt_10.ckpt"):
        torch.save({"global_step": 1}, name)
    assert newest_valid("hpc_ckpt_*.ckpt") == "hpc_ckpt_10.ckpt"
    write("hpc_ckpt_2.ckpt", 50)
    assert newest_valid("hpc_ckpt_*.ckpt") == "hpc_ckpt_2.ckpt"
    assert newest_valid("hpc_ckpt_*.ckpt", by_name=True) == "hpc_ckpt_10.ckpt"


def test_directories_and_files_are_compared() -> None:
    write("file.ckpt", 1)
    write_sharded("directory.ckpt", 2)
    assert newest_valid(".") == "./directory.ckpt"
    assert generation_of("directory.ckpt") > generation_of("file.ckpt")  # type: ignore[operator]
    assert torch.equal(load("directory.ckpt")["state_dict"]["w"], torch.full((100,), 2.0))


def test_remote_folder() -> None:
    for step in (1, 12, 3):
        write(f"memory://generations/run/{step}.ckpt", step)
    assert newest_valid("memory://generations/run") == "memory:///generations/run/12.ckpt"
    import fsspec

    filesystem = fsspec.filesystem("memory")
    data = bytearray(filesystem.cat_file("/generations/run/12.ckpt"))
    data[100] ^= 1
    filesystem.pipe_file("/generations/run/12.ckpt", bytes(data))
    with pytest.warns(UserWarning, match=r"12\.ckpt"):
        assert newest_valid("memory://generations/run/*.ckpt") == "memory:///generations/run/3.ckpt"


# ---- seals ------------------------------------------------------------------------------------------------------------


def test_sealed_file_is_read_by_torch_and_by_zip_tools() -> None:
    write("a.ckpt", 3)
    for mmap in (False, True):
        assert torch.load("a.ckpt", weights_only=True, mmap=mmap)["global_step"] == 3
    assert zipfile.ZipFile("a.ckpt").testzip() is None


def test_error_names_the_file_the_record_and_the_way_out() -> None:
    write("a.ckpt", 3)
    with zipfile.ZipFile("a.ckpt") as archive:
        place = archive.getinfo("archive/data/0").header_offset
    flip("a.ckpt", place + 200)
    for read in (lambda: load("a.ckpt"), lambda: load("a.ckpt", mmap=True), lambda: verify("a.ckpt")):
        with pytest.raises(DamagedCheckpoint, match=r"'a\.ckpt'.*'archive/data/0' is broken.*checkpoint before it"):
            read()
    assert load("a.ckpt", verify=False)["global_step"] == 3


def test_flipped_weight_in_a_file_of_torch_is_found_by_the_checksums_of_the_archive() -> None:
    torch.save({"w": torch.zeros(1000)}, "a.ckpt")
    flip("a.ckpt", 3000)
    assert torch.load("a.ckpt")["w"].any()  # torch does not look
    with pytest.raises(DamagedCheckpoint, match="'a/data/0' is broken"):
        load("a.ckpt")


def test_record_that_a_flipped_bit_made_a_folder_is_found() -> None:
    """torch would load the tensor without filling it, and the checksum of the record is right."""
    torch.save({"w": torch.ones(100)}, "a.ckpt")
    data = bytearray(Path("a.ckpt").read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"a/data/0"))
    data[entry + 38] ^= 0x10  # of the external attributes
    Path("a.ckpt").write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="'a/data/0' is broken"):
        load("a.ckpt")


def test_archive_without_checksums_is_read() -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load("a.ckpt")["w"], torch.ones(3))


def test_checkpoint_within_an_open_file_is_checked_from_where_it_begins() -> None:
    write("a.ckpt", 3)
    data = Path("a.ckpt").read_bytes()
    assert load(streams.BytesIO(data))["global_step"] == 3
    stream = streams.BytesIO(b"before" + data)
    stream.seek(6)
    assert seal.verify(stream, "stream", 6).generation.global_step == 3  # type: ignore[union-attr]
    assert stream.tell() == 6


def test_generation_is_read_without_the_tensors() -> None:
    save({"global_step": 4, "w": torch.ones(1_000_000)}, "a.ckpt")

    class Counting(streams.FileIO):
        count = 0

        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            self.count += len(data)
            return data

    with Counting("a.ckpt") as file:
        assert seal.read_seal(file, "a.ckpt").generation.global_step == 4  # type: ignore[union-attr]
        assert file.count < 1000


def test_archive_that_would_unfold_is_refused() -> None:
    torch.save({"w": torch.ones(4)}, "a.ckpt")
    with zipfile.ZipFile("a.ckpt") as archive, zipfile.ZipFile("bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name) if "data/0" not in name else bytes(50_000_000))
    assert os.path.getsize("bomb.ckpt") < 100_000
    with pytest.raises(DamagedCheckpoint, match="unfold"):
        load("bomb.ckpt")


# ---- what dead processes leave ----------------------------------------------------------------------------------------


def in_another_process(code: str) -> Any:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_sweep_removes_what_dead_processes_left_and_nothing_else() -> None:
    name = in_another_process("from lightning.fabric.checkpoint.temporary import temporary_name as t; print(t())")
    Path(name).touch()
    os.mkdir(in_another_process("from lightning.fabric.checkpoint.temporary import temporary_name as t; print(t())"))
    own = temporary.temporary_name()
    kept = {own, ".0123456789abcdef.partial", "a.ckpt", ".hidden"}  # the second is of an unknown process, and new
    for each in kept:
        Path(each).touch()
    removed = temporary.sweep(".")
    assert f"./{name}" in removed
    assert len(removed) == 2
    assert set(os.listdir()) == kept


def test_sweep_removes_old_files_of_unknown_processes_and_those_from_before_a_restart() -> None:
    own = temporary.temporary_name().split("~")
    elsewhere = "~".join([own[0], "otherhost", *own[2:]])
    restarted = "~".join([own[0], own[1], "00000000", *own[3:]])
    for each in (".0123456789abcdef.partial", ".fedcba9876543210.partial", elsewhere, restarted):
        Path(each).touch()
    os.utime(".0123456789abcdef.partial", (1e9, 1e9))
    temporary.sweep(".")
    assert set(os.listdir()) == {".fedcba9876543210.partial", elsewhere}
    os.utime(elsewhere, (1e9, 1e9))
    temporary.sweep(".")
    assert os.listdir() == [".fedcba9876543210.partial"]


def test_sweep_puts_a_directory_back_that_had_stepped_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "exchange", lambda one, other: False)  # a file system where two directories can't change places
    write_sharded("a.ckpt", 1)
    real = os.replace

    def killed(one: Any, other: Any) -> None:
        if os.fspath(other).endswith("a.ckpt"):
            raise KeyboardInterrupt
        real(one, other)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_sharded("a.ckpt", 2)
    monkeypatch.setattr(os, "replace", real)
    assert not os.path.exists("a.ckpt")
    temporary.sweep(".")
    assert load("a.ckpt")["global_step"] == 1
    os.rename(".new", ".other")
    write_sharded("a.ckpt", 3)
    assert load("a.ckpt")["global_step"] == 3
    assert not os.path.exists("a.ckpt" + temporary.REPLACED)
