"""Steps that are recorded and replayed give what they give without: by a recorder for the CPU that repeats operations on their memory.

What only CUDA does is checked on a GPU: tests/gpu/check_compile_cuda.py.
"""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from tape import SmallNet, TapeRecorder, record_on_tapes
from trainers import quiet

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops import graph_recording, graphs

EPOCHS = 4


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[TapeRecorder]:
    """Let the CPU record; gives the recorders that were used."""
    return record_on_tapes(monkeypatch.setattr)


class Model(SmallNet):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("count", float(len(batch[0])), reduce_fx="sum", on_epoch=True)
        return {"loss": loss, "twice": 2 * loss.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        self.seen.append(({name: value.item() for name, value in outputs.items()}, metrics))

    def on_train_epoch_end(self) -> None:
        self.seen.append({name: value.item() for name, value in self.trainer.callback_metrics.items()})


def data(count: int = 44) -> DataLoader[Any]:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)  # the last batch is smaller


def fitted(kind: Callable[[], Model], loader: Any = None, val: Any = None, **arguments: Any) -> Model:
    model = kind()
    torch.manual_seed(1)
    quiet(**{"max_epochs": EPOCHS, **arguments}).fit(model, data() if loader is None else loader, val)
    return model


def compare(kind: Callable[[], Model], *, exact: bool = True, loader: Any = None, val: Any = None, **arguments: Any) -> Model:
    """Fit without and with recordings; what comes out must be the same."""
    plain = fitted(kind, loader, val, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning says that nothing is replayed
        replayed = fitted(kind, loader, val, compile="step", **arguments)
    assert len(plain.seen) >= 10
    if exact:
        assert replayed.seen == plain.seen
    assert list(replayed.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        if exact:
            assert torch.equal(replayed.state_dict()[name], value), name
        else:
            torch.testing.assert_close(replayed.state_dict()[name], value)
    return replayed


# ---- the same as without --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 4},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1, "limit_train_batches": 5},
        {"precision": "bf16-mixed"},
        {"precision": "64-true", "max_epochs": 3},
    ],
    ids=str,
)
def test_weights_and_all_that_is_seen_are_the_same(arguments: dict[str, Any], recorders: list[TapeRecorder]) -> None:
    class Cast(Model):
        def loss(self, batch: Any) -> Tensor:
            return super().loss([each.to(self.dtype) for each in batch]).float()

    compare(Cast, **arguments)
    assert recorders[0].recordings >= 2
    assert recorders[0].replays >= 8


def test_each_kind_of_step_is_recorded_once(recorders: list[TapeRecorder]) -> None:
    compare(Model)
    assert recorders[0].recordings == 2  # of whole batches, and of the last one
    steps = 6 * EPOCHS
    assert recorders[0].replays == steps - 2 * graphs.WARM_UP


def test_hooks_within_a_step_run_in_each_step_on_its_values(recorders: list[TapeRecorder]) -> None:
    class Hooked(Model):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.seen.append("zero")

        def on_before_backward(self, loss: Tensor) -> None:
            self.seen.append(loss.item())

        def on_after_backward(self) -> None:
            for parameter in self.parameters():
                parameter.grad.mul_(0.5)  # type: ignore[union-attr]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norm = torch.stack([parameter.grad.norm() for parameter in self.parameters() if parameter.grad is not None]).norm()
            self.seen.append(norm.item())
            self.log("norm", norm, on_step=True, on_epoch=True)

    model = compare(Hooked, gradient_clip_val=0.1)
    assert model.seen.count("zero") == 6 * EPOCHS
    assert recorders[0].replays > 30


def test_hooks_of_a_window_run_too() -> None:
    class Hooked(Model):
        def on_after_backward(self) -> None:
            self.seen.append(self.net[0].weight.grad.sum().item())

    compare(Hooked, accumulate_grad_batches=3)


def test_learning_rates_of_schedulers_are_followed(tmp_path: Path) -> None:
    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            assert isinstance(self.seen[-1], float)

    compare(Scheduled, exact=False)  # the device has the learning rate in single precision


def test_a_learning_rate_that_is_a_tensor_already_is_left_as_it_is() -> None:
    class OnDevice(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), torch.tensor(0.01), fused=True)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]

    compare(OnDevice)


def test_a_learning_rate_that_a_hook_sets_is_followed() -> None:
    class Slower(Model):
        def on_train_epoch_start(self) -> None:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.01 / (self.current_epoch + 1)

    compare(Slower, exact=False)


def test_an_optimizer_step_of_the_user_runs_in_each_step() -> None:
    class Warming(Model):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.001 * (batch_idx + 1)
            optimizer.step(closure=optimizer_closure)

    compare(Warming, gradient_clip_val=0.1)


