"""Files made to do harm, given to every way into the library that reads files: nothing that they hold is executed."""

from __future__ import annotations

import http.server
import io
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric import Fabric
from lightning.fabric.checkpoint import sharded
from lightning.fabric.checkpoint.generations import newest_valid
from lightning.fabric.checkpoint.io import save
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml, save_hparams_to_tags_csv
from lightning.pytorch.plugins import AsyncCheckpointIO

MARK = "executed"


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield
    assert not Path(MARK).exists()
    assert not {"antigravity", "this"} & set(sys.modules)


class Gadget:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


class Data(LightningDataModule):
    pass


class Model(LightningModule):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).sum()  # type: ignore[no-any-return]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 1)))

    test_dataloader = train_dataloader


def checkpoint(**entries: Any) -> dict[str, Any]:
    return {
        "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.0", "state_dict": Model().state_dict(), "loops": {},
        "callbacks": {}, "optimizer_states": [], "lr_schedulers": [], **entries,
    }  # fmt: skip


def packed(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def unfolding() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed(checkpoint()))) as archive, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name) if not name.endswith("data/0") else bytes(200_000_000))
    return buffer.getvalue()


def climbing() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"../../{MARK}", "x")
        archive.writestr(f"archive/../../{MARK}", "x")
        archive.writestr("archive/data.pkl", pickle.dumps(Gadget(os.system, f"touch {MARK}"), 2))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


CORPUS: dict[str, Callable[[], bytes]] = {
    "at the top": lambda: packed(Gadget(os.system, f"touch {MARK}")),
    "in the weights": lambda: packed(checkpoint(state_dict={"layer.weight": Gadget(eval, f"open({MARK!r}, 'w')")})),
    "in hyperparameters": lambda: packed(checkpoint(hyper_parameters={"width": Gadget(Path.touch, Path(MARK))})),
    "in callbacks": lambda: packed(checkpoint(callbacks={"x": Gadget(subprocess.Popen, ["touch", MARK])})),
    "in the loops": lambda: packed(checkpoint(loops={"fit_loop": Gadget(__import__, "antigravity")})),
    "in optimizers": lambda: packed(checkpoint(optimizer_states=[Gadget(exec, f"open({MARK!r}, 'w')")])),
    "in a data module": lambda: packed(checkpoint(datamodule_hyper_parameters=Gadget(os.system, f"touch {MARK}"))),
    "in a version of old": lambda: packed({**checkpoint(), "pytorch-lightning_version": Gadget(os.system, f"touch {MARK}")}),
    "a bare pickle": lambda: pickle.dumps(checkpoint(x=Gadget(os.system, f"touch {MARK}"))),
    "torch.load inside": lambda: packed(checkpoint(x=Gadget(torch.load, "other"))),
    "unfolding": unfolding,
    "climbing": climbing,
}


def evaluate(path: str) -> None:
    Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False).test(Model(), ckpt_path=path)


def resume(path: str) -> None:
    Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1
    ).fit(Model(), ckpt_path=path)


