"""Samplers shared among processes, and the question whether they share a disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DistributedSampler, Sampler, SequentialSampler

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper, is_shared_filesystem


class Group:
    """Several ranks as threads: what each contributes, in turns."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=10)
        self.values: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.barrier.wait()
        self.values[rank] = value
        self.barrier.wait()
        return list(self.values)


class Rank:
    """The part of a strategy that the question needs."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank = group, rank
        self.world_size, self.global_rank, self.is_global_zero = group.size, rank, rank == 0

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self.group.gather(self.rank, obj)[src]

    def barrier(self, name: str | None = None) -> None:
        self.group.gather(self.rank, name)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        decisions = self.group.gather(self.rank, decision)
        return min(decisions) if all else max(decisions)


def ask(paths: list[Any], timeout: float = 1) -> list[bool]:
    group = Group(len(paths))
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = [pool.submit(is_shared_filesystem, Rank(group, rank), path, timeout) for rank, path in enumerate(paths)]  # type: ignore[arg-type]
        return [answer.result() for answer in answers]


def test_same_folder_is_shared_and_left_clean(tmp_path: Path) -> None:
    assert ask([tmp_path, str(tmp_path)]) == [True, True]
    assert list(tmp_path.iterdir()) == []


def test_working_directory_is_asked_about_by_default() -> None:
    assert ask([None, None]) == [True, True]


def test_file_stands_for_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert ask([file, file.as_uri()]) == [True, True]


def test_different_folders_are_not_shared(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert ask([tmp_path, tmp_path / "other"]) == [False, False]


def test_folder_that_only_looks_the_same_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: touch(path.parent.parent / path.name))  # rank 0 writes to a disk of its own
    (tmp_path / "mount").mkdir()
    assert ask([tmp_path / "mount"] * 2, timeout=0.1) == [False, False]


def test_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist on every machine"):
        ask([tmp_path / "missing"] * 2)


def test_url_and_single_process_are_shared_without_asking() -> None:
    assert is_shared_filesystem(Rank(Group(2), 0), "s3://bucket/folder")  # type: ignore[arg-type]
    assert is_shared_filesystem(Rank(Group(1), 0), "missing")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"shuffle": True, "seed": 3}, {"drop_last": True}])
def test_wrapped_sampler_is_shared_out_as_a_dataset_would_be(options: dict[str, Any]) -> None:
    indices = [5, 6, 7, 8, 9]
    for rank in range(2):
        wrapped = DistributedSamplerWrapper(indices, num_replicas=2, rank=rank, **options)
        expected: Any = DistributedSampler(range(5), num_replicas=2, rank=rank, **options)  # type: ignore[arg-type]
        for epoch in range(2):
            wrapped.set_epoch(epoch)
            expected.set_epoch(epoch)
            assert list(wrapped) == [indices[place] for place in expected]
        assert len(wrapped) == len(expected)


def test_wrapped_sampler_is_asked_anew_each_time() -> None:
    class Growing(SequentialSampler):
        start = 0

        def __iter__(self) -> Iterator[int]:
            self.start += 10
            return iter([self.start, self.start + 1])

    sampler = DistributedSamplerWrapper(Growing(range(2)), num_replicas=1, rank=0, shuffle=False)
    assert list(sampler) == [10, 11]
    assert list(sampler) == [20, 21]


def test_wrapping_a_sampler_without_length_raises() -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    with pytest.raises(TypeError, match="Endless has no `__len__`"):
        DistributedSamplerWrapper(Endless(), num_replicas=1, rank=0)
