"""The Trainer under DeepSpeed, in two real processes on its CPU accelerator, computes what it computes alone on all of the data.

Needs the package deepspeed: ``make test-deepspeed``. Most runs of this file happen in one pair of processes, since DeepSpeed takes
seconds to get ready in each.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from trainers import Regression, Vectors, loader, quiet
from training import largest_difference, plain

from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.callbacks import ModelSummary as ModelSummaryCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed: make test-deepspeed")

TOLERANCE = 1e-6
SAMPLES, BATCH = 30, 6


class Model(Regression):
    """With AdamW and a scheduler, and validated."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)


class Overriding(Model):
    """Has hooks of its own around the step: some steps are clipped, and some are not."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (batch_idx + 1)
        optimizer.step(closure=optimizer_closure)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        if self.global_step % 2 == 0:
            self.clip_gradients(optimizer, 0.2, "norm")


class OwnBackward(Model):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Chatty(Model):
    """Returns more than the loss."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        hidden = self.net[0](batch)
        return {"loss": super().training_step(batch, batch_idx), "hidden": hidden, "more": {"list": [hidden, 1]}}


class Rooted(Model):
    """Has a parameter of its own, outside of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch) * self.factor.abs().sum()
        self.losses.append(loss.item())
        return loss


class Manual(Rooted):
    """Steps and clips by hand, every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
            optimizer.zero_grad()


class BuiltLate(Model):
    """Is built in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None
        self.sizes: list[int] = []

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(5, 7), nn.Identity(), nn.Tanh(), nn.Linear(7, 1))
            self.sizes = [parameter.numel() for parameter in self.net.parameters()]


class Frozen(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class Configured(Model):
    """Leaves optimizer and scheduler to the configuration, or makes the same."""

    def configure_optimizers(self) -> Any:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return None
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(max(step - 1, 0), 4) / 4)  # as WarmupLR counts
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


OPTIMIZER = {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.01, "torch_adam": True}}
SCHEDULER = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.05, "warmup_num_steps": 4, "warmup_type": "linear"},
}
WINDOW = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
RUNS: dict[str, tuple[type[Model], dict[str, Any]]] = {
    "plain": (Model, {}),
    "window": (Model, WINDOW),
    "overriding": (Overriding, {}),
    "own backward": (OwnBackward, WINDOW),
    "chatty": (Chatty, {}),
    "rooted": (Rooted, {}),
    "manual": (Manual, {}),
    "built late": (BuiltLate, {}),
    "frozen": (Frozen, {}),
    "configured": (Configured, {}),
}


def deepspeed_strategy(stage: int, name: str = "", **arguments: Any) -> DeepSpeedStrategy:
    strategy = DeepSpeedStrategy(stage=stage, **arguments)
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else weights as small as these stay whole
    if name == "configured":
        strategy.config.update(optimizer=OPTIMIZER, scheduler=SCHEDULER)
    return strategy


def prepare() -> None:
    """Let pass what DeepSpeed's imports, and these runs, warn of."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for message in ("there is no validation loader", "`configure_optimizers` returned None"):
        warnings.filterwarnings("ignore", message=f".*{message}")


def fit(name: str, size: int = 1, **arguments: Any) -> tuple[Any, Model]:
    kind, more = RUNS[name]
    trainer, model = quiet(**more, **arguments), kind()
    trainer.fit(model, loader(Vectors(SAMPLES), BATCH, size), validation())
    return trainer, model


def validation() -> DataLoader[Any]:
    return DataLoader(Vectors(8), batch_size=2)


def outcome_of(trainer: Any, model: Model) -> dict[str, Any]:
    return {
        "losses": model.losses,
        "weights": plain(trainer.strategy.get_module_state_dict(model)),
        "val": trainer.callback_metrics["val"].item(),
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
    }


# ---- numbers ------------------------------------------------------------------------------------------------------------