def test_callbacks_see_the_weights_of_each_step() -> None:
    class Average(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            weight = pl_module.net[0].weight.detach()  # type: ignore[union-attr, index]
            self.mean = weight.clone() if not hasattr(self, "mean") else self.mean.lerp_(weight, 0.1)

    first, second = Average(), Average()
    fitted(Model, callbacks=first)
    fitted(Model, callbacks=second, compile="step")
    assert torch.equal(first.mean, second.mean)


def test_what_is_kept_of_a_step_stays_as_it_was() -> None:
    class Keeping(Model):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append((outputs["loss"], outputs["twice"], self.trainer.callback_metrics["loss"]))

    model = fitted(Keeping, compile="step")
    plain = fitted(Keeping)
    kept = [[value.item() for value in each] for each in model.seen if isinstance(each, tuple)]
    assert kept == [[value.item() for value in each] for each in plain.seen if isinstance(each, tuple)]
    assert len({loss for loss, *_ in kept}) == len(kept)


def test_loggers_get_the_same_rows(tmp_path: Path) -> None:
    rows = []
    for name, compile in (("plain", None), ("replayed", "step")):
        logger = CSVLogger(tmp_path, name, version=0)
        fitted(Model, logger=logger, log_every_n_steps=2, compile=compile, callbacks=LearningRateMonitor("step"))
        rows.append((tmp_path / name / "version_0" / "metrics.csv").read_text())
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) > 10


