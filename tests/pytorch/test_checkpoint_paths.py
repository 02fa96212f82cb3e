"""``ckpt_path`` in all its forms, files that are no checkpoints, checkpoints that do not fit, and saves that fail."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric.checkpoint.seal import DamagedCheckpoint
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


@pytest.fixture
def Model(Evaluated: Any) -> Any:
    """A model whose weight is the number of the last batch that trained it; validation logs it."""

    class Model(Evaluated):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return -self.weight

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", -((self.weight - 2) ** 2))  # best after two steps

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("weight", self.weight)

    return Model


@pytest.fixture
def fitted(Model: Any, make_trainer: Any, numbers: Any) -> Any:
    """``fitted(**arguments)``: a trainer that ran four epochs of one batch, and saved the best and the last."""

    def run(**arguments: Any) -> Any:
        saving = ModelCheckpoint("files", monitor="val", mode="max", save_top_k=-1, save_last=True)
        trainer = make_trainer(max_epochs=4, callbacks=[saving], enable_checkpointing=True, **arguments)
        trainer.fit(Model(), numbers(1), numbers(1))
        return trainer

    return run


def weight_of(trainer: Any, numbers: Any, **arguments: Any) -> float:
    """The weight of the model that was tested."""
    (result,) = trainer.test(dataloaders=numbers(1), verbose=False, **arguments)
    return result["weight"]  # type: ignore[no-any-return]


# ---- best, last, hpc ------------------------------------------------------------------------------------------------


def test_best_and_last_mean_those_of_the_fit(fitted: Any, Model: Any, numbers: Any) -> None:
    trainer = fitted()
    assert weight_of(trainer, numbers, ckpt_path="best") == 2.0
    assert Path(trainer.ckpt_path).name == "epoch=1-step=2.ckpt"
    assert weight_of(trainer, numbers, ckpt_path="last") == 4.0
    assert Path(trainer.ckpt_path).name == "last.ckpt"
    model = Model()
    assert weight_of(trainer, numbers, model=model, ckpt_path="best") == 2.0
    assert weight_of(trainer, numbers, model=Model()) == 0.0  # no checkpoint without being asked
    assert trainer.ckpt_path is None


def test_best_is_taken_with_a_warning_where_neither_model_nor_path_is_given(fitted: Any, numbers: Any) -> None:
    trainer = fitted()
    with pytest.warns(UserWarning, match="the best checkpoint of the last fit is loaded"):
        assert weight_of(trainer, numbers) == 2.0


def test_best_is_an_error_where_there_is_none(Model: Any, make_trainer: Any, numbers: Any) -> None:
    with pytest.raises(ValueError, match="no ModelCheckpoint"):
        weight_of(make_trainer(), numbers, model=Model(), ckpt_path="best")
    with pytest.raises(ValueError, match="no best checkpoint was saved yet"):
        weight_of(make_trainer(callbacks=[ModelCheckpoint("files")], enable_checkpointing=True), numbers, model=Model(), ckpt_path="best")


def test_best_of_the_first_callback_is_taken_with_a_warning(Model: Any, make_trainer: Any, numbers: Any) -> None:
    callbacks = [ModelCheckpoint("a", monitor="val", mode="max"), ModelCheckpoint("b", monitor="val", mode="min")]
    trainer = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(Model(), numbers(1), numbers(1))
    with pytest.warns(UserWarning, match="2 checkpoint callbacks"):
        assert weight_of(trainer, numbers, ckpt_path="best") == 2.0


def test_last_is_the_newest_file_of_all_callbacks(Model: Any, make_trainer: Any, numbers: Any) -> None:
    def trainer(epochs: int) -> Any:
        callbacks = [
            ModelCheckpoint("a", save_last=True, every_n_epochs=2),
            ModelCheckpoint("b", save_last=True, save_top_k=0, monitor="val"),
        ]
        return make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)

    trainer(3).fit(Model(), numbers(1), numbers(1))
    os.utime("a/last.ckpt", (1, 1))
    resumed = trainer(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.pytorch.callbacks.model_checkpoint.rank_zero_warn", lambda *args, **kwargs: None)
        resumed.fit(Model(), numbers(1), numbers(1), ckpt_path="last")
    assert Path(resumed.ckpt_path).parent.name == "b"
    assert resumed.global_step == 5


def test_last_starts_anew_with_a_warning_where_there_is_none(Model: Any, make_trainer: Any, numbers: Any) -> None:
    trainer, model = make_trainer(callbacks=[ModelCheckpoint("files")], enable_checkpointing=True), Model()
    with pytest.warns(UserWarning, match="no last checkpoint"):
        trainer.fit(model, numbers(2), numbers(1), ckpt_path="last")
    assert trainer.global_step == 2


def damage(path: str, how: str) -> None:
    content = Path(path).read_bytes()
    os.unlink(path)
    if how == "link":
        os.symlink("gone.ckpt", path)
    else:
        Path(path).write_bytes(content[:-300] if how == "torn" else bytes(len(content)))


@pytest.mark.parametrize("how", ["torn", "zeros", "link"])
def test_last_that_is_damaged_is_named_and_the_newest_of_its_folder_used(
    fitted: Any, Model: Any, make_trainer: Any, numbers: Any, how: str
) -> None:
    fitted().save_checkpoint("files/weights.ckpt", weights_only=True)  # from which no training goes on
    damage("files/last.ckpt", how)
    os.utime("files/epoch=1-step=2.ckpt", (4e9, 4e9))
    resumed = make_trainer(max_epochs=5, callbacks=ModelCheckpoint("files"), enable_checkpointing=True)
    with (
        pytest.warns(UserWarning, match="callbacks that this trainer does not have"),
        pytest.warns(UserWarning, match="is not empty"),
        pytest.warns(UserWarning, match=r"epoch=3-step=4\.ckpt is used instead: .*last\.ckpt: "),
    ):
        resumed.fit(Model(), numbers(1), numbers(1), ckpt_path="last")
    assert Path(resumed.ckpt_path).name == "epoch=3-step=4.ckpt"
    assert resumed.global_step == 5


def test_last_is_an_error_where_all_are_damaged(fitted: Any, Model: Any, make_trainer: Any, numbers: Any) -> None:
    fitted()
    for path in Path("files").iterdir():
        damage(str(path), "torn")
    with pytest.raises(DamagedCheckpoint, match=r"None of the 5 checkpoints.*last\.ckpt.*epoch=3-step=4\.ckpt"):
        make_trainer(callbacks=ModelCheckpoint("files"), enable_checkpointing=True).fit(Model(), numbers(1), numbers(1), ckpt_path="last")


def test_last_looks_at_the_files_that_are_still_there(Model: Any, make_trainer: Any, numbers: Any) -> None:
    class Claims(Checkpoint):
        def _find_last_checkpoints(self, trainer: Any) -> set[str]:
            return {"gone.ckpt", "there.ckpt"}

    trainer = make_trainer()
    trainer.fit(Model(), numbers(3), numbers(1))
    trainer.save_checkpoint("there.ckpt")
    resumed = make_trainer(max_epochs=2, callbacks=[Claims(), Checkpoint()], enable_checkpointing=True)
    resumed.fit(Model(), numbers(3), numbers(1), ckpt_path="last")
    assert resumed.ckpt_path == "there.ckpt"
    assert resumed.global_step == 6


def test_last_may_lie_where_files_have_no_time(Model: Any, make_trainer: Any, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def modified(self: Any, path: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(MemoryFileSystem, "modified", modified)
    saving = ModelCheckpoint("memory://timeless", save_last=True)
    make_trainer(callbacks=saving, enable_checkpointing=True).fit(Model(), numbers(1), numbers(1))
    resumed = make_trainer(max_epochs=2, callbacks=ModelCheckpoint("memory://timeless", save_last=True), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="not empty"):
        resumed.fit(Model(), numbers(1), numbers(1), ckpt_path="last")
    assert str(resumed.ckpt_path).endswith("timeless/last.ckpt")
    assert resumed.global_step == 2


def test_hpc_looks_for_files_of_that_name_only(Model: Any, make_trainer: Any, numbers: Any) -> None:
    with pytest.raises(ValueError, match="no checkpoint hpc_ckpt"):
        make_trainer(default_root_dir="nowhere").fit(Model(), numbers(1), numbers(1), ckpt_path="hpc")
    trainer = make_trainer()
    trainer.fit(Model(), numbers(1), numbers(1))
    for name in ("hpc_ckpt_1.ckpt", "hpc_ckpt_12.ckpt.tmp", "my_hpc_ckpt_x.ckpt", "other.ckpt"):
        trainer.save_checkpoint(name)
    resumed = make_trainer(max_epochs=2)
    resumed.fit(Model(), numbers(1), numbers(1), ckpt_path="hpc")
    assert Path(resumed.ckpt_path).name == "hpc_ckpt_1.ckpt"


@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(("path", "error", "message"), [("", ValueError, "an empty path"), (3, TypeError, "must be a path, a URL")])
def test_what_is_no_path_is_refused(
    Model: Any, make_trainer: Any, numbers: Any, task: str, path: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"`\.{task}\(ckpt_path={path!r}\)`.*{message}"):
        getattr(make_trainer(), task)(Model(), *[numbers(1)] * (2 if task == "fit" else 1), ckpt_path=path)


def test_hpc_means_the_one_with_the_highest_number(Model: Any, make_trainer: Any, numbers: Any) -> None:
    with pytest.raises(ValueError, match="no checkpoint hpc_ckpt"):
        make_trainer(max_epochs=2).fit(Model(), numbers(1), numbers(1), ckpt_path="hpc")
    for epochs, number in ((3, 2), (1, 9), (2, 10)):
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(Model(), numbers(1), numbers(1))
        trainer.save_checkpoint(f"hpc_ckpt_{number}.ckpt")
    resumed = make_trainer(max_epochs=2)
    resumed.fit(Model(), numbers(1), numbers(1), ckpt_path="hpc")
    assert Path(resumed.ckpt_path).name == "hpc_ckpt_10.ckpt"
    assert resumed.global_step == 2


# ---- paths and URLs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        lambda folder: "plain.ckpt",
        lambda folder: str(folder / "deep" / "er" / "absolute.ckpt"),
        lambda folder: folder / "path object.ckpt",
        lambda folder: f"file://{folder}/url.ckpt",
        lambda folder: f"memory://{folder.name}/remote.ckpt",
    ],
    ids=["relative", "absolute", "Path", "file URL", "memory URL"],
)
def test_checkpoint_is_saved_to_and_loaded_from_any_place(Model: Any, make_trainer: Any, numbers: Any, tmp_path: Path, place: Any) -> None:
    path, trainer = place(tmp_path), make_trainer(max_epochs=3)
    trainer.fit(Model(), numbers(1), numbers(1))
    trainer.save_checkpoint(path)
    resumed = make_trainer(max_epochs=5)
    resumed.fit(Model(), numbers(1), numbers(1), ckpt_path=path)
    assert resumed.global_step == 5
    assert weight_of(make_trainer(), numbers, model=Model(), ckpt_path=path) == 3.0
    assert Model.load_from_checkpoint(path).weight.item() == 3.0


@pytest.mark.parametrize("wrong", ["absent.ckpt", "memory://absent/x.ckpt", Path("nowhere") / "x.ckpt"])
def test_missing_file_is_told_by_name(Model: Any, make_trainer: Any, numbers: Any, wrong: Any) -> None:
    with pytest.raises(FileNotFoundError, match=Path(str(wrong)).name):
        make_trainer().fit(Model(), numbers(1), numbers(1), ckpt_path=wrong)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda: Path("x.ckpt").write_bytes(b""), RuntimeError, "incomplete or damaged"),
        (lambda: Path("x.ckpt").write_bytes(b"no checkpoint"), RuntimeError, "not a checkpoint|damaged"),
        (lambda: Path("x.ckpt").mkdir(), IsADirectoryError, "directory"),
        (lambda: torch.save([1, 2], "x.ckpt"), ValueError, "no checkpoint of a trainer: it holds a list"),
        (lambda: torch.save({"weight": torch.ones(())}, "x.ckpt"), ValueError, "a dict with the keys .'weight'"),
        (lambda: torch.save({"state_dict": {}, "evil": Evil()}, "x.ckpt"), pickle.UnpicklingError, "weights_only=False"),
    ],
    ids=["empty", "text", "directory", "list", "weights", "code"],
)
@pytest.mark.parametrize("task", ["fit", "test"])
def test_file_that_is_no_checkpoint_is_refused_by_name(
    Model: Any, make_trainer: Any, numbers: Any, task: str, write: Any, error: Any, message: str
) -> None:
    write()
    model = Model()
    with pytest.raises(error, match=f"(?s)(x.ckpt.*({message}))|(({message}).*x.ckpt)"):
        getattr(make_trainer(), task)(model, numbers(1), **({"val_dataloaders": numbers(1)} if task == "fit" else {}), ckpt_path="x.ckpt")
    assert model.seen == []
    assert not Path("evil").exists()


def test_truncated_checkpoint_is_refused(Model: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer()
    trainer.fit(Model(), numbers(1), numbers(1))
    trainer.save_checkpoint("x.ckpt")
    whole = Path("x.ckpt").read_bytes()
    for size in (len(whole) // 2, len(whole) - 10):
        Path("x.ckpt").write_bytes(whole[:size])
        with pytest.raises(RuntimeError, match=r"x\.ckpt.*damaged"):
            make_trainer(max_epochs=2).fit(Model(), numbers(1), numbers(1), ckpt_path="x.ckpt")


def test_code_in_a_checkpoint_of_a_trusted_source_runs_where_allowed(Model: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer()
    trainer.fit(Model(), numbers(1), numbers(1))
    trainer.save_checkpoint("x.ckpt")
    torch.save({**torch.load("x.ckpt", weights_only=False), "evil": Evil()}, "x.ckpt")
    make_trainer(max_epochs=2).fit(Model(), numbers(1), numbers(1), ckpt_path="x.ckpt", weights_only=False)
    assert Path("evil").exists()


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (lambda m: torch.optim.Adam(m.parameters()), r"saved with the optimizers \['SGD'\].*returned \['Adam'\]"),
        (lambda m: None, r"saved with the optimizers \['SGD'\].*returned \['NoOptimizer'\]"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=1.0), r"saved with the learning rate schedulers \['StepLR'\].*returned \[\]"),
    ],
    ids=["another optimizer", "no optimizer", "no scheduler"],
)
@pytest.mark.filterwarnings("ignore:.*returned None")
def test_other_optimizers_or_schedulers_are_told(Model: Any, make_trainer: Any, numbers: Any, here: Any, message: str) -> None:
    class Saved(Model):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    class Here(Model):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return here(self)

    trainer = make_trainer()
    trainer.fit(Saved(), numbers(1), numbers(1))
    trainer.save_checkpoint("x.ckpt")
    resumed = make_trainer(max_epochs=2)
    with pytest.raises(MisconfigurationException, match=message):
        resumed.fit(Here(), numbers(1), numbers(1), ckpt_path="x.ckpt")
    assert (resumed.current_epoch, resumed.global_step) == (0, 0)


def test_other_number_of_optimizers_is_told(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Manual(Weight):  # type: ignore[misc]
        def __init__(self, count: int) -> None:
            super().__init__()
            self.automatic_optimization, self.count = False, count

        def training_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(self.count)]

    trainer = make_trainer()
    trainer.fit(Manual(2), numbers(1))
    trainer.save_checkpoint("x.ckpt")
    for count in (1, 3):
        with pytest.raises(MisconfigurationException, match="saved with the optimizers"):
            make_trainer(max_epochs=2).fit(Manual(count), numbers(1), ckpt_path="x.ckpt")


def test_other_weights_are_told_unless_the_model_is_lenient(Model: Any, make_trainer: Any, numbers: Any) -> None:
    class Larger(Model):  # type: ignore[misc]
        def __init__(self, lenient: bool) -> None:
            super().__init__()
            self.extra = nn.Linear(1, 1)
            self.strict_loading = not lenient

    trainer = make_trainer()
    trainer.fit(Model(), numbers(1), numbers(1))
    trainer.save_checkpoint("x.ckpt")
    with pytest.raises(RuntimeError, match=r"extra\.weight"):
        weight_of(make_trainer(), numbers, model=Larger(False), ckpt_path="x.ckpt")
    assert weight_of(make_trainer(), numbers, model=Larger(True), ckpt_path="x.ckpt") == 1.0


def test_state_of_a_callback_that_is_not_there_is_told(Model: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer(callbacks=[ModelCheckpoint("files")], enable_checkpointing=True)
    trainer.fit(Model(), numbers(1), numbers(1))
    trainer.save_checkpoint("x.ckpt")
    with pytest.warns(UserWarning, match="callbacks that this trainer does not have: .*ModelCheckpoint"):
        make_trainer(max_epochs=2).fit(Model(), numbers(1), numbers(1), ckpt_path="x.ckpt")


# ---- saves that fail ------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_save_that_fails_raises_and_leaves_the_old_file(Model: Any, make_trainer: Any, numbers: Any) -> None:
    trainer, model = make_trainer(), Model()
    trainer.fit(model, numbers(1), numbers(1))
    trainer.save_checkpoint("x.ckpt")
    old = Path("x.ckpt").read_bytes()
    model.extra = nn.Linear(100, 100)
    with full_disk(10_000), pytest.raises(OSError, match=r"x\.ckpt"):
        trainer.save_checkpoint("x.ckpt")
    assert Path("x.ckpt").read_bytes() == old
    assert os.listdir() == ["x.ckpt"]


def test_save_to_a_place_that_cannot_be_written_raises(Model: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer()
    trainer.fit(Model(), numbers(1), numbers(1))
    Path("file").write_text("kept")
    Path("folder").mkdir()
    for wrong in ("file/x.ckpt", "folder"):
        with pytest.raises(OSError, match=r"file|folder"):
            trainer.save_checkpoint(wrong)
    assert Path("file").read_text() == "kept"
    with pytest.raises(AttributeError, match="needs a model"):
        make_trainer().save_checkpoint("x.ckpt")


def test_save_that_fails_during_training_ends_the_run_and_the_last_file_resumes(Model: Any, make_trainer: Any, numbers: Any) -> None:
    class Growing(Model):  # type: ignore[misc]
        def on_save_checkpoint(self, checkpoint: Any) -> None:
            if self.current_epoch == 2:
                checkpoint["too much"] = torch.zeros(100_000)

    saving = ModelCheckpoint("files", save_last=True)
    trainer = make_trainer(max_epochs=4, callbacks=[saving], enable_checkpointing=True)
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        trainer.fit(Growing(), numbers(1), numbers(1))
    assert sorted(os.listdir("files")) == ["epoch=1-step=2.ckpt", "last.ckpt"]
    assert torch.load("files/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("value", [lambda: None, open, object()], ids=["lambda", "function", "object"])
@pytest.mark.parametrize("where", ["module", "datamodule"])
def test_hyperparameter_that_cannot_be_saved_is_told_before_training(
    Evaluated: Any, make_trainer: Any, numbers: Any, value: Any, where: str
) -> None:
    from lightning.pytorch import LightningDataModule

    class Module(Evaluated):  # type: ignore[misc]
        def __init__(self, given: Any = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Data(LightningDataModule):
        def __init__(self, given: Any = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return numbers(1)

        def val_dataloader(self) -> Any:
            return numbers(1)

    class Local:
        pass

    value = Local() if type(value) is object else value
    module, datamodule = Module(value if where == "module" else 1), Data(value if where == "datamodule" else 1)
    trainer = make_trainer(callbacks=[ModelCheckpoint("files")], enable_checkpointing=True)
    if value is open:
        trainer.fit(module, datamodule=datamodule)  # a name that any process can look up
        return
    with pytest.raises(TypeError, match=r"hparams\.given"):
        trainer.fit(module, datamodule=datamodule)
    assert module.seen == []