ENTRIES: dict[str, Callable[[str], Any]] = {
    "fit": resume,
    "test": evaluate,
    "load_from_checkpoint": Model.load_from_checkpoint,
    "datamodule": Data.load_from_checkpoint,
    "fabric": lambda path: Fabric(accelerator="cpu").load(path),
    "async plugin": lambda path: AsyncCheckpointIO().load_checkpoint(path),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_hostile_checkpoint_is_refused(name: str, entry: str) -> None:
    Path("bad.ckpt").write_bytes(CORPUS[name]())
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        ENTRIES[entry]("bad.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CORPUS)
def test_newest_valid_executes_nothing(name: str) -> None:
    Path("bad.ckpt").write_bytes(CORPUS[name]())
    save({"global_step": 1}, "good.ckpt")
    newest_valid(".")


@pytest.fixture
def website() -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ["fit", "test", "load_from_checkpoint"])
@pytest.mark.parametrize("name", ["at the top", "in hyperparameters", "unfolding"])
def test_hostile_download_is_refused(name: str, entry: str, website: str) -> None:
    Path("bad.ckpt").write_bytes(CORPUS[name]())
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        ENTRIES[entry](f"{website}/bad.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("victim", [".metadata", "meta.pt", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("entry", ["fit", "load_from_checkpoint", "fabric"])
def test_hostile_file_in_a_sharded_checkpoint_is_refused(victim: str, entry: str) -> None:
    os.mkdir(".new")
    weights = {f"state_dict.{name}": value for name, value in Model().state_dict().items()}
    sharded.write_shards(weights, ".new")
    stood = {name.removeprefix("state_dict."): sharded.stand_in(value, name) for name, value in weights.items()}
    if victim == "meta.pt":
        sharded.commit(checkpoint(state_dict=stood), ".new", os.path.abspath("bad.ckpt"))
        Path("bad.ckpt", victim).write_bytes(CORPUS["in hyperparameters"]())
    else:  # one that is hostile from the start: its checksums are right
        gadget = Gadget(os.system, f"touch {MARK}")
        Path(".new", victim).write_bytes(packed(gadget) if victim == "__0_0.distcp" else pickle.dumps(gadget))
        for name in os.listdir(".new"):
            if name.startswith(sharded.SUMS):
                Path(".new", name).unlink()
        sharded.commit(checkpoint(state_dict=stood), ".new", os.path.abspath("bad.ckpt"))
        if victim == "manifest.json":
            Path("bad.ckpt", victim).write_text('{"version": 1, "files": {"../../etc/passwd": [1, 2]}}')
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        ENTRIES[entry]("bad.ckpt")


def sharded_checkpoint() -> None:
    os.mkdir(".new")
    weights = Model().state_dict()
    sharded.write_shards(weights, ".new")
    stood = {name: sharded.stand_in(value, name) for name, value in weights.items()}
    sharded.commit(checkpoint(state_dict=stood), ".new", os.path.abspath("bad.ckpt"))


@pytest.mark.timeout(60)
@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no file without end here")
@pytest.mark.parametrize("victim", [".metadata", "meta.pt", "__0_0.distcp", "manifest.json"])
def test_link_to_a_device_is_refused(victim: str) -> None:
    sharded_checkpoint()
    Path("bad.ckpt", victim).unlink()
    Path("bad.ckpt", victim).symlink_to("/dev/zero")
    with pytest.raises((RuntimeError, OSError), match=r"bad\.ckpt"):
        Fabric(accelerator="cpu").load("bad.ckpt")


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_pipe_and_device_are_no_checkpoints() -> None:
    os.mkfifo("bad.ckpt")
    with pytest.raises(RuntimeError, match=r"'bad\.ckpt' is no file"):
        Fabric(accelerator="cpu").load("bad.ckpt")


@pytest.mark.parametrize(
    "text",
    [
        f"width: !!python/object/apply:os.system ['touch {MARK}']",
        f"width: !!python/object/new:subprocess.Popen [['touch', '{MARK}']]",
        "width: !!python/name:os.system",
        "width: !!python/module:antigravity",
        f"!!python/object/apply:eval [\"open('{MARK}', 'w')\"]",
    ],
)
def test_hostile_hyperparameter_file_is_refused(text: str) -> None:
    torch.save({**checkpoint()}, "good.ckpt")
    Path("hparams.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"hparams\.yaml"):
        Model.load_from_checkpoint("good.ckpt", hparams_file="hparams.yaml")


@pytest.mark.parametrize("tuples", [False, True])
def test_hyperparameters_without_end_are_refused(tuples: bool) -> None:
    kind = "!!python/tuple " if tuples else ""
    lines = ["a0: &a0 [1, 1]", *(f"a{level}: &a{level} {kind}[*a{level - 1}, *a{level - 1}]" for level in range(1, 60))]
    Path("hparams.yaml").write_text("\n".join([*lines, "? *a59", ": 1"] if tuples else lines))
    with pytest.raises(ValueError, match=r"hparams\.yaml.*more than"):
        load_hparams_from_yaml("hparams.yaml")


@pytest.mark.parametrize("value", ["__import__('os').system('touch executed')", "[" * 100_000, "9" * 100_000, "9**9**9**9", "{}.__class__"])
def test_hostile_table_of_hyperparameters_is_read_as_text(value: str) -> None:
    save_hparams_to_tags_csv("hparams.csv", {"width": value})
    assert load_hparams_from_tags_csv("hparams.csv") == {"width": value}


@pytest.mark.filterwarnings("ignore")
def test_class_named_by_a_checkpoint_is_not_made() -> None:
    for key in ("_instantiator", "_class_path"):
        torch.save(checkpoint(hyper_parameters={key: "os.system", "width": 1}), "bad.ckpt")
        Model.load_from_checkpoint("bad.ckpt", strict=False)