def test_validation_between_steps_changes_nothing() -> None:
    class Validated(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

    compare(Validated, val=data(16), val_check_interval=2)


def test_accumulation_may_change_with_the_epoch() -> None:
    compare(Model, callbacks=GradientAccumulationScheduler({0: 1, 1: 3, 2: 2}), max_epochs=6)


def test_batches_of_any_structure_are_copied() -> None:
    class Named(Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            x = torch.arange(5.0) + index
            return {"in": [x, {"mask": torch.ones(5)}], "out": x.sum().reshape(1), "kind": 3}

        def __len__(self) -> int:
            return 32

    class Structured(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, more = batch["in"]
            loss = self.loss((x * more["mask"] / 40, batch["out"] / 40))
            self.log("loss", loss, batch_size=8)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(outputs["loss"].item())

    compare(Structured, loader=DataLoader(Named(), batch_size=8))


def test_what_a_hook_sets_in_each_epoch_is_taken_up(recorders: list[TapeRecorder]) -> None:
    class Annealed(Model):
        factor = 1.0
        settings: dict[str, float]

        def on_train_epoch_start(self) -> None:
            self.factor = 1.0 if self.current_epoch < 2 else 0.5
            self.net[3].p = 0.2 if self.current_epoch < 3 else 0.5  # type: ignore[union-attr]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {**super().training_step(batch, batch_idx), "loss": self.loss(batch) * self.factor}

    compare(Annealed, max_epochs=6)
    assert recorders[0].recordings > 2


def test_weights_that_a_callback_freezes_stay_frozen() -> None:
    class Freezing(Model):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch < 2)

    compare(Freezing)


def test_loss_without_listeners_is_not_copied(recorders: list[TapeRecorder]) -> None:
    class Silent(Model):
        on_train_batch_end = LightningModule.on_train_batch_end

    plain, replayed = fitted(Silent), fitted(Silent, compile="step")
    for name, value in plain.state_dict().items():
        assert torch.equal(replayed.state_dict()[name], value)
    assert replayed.seen == plain.seen


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The checkpoint holds the state of callbacks")
def test_checkpoints_are_those_of_a_plain_run_and_resume_either_way(tmp_path: Path) -> None:
    class Free(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.01)  # whose steps are to be recorded as fused

    for name, compile in (("plain", None), ("replayed", "step")):
        saver = ModelCheckpoint(tmp_path / name, save_top_k=-1, every_n_train_steps=5)
        fitted(Free, callbacks=saver, enable_checkpointing=True, compile=compile)
    plain, replayed = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("plain", "replayed"))
    assert plain == replayed
    for name in plain:
        theirs, ours = (torch.load(tmp_path / kind / name, weights_only=True) for kind in ("plain", "replayed"))
        assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
        for key, value in theirs["state_dict"].items():
            torch.testing.assert_close(ours["state_dict"][key], value, rtol=1e-4, atol=1e-5)
    path = tmp_path / "replayed" / plain[2]  # in the middle of an epoch
    ends = []
    for compile in (None, "step"):
        model = Free()
        quiet(max_epochs=EPOCHS, compile=compile).fit(model, data(), ckpt_path=path)
        ends.append(model)
    for ours, theirs in zip(ends[1].parameters(), ends[0].parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The checkpoint holds the state of callbacks")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_replayed_run_resumed_in_mid_epoch_ends_in_the_same_bits(accumulate: int, tmp_path: Path) -> None:
    class Saving(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.progress.total_batches:02}.ckpt")

    whole = fitted(Model, callbacks=Saving(), compile="step", accumulate_grad_batches=accumulate)
    for path in sorted(tmp_path.iterdir())[7:20:3]:
        model = Model()
        torch.manual_seed(5)
        quiet(max_epochs=EPOCHS, compile="step", accumulate_grad_batches=accumulate).fit(model, data(), ckpt_path=path)
        for name, value in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert model.seen == whole.seen[-len(model.seen) :]


def test_optimizer_is_left_as_the_user_made_it() -> None:
    class Free(Model):
        def configure_optimizers(self) -> Any:
            self.made = torch.optim.AdamW(self.parameters(), 0.01)
            return self.made

    model = fitted(Free, compile="step")
    assert model.made.param_groups[0]["fused"] is None
    assert model.made.param_groups[0]["capturable"] is False
    model.made.step()


# ---- what can't be replayed -----------------------------------------------------------------------------------------


class ByIndex(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {**super().training_step(batch, batch_idx), "loss": self.loss(batch) * (1 + batch_idx % 3)}


class ByStep(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {**super().training_step(batch, batch_idx), "loss": self.loss(batch) * min(1.0, self.global_step / 10)}


class ByTrainer(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {**super().training_step(batch, batch_idx), "loss": self.loss(batch) * (1 + self.trainer.current_epoch)}


class Counting(Model):
    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        return {**super().training_step(batch, batch_idx), "loss": self.loss(batch) * self.calls}


class Collecting(Model):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        self.losses.append(1.0)
        return outputs


class Rebinding(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        self.running = 0.9 * self.running + 0.1 * outputs["loss"].detach()
        return {"loss": outputs["loss"] + self.running, "twice": outputs["twice"]}


class Reading(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        if outputs["loss"].item() > 0.5:
            outputs["loss"] = outputs["loss"] * 2
        return outputs


class Drawing(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {**super().training_step(batch, batch_idx), "loss": self.loss(batch) * (1.0 + (random.random() > 0.5))}


STEPS: list[int] = []  # beyond the module: nobody sees that it is changed


class LoggingSometimes(Model):
    def __init__(self) -> None:
        super().__init__()
        STEPS.clear()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        STEPS.append(1)
        if len(STEPS) > 2:
            self.log("late", outputs["loss"])
        return outputs


class Hooked(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_hook(lambda module, args, output: STEPS.append(1))


class HandMade(Model):
    def configure_optimizers(self) -> Any:
        class Decaying(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                for parameter in self.param_groups[0]["params"]:
                    self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
                    self.param_groups[0]["momentum"] = 0.5
                loss = closure()
                with torch.no_grad():
                    for parameter in self.param_groups[0]["params"]:
                        parameter -= 0.1 / self.state[parameter]["step"] * parameter.grad
                return loss

        return Decaying(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ByIndex, r"`batch_idx`.*test_graphs.py:\d+: `return .*batch_idx % 3"),
        (ByStep, r"`self.global_step`.*test_graphs.py:\d+"),
        (ByTrainer, r"`self.trainer`.*test_graphs.py:\d+"),
        (Counting, r"`self.calls`"),
        (Collecting, r"`self.losses`"),
        (Rebinding, r"`self.running`"),
        (Reading, r"reads from the device.*test_graphs.py:\d+: `if outputs\[.loss.\].item"),
        (Drawing, r"random numbers on the host"),
        (LoggingSometimes, r"it logs 'late' in some steps.*test_graphs.py:\d+"),
        (Hooked, r"`net.0` has hooks"),
        (HandMade, r"Decaying changes `state 'step' of parameter 0` on the host"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_steps_that_cannot_be_replayed_run_as_always_and_the_reason_is_told(kind: type[Model], message: str) -> None:
    random.seed(3)
    plain = fitted(kind)
    random.seed(3)
    with pytest.warns(UserWarning, match=message) as caught:
        run = fitted(kind, compile="step")
    assert len([each for each in caught if "compile='step'" in str(each.message)]) == 1
    assert run.seen == plain.seen
    for name, value in plain.state_dict().items():
        assert torch.equal(run.state_dict()[name], value), name


def test_error_while_recording_names_the_line_and_leaves_no_trace() -> None:
    class Refusing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            if graph_recording.torch.utils._python_dispatch._get_current_dispatch_mode() is not None and not self.watched():
                raise RuntimeError("operation not permitted when stream is capturing")
            return outputs

        def watched(self) -> bool:
            loop = self.__dict__["_trainer"].fit_loop
            return any(guard.watching for guard in loop.guards)

    plain = fitted(Refusing)
    with pytest.warns(
        UserWarning, match=r"can't be recorded: RuntimeError: operation not permitted.*test_graphs.py:\d+: `raise RuntimeError"
    ):
        run = fitted(Refusing, compile="step")
    assert run.seen == plain.seen
    for name, value in plain.state_dict().items():
        assert torch.equal(run.state_dict()[name], value), name


def test_what_changes_at_each_step_is_given_up_after_a_while(recorders: list[TapeRecorder]) -> None:
    class Restless(Model):
        factor = 1.0

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.factor = 1.0 / (1 + batch_idx)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {**super().training_step(batch, batch_idx), "loss": self.loss(batch) * self.factor}

    plain = fitted(Restless, max_epochs=8)
    with pytest.warns(UserWarning, match=r"'self.factor' changes again and again"):
        run = fitted(Restless, max_epochs=8, compile="step")
    assert run.seen == plain.seen


def test_further_shapes_run_as_always(recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    class Lengths(Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            x = torch.randn(2 + index, 5, generator=torch.Generator().manual_seed(index))
            return x, x.sum(1, keepdim=True)

        def __len__(self) -> int:
            return 5

    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    loader = DataLoader(Lengths(), batch_size=None)
    plain = fitted(Model, loader)
    with pytest.warns(UserWarning, match="3 kinds of training steps are replayed") as caught:
        run = fitted(Model, loader, compile="step")
    assert len(caught) == 1
    assert run.seen == plain.seen
    assert recorders[0].recordings == 3


def test_batches_of_unknown_kinds_are_not_replayed() -> None:
    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, *args: Any, **kwargs: Any) -> Box:
            return self

    class Boxed(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss((batch.x, batch.x.sum(1, keepdim=True)))
            self.log("loss", loss, batch_size=4)
            return {"loss": loss}

    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x), batch_size=4, collate_fn=lambda samples: Box(torch.stack([each for (each,) in samples])))
    plain = fitted(Boxed, loader)
    with pytest.warns(UserWarning, match="the batch holds a Box"):
        run = fitted(Boxed, loader, compile="step")
    assert run.seen == plain.seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_nonfinite": "error"}, "on_nonfinite='error'"),
        ({"on_out_of_memory": "split_batch"}, "on_out_of_memory='split_batch'"),
        ({"detect_anomaly": True}, "detect_anomaly"),
    ],
)
def test_what_looks_into_steps_does_not_go_with_it(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"compile='step'.*{message}"):
        fitted(Model, compile="step", **arguments)


def test_manual_optimization_does_not_go_with_it() -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match=r"compile='step'.*manual optimization"):
        fitted(Manual, compile="step")


@pytest.mark.slow
def test_changes_by_hooks_between_steps_are_taken_up() -> None:
    """Those that the checks for a GPU make: weights in other memory, parts set to evaluation, the optimizer's state loaded, ..."""
    script = Path(__file__).parents[3] / "tests" / "gpu" / "check_compile_cuda.py"
    command = [sys.executable, str(script), "--device", "cpu", "--only", "changed|validation between|as eager: 16-mixed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("PASS") >= 14


# ---- what it costs --------------------------------------------------------------------------------------------------


def calls(**arguments: Any) -> list[int]:
    """Python calls into the package from one training batch to the next."""
    import lightning

    package, counts, count = str(Path(lightning.__file__).parent), [], 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(package):
            count += 1

    class Noting(Model):
        on_train_batch_end = LightningModule.on_train_batch_end

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            nonlocal count
            for batch in data(200):
                counts.append(count)
                count = 0
                yield batch

        def __len__(self) -> int:
            return 25

    sys.setprofile(profile)
    try:
        fitted(Noting, Batches(), max_epochs=1, **arguments)
    finally:
        sys.setprofile(None)
    return counts[15:]


def test_a_replayed_step_keeps_to_the_budget_of_an_eager_one() -> None:
    assert max(calls(compile="step")) <= 25


def test_without_a_device_that_records_steps_run_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_recording, "recorder_of", lambda device: None)
    plain = fitted(Model)
    with pytest.warns(UserWarning, match="needs a CUDA device"):
        run = fitted(Model, compile="step")
    assert run.seen == plain.seen
