"""The bars of a real trainer."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset


class Logging(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", float(batch_idx), prog_bar=True)
        self.log("acc", float(batch_idx), prog_bar=True, on_step=True, on_epoch=True)
        self.log("hidden", 1.0)
        if batch_idx == 2:
            self.print("from the module")
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("late", float(self.current_epoch), prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", 0.25, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", 0.5)

    def predict_dataloader(self) -> Any:
        return [torch.utils.data.DataLoader(RandomDataset(32, 3)) for _ in range(2)]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return batch


def trainer(bar: ProgressBar, *callbacks: Callback, **kwargs: Any) -> Trainer:
    return Trainer(
        **{
            "max_epochs": 2,
            "limit_train_batches": 5,
            "limit_val_batches": 3,
            "limit_test_batches": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "callbacks": [bar, *callbacks],
            **kwargs,
        }
    )


def test_tqdm_fit_ends_with_the_last_values(screen: Callable[[], list[str]]) -> None:
    run = trainer(TQDMProgressBar())
    run.fit(Logging())
    first, second, line = screen()
    assert first == second == "from the module"
    assert line.startswith("Epoch 1: 100%|██████████| 5/5 [")
    assert line.endswith("loss=4.000, acc_step=4.000, val=0.250, acc_epoch=2.000, late=1.000]")
    assert run.progress_bar_callback is run.callbacks[0]  # type: ignore[attr-defined]


def test_rich_fit_ends_with_the_last_values(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(RichProgressBar(console_kwargs={"width": 160})).fit(Logging())
    *printed, line = capsys.readouterr().out.splitlines()
    assert printed == ["from the module"] * 2
    assert line.startswith("Epoch 1/1 ━")
    assert line.rstrip().endswith("loss: 4.000 acc_step: 4.000 val: 0.250 acc_epoch: 2.000 late: 1.000")


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize(("fn", "text"), [("validate", "Validation"), ("test", "Testing"), ("predict", "Predicting DataLoader 1")])
def test_evaluation_prints_the_bar_and_the_results_below(
    screen: Callable[[], list[str]], bar: type[ProgressBar], fn: str, text: str
) -> None:
    run = trainer(bar())
    getattr(run, fn)(Logging())
    first, *rest = screen()
    assert first.startswith(text)
    assert " 3/3 " in first
    assert any("0.25" in line or "0.5" in line for line in rest) is (fn != "predict")


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_resume_in_the_middle_of_an_epoch_goes_on_from_there(screen: Callable[[], list[str]], bar: type[ProgressBar]) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint("three.ckpt")

    trainer(bar(), Save(), max_epochs=1).fit(BoringModel())
    screen()
    positions = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            shown: Any = trainer.progress_bar_callback.train_progress_bar  # type: ignore[union-attr]
            positions.append(shown.n if isinstance(trainer.progress_bar_callback, TQDMProgressBar) else shown.completed)

    trainer(bar(), Look(), max_epochs=1).fit(BoringModel(), ckpt_path="three.ckpt")
    assert positions[0] in (3, 4)  # the rich bar moves when it is drawn
    assert positions[-1] == 5
    (line,) = screen()
    assert line.startswith("Epoch 0")
    assert " 5/5 " in line


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_exception_ends_the_bar_with_its_line(capsys: pytest.CaptureFixture[str], bar: type[ProgressBar]) -> None:
    class Failing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise ValueError("in the middle")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="in the middle"):
        trainer(bar()).fit(Failing())
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert "3/5" in re.split(r"[\r\n]", out)[-2]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_bar_may_be_used_for_several_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bar: type[ProgressBar]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = bar()
    for _ in range(2):
        run = trainer(shown, max_epochs=1)
        run.fit(Logging())
        run.test(Logging())
    assert len(re.findall(r"5/5[^\n]*late[^\n]*\n", capsys.readouterr().out)) == 2


def test_batch_without_a_refresh_costs_one_call() -> None:
    class Count(Callback):
        """Counts what is called inside the bar's hook, between two hooks of its own."""

        calls: list[str] = []

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            bar = trainer.progress_bar_callback
            self.calls = []

            def count(frame: Any, event: str, arg: Any) -> None:
                if event == "call":
                    self.calls.append(frame.f_code.co_name)

            sys.setprofile(count)
            bar.on_train_batch_end(trainer, None, None, None, 1)  # type: ignore[union-attr, arg-type]
            sys.setprofile(None)

    counter = Count()
    trainer(TQDMProgressBar(refresh_rate=100), counter, max_epochs=1, limit_val_batches=0).fit(BoringModel())
    assert counter.calls == ["on_train_batch_end"]


def test_metrics_are_numbers_of_the_host() -> None:
    seen: list[Any] = []

    class Bar(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            metrics = super().get_metrics(trainer, pl_module)
            seen.extend(metrics.values())
            return metrics

    trainer(Bar()).fit(Logging())
    assert {type(value) for value in seen} == {float}


def test_bar_is_drawn_from_the_loggers_version(screen: Callable[[], list[str]]) -> None:
    from lightning.pytorch.loggers import CSVLogger

    trainer(TQDMProgressBar(), logger=CSVLogger(".", version=3), max_epochs=1, log_every_n_steps=1).fit(BoringModel())
    assert "v_num=3" in screen()[-1]


@pytest.mark.parametrize(
    ("arguments", "totals"),
    [
        ({"max_steps": 3}, [3]),
        ({"max_steps": 7}, [5, 2]),
        ({"max_steps": 10}, [5, 5]),
        ({"max_steps": 1, "accumulate_grad_batches": 2}, [2]),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, [5]),
        ({"max_steps": 5, "accumulate_grad_batches": 2}, [5, 4]),
        ({"max_steps": 100}, [5, 5]),
    ],
)
def test_bar_is_full_where_max_steps_ends_the_run(arguments: dict[str, int], totals: list[int]) -> None:
    ends: list[tuple[int, int]] = []

    class Ends(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            shown = bar.train_progress_bar
            ends.append((shown.n, shown.total))
            assert bar.total_train_batches == shown.total

    bar = TQDMProgressBar()
    trainer(bar, Ends(), limit_val_batches=0, **arguments).fit(BoringModel())
    assert ends == [(total, total) for total in totals]


def test_bar_of_a_resumed_run_is_full_where_max_steps_ends_it() -> None:
    first = trainer(TQDMProgressBar(), limit_val_batches=0, max_steps=2)
    first.fit(BoringModel())
    first.save_checkpoint("saved.ckpt")
    bar = TQDMProgressBar()
    trainer(bar, limit_val_batches=0, max_steps=4).fit(BoringModel(), ckpt_path="saved.ckpt")
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (4, 4)
