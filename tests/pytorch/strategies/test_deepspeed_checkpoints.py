"""Checkpoints under DeepSpeed, in two real processes on its CPU accelerator: saved, resumed, brought to one file, and loaded from one.

Needs the package deepspeed: ``make test-deepspeed``. All runs of this file happen in one pair of processes, since DeepSpeed takes
seconds to get ready in each.
"""

from __future__ import annotations

import os
import pickle
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

from lightning.fabric import Fabric
from lightning.fabric.checkpoint import io
from lightning.fabric.strategies import deepspeed_checkpoint as directories
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict, ds_checkpoint_dir

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed: make test-deepspeed")

TOLERANCE = 1e-6
SAMPLES, BATCH = 30, 6
STAGES = (0, 1, 2, 3)
SHARED = "file.ckpt"  # saved by one process, without DeepSpeed


class Model(Regression):
    """With AdamW, whose state matters, a scheduler, a buffer, and hyperparameters."""

    def __init__(self, seed: int = 3, frozen: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("seen", torch.zeros(()))
        if seed != 3:
            torch.manual_seed(seed)
            for parameter in self.parameters():
                nn.init.normal_(parameter)
        if frozen:
            self.net[0].requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)


class Other(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def deepspeed_strategy(stage: int, **arguments: Any) -> DeepSpeedStrategy:
    strategy = DeepSpeedStrategy(stage=stage, **arguments)
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else weights as small as these stay whole
    return strategy


def prepare() -> None:
    """Let pass what DeepSpeed's imports, and these runs, warn of."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*there is no validation loader")


def fit(model: Model, size: int = 1, epochs: int = 1, path: Any = None, **arguments: Any) -> Any:
    trainer = quiet(max_epochs=epochs, **({"devices": size} if size > 1 else {}), **arguments)
    trainer.fit(model, loader(Vectors(SAMPLES), BATCH, size), ckpt_path=path)
    return trainer


def validated(trainer: Any, model: Model, path: Any = None) -> float:
    value: float = trainer.validate(model, DataLoader(Vectors(8), batch_size=2), ckpt_path=path, verbose=False)[0]["val"]
    return value


def weights_of(trainer: Any) -> dict[str, Any]:
    return plain(trainer.strategy.get_module_state_dict(trainer.lightning_module))


# ---- in two processes -----------------------------------------------------------------------------------------------------


def save_and_resume(size: int, stage: int, folder: Path) -> dict[str, Any]:
    """A run of two epochs; one of an epoch that is saved; and everything that can go on from there."""
    saved = folder / f"stage_{stage}.ckpt"
    whole = fit(Model(), size, 2, strategy=deepspeed_strategy(stage))
    outcome: dict[str, Any] = {"whole": weights_of(whole)}
    trainer = fit(Model(), size, strategy=deepspeed_strategy(stage))
    trainer.save_checkpoint(saved)
    trainer.save_checkpoint(saved)  # in the place of the first one
    outcome["saved"] = weights_of(trainer)
    resumed = fit(Model(seed=4), size, 2, saved, strategy=deepspeed_strategy(stage))
    outcome["resumed"] = weights_of(resumed)
    outcome["steps"] = (resumed.global_step, resumed.lr_scheduler_configs[0].scheduler.last_epoch)
    outcome["validated"] = validated(quiet(strategy=deepspeed_strategy(stage), devices=size), Model(seed=4), saved)
    model = Model(seed=4)
    outcome["from file"] = weights_of(fit(model, size, 2, folder / SHARED, strategy=deepspeed_strategy(stage, load_full_weights=True)))
    evaluated = quiet(strategy=deepspeed_strategy(stage), devices=size)
    outcome["file validated"] = validated(evaluated, Model(seed=4), folder / SHARED)
    evaluated.save_checkpoint(folder / f"evaluated {stage}.ckpt")
    return outcome


def frozen(size: int, stage: int, folder: Path) -> dict[str, Any]:
    """Weights that are not trained: saved, or left out."""
    outcome = {}
    for name, excluded in (("kept", False), ("left out", True)):
        path = folder / f"frozen {name} {stage}.ckpt"
        trainer = fit(Model(frozen=True), size, strategy=deepspeed_strategy(stage, exclude_frozen_parameters=excluded))
        trainer.save_checkpoint(path)
        model = Model(frozen=True, seed=3 if excluded else 4)
        resumed = fit(model, size, 2, path, strategy=deepspeed_strategy(stage, exclude_frozen_parameters=excluded))
        outcome[name] = weights_of(resumed)
    return outcome


def checkpoint_callback(size: int, folder: Path) -> dict[str, Any]:
    callback = ModelCheckpoint(folder / "best", filename="{epoch}", save_top_k=1, monitor="epoch", mode="max", save_last=True)
    trainer = fit(Model(), size, 3, strategy=deepspeed_strategy(2), enable_checkpointing=True, callbacks=[callback])
    trainer.strategy.barrier()
    return {"names": sorted(os.listdir(folder / "best")), "best": os.path.isfile(Path(callback.best_model_path) / "latest")}


def bf16(size: int, folder: Path) -> dict[str, Any]:
    """A float32 file is loaded into 16 bits without losing the float32 copy of the weights."""
    path = folder / "bf16.ckpt"
    trainer = quiet(max_epochs=1, strategy=deepspeed_strategy(3), devices=size, precision="bf16-mixed")
    trainer.fit(Model(), loader(Vectors(SAMPLES), BATCH, size), ckpt_path=folder / SHARED)  # which has had its epoch
    trainer.save_checkpoint(path)
    return {"steps": trainer.global_step}


def fabric(size: int, folder: Path) -> dict[str, Any]:
    """A loop of the user's own saves and goes on."""

    def loop(steps: int, path: Path | None, save: Path | None) -> dict[str, Any]:
        runtime = Fabric(accelerator="cpu", devices=size, strategy=deepspeed_strategy(2))
        runtime.launch()
        module = Regression()
        model, optimizer = runtime.setup(module, torch.optim.AdamW(module.parameters(), 0.05))
        state = {"model": model, "optimizer": optimizer, "step": 0}
        if path is not None:
            runtime.load(path, state)
        data = Vectors(24).samples.view(-1, 6, 5)
        for step in range(state["step"], steps):
            batch = data[step][runtime.global_rank :: size]
            runtime.backward((model(batch) - batch.sum(1, keepdim=True)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if save is not None:
            runtime.save(save, {**state, "step": steps})
        del os.environ["LOCAL_RANK"]  # which the engine needed, and by which the next run would believe that a script has started it
        return plain(module.state_dict())

    Regression.forward = lambda self, batch: self.net(batch)  # type: ignore[assignment]
    whole = loop(4, None, None)
    loop(2, None, folder / "fabric.ckpt")
    return {"whole": whole, "resumed": loop(4, folder / "fabric.ckpt", None)}


def resume_alone(rank: int, size: int, path: str) -> dict[str, Any]:
    """Of another number of processes, from what DeepSpeed's own tool has made of a directory."""
    prepare()
    command = directories.TO_UNIVERSAL.format(path).split()
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    strategy = deepspeed_strategy(2)
    strategy.config["checkpoint"] = {"load_universal": True}
    trainer = quiet(max_epochs=2, strategy=strategy)
    trainer.fit(Model(seed=4), loader(Vectors(SAMPLES), BATCH, 1), ckpt_path=path)
    return weights_of(trainer)


class Touching:
    """What a malicious file might hold."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("touched",)


def failures(rank: int, size: int, folder: Path) -> list[str]:
    saved = folder / "stage_2.ckpt"
    poisoned = folder / "poisoned.ckpt"
    if rank == 0:
        import shutil

        shutil.copytree(saved, poisoned)
        file = poisoned / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        content = torch.load(file, weights_only=False)
        torch.save({**content, "more": Touching()}, file)
    torch.distributed.barrier()
    trained = fit(Model(), size, strategy=deepspeed_strategy(2))
    attempts: list[Callable[[], Any]] = [
        lambda: fit(Model(), size, 2, saved, strategy=deepspeed_strategy(3)),
        lambda: fit(Other(), size, 2, saved, strategy=deepspeed_strategy(2)),
        lambda: fit(Model(), size, 2, poisoned, strategy=deepspeed_strategy(2)),
        lambda: trained.save_checkpoint("memory://somewhere"),
        lambda: trained.save_checkpoint(folder / "x.ckpt", storage_options={"a": 1}),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(Exception) as error:
            attempt()
        messages.append(f"{type(error.value).__name__}: {error.value}")
    return messages


def everything(rank: int, size: int, folder: str) -> dict[str, Any]:
    prepare()
    place = Path(folder)
    outcomes: dict[str, Any] = {str(stage): save_and_resume(size, stage, place) for stage in STAGES}
    outcomes["frozen"] = {str(stage): frozen(size, stage, place) for stage in (1, 2, 3)}
    outcomes["callback"] = checkpoint_callback(size, place)
    outcomes["bf16"] = bf16(size, place)
    outcomes["fabric"] = fabric(size, place)
    outcomes["failures"] = failures(rank, size, place)
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process computes, after two epochs and after one, which it saves."""
    with warnings.catch_warnings():
        prepare()
        whole = weights_of(fit(Model(), epochs=2))
        trainer = fit(Model())
        trainer.save_checkpoint(folder / SHARED)
        return {"whole": whole, "saved": weights_of(trainer), "val": validated(quiet(), Model(seed=4), folder / SHARED)}


@pytest.fixture(scope="module")
def outcomes(folder: Path, alone: dict[str, Any]) -> dict[str, Any]:
    """What two processes compute, as rank 0 sees it."""
    first: dict[str, Any] = run(everything, 2, str(folder), timeout=240)[0]
    return first


# ---- what came of it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "resumed", "from file"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_ends_as_one_process_does_wherever_it_was_resumed_from(
    stage: int, name: str, outcomes: dict[str, Any], alone: dict[str, Any]
) -> None:
    ours = outcomes[str(stage)][name]
    assert largest_difference(ours, alone["whole"]) < TOLERANCE
    assert ours["seen"] == 10


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_counts_on(stage: int, outcomes: dict[str, Any]) -> None:
    assert outcomes[str(stage)]["steps"] == (10, 10)


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_reads_directories_and_files(stage: int, outcomes: dict[str, Any], alone: dict[str, Any]) -> None:
    assert outcomes[str(stage)]["validated"] == pytest.approx(alone["val"], abs=10 * TOLERANCE)
    assert outcomes[str(stage)]["file validated"] == pytest.approx(alone["val"], abs=10 * TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_only_evaluates_saves_one_file(stage: int, outcomes: dict[str, Any], alone: dict[str, Any], folder: Path) -> None:
    model = Model.load_from_checkpoint(folder / f"evaluated {stage}.ckpt")
    assert largest_difference(plain(model.state_dict()), alone["saved"]) < TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_a_directory_is_complete_and_nothing_is_left_beside_it(stage: int, outcomes: dict[str, Any], folder: Path) -> None:
    assert ds_checkpoint_dir(folder / f"stage_{stage}.ckpt") == str(folder / f"stage_{stage}.ckpt" / "checkpoint")
    assert [name for name in os.listdir(folder) if "partial" in name or name.endswith(".old")] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("stage", STAGES)
def test_a_directory_becomes_one_file(stage: int, outcomes: dict[str, Any], alone: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    converted = convert_zero_checkpoint_to_fp32_state_dict(folder / f"stage_{stage}.ckpt", tmp_path / "whole.ckpt")
    read = io.load(tmp_path / "whole.ckpt")
    assert set(read) == set(converted)
    assert (read["epoch"], read["global_step"], read["hyper_parameters"]["seed"]) == (1, 5, 3)
    model = Model.load_from_checkpoint(tmp_path / "whole.ckpt")
    assert list(model.state_dict()) == list(read["state_dict"])
    assert largest_difference(plain(model.state_dict()), alone["saved"]) < TOLERANCE
    assert validated(quiet(), Model(seed=4), tmp_path / "whole.ckpt") == pytest.approx(alone["val"], abs=10 * TOLERANCE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*there is no validation loader")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_that_are_not_trained_are_saved_unless_left_out(stage: int, outcomes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    expected = weights_of(fit(Model(frozen=True), epochs=2))
    for name in ("kept", "left out"):
        assert largest_difference(outcomes["frozen"][str(stage)][name], expected) < TOLERANCE
        path = folder / f"frozen {name} {stage}.ckpt"
        weights = convert_zero_checkpoint_to_fp32_state_dict(path, tmp_path / "whole.ckpt")["state_dict"]
        assert ("net.0.weight" in weights) == (name == "kept")


def test_model_checkpoint_keeps_the_best_directories(outcomes: dict[str, Any]) -> None:
    assert outcomes["callback"] == {"names": ["epoch=2.ckpt", "last.ckpt"], "best": True}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_float32_file_keeps_its_bits_in_a_bf16_run(outcomes: dict[str, Any], alone: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    weights = convert_zero_checkpoint_to_fp32_state_dict(folder / "bf16.ckpt", tmp_path / "whole.ckpt")["state_dict"]
    assert outcomes["bf16"]["steps"] == 5
    assert largest_difference({name: value.tolist() for name, value in weights.items()}, alone["saved"]) < TOLERANCE


def test_a_loop_of_ones_own_is_resumed(outcomes: dict[str, Any]) -> None:
    assert largest_difference(outcomes["fabric"]["resumed"], outcomes["fabric"]["whole"]) < TOLERANCE


def test_a_run_goes_on_under_another_number_of_processes(outcomes: dict[str, Any], alone: dict[str, Any], folder: Path) -> None:
    ours = run(resume_alone, 1, str(folder / "stage_2.ckpt"), timeout=240)[0]
    assert largest_difference(ours, alone["whole"]) < TOLERANCE


def test_errors_say_what_to_do(outcomes: dict[str, Any]) -> None:
    stage, optimizer, poisoned, remote, options = outcomes["failures"]
    assert "stage of ZeRO was 2, and here it is 3" in stage
    assert "optimizer was AdamW, and here it is SGD" in optimizer
    assert poisoned.startswith(pickle.UnpicklingError.__name__)
    assert "mkdir in zero_pp_rank_1_mp_rank_00_optim_states.pt" in poisoned
    assert not Path("touched").exists()
    assert "writes to file systems of this machine, not to URLs" in remote
    assert "Leave them out" in options