def fit_all(rank: int, size: int) -> dict[str, Any]:
    prepare()
    outcomes: dict[str, Any] = {}
    for stage in (1, 2, 3):
        for name in RUNS:
            trainer, model = fit(name, size, strategy=deepspeed_strategy(stage, name), devices=size)
            outcomes[f"{stage} {name}"] = outcome_of(trainer, model)
            outcomes[f"{stage} {name}"]["sizes"] = getattr(model, "sizes", None)
        summary = ModelSummaryCallback(max_depth=2)._summary(trainer, model)
        columns = {title: [cell.strip() for cell in cells] for title, cells in summary._get_summary_data()}
        outcomes[f"{stage} summary"] = (summary.total_parameters, columns)
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> Any:
    return run(fit_all, 2, timeout=240)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_numbers_are_those_of_one_process(stage: int, name: str, outcomes: Any) -> None:
    alone = outcome_of(*fit(name))
    ours = outcomes[0][f"{stage} {name}"]
    losses = torch.tensor([each[f"{stage} {name}"]["losses"] for each in outcomes]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"]), rtol=0, atol=10 * TOLERANCE)  # they are of the order of 10
    assert largest_difference(ours["weights"], alone["weights"]) < TOLERANCE
    assert ours["val"] == pytest.approx(alone["val"], abs=10 * TOLERANCE)
    assert ours["lr"] == pytest.approx(alone["lr"])


def test_what_is_built_in_configure_model_is_divided_at_once_with_zero_3(outcomes: Any) -> None:
    assert outcomes[0]["3 built late"]["sizes"] == [0, 0, 0, 0]
    assert outcomes[0]["2 built late"]["sizes"] == [35, 7, 7, 1]


def test_the_summary_tells_whole_sizes_and_what_a_process_holds(outcomes: Any) -> None:
    total, columns = outcomes[0]["3 summary"]
    assert total == 50
    assert columns["Name"] == ["net", "net.0", "net.1", "net.2", "net.3"]
    assert columns["Params"] == ["50", "42", "0", "0", "8"]
    assert columns["Params per Device"] == ["27", "22", "0", "0", "5"]
    total, columns = outcomes[0]["2 summary"]
    assert (total, columns["Params"]) == (50, ["50", "42", "0", "0", "8"])
    assert "Params per Device" not in columns


# ---- one run after another ----------------------------------------------------------------------------------------------


def several_runs(rank: int, size: int, stage: int, folder: str) -> dict[str, Any]:
    """A model is evaluated, trained, evaluated, and trained anew."""
    prepare()
    model = Model()
    trainer = quiet(strategy=deepspeed_strategy(stage), devices=size, precision="bf16-mixed")
    trainer.validate(model, validation(), verbose=False)
    kept = stage == 3 or all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), Model().parameters()))
    logger = CSVLogger(folder)
    trainer = quiet(strategy=deepspeed_strategy(stage), devices=size, logger=logger, callbacks=[LearningRateMonitor("step")])
    model = Model()
    trainer.fit(model, loader(Vectors(SAMPLES), BATCH, size), validation())
    results: dict[str, Any] = {"fit": trainer.callback_metrics["val"].item()}
    results["validate"] = trainer.validate(model, validation(), verbose=False)[0]["val"]
    results["predictions"] = len(trainer.predict(Predicting(model), validation()) or ())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(Vectors(SAMPLES), BATCH, size), validation())
    engine = trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
    results["weights"] = plain(trainer.strategy.get_module_state_dict(model))
    return {**results, "kept": kept, "batch": engine.train_micro_batch_size_per_gpu(), "batches": engine.train_batch_size()}


class Predicting(Model):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.net = model.net

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.net(batch)


def all_several_runs(rank: int, size: int, folder: str) -> Any:
    return {stage: several_runs(rank, size, stage, folder) for stage in (1, 3)}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(all_several_runs, 2, str(tmp_path_factory.mktemp("logs")), timeout=240)[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_runs_follow_each_other(stage: int, several: Any) -> None:
    trainer = quiet()
    model = Model()
    trainer.fit(model, loader(Vectors(SAMPLES), BATCH, 1), validation())
    first = trainer.callback_metrics["val"].item()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(Vectors(SAMPLES), BATCH, 1), validation())
    ours = several[stage]
    assert ours["fit"] == pytest.approx(first, abs=10 * TOLERANCE)
    assert ours["validate"] == pytest.approx(first, abs=10 * TOLERANCE)
    assert ours["predictions"] > 0
    assert largest_difference(ours["weights"], plain(model.state_dict())) < 2 * TOLERANCE


def test_evaluation_in_bf16_leaves_the_weights_as_they_were(several: Any) -> None:
    assert several[1]["kept"]


def test_the_engine_learns_the_size_of_batches_for_its_log(several: Any) -> None:
    assert (several[1]["batch"], several[1]["batches"]) == (3, 6)


# ---- processes of a script ------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from trainers import Regression, Vectors, loader, quiet
trainer, model = quiet(strategy="deepspeed_stage_3", devices=2, max_epochs=2, gradient_clip_val=0.5), Regression()
trainer.fit(model, loader(Vectors(30), 6, 2))
trainer.save_checkpoint("saved.ckpt")
sys.stdout.write(f"process {{trainer.global_rank}} of {{trainer.world_size}} took {{trainer.global_step}} steps\\n")  # one write
"""


@pytest.mark.slow
def test_a_script_runs_in_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(paths=[str(Path(__file__).resolve().parents[2] / "helpers")]))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2 took 10 steps" in done.stdout
    assert "process 1 of 2 took 10 steps" in done.stdout
    assert (tmp_path / "saved.ckpt" / "latest").is_file()


# ---- errors ---------------------------------------------------------------------------------------------------------------


def failing(rank: int, size: int) -> list[str]:
    prepare()
    attempts: list[Callable[[], Any]] = [
        lambda: fit("plain", size, strategy=deepspeed_strategy(2), devices=size, gradient_clip_val=0.5, gradient_clip_algorithm="value"),
        lambda: fit("configured", size, strategy=deepspeed_strategy(2), devices=size),
        lambda: quiet(strategy=deepspeed_strategy(2), devices=size, precision="64-true"),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(Exception) as error:
            attempt()
        messages.append(str(error.value))
    return messages


def test_errors_say_what_to_do() -> None:
    by_value, none, double = run(failing, 2, timeout=240)[0]
    assert "DeepSpeed clips gradients by their norm only" in by_value
    assert "Return one, or add it to the configuration" in none
    assert "'64-true'" in double
    assert "does not run under DeepSpeed" in double
