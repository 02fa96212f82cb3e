"""What data each of several processes gets from the loaders of a run, and that every sample counts once."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run, run_to_end
from trainers import Evaluated, Numbers, Stream, Weight, joined

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

TRAINED = DataLoader(Numbers(4), batch_size=2)


def numbers(count: int, batch_size: int = 1, start: int = 0, **arguments: Any) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count, start), batch_size=batch_size, **arguments)


class Shares(Weight):
    """Notes its batches epoch by epoch, of whatever they consist."""

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen[-1].append(plain(batch))  # type: ignore[arg-type]
        return self.weight * 1.0


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(value) for value in batch]
    return batch.flatten().tolist() if isinstance(batch, Tensor) else batch


def trained_on(loader: Any, **arguments: Any) -> list[Any]:
    """The batches of each epoch."""
    model = Shares()
    joined(**arguments).fit(model, loader)
    return model.seen


# ---- training -------------------------------------------------------------------------------------------------------


def trained(rank: int, size: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # what a process draws by itself must not matter
    user = DistributedSampler(Numbers(6), num_replicas=size, rank=rank, shuffle=True, seed=7)
    return {
        "in order": trained_on(numbers(6, 2), max_epochs=3),
        "shuffled": trained_on(numbers(6, 2, shuffle=True), max_epochs=3),
        "repeated": trained_on(numbers(5, 2)),
        "drop_last": trained_on(numbers(5, 2, drop_last=True)),
        "the user's": trained_on(numbers(6, 2, sampler=user), max_epochs=2),
        "subset": trained_on(numbers(9, sampler=SubsetRandomSampler([1, 3, 5, 7]))),
        "not shared out": trained_on(numbers(3), use_distributed_sampler=False),
        "any iterable": trained_on(range(2)),
        "fraction": trained_on(numbers(8), limit_train_batches=0.5),
        "overfit": trained_on(numbers(8), overfit_batches=2, max_epochs=2),
        "overfit fraction": trained_on(numbers(8), overfit_batches=0.25),
    }


def sampled(count: int, epoch: int, seed: int = 0) -> list[Any]:
    """What torch's sampler gives two processes, in batches of 2."""
    samplers = [DistributedSampler(Numbers(count), 2, rank, shuffle=True, seed=seed) for rank in range(2)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    shares = [[float(index) for index in sampler] for sampler in samplers]
    return [[share[at : at + 2] for at in range(0, len(share), 2)] for share in shares]


def test_training_data_are_shared_out_and_shuffled_by_seed_and_epoch() -> None:
    first, second = run(trained, 2)
    for name in ("in order", "shuffled"):
        assert [first[name], second[name]] == [[sampled(6, epoch)[rank] for epoch in range(3)] for rank in range(2)]
    assert first["in order"][0] != first["in order"][1]
    assert [first["repeated"], second["repeated"]] == [[share] for share in sampled(5, 0)]  # 3 each: one sample comes twice
    assert [len(share["drop_last"][0]) for share in (first, second)] == [1, 1]
    assert [first["the user's"], second["the user's"]] == [[sampled(6, epoch, seed=7)[rank] for epoch in range(2)] for rank in range(2)]
    subset = [sample for share in (first, second) for batch in share["subset"][0] for sample in batch]
    assert sorted(subset) == [1.0, 3.0, 5.0, 7.0]
    assert first["not shared out"] == second["not shared out"] == [[[0.0], [1.0], [2.0]]]
    assert first["any iterable"] == second["any iterable"] == [[0, 1]]
    assert [len(share["fraction"][0]) for share in (first, second)] == [2, 2]
    # Not shuffled, so that each epoch has the same samples; Lightning's limits count the batches of each process.
    assert [first["overfit"], second["overfit"]] == [[[[0.0], [2.0]]] * 2, [[[1.0], [3.0]]] * 2]
    assert [first["overfit fraction"], second["overfit fraction"]] == [[[[0.0]]], [[[1.0]]]]


def seeded(rank: int, size: int) -> Any:
    from lightning.pytorch import seed_everything

    seed_everything(11, verbose=False)
    return trained_on(numbers(6, 2))


def test_seed_of_the_program_decides_on_the_order() -> None:
    assert run(seeded, 2) == [[share] for share in sampled(6, 0, seed=11)]


class Halves(BatchSampler):
    """Batches whose second half is reversed; its constructor has an argument of its own."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, times: int = 1) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.times = times
        self.epochs: list[int] = []

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch * self.times


class Opaque:
    """A batch sampler that has nothing to put another sampler into."""

    def __iter__(self) -> Any:
        return iter([[0, 1], [2]])

    def __len__(self) -> int:
        return 2


def with_batch_samplers(rank: int, size: int) -> dict[str, Any]:
    own = Halves(RandomSampler(Numbers(4)), 2, False, times=2)
    loader = DataLoader(Numbers(4), batch_sampler=own)
    trainer, model = joined(max_epochs=2), Shares()
    trainer.fit(model, loader)
    assert isinstance(trainer.train_dataloader, DataLoader)
    made = trainer.train_dataloader.batch_sampler
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        trained_on(DataLoader(Numbers(3), batch_sampler=Opaque()))  # type: ignore[arg-type]
    kept = trained_on(DataLoader(Numbers(3), batch_sampler=Opaque()), use_distributed_sampler=False)  # type: ignore[arg-type]
    return {"seen": model.seen, "made": [type(made).__name__, made.times, made is own, made.batch_size], "kept": kept}


def test_batch_samplers_of_the_user_are_made_anew_with_their_arguments() -> None:
    results = run(with_batch_samplers, 2)
    for rank, result in enumerate(results):
        assert result["seen"] == [[batch * 2 for batch in sampled(4, epoch)[rank]] for epoch in range(2)]
        assert result["made"] == ["Halves", 2, False, 2]
        assert result["kept"] == [[[0.0, 1.0], [2.0]]]


def combined(rank: int, size: int) -> dict[str, Any]:
    loaders = {"a": numbers(4), "b": numbers(8, start=10)}
    several = {mode: trained_on(CombinedLoader(loaders, mode), overfit_batches=1.0) for mode in ("min_size", "max_size_cycle")}
    return {**several, "a dict": len(trained_on(loaders)[0]), "streams": trained_on({"a": DataLoader(Stream(2)), "b": numbers(2)})}


def test_each_of_combined_loaders_is_shared_out() -> None:
    first, second = run(combined, 2)
    assert first["min_size"] == [[{"a": [0.0], "b": [10.0]}, {"a": [2.0], "b": [12.0]}]]
    assert second["min_size"] == [[{"a": [1.0], "b": [11.0]}, {"a": [3.0], "b": [13.0]}]]
    assert [batch["b"] for batch in second["max_size_cycle"][0]] == [[11.0], [13.0], [15.0], [17.0]]
    assert first["a dict"] == 4
    assert sorted(share["streams"][0][0]["b"] for share in (first, second)) == [[0.0], [1.0]]
    assert [batch["a"] for batch in first["streams"][0]] == [[0.0], [1.0]]  # a stream is shared out by its author


def streams(rank: int, size: int) -> list[Any]:
    even = trained_on(DataLoader(Stream(3, start=10 * rank), batch_size=2), max_epochs=2)
    limited = trained_on(DataLoader(Stream(3 + 2 * rank, start=10 * rank)), limit_train_batches=2)
    return [even, limited]


def test_streams_are_taken_as_they_are() -> None:
    assert run(streams, 2) == [
        [[[[0.0, 1.0], [2.0]]] * 2, [[[0.0], [1.0]]]],
        [[[[10.0, 11.0], [12.0]]] * 2, [[[10.0], [11.0]]]],
    ]


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluated(rank: int, size: int, count: int) -> list[Any]:
    model = Evaluated()
    trainer = joined()
    loader = numbers(count, 2)
    results = [trainer.validate(model, loader, verbose=False), trainer.test(model, loader, verbose=False)]
    trainer.fit(model, numbers(2), loader)
    in_fit = trainer.callback_metrics["val"].item()
    predictions = [batch.flatten().tolist() for batch in trainer.predict(model, loader)]
    return [results, in_fit, model.evaluated, predictions, model.weight.item()]


@pytest.mark.parametrize(("size", "count"), [(2, 5), (2, 1), (3, 7), (3, 2)])
def test_evaluation_counts_every_sample_once_and_in_order(size: int, count: int) -> None:
    mean = sum(range(count)) / count
    for rank, (results, in_fit, seen, predictions, weight) in enumerate(run(evaluated, size, count)):
        assert results == [[{"val": pytest.approx(mean)}], [{"test": pytest.approx(mean)}]]
        assert in_fit == pytest.approx(mean)
        mine = [float(sample) for sample in range(rank, count, size)]
        batches = [mine[at : at + 2] for at in range(0, len(mine), 2)]
        assert seen == batches * 3
        assert predictions == [[pytest.approx(sample + weight) for sample in batch] for batch in batches]


class Several(Evaluated):
    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> Any:
        self.evaluated.append([dataloader_idx, *batch.flatten().tolist()])
        self.log("val", batch.mean(), sync_dist=True)
        self.log("count", float(len(batch)), sync_dist=True, reduce_fx="sum", add_dataloader_idx=False) if dataloader_idx == 1 else None


def with_several_loaders(rank: int, size: int) -> list[Any]:
    model, trainer = Several(), joined()
    results = trainer.validate(model, [numbers(5, 2), numbers(1, start=10), numbers(4, start=20)], verbose=False)
    shuffled = Evaluated()
    with pytest.warns(UserWarning, match="shuffles its data") if rank == 0 else nullcontext():
        joined().validate(shuffled, numbers(5, shuffle=True), verbose=False)
    return [results, model.evaluated, shuffled.evaluated]


def test_each_of_several_validation_loaders_is_shared_out() -> None:
    ranks = run(with_several_loaders, 2)
    for results, _, _ in ranks:
        assert results == [{"val/dataloader_idx_0": 2.0}, {"val/dataloader_idx_1": 10.0, "count": 1.0}, {"val/dataloader_idx_2": 21.5}]
    assert ranks[0][1] == [[0, 0.0, 2.0], [0, 4.0], [1, 10.0], [2, 20.0], [2, 22.0]]
    assert ranks[1][1] == [[0, 1.0, 3.0], [2, 21.0], [2, 23.0]]
    assert sorted(sample for rank in ranks for (sample,) in rank[2]) == [0.0, 1.0, 2.0, 3.0, 4.0]


class SideBySide(Evaluated):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.evaluated.append([each.item() for each in batch])
        self.log("sum", sum(each.sum() for each in batch), sync_dist=True, reduce_fx="sum")


def side_by_side(rank: int, size: int, mode: str) -> list[Any]:
    model = SideBySide()
    loaders = CombinedLoader([numbers(5), numbers(4, start=10)], mode)
    results = [joined().validate(model, loaders, verbose=False)[0]["sum"] for _ in range(2)]
    return [results, model.evaluated[: len(model.evaluated) // 2]]


@pytest.mark.parametrize(("mode", "total", "last"), [("min_size", 6 + 46.0, [3.0, 13.0]), ("max_size_cycle", 10 + 56.0, [4.0, 10.0])])
def test_loaders_side_by_side_are_shared_out_in_evaluation(mode: str, total: float, last: list[float]) -> None:
    ranks = run(side_by_side, 2, mode)
    assert [results for results, _ in ranks] == [[total, total]] * 2
    assert max(batch for _, batches in ranks for batch in batches) == last


def limited(rank: int, size: int, limit: Any) -> Any:
    model, trainer = Evaluated(), joined(limit_val_batches=limit)
    results = trainer.validate(model, numbers(5), verbose=False)
    return [results[0]["val"], model.evaluated, trainer.num_val_batches]


def test_limits_of_evaluation_count_the_batches_of_each_process() -> None:
    assert run(limited, 2, 1) == [[0.5, [[0.0]], [1]], [0.5, [[1.0]], [1]]]
    assert run(limited, 2, 0.7) == [[1.0, [[0.0], [2.0]], [2]], [1.0, [[1.0]], [1]]]


def test_loader_of_no_sample_is_an_error_in_every_process() -> None:
    for outcome in run_to_end(evaluated, 2, 0, timeout=20):
        assert outcome.error == "MisconfigurationException", outcome.trace
        assert "length 0" in outcome.message


# ---- around them ----------------------------------------------------------------------------------------------------


class Reloading(Shares):
    loads = 0

    def train_dataloader(self) -> Any:
        self.loads += 1
        return numbers(4, start=10 * self.loads)

    def val_dataloader(self) -> Any:
        return numbers(3, start=10 * self.loads)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean(), sync_dist=True, reduce_fx="max")


def reloading(rank: int, size: int) -> list[Any]:
    model, trainer = Reloading(), joined(max_epochs=4, reload_dataloaders_every_n_epochs=2)
    trainer.fit(model)
    return [model.loads, [sorted(sample for (sample,) in epoch) for epoch in model.seen], trainer.callback_metrics["val"].item()]


def test_loaders_that_are_asked_for_anew_are_shared_out_anew() -> None:
    ranks = run(reloading, 2)
    assert [rank[0] for rank in ranks] == [2, 2]
    for epoch, start in enumerate([10, 10, 20, 20]):
        assert sorted(sample for rank in ranks for sample in rank[1][epoch]) == [float(start + index) for index in range(4)]
    assert [rank[2] for rank in ranks] == [22.0, 22.0]


class Downloads(LightningDataModule):
    """Notes what is called in which process, in a folder that all of them see."""

    def __init__(self, folder: str, per_node: bool) -> None:
        super().__init__()
        self.folder, self.prepare_data_per_node = Path(folder), per_node

    def prepare_data(self) -> None:
        (self.folder / f"data-{self.trainer.global_rank}").touch()  # type: ignore[union-attr]

    def setup(self, stage: str) -> None:
        self.found = sorted(path.name for path in self.folder.iterdir())

    def train_dataloader(self) -> Any:
        return numbers(2)


def preparing(rank: int, size: int, folder: str, per_node: bool, devices: int) -> list[str]:
    class Model(Weight):
        def prepare_data(self) -> None:
            (Path(folder) / f"model-{rank}").touch()

    data = Downloads(folder, per_node)
    joined(devices=devices, num_nodes=size // devices).fit(Model(), datamodule=data)
    return data.found


@pytest.mark.parametrize(
    ("per_node", "devices", "expected"),
    [
        (True, 2, ["data-0", "model-0"]),
        (False, 2, ["data-0", "model-0"]),
        (True, 1, ["data-0", "data-1", "model-0", "model-1"]),
        (False, 1, ["data-0", "model-0", "model-1"]),  # the model does it on each machine
    ],
)
def test_data_are_prepared_once_before_any_process_goes_on(tmp_path: Path, per_node: bool, devices: int, expected: list[str]) -> None:
    assert run(preparing, 2, str(tmp_path), per_node, devices) == [expected] * 2


def workers_seeded(rank: int, size: int) -> list[Any]:
    from lightning.pytorch import seed_everything

    seed_everything(1, workers=True, verbose=False)
    trainer = joined()
    trainer.fit(Weight(), numbers(2))
    loader: Any = trainer.train_dataloader
    with torch.random.fork_rng():
        torch.manual_seed(5)
        loader.worker_init_fn(0)
        return [loader.worker_init_fn.keywords, torch.rand(1).item()]


def test_workers_of_each_process_are_seeded_by_its_rank() -> None:
    first, second = run(workers_seeded, 2)
    assert [first[0], second[0]] == [{"rank": 0}, {"rank": 1}]
    assert first[1] != second[1]
