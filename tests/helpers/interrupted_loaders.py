"""Datasets, samplers and loops for the tests of loaders that are interrupted."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from lightning.fabric.utilities.loader_state import ResumableLoader
from lightning.fabric.utilities.seed import collect_rng_states, set_rng_states

Batch = Any
Step = tuple[int, int, Batch, float]


class Augmented(Dataset[Any]):
    """Samples that show which they are, and what the three global generators gave for them."""

    def __init__(self, length: int = 10) -> None:
        self.length = length
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        info = get_worker_info()
        worker = (-1.0, 0.0) if info is None else (info.id, info.seed % 2**20)
        assert info is None or isinstance(info.dataset, Augmented)
        return torch.tensor([index, random.gauss(0, 1), np.random.randn(), float(torch.rand(())), *worker], dtype=torch.float64)


class OnlyNormal(Augmented):
    """Draws nothing but normally distributed numbers of numpy, which come in pairs: each second one was in store."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, np.random.randn()])


class InBulk(Augmented):
    """The same, asked for several samples at once."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        assert len(indices) > 0
        return [self[index] for index in indices]


class WithOwnGenerators(Augmented):
    """Draws from generators of its own, one of them deep inside."""

    def __init__(self, length: int = 10) -> None:
        super().__init__(length)
        self.numpy = np.random.default_rng(3)
        self.transforms = [{"python": random.Random(4)}, torch.Generator().manual_seed(5)]

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = [self.numpy.random(), self.transforms[0]["python"].random(), float(torch.rand((), generator=self.transforms[1]))]  # type: ignore
        return torch.cat([super().__getitem__(index), torch.tensor(drawn, dtype=torch.float64)])


class WithState(Augmented):
    """Counts what it gave, and can tell."""

    count = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.count += 1
        return torch.cat([super().__getitem__(index), torch.tensor([self.count], dtype=torch.float64)])

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Stream(IterableDataset[Any]):
    """A part of the samples for each worker, with random numbers."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.length, step):
            yield torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64)


class StreamWithState(Stream):
    """The same, able to begin in the middle."""

    def __init__(self, length: int = 10) -> None:
        super().__init__(length)
        self.next = 0
        self.loaded: list[int] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.next < self.length:
            self.next += 1
            self.loaded.append(self.next - 1)
            yield torch.tensor([self.next - 1, random.random(), float(torch.rand(()))], dtype=torch.float64)
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Eager(Sampler[int]):
    """Draws its order from numpy when it is started, and not with its first sample."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(self.length).tolist())


class AsItGoes(Eager):
    """Draws each sample when it is asked for it."""

    def __iter__(self) -> Iterator[int]:
        return (random.randrange(self.length) for _ in range(self.length))


class DrawsAtItsEnd(Eager):
    """Draws once more when it is asked for more than it has."""

    def __iter__(self) -> Iterator[int]:
        yield from range(self.length)
        torch.rand(1)


class ByPass(Eager):
    """Another order in each pass, known by counting; can tell its count."""

    passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(self.passes)).tolist())

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]


class BatchesOfPairs(Eager):
    """A batch sampler that is none of torch's."""

    def __len__(self) -> int:
        return self.length // 2

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        order = torch.randperm(self.length).tolist()
        for i in range(len(self)):
            yield order[2 * i : 2 * i + 2]


def collate(samples: list[torch.Tensor]) -> torch.Tensor:
    """Stack, and draw again."""
    return torch.stack([sample + random.random() + np.random.rand() + torch.rand(()) * 0 for sample in samples])


def times_two(sample: torch.Tensor) -> torch.Tensor:
    """For loaders of single samples."""
    return 2 * sample


