"""Checkpoints go from one strategy and number of processes to any other, as one file or as a directory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from sharded import fit, fsdp, optimizer_state, set_up, weights
from training import Net, batches, largest_difference, part

from lightning.fabric.checkpoint import io, sharded
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.fsdp_module import root_of
from lightning.fabric.strategies.sharding import full_state
from lightning.fabric.strategies.single_device import SingleDeviceStrategy

TOLERANCE = 1e-6


class Model(Net):
    """With a number, statistics, and a tied weight."""

    def __init__(self) -> None:
        super().__init__(normalises=True)
        self.first = nn.Linear(5, 7, bias=False)  # normalisation would make the gradient of a bias zero
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.optional.weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(batch)) * self.scale)
        return (self.last(self.tied(hidden + self.optional(hidden))) - batch.sum(1, keepdim=True)).square().mean()


KINDS: dict[str, Any] = {
    "alone": (1, lambda size: SingleDeviceStrategy()),
    "ddp": (2, lambda size: DDPStrategy(parallel_devices=[torch.device("cpu")] * size)),
    "full": (2, fsdp),
    "full on 3": (3, fsdp),
    "sharded": (2, lambda size: fsdp(size, state_dict_type="sharded")),
    "sharded on 3": (3, lambda size: fsdp(size, state_dict_type="sharded")),
    "offloaded": (2, lambda size: fsdp(size, state_dict_type="sharded", cpu_offload=True)),
    "hybrid": (2, lambda size: fsdp(size, state_dict_type="sharded", sharding_strategy="HYBRID_SHARD", device_mesh=(2, 1))),
    "one process": (1, lambda size: fsdp(size, state_dict_type="sharded")),
}


def compose(strategy: Any, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    state = {"state_dict": strategy.lightning_module_state_dict(), "optimizer_states": [strategy.optimizer_state(optimizer)]}
    return {**state, "epoch": 3, "folder": Path("x"), **more}


def going_on(rank: int, size: int, kind: str, path: str, target: str, optimizer: str, first: bool) -> list[Any]:
    """Train for two steps and save, or load what others saved and train for two more."""
    strategy = KINDS[kind][1](size)
    options: dict[str, Any] = {"sgd": {"lr": 0.02, "momentum": 0.9}, "adam": {"lr": 0.01, "fused": True}}[optimizer]
    prepared = set_up(strategy, Model(), {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}[optimizer], **options)
    # Statistics are those of rank 0, so all processes see the same data here.
    if not first:
        checkpoint = strategy.load_checkpoint(path)
        assert checkpoint["epoch"] == 3
        assert checkpoint["folder"] == Path("x")
        strategy.load_model_state_dict(checkpoint)
        strategy.load_optimizer_state(prepared, checkpoint["optimizer_states"][0])
    fit(strategy, prepared, batches()[:2] if first else batches()[2:])
    strategy.save_checkpoint(compose(strategy, prepared), target)
    return [weights(strategy), optimizer_state(prepared)]


def uninterrupted(optimizer: str) -> list[Any]:
    going_on(0, 1, "alone", "", "a.ckpt", optimizer, True)
    return going_on(0, 1, "alone", "a.ckpt", "b.ckpt", optimizer, False)


@pytest.mark.parametrize(
    ("kinds", "optimizer"),
    [
        (("alone", "full"), "sgd"),
        (("full", "alone"), "adam"),
        (("alone", "sharded"), "adam"),
        (("sharded", "alone"), "sgd"),
        (("ddp", "sharded"), "sgd"),
        (("sharded", "ddp"), "adam"),
        (("full", "sharded on 3"), "adam"),
        (("sharded on 3", "full"), "sgd"),
        (("sharded", "one process"), "adam"),
        (("one process", "full on 3"), "sgd"),
        (("offloaded", "sharded"), "adam"),
        (("hybrid", "offloaded"), "sgd"),
        (("sharded", "hybrid"), "adam"),
    ],
)
def test_training_goes_on_under_another_strategy(kinds: tuple[str, str], optimizer: str, tmp_path: Path) -> None:
    expected = uninterrupted(optimizer)
    source, target = str(tmp_path / "first.ckpt"), str(tmp_path / "second.ckpt")
    for kind, path, result in ((kinds[0], "", source), (kinds[1], source, target)):
        size = KINDS[kind][0]
        found = run(going_on, size, kind, path, result, optimizer, result == source)
        assert os.path.isdir(result) is any(word in kind for word in ("sharded", "offloaded", "hybrid", "one process"))
    for states, numbers in found:
        assert largest_difference(states, expected[0]) < TOLERANCE
        assert largest_difference(numbers, expected[1]) < TOLERANCE
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b.ckpt", "first.ckpt", "second.ckpt"]  # and nothing half done


# ---- what is in a directory ---------------------------------------------------------------------------------------------


def saved(rank: int, size: int, path: str) -> dict[str, Any]:
    strategy = fsdp(size, state_dict_type="sharded")
    optimizer = set_up(strategy, Model(), torch.optim.AdamW, lr=0.01)
    fit(strategy, optimizer, [part(batch, rank, size) for batch in batches()])
    checkpoint = compose(strategy, optimizer, extra={"average": strategy.module.last.weight.detach() * 2, "text": "ä"})  # type: ignore[union-attr]
    strategy.save_checkpoint(checkpoint, path)
    return {"weights": weights(strategy), "versions": list(checkpoint["state_dict"]._metadata)}


def test_one_process_reads_all_of_it_without_a_group_or_a_module(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    facts = run(saved, 2, path)[0]
    checkpoint = io.load(path)
    assert {name: value.tolist() for name, value in checkpoint["state_dict"].items()} == facts["weights"]
    assert list(checkpoint["state_dict"]._metadata) == facts["versions"]
    assert (checkpoint["epoch"], checkpoint["folder"], checkpoint["extra"]["text"]) == (3, Path("x"), "ä")
    assert checkpoint["extra"]["average"].tolist() == [[2 * value for value in row] for row in facts["weights"]["last.weight"]]
    states = checkpoint["optimizer_states"][0]["state"]
    assert all(not tensor.is_meta for values in states.values() for tensor in values.values())
    assert not torch.distributed.is_initialized()
    Model().load_state_dict(checkpoint["state_dict"])
    shards = [name for name in os.listdir(path) if name.endswith(".distcp")]
    assert len(shards) == 2
    assert io.load(path, map_location="meta")["state_dict"]["last.weight"].is_meta


def test_entries_that_are_large_stay_unread_until_they_are_needed(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    expected = run(saved, 2, path)[0]["weights"]
    checkpoint = sharded.open_sharded(path)
    assert checkpoint["state_dict"]["first.weight"].is_meta
    assert not checkpoint["extra"]["average"].is_meta
    assert sharded.materialized(checkpoint)["state_dict"]["first.weight"].tolist() == expected["first.weight"]


def test_consolidated_into_one_file(tmp_path: Path) -> None:
    path, output = str(tmp_path / "last.ckpt"), str(tmp_path / "one.ckpt")
    expected = run(saved, 2, path)[0]["weights"]
    sharded.consolidate(path, output)
    state = torch.load(output, weights_only=True)["state_dict"]
    assert {name: value.tolist() for name, value in state.items()} == expected
    with pytest.raises(FileExistsError, match="there already"):
        sharded.consolidate(path, output)
    with pytest.raises(ValueError, match="not a complete sharded checkpoint"):
        sharded.consolidate(output, str(tmp_path / "two.ckpt"))


@pytest.mark.parametrize("package", ["fabric", "pytorch"])
def test_consolidated_by_a_command(package: str, tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    run(saved, 2, path)
    command = [sys.executable, "-m", f"lightning.{package}.utilities.consolidate_checkpoint", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "last.ckpt.consolidated" in done.stdout
    assert torch.load(f"{path}.consolidated", weights_only=True)["epoch"] == 3
    again = subprocess.run([*command, "--output_file", f"{path}.consolidated"], capture_output=True, text=True, check=False)
    assert (again.returncode, "there already" in again.stderr, "Traceback" in again.stderr) == (1, True, False)


def test_incomplete_and_damaged_directories_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    run(saved, 2, str(path))
    os.rename(path / "__1_0.distcp", path / "away")
    with pytest.raises(io.DamagedCheckpoint, match="incomplete or damaged"):
        io.load(path)
    os.rename(path / "away", path / "__1_0.distcp")
    with open(path / "__1_0.distcp", "r+b") as file:
        file.truncate(10)
    with pytest.raises(RuntimeError, match=r"damaged|PytorchStreamReader"):
        io.load(path)
    os.remove(path / "meta.pt")
    with pytest.raises(IsADirectoryError, match="not saved to its end"):
        io.load(path)


class Gadget:
    def __reduce__(self) -> Any:
        return os.mkdir, ("run",)


def test_metadata_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    run(saved, 2, str(path))
    with open(path / ".metadata", "wb") as file:
        pickle.dump(Gadget(), file)
    with pytest.raises(io.DamagedCheckpoint, match=r"posix\.mkdir|nt\.mkdir"):
        io.load(path, verify=False)
    assert not os.path.exists("run")


def test_metadata_name_no_files_of_others_and_no_bytes_for_tensors(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    path = tmp_path / "last.ckpt"
    run(saved, 2, str(path))
    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    info = next(iter(metadata.storage_data.values()))
    name, info.relative_path = info.relative_path, "../other"
    with open(path / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(io.DamagedCheckpoint, match="not its own"):
        io.load(path, verify=False)
    info.relative_path = name
    metadata.state_dict_metadata["state_dict.first.weight"] = BytesStorageMetadata()
    with open(path / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(io.DamagedCheckpoint, match="no tensor"):
        io.load(path, verify=False)  # whoever wrote that file would write checksums that suit it


def of_another_shape(rank: int, size: int, path: str) -> None:
    strategy, module = fsdp(size), Model()
    module.last = nn.Linear(7, 2)
    set_up(strategy, module, lr=0.1)
    strategy.load_model_state_dict(strategy.load_checkpoint(path))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    run(saved, 2, path)
    for outcome in run_to_end(of_another_shape, 2, path):
        assert outcome.error == "RuntimeError"
        assert "last.weight" in outcome.message


# ---- saving -------------------------------------------------------------------------------------------------------------


class Unstorable:
    def __reduce__(self) -> Any:
        raise ValueError("stays here")


def failing(rank: int, size: int, path: str, where: str) -> list[str]:
    strategy = fsdp(size, state_dict_type="sharded")
    optimizer = set_up(strategy, Model(), lr=0.1)
    checkpoint = compose(strategy, optimizer, **({"bad": Unstorable()} if where == "meta" else {}))
    if where == "shards" and rank == 1:
        import torch.distributed.checkpoint.filesystem as filesystem

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        filesystem._write_item = full  # type: ignore[assignment]
    try:
        strategy.save_checkpoint(checkpoint, "s3://bucket/x" if where == "url" else path)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


@pytest.mark.parametrize(
    ("where", "said"), [("meta", "bad of type"), ("shards", "No space left"), ("url", "state_dict_type='full'")]
)  # fmt: skip
def test_save_that_fails_fails_everywhere_and_leaves_the_old_checkpoint(where: str, said: str, tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    expected = run(saved, 2, path)[0]["weights"]
    for _, message in run(failing, 2, path, where):
        assert said in message
    assert {name: value.tolist() for name, value in io.load(path)["state_dict"].items()} == expected
    assert os.listdir(tmp_path) == ["last.ckpt"]


def replacing(rank: int, size: int, path: str) -> list[bool]:
    found = []
    for kind in ("full", "sharded", "sharded", "full"):
        strategy = fsdp(size, state_dict_type=kind)
        optimizer = set_up(strategy, Model(), lr=0.1)
        strategy.save_checkpoint(compose(strategy, optimizer), path)
        torch.distributed.barrier()
        found.append(os.path.isdir(path))
    return found


def test_file_and_directory_take_each_others_place(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    assert run(replacing, 2, path) == [[False, True, True, False]] * 2
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert io.load(path)["epoch"] == 3


def half_a_window(rank: int, size: int, kind: str, path: str) -> list[Any]:
    """Save within a window, go on from there in new objects, and finish it."""
    data = [piece for batch in batches()[:1] for piece in part(batch, rank, size).split(1)]
    strategy = fsdp(size, state_dict_type=kind)
    optimizer = set_up(strategy, Net(), lr=0.1)
    with strategy.no_backward_sync():
        for piece in data[:2]:
            strategy.backward(strategy.bind("training_step")(piece, 0) / 3)
    strategy.save_checkpoint(compose(strategy, optimizer, gradients=strategy.accumulated_gradients()), path)
    torch.distributed.barrier()
    strategy = fsdp(size)
    optimizer = set_up(strategy, Net(), lr=0.1)
    checkpoint = strategy.load_checkpoint(path)
    strategy.load_accumulated_gradients(checkpoint["gradients"])
    root = root_of(strategy.module)
    assert root is not None
    again = full_state(root.accumulated_gradients(), rank0_only=False)
    same = all(torch.equal(again[name], sharded.materialized(value)) for name, value in checkpoint["gradients"].items())
    strategy.backward(strategy.bind("training_step")(data[2], 0) / 3)
    optimizer.step()
    return [weights(strategy), same]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_gradients_of_half_a_window_are_kept(kind: str, tmp_path: Path) -> None:
    strategy = SingleDeviceStrategy()
    fit(strategy, set_up(strategy, Net(), lr=0.1), batches()[:1])
    for found, same in run(half_a_window, 2, kind, str(tmp_path / "last.ckpt")):
        assert largest_difference(found, weights(strategy)) < TOLERANCE
        assert same


def mapped(rank: int, size: int, path: str) -> list[Any]:
    strategy = fsdp(size)
    optimizer = set_up(strategy, Model(), torch.optim.AdamW, lr=0.01)
    checkpoint = strategy.load_checkpoint(path)
    is_mapped = path in Path("/proc/self/maps").read_text()
    strategy.load_model_state_dict(checkpoint)
    strategy.load_optimizer_state(optimizer, checkpoint["optimizer_states"][0])
    return [is_mapped, weights(strategy), optimizer_state(optimizer)]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_file_is_mapped_and_each_process_reads_its_part(tmp_path: Path) -> None:
    path = str(tmp_path / "one.ckpt")
    strategy = SingleDeviceStrategy()
    optimizer = set_up(strategy, Model(), torch.optim.AdamW, lr=0.01)
    fit(strategy, optimizer, batches())
    strategy.save_checkpoint(compose(strategy, optimizer), path)
    for is_mapped, found, states in run(mapped, 2, path):
        assert is_mapped
        assert largest_difference(found, weights(strategy)) == 0
        assert largest_difference(states, optimizer_state(optimizer)) == 0
