"""Every way in that reads a file, and every hostile file: nothing is executed or written, time and memory stay bounded, the file is named.

Each runs in a child process of its own, under an audit hook. Some ways get a third of the files by default, and all of them with
``KERAUNOS_FAULTS=full`` (``make test-faults``).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import shutil
import sys
import zipfile
import zoneinfo  # noqa: F401  (so that a time zone in a file imports nothing)
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric import Fabric
from lightning.fabric.checkpoint import io as checkpoints
from lightning.fabric.checkpoint import sharded
from lightning.fabric.checkpoint.generations import generation_of, newest_valid
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import guard
import hostile_files as corpus

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the guard reads /proc"),
    pytest.mark.filterwarnings("ignore"),
]
FULL = os.environ.get("KERAUNOS_FAULTS") == "full"
MEMORY, SECONDS = 300_000_000, 15.0


class Data(LightningDataModule):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()


class Model(LightningModule):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).sum()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 1)))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        pass


def trainer(**arguments: Any) -> Trainer:
    return Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}  # type: ignore[arg-type]
        | {"enable_model_summary": False, "default_root_dir": ".", **arguments}
    )


def best(path: str) -> None:
    callback = ModelCheckpoint(".")
    callback.best_model_path = path
    trainer(enable_checkpointing=True, callbacks=[callback]).test(Model(), ckpt_path="best", verbose=False)


def last(path: str) -> None:
    os.makedirs("run")
    os.rename(path, "run/last.ckpt")
    trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint("run", save_last=True)]).fit(Model(), ckpt_path="last")


def auto(path: str) -> None:
    os.makedirs("run")
    os.rename(path, "run/epoch=0-step=1.ckpt")
    trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint("run")]).fit(Model(), ckpt_path="auto")


def preempted(path: str) -> None:
    os.makedirs("job")
    os.rename(path, "job/hpc_ckpt_1.ckpt")
    trainer(default_root_dir="job").fit(Model(), ckpt_path="hpc")


def remote(path: str) -> None:
    with get_filesystem("memory://x").open("memory://x/bad.ckpt", "wb") as file:
        file.write(Path(path).read_bytes())
    trainer().fit(Model(), ckpt_path="memory://x/bad.ckpt")


def fabric_state(path: str) -> None:
    Fabric(accelerator="cpu").load(path, {"state_dict": torch.nn.ModuleDict({"layer": torch.nn.Linear(1, 1)})})


FILES: dict[str, Callable[[str], Any]] = {
    "load": checkpoints.load,
    "fit": lambda path: trainer().fit(Model(), ckpt_path=path),
    "validate": lambda path: trainer().validate(Model(), ckpt_path=path, verbose=False),
    "test": lambda path: trainer().test(Model(), ckpt_path=path, verbose=False),
    "predict": lambda path: trainer().predict(Model(), ckpt_path=path),
    "best": best,
    "last": last,
    "auto": auto,
    "hpc": preempted,
    "remote": remote,
    "load_from_checkpoint": Model.load_from_checkpoint,
    "an open file": lambda path: Model.load_from_checkpoint(io.BytesIO(Path(path).read_bytes())),
    "a data module": Data.load_from_checkpoint,
    "fabric": lambda path: Fabric(accelerator="cpu").load(path),
    "fabric's state": fabric_state,
    "fabric's raw load": lambda path: Fabric(accelerator="cpu").load_raw(path, torch.nn.Linear(1, 1)),
    "mapped": functools.partial(checkpoints.load, mmap=True),
    "unverified": functools.partial(checkpoints.load, verify=False),
    "the plugin": TorchCheckpointIO().load_checkpoint,
    "the plugin in the background": lambda path: AsyncCheckpointIO().load_checkpoint(path),
}
IN_FULL = ("load", "load_from_checkpoint")


@functools.cache
def files() -> dict[str, bytes]:
    return {name: build() for name, build in corpus.CORPUS.items()}


def chosen(way: str, ways: dict[str, Any]) -> list[str]:
    names = list(corpus.CORPUS)
    return names if FULL or way in IN_FULL else names[list(ways).index(way) % 3 :: 3]


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    shutil.rmtree(corpus.OUTSIDE, ignore_errors=True)
    os.makedirs(corpus.OUTSIDE)
    Path(corpus.PRECIOUS).write_text("x")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    assert os.listdir(corpus.OUTSIDE) == ["precious"]
    shutil.rmtree(corpus.OUTSIDE)


def check(name: str, action: Callable[[], Any], file: str, must_fail: bool, allowed: tuple[str, ...] = ()) -> None:
    outcome = guard.outcome_of(action, os.getcwd(), allowed)
    assert not outcome.forbidden, f"{name}: {outcome}"
    assert outcome.status == 0, f"{name}: it took too much time or memory: {outcome}"
    assert outcome.seconds < SECONDS, f"{name}: {outcome}"
    assert outcome.memory < MEMORY, f"{name}: {outcome}"
    assert os.listdir(corpus.OUTSIDE) == ["precious"], f"{name}: {outcome}"
    if must_fail:
        assert {"UnpicklingError", "RuntimeError"} & set(outcome.bases), f"{name}: {outcome}"
        assert file in outcome.message, f"{name}: {outcome}"


@pytest.mark.parametrize("way", FILES)
def test_hostile_file(way: str) -> None:
    Path("bad.ckpt").write_bytes(corpus.saved(corpus.checkpoint()))
    with contextlib.suppress(RuntimeError):
        FILES[way]("bad.ckpt")  # a good one: what is imported when it is needed is there now
    for name in chosen(way, FILES):
        for folder in ("run", "job"):
            shutil.rmtree(folder, ignore_errors=True)
        Path("bad.ckpt").write_bytes(files()[name])
        named = {"an open file": "<BytesIO>", "last": "last.ckpt", "auto": "step=1.ckpt", "hpc": "hpc_ckpt_1.ckpt"}.get(way, "bad.ckpt")
        # "auto" passes over what is no checkpoint of a run; this one is a tensor, which is not looked at before that is known.
        passed_over = way == "auto" and name == "a view beyond the storage"
        check(name, functools.partial(FILES[way], "bad.ckpt"), named, name in corpus.REFUSED and not passed_over)


@pytest.mark.parametrize("way", FILES)
def test_good_file_is_read_without_doing_anything_forbidden(way: str) -> None:
    for guarded in (False, True):
        for folder in ("run", "job"):
            shutil.rmtree(folder, ignore_errors=True)
        content = corpus.checkpoint() if way != "fabric's raw load" else {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        Path("bad.ckpt").write_bytes(corpus.saved(content))
        if guarded:
            outcome = guard.outcome_of(functools.partial(FILES[way], "bad.ckpt"), os.getcwd())
            assert (outcome.status, outcome.error, outcome.forbidden) == (0, "", []), outcome
        else:
            FILES[way]("bad.ckpt")


def test_newest_of_hostile_files_is_the_good_one() -> None:
    os.makedirs("runs")
    checkpoints.save({"global_step": 5}, "runs/good.ckpt")
    for name in chosen("x", {"x": 0}):
        Path("runs/bad.ckpt").write_bytes(files()[name])
        check(name, lambda: newest_valid("runs"), "", False)
        check(name, lambda: generation_of("runs/bad.ckpt"), "", False)


# ---- the directories of sharded checkpoints ------------------------------------------------------------------------------


@functools.cache
def good_directory() -> dict[str, bytes]:
    """The files of a sharded checkpoint without a seal, so that no checksum stands before what is in them."""
    os.mkdir(".good")
    weights = corpus.checkpoint()["state_dict"]
    sharded.write_shards(dict(weights), ".good")
    stood = {name: sharded.stand_in(value, name) for name, value in weights.items()}
    content = {name: Path(".good", name).read_bytes() for name in os.listdir(".good") if not name.startswith(sharded.SUMS)}
    shutil.rmtree(".good")
    buffer = io.BytesIO()
    torch.save(checkpoints.encode(corpus.checkpoint(state_dict=stood)), buffer)
    return {**content, sharded.META: buffer.getvalue()}


def write_directory(victim: str, data: bytes) -> None:
    shutil.rmtree("bad.ckpt", ignore_errors=True)
    os.mkdir("bad.ckpt")
    content = dict(good_directory())
    if victim == ".metadata":
        data = pickle_of(data)
    elif victim == "__0_0.distcp":
        metadata = pickle.loads(content[".metadata"])
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = type(info)(info.relative_path, 0, len(data))
        content[".metadata"] = pickle.dumps(metadata)
    for name, each in {**content, **({victim: data} if victim else {})}.items():
        Path("bad.ckpt", name).write_bytes(each)


def pickle_of(data: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            return next((file.read(name) for name in file.namelist() if name.endswith("data.pkl")), data)
    except (zipfile.BadZipFile, ValueError):
        return data


DIRECTORIES: dict[str, Callable[[str], Any]] = {
    "fit": FILES["fit"],
    "load_from_checkpoint": FILES["load_from_checkpoint"],
    "fabric": FILES["fabric"],
    "parts": lambda path: sharded.materialized(sharded.open_sharded(path)),
    "consolidate": lambda path: sharded.consolidate(path, f"{path}.{os.getpid()}"),
}


@pytest.mark.parametrize("way", DIRECTORIES)
@pytest.mark.parametrize("victim", [sharded.META, ".metadata", "__0_0.distcp"])
def test_hostile_file_in_a_directory(victim: str, way: str) -> None:
    write_directory("", b"")
    DIRECTORIES[way]("bad.ckpt")  # a good one, as above
    names = [name for name in corpus.CORPUS if victim != ".metadata" or name != "zip bomb in the pickle"]  # which is large when unfolded
    for name in names if FULL or way == "fabric" else names[list(DIRECTORIES).index(way) :: 5]:
        write_directory(victim, files()[name])
        must_fail = victim != sharded.META or name in corpus.REFUSED
        check(name, functools.partial(DIRECTORIES[way], "bad.ckpt"), "bad.ckpt", must_fail)