def train(
    make: Callable[[], Any],
    epochs: int = 2,
    stops: Collection[tuple[int, int]] = (),
    saved: bytes | None = None,
    limit: int | None = None,
    ahead: int = 0,
    wrapped: bool = True,
) -> tuple[list[Step], dict[tuple[int, int], bytes]]:
    """A loop over epochs that draws random numbers itself.

    Args:
        make: gives the loader, as a new process would make it.
        epochs: how many.
        stops: the epochs and numbers of used batches, -1 for between epochs, after which to save.
        saved: what a run saved that was interrupted there.
        limit: batches of an epoch to use at most.
        ahead: how many batches are fetched before those before them are used: 0 or 1.
        wrapped: whether the loader can be resumed; else it is iterated as it is.

    Returns:
        for each step the epoch, the batch's number, the batch and a number drawn in the step; and what was saved at the stops.
    """
    torch.manual_seed(7)
    random.seed(8)
    np.random.seed(9)
    loader = ResumableLoader(make(), looks_ahead=ahead > 0) if wrapped else make()
    first, start = 0, 0
    if saved is not None:
        random.seed(99)  # a new process has drawn who knows what
        torch.manual_seed(99)
        np.random.seed(99)
        content = torch.load(io.BytesIO(saved), weights_only=True)
        loader.load_state_dict(content["loader"])
        first, start = content["epoch"], content["batch"]
        set_rng_states(content["rng"])
    steps: list[Step] = []
    files: dict[tuple[int, int], bytes] = {}
    for epoch in range(first, epochs):
        set_epoch(loader, epoch)
        batches = iter(loader)
        fetched: list[Batch] = []
        k = start if epoch == first else 0
        while True:
            if (epoch, k) in stops:
                files[epoch, k] = save(loader, epoch, k, False)
            while len(fetched) <= ahead and (limit is None or k + len(fetched) < limit):
                try:
                    fetched.append(next(batches))
                except StopIteration:
                    break
            if not fetched:
                break
            steps.append((epoch, k, fetched.pop(0), float(torch.rand(()) + random.random() + np.random.randn())))
            k += 1
        del batches
        if (epoch + 1, -1) in stops:
            files[epoch + 1, -1] = save(loader, epoch + 1, 0, True)
    return steps, files


def set_epoch(loader: Any, epoch: int) -> None:
    """As the loops of the package do."""
    sampler = getattr(getattr(loader, "loader", loader), "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def save(loader: ResumableLoader, epoch: int, batch: int, over: bool) -> bytes:
    """What a checkpoint would hold, as a file."""
    file = io.BytesIO()
    state = loader.state_dict(over=True) if over else loader.state_dict(batch)
    torch.save({"loader": state, "epoch": epoch, "batch": batch, "rng": collect_rng_states()}, file)
    return file.getvalue()


def assert_same(got: list[Step], wanted: list[Step]) -> None:
    """Compare steps bit by bit."""
    assert [(epoch, k) for epoch, k, _, _ in got] == [(epoch, k) for epoch, k, _, _ in wanted]
    for one, other in zip(got, wanted):
        assert torch.equal(torch.as_tensor(one[2]), torch.as_tensor(other[2])), f"batch {one[1]} of epoch {one[0]}"
        assert one[3] == other[3], f"the step of batch {one[1]} of epoch {one[0]}"


def check_every_interruption(make: Callable[[], Any], epochs: int = 2, **how: Any) -> None:
    """Interrupt after every batch, and between epochs; what comes after is what an uninterrupted run of the plain loader gives."""
    wanted, _ = train(make, epochs, wrapped=False, **how)
    assert len(wanted) >= 2 * epochs
    stops = [(epoch, k) for epoch, k, _, _ in wanted]
    stops += [(epoch, max(k for at, k in stops if at == epoch) + 1) for epoch in range(epochs)]
    stops += [(epoch, -1) for epoch in range(1, epochs)]
    whole, files = train(make, epochs, stops, **how)
    assert_same(whole, wanted)
    assert len(files) == len(stops)
    for (epoch, k), saved in files.items():
        rest, _ = train(make, epochs, saved=saved, **how)
        assert_same(rest, [step for step in wanted if step[:2] >= (epoch, k)])


def loader_of(dataset: Callable[[], Any] = Augmented, **kwargs: Any) -> Callable[[], DataLoader[Any]]:
    """A function that makes a loader anew, with a sampler of its own."""

    def make() -> DataLoader[Any]:
        made = {name: value() if name in ("sampler", "batch_sampler", "generator") else value for name, value in kwargs.items()}
        return DataLoader(dataset(), **{"collate_fn": collate, **made})

    return make
