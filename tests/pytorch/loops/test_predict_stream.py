"""``predict_stream``: outputs one by one, of a run like that of ``predict``, which ends when the caller wants no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerStatus

HELPERS = str(Path(__file__).resolve().parents[2] / "helpers")


class Events(Callback):
    """Writes down the hooks of a prediction."""

    def __init__(self) -> None:
        self.names: list[str] = []


def _noting(name: str) -> Any:
    def hook(self: Events, *args: Any, **kwargs: Any) -> None:
        self.names.append(name)

    return hook


for _name in (
    "setup", "on_predict_start", "on_predict_epoch_start", "on_predict_batch_start", "on_predict_batch_end", "on_predict_epoch_end",
    "on_predict_end", "teardown", "on_exception",
):  # fmt: skip
    setattr(Events, _name, _noting(_name))


def consume(stream: Iterator[Any], use: Callable[[Any], Any]) -> None:
    """Do something with each output."""
    for output in stream:
        use(output)


def test_outputs_and_hooks_are_those_of_predict(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    streamed, returned = Events(), Events()
    outputs = list(make_trainer(callbacks=streamed).predict_stream(Evaluated(), numbers(5, batch_size=2)))
    expected = make_trainer(callbacks=returned).predict(Evaluated(), numbers(5, batch_size=2))
    assert [each.tolist() for each in outputs] == [each.tolist() for each in expected]
    assert streamed.names == returned.names
    assert streamed.names[-1] == "teardown"


def test_each_output_comes_before_the_next_batch_is_asked_for(Evaluated: Any, make_trainer: Any) -> None:
    asked: list[int] = []

    class Counting(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            asked.append(index)
            return torch.ones(1)

    loader = torch.utils.data.DataLoader(Counting())
    for index, _ in enumerate(make_trainer().predict_stream(Evaluated(), loader)):
        assert asked == list(range(index + 1))
    assert asked == [0, 1, 2, 3]


def test_nothing_runs_before_the_first_output_is_asked_for(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    events = Events()
    stream = make_trainer(callbacks=events).predict_stream(Evaluated(), numbers(2))
    assert events.names == []
    next(stream)
    assert events.names[:2] == ["setup", "on_predict_start"]
    stream.close()


def test_mistakes_are_told_where_the_stream_is_made(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Data(LightningDataModule):
        def predict_dataloader(self) -> Any:
            return numbers(2)

    with pytest.raises(TypeError, match="needs a model"):
        make_trainer().predict_stream()
    with pytest.raises(MisconfigurationException, match="both loaders and a datamodule"):
        make_trainer().predict_stream(Evaluated(), numbers(2), datamodule=Data())
    assert len(list(make_trainer().predict_stream(Evaluated(), datamodule=Data()))) == 2


def test_several_loaders_come_one_after_another(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> Any:
            return batch.item(), batch_idx, dataloader_idx

    trainer = make_trainer()
    found = [(output, trainer.predict_loop.dataloader_idx) for output in trainer.predict_stream(Model(), [numbers(2), numbers(1, start=5)])]
    assert found == [((0.0, 0, 0), 0), ((1.0, 1, 0), 0), ((5.0, 0, 1), 1)]


@pytest.mark.parametrize(
    ("arguments", "expected"), [({"limit_predict_batches": 2}, 2), ({"limit_predict_batches": 0}, 0), ({"fast_dev_run": True}, 1)]
)
def test_limits_count(Evaluated: Any, make_trainer: Any, numbers: Any, arguments: Any, expected: int) -> None:
    assert len(list(make_trainer(**arguments).predict_stream(Evaluated(), numbers(4)))) == expected


def test_weights_come_from_a_checkpoint_and_the_precision_is_the_trainers(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.weight, batch

    trained = Evaluated()
    trainer = make_trainer()
    trainer.fit(trained, numbers(2, start=1), numbers(1))
    trainer.save_checkpoint("a.ckpt")
    ((weight, batch),) = make_trainer(precision="64-true").predict_stream(Model(), numbers(1), ckpt_path="a.ckpt")
    assert weight == trained.weight != 0
    assert weight.dtype == batch.dtype == torch.float64


def test_the_callers_turn_has_its_own_gradient_mode(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    inside: list[bool] = []

    class Model(Evaluated):  # type: ignore[misc]
        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            inside.append(torch.is_inference_mode_enabled())
            return super().predict_step(batch, batch_idx)

    for _ in make_trainer().predict_stream(Model(), numbers(3)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert inside == [True] * 3
    with torch.no_grad():
        for _ in make_trainer().predict_stream(Model(), numbers(2)):
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("how", ["close", "drop", "break"])
def test_a_stream_that_is_left_early_tears_down(Evaluated: Any, make_trainer: Any, numbers: Any, how: str) -> None:
    events, model = Events(), Evaluated()
    model.layer = torch.nn.Dropout()
    trainer = make_trainer(callbacks=[events, TQDMProgressBar()], enable_progress_bar=True)
    if how == "break":
        for _ in trainer.predict_stream(model, numbers(4, num_workers=1)):
            break
    else:
        stream = trainer.predict_stream(model, numbers(4, num_workers=1))
        next(stream)
        assert not model.layer.training
        if how == "close":
            stream.close()
        del stream
    assert events.names[-2:] == ["on_predict_batch_end", "teardown"]
    assert model.layer.training
    assert trainer.state.status is TrainerStatus.FINISHED
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(trainer.predict(model, numbers(4))) == 4  # the trainer is free


def test_an_error_within_reaches_the_caller_and_the_hooks(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            return batch / [1, 1][batch_idx]

    events = Events()
    trainer = make_trainer(callbacks=events)
    stream = trainer.predict_stream(Model(), numbers(4))
    assert [next(stream).item(), next(stream).item()] == [0.0, 1.0]
    with pytest.raises(IndexError):
        next(stream)
    assert events.names[-1] == "on_exception"
    assert trainer.state.status is TrainerStatus.INTERRUPTED
    assert list(stream) == []
    assert len(list(trainer.predict_stream(Evaluated(), numbers(4)))) == 4


def test_an_error_of_the_caller_is_its_own(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    events = Events()
    with pytest.raises(ZeroDivisionError):
        consume(make_trainer(callbacks=events).predict_stream(Evaluated(), numbers(4)), lambda output: 1 / 0)
    assert "on_exception" not in events.names


@pytest.mark.parametrize("entry", ["fit", "validate", "predict", "predict_stream"])
def test_no_other_run_begins_while_a_stream_is_open(Evaluated: Any, make_trainer: Any, numbers: Any, entry: str) -> None:
    trainer, model = make_trainer(), Evaluated()
    outputs = []
    for output in trainer.predict_stream(model, numbers(3)):
        outputs.append(output.item())
        with pytest.raises(MisconfigurationException, match="predict_stream"):
            next(getattr(trainer, entry)(model, numbers(2)))
    assert outputs == [0.0, 1.0, 2.0]
    trainer.fit(model, numbers(2), numbers(2))


def test_writers_are_called(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Writer(BasePredictionWriter):
        def __init__(self) -> None:
            super().__init__("batch_and_epoch")
            self.batches: list[Any] = []

        def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *_: Any) -> None:
            self.batches.append((prediction.flatten().tolist(), batch_indices))

        def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
            self.epoch = ([each.flatten().tolist() for each in predictions], batch_indices)

    writer = Writer()
    for _ in make_trainer(callbacks=writer).predict_stream(Evaluated(), numbers(3, batch_size=2)):
        pass
    assert writer.batches == [([0.0, 1.0], [0, 1]), ([2.0], [2])]
    assert writer.epoch == ([[0.0, 1.0], [2.0]], [[[0, 1], [2]]])


def test_ctrl_c_in_the_callers_turn_is_not_put_off(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    events = Events()
    taken: list[Any] = []

    def interrupt(output: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        taken.append(output)

    with pytest.raises(KeyboardInterrupt):
        consume(make_trainer(callbacks=events).predict_stream(Evaluated(), numbers(4)), interrupt)
    assert taken == []
    assert events.names[-1] == "teardown"


def test_sigterm_ends_the_stream_before_its_next_batch(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    taken: list[Any] = []

    def terminate(output: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        taken.append(output)

    with pytest.raises(SystemExit):
        consume(make_trainer().predict_stream(Evaluated(), numbers(4)), terminate)
    assert len(taken) == 1


def test_processes_with_copies_are_refused(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer(strategy="ddp_spawn", devices=2)
    with pytest.raises(MisconfigurationException, match="Use a strategy whose processes run the script"):
        trainer.predict_stream(Evaluated(), numbers(4))


SCRIPT = f"""
import sys
sys.path.insert(0, {HELPERS!r})
import torch
from torch.utils.data import DataLoader
from trainers import Evaluated, Numbers, quiet
torch.set_num_threads(1)
class Model(Evaluated):
    def predict_step(self, batch, batch_idx):
        if "fails" in sys.argv and self.trainer.global_rank == 1 and batch_idx == 1:
            raise ZeroDivisionError("the user's own")
        return batch
trainer = quiet(strategy="ddp", devices=2)
for name in ("a", "b"):
    for output in trainer.predict_stream(Model(), DataLoader(Numbers(5))):
        print(f"{{name}} {{trainer.global_rank}} {{int(output)}}\\n", end="", flush=True)  # in one write
        if name == "b":
            break
trainer.validate(Evaluated(), DataLoader(Numbers(4)), verbose=False)
print(f"end {{trainer.global_rank}}\\n", end="", flush=True)
"""


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    Path("script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "LOCAL_", "NODE_"))}
    return subprocess.run([sys.executable, "script.py", *arguments], capture_output=True, text=True, timeout=120, env=environment)


def test_each_process_gets_the_outputs_of_its_own_samples() -> None:
    done = run_script()
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines == ["a 0 0", "a 0 2", "a 0 4", "a 1 1", "a 1 3", "b 0 0", "b 1 1", "end 0", "end 1"]


def test_a_process_that_fails_ends_the_streams_of_all() -> None:
    done = run_script("fails")
    assert done.returncode != 0
    assert "the user's own" in done.stderr
    assert "end 0" not in done.stdout
