"""Checkpoints that Lightning 2.6.6 wrote (``fixtures/``) continue here where they would have continued there.

The other direction, tried by hand with Lightning 2.6.6: what ``Trainer.save_checkpoint`` writes here loads there through
``load_from_checkpoint`` and ``validate(ckpt_path=...)``, with and without ``weights_only``. Hyperparameters that are no plain data (a Path)
arrive in the form in which they are stored, and ``fit(ckpt_path=...)`` takes weights and optimizers but counts epochs from 0.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.pytorch import LightningModule, Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:This run saves checkpoints in"),  # in a folder of its own
    pytest.mark.filterwarnings("ignore:The checkpoint folder"),
    pytest.mark.filterwarnings("ignore:`EarlyStopping` monitors"),  # one of the runs does not validate
]

FOLDER = Path(__file__).parent / "fixtures"

_spec = importlib.util.spec_from_file_location("make_checkpoints", FOLDER / "make_checkpoints.py")
assert _spec is not None
assert _spec.loader is not None
written = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(written)

EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
# The batches that are left after each checkpoint of a run of 3 epochs of 5 batches.
ALL = [[epoch, index] for epoch in range(3) for index in range(5)]
LEFT = {
    "mid_epoch": ALL[7:], "last_batch": ALL[10:], "epoch_end": ALL[10:], "after_validation": ALL[7:], "before_validation": ALL[7:],
    "window": ALL[6:], "accumulated": ALL[7:], "finished": [], "manual": ALL[7:],
}  # fmt: skip


def resumed(name: str, **more: Any) -> tuple[Any, Trainer]:
    kind, arguments, *_ = written.SCENARIOS[name]
    model = kind()
    torch.nn.init.zeros_(model.layer.weight)
    trainer = Trainer(**{**written.QUIET, **arguments, **more}, callbacks=written.callbacks())
    trainer.fit(model, written.loader(), written.loader(2), ckpt_path=FOLDER / f"{name}.ckpt")
    return model, trainer


@pytest.mark.parametrize("name", written.SCENARIOS)
def test_run_is_resumed_where_it_was_saved(name: str) -> None:
    model, trainer = resumed(name)
    assert [list(batch) for batch in model.batches] == LEFT[name]
    assert trainer.current_epoch == 3
    assert trainer.global_step == EXPECTED[name]["global_step"]


@pytest.mark.parametrize("name", [name for name in written.SCENARIOS if name not in ("window", "accumulated")])
def test_resumed_run_ends_like_the_uninterrupted_one(name: str) -> None:
    model, _ = resumed(name)
    assert model.layer.weight.tolist()[0] == pytest.approx(EXPECTED[name]["weight"][0], abs=1e-6)
    assert model.layer.bias.tolist() == pytest.approx(EXPECTED[name]["bias"], abs=1e-6)


@pytest.mark.parametrize(("name", "first"), [("mid_epoch", 7), ("accumulated", 4), ("window", 3), ("epoch_end", 10)])
def test_rows_of_a_resumed_run_go_on_under_the_next_step(name: str, first: int, Rows: Any) -> None:
    class Logging(written.Line):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    rows = Rows()
    _, arguments, *_ = written.SCENARIOS[name]
    trainer = Trainer(**{**written.QUIET, **arguments, "logger": rows, "log_every_n_steps": 1}, callbacks=written.callbacks())
    trainer.fit(Logging(), written.loader(), written.loader(2), ckpt_path=FOLDER / f"{name}.ckpt")
    steps = [step for step, _ in rows.of("loss")]
    assert steps == list(range(first, EXPECTED[name]["global_step"]))


def test_callbacks_get_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    early, saving = written.callbacks()
    trainer = Trainer(**{**written.QUIET, "max_epochs": 3}, callbacks=[early, saving])
    trainer.fit(written.Line(), written.loader(), written.loader(2), ckpt_path=FOLDER / "finished.ckpt")
    saved = torch.load(FOLDER / "finished.ckpt", weights_only=False)["callbacks"]
    (of_early,) = (state for key, state in saved.items() if key.startswith("EarlyStopping"))
    (of_saving,) = (state for key, state in saved.items() if key.startswith("ModelCheckpoint"))
    assert early.best_score == of_early["best_score"]
    assert early.wait_count == of_early["wait_count"]
    assert Path(saving.best_model_path).name == Path(of_saving["best_model_path"]).name


@pytest.mark.parametrize("task", ["validate", "predict"])
def test_checkpoint_can_be_evaluated(task: str) -> None:
    model = written.Line()
    model.predict_step = lambda batch, batch_idx: model.layer(batch[0])
    trainer = Trainer(**written.QUIET, callbacks=written.callbacks())
    getattr(trainer, task)(model, written.loader(2), ckpt_path=FOLDER / "finished.ckpt")
    assert model.layer.weight.tolist()[0] == pytest.approx(EXPECTED["finished"]["weight"][0], abs=1e-6)


def test_module_is_built_from_the_hyperparameters() -> None:
    model = written.Line.load_from_checkpoint(FOLDER / "weights_only.ckpt")
    assert model.layer.weight.tolist() == EXPECTED["weights_only"]["weight"]
    assert (model.hparams.lr, model.hparams.folder) == (0.25, Path("else", "where"))
    assert isinstance(model, LightningModule)


def test_weights_alone_cannot_be_resumed() -> None:
    trainer = Trainer(**written.QUIET, enable_checkpointing=False)
    with pytest.raises(KeyError, match="weights only"):
        trainer.fit(written.Line(), written.loader(), written.loader(2), ckpt_path=FOLDER / "weights_only.ckpt")


def test_validation_that_was_under_way_counts_as_done() -> None:
    """The file does not tell a validation that is about to run from one that is over."""
    (before, _), (after, _) = resumed("before_validation"), resumed("after_validation")
    assert before.batches == after.batches
    assert before.layer.weight.tolist() == after.layer.weight.tolist()
