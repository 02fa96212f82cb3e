from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.model_summary import ModelSummary
from lightning.pytorch.callbacks.rich_model_summary import RichModelSummary
from lightning.pytorch.demos.boring_classes import BoringModel


class Net(LightningModule):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 2), nn.Dropout())
        self.example_input_array = example

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def start(callback: ModelSummary, model: LightningModule, is_global_zero: bool = True) -> None:
    callback.on_fit_start(SimpleNamespace(is_global_zero=is_global_zero), model)  # type: ignore[arg-type]


def test_table_is_logged_when_training_begins(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        start(ModelSummary(), Net())
    (record,) = caplog.records
    assert record.name == "lightning.pytorch.callbacks.model_summary"
    assert "0 | net  | Sequential | 66     | train | 0" in record.message
    assert record.message.endswith("0         Total FLOPs")


def test_max_depth_reaches_the_table(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        start(ModelSummary(max_depth=-1), Net())
    assert "2 | net.1 | Dropout" in caplog.text


@pytest.mark.parametrize(("max_depth", "is_global_zero"), [(0, True), (1, False)])
def test_nothing_is_printed_with_depth_zero_or_on_other_processes(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], max_depth: int, is_global_zero: bool
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        for kind in (ModelSummary, RichModelSummary):
            start(kind(max_depth=max_depth), Net(), is_global_zero)
    assert (caplog.text, capsys.readouterr().out) == ("", "")


def test_overridden_summarize_gets_the_data_and_the_arguments() -> None:
    calls = []

    class Own(ModelSummary):
        @staticmethod
        def summarize(*args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

    start(Own(max_depth=1, color="red"), Net(torch.zeros(3, 32)))
    (((data, total, trainable, size, modes), kwargs),) = calls
    assert dict(data) == {
        " ": ["0"],
        "Name": ["net"],
        "Type": ["Sequential"],
        "Params": ["66  "],
        "Mode": ["train"],
        "FLOPs": ["384  "],
        "In sizes": ["[3, 32]"],
        "Out sizes": ["[3, 2]"],
    }
    assert (total, trainable, modes) == (66, 66, {"train": 3, "eval": 0})
    assert size == pytest.approx(66 * 4e-6)
    assert kwargs == {"total_flops": 384, "color": "red"}


def test_rich_table_is_printed_when_training_begins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    start(RichModelSummary(max_depth=-1, header_style="bold"), Net(torch.zeros(3, 32)))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "┃   ┃ Name  ┃ Type       ┃ Params ┃ Mode  ┃ FLOPs ┃ In sizes ┃ Out sizes ┃"
    assert lines[4] == "│ 1 │ net.0 │ Linear     │     66 │ train │   384 │  [3, 32] │    [3, 2] │"
    assert lines[-7:] == [
        "Trainable params: 66",
        "Non-trainable params: 0",
        "Total params: 66",
        "Total estimated model params size (MB): 0.000",
        "Modules in train mode: 3",
        "Modules in eval mode: 0",
        "Total FLOPs: 384",
    ]


def test_missing_rich_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "keraunos\[rich\]"'):
        RichModelSummary()


def test_importing_the_summaries_does_not_import_rich() -> None:
    code = (
        "import sys, lightning.pytorch.callbacks.rich_model_summary as m; m.RichModelSummary();"
        "print([name for name in ('rich', 'torch.utils.flop_counter') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_fit_prints_the_summary_once_in_the_precision_of_the_run(caplog: pytest.LogCaptureFixture, precision: str) -> None:
    model = BoringModel()
    model.example_input_array = torch.zeros(5, 32)
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", precision=precision, enable_progress_bar=False, callbacks=ModelSummary())
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer.fit(model)
    (table,) = [record.message for record in caplog.records if "Total FLOPs" in record.message]
    assert "0 | layer | Linear | 66     | train | 640   | [5, 32]  | [5, 2]" in table


@pytest.mark.parametrize("enabled", [True, False])
def test_trainer_prints_a_summary_unless_told_not_to(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], enabled: bool
) -> None:
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, enable_model_summary=enabled)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer.fit(BoringModel())
    assert ("Total FLOPs" in caplog.text + capsys.readouterr().out) is enabled
