"""What DeepSpeedStrategy tells DeepSpeed, and what it refuses: all of it without the package."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.checkpoint.io import TorchCheckpointIO
from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.fabric.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.fabric.runtime import resolve
from lightning.fabric.strategies import STRATEGY_REGISTRY, DeepSpeedStrategy
from lightning.fabric.strategies import deepspeed_checkpoint as directories
from lightning.fabric.strategies.deepspeed_config import complete, for_evaluation, require_deepspeed, zero_stage
from lightning.fabric.utilities.exceptions import MisconfigurationException

DEFAULT = {
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 200_000_000,
        "reduce_bucket_size": 200_000_000,
        "sub_group_size": 1_000_000_000_000,
    },
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "contiguous_memory_optimization": False,
        "synchronize_checkpoint_boundary": False,
    },
    "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True, "thread_count": 1},
}


# ---- where the configuration comes from -------------------------------------------------------------------------------


def test_arguments_make_a_configuration() -> None:
    assert DeepSpeedStrategy().config == DEFAULT


def test_offloading_adds_sections() -> None:
    zero = DeepSpeedStrategy(
        stage=3, offload_optimizer=True, offload_parameters=True, offload_params_device="nvme", nvme_path="/fast", pin_memory=True
    ).config["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "cpu", "nvme_path": "/fast", "buffer_count": 4, "pin_memory": True}
    assert zero["offload_param"] == {
        "device": "nvme",
        "nvme_path": "/fast",
        "buffer_count": 5,
        "buffer_size": 100_000_000,
        "max_in_cpu": 1_000_000_000,
        "pin_memory": True,
    }


def test_without_zero_there_is_no_stage() -> None:
    strategy = DeepSpeedStrategy(zero_optimization=False, cpu_checkpointing=True)
    assert "zero_optimization" not in strategy.config
    assert zero_stage(strategy.config) == 0
    assert strategy.config["activation_checkpointing"]["cpu_checkpointing"] is True


def test_a_dict_takes_the_place_of_the_arguments_and_stays_as_it_was() -> None:
    given = {"zero_optimization": {"stage": 3}}
    strategy = DeepSpeedStrategy(stage=1, config=given)
    assert strategy.config == given
    assert strategy.zero_stage_3
    assert strategy.forward_is_collective
    strategy.config["zero_optimization"]["stage"] = 1
    assert given == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_read(kind: type, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    assert DeepSpeedStrategy(config=kind(file)).config == {"zero_optimization": {"stage": 1}}


def test_the_environment_names_a_file_unless_a_configuration_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.setenv(DeepSpeedStrategy.DEEPSPEED_ENV_VAR, str(file))
    assert DeepSpeedStrategy().config == {"zero_optimization": {"stage": 1}}
    assert DeepSpeedStrategy(config={"zero_optimization": {"stage": 2}}).config == {"zero_optimization": {"stage": 2}}


def test_a_missing_file_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match=r"config='nowhere\.json': there is no such file"):
        DeepSpeedStrategy(config="nowhere.json")
    monkeypatch.setenv(DeepSpeedStrategy.DEEPSPEED_ENV_VAR, "nowhere.json")
    with pytest.raises(MisconfigurationException, match=r"PL_DEEPSPEED_CONFIG_PATH='nowhere\.json'"):
        DeepSpeedStrategy()


@pytest.mark.parametrize(("content", "message"), [("{", "holds no JSON"), ("[1]", "a JSON object is needed")])
def test_a_file_without_a_configuration_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(MisconfigurationException, match=message):
        DeepSpeedStrategy(config=tmp_path / "config.json")


def test_another_type_of_configuration_is_an_error() -> None:
    with pytest.raises(TypeError, match="give a dict, or the path of a JSON file"):
        DeepSpeedStrategy(config=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [4, -1, "2"])
def test_an_unknown_stage_is_an_error(stage: Any) -> None:
    with pytest.raises(MisconfigurationException, match="ZeRO has the stages 1, 2 and 3"):
        DeepSpeedStrategy(stage=stage)


# ---- what is added for a run ------------------------------------------------------------------------------------------


def completed(config: dict[str, Any], precision: str = "32-true", batch_size: int | None = None) -> dict[str, Any]:
    return complete(config, DeepSpeedPrecision(precision).policy, {"loss_scale": 0}, batch_size)


def test_gradients_are_neither_accumulated_nor_clipped_by_default() -> None:
    config = completed({})
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (1, 0.0)
    assert completed({"gradient_clipping": 0.5})["gradient_clipping"] == 0.5


def test_accumulation_in_the_configuration_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="use accumulate_grad_batches"):
        completed({"gradient_accumulation_steps": 4})


def test_a_batch_size_is_filled_in_unless_there_is_one() -> None:
    assert completed({})["train_micro_batch_size_per_gpu"] == 1
    assert completed({}, batch_size=8)["train_micro_batch_size_per_gpu"] == 8
    assert completed({"train_micro_batch_size_per_gpu": 4}, batch_size=8)["train_micro_batch_size_per_gpu"] == 4
    assert "train_micro_batch_size_per_gpu" not in completed({"train_batch_size": 16})


@pytest.mark.parametrize(
    ("precision", "section", "content"),
    [
        ("16-mixed", "fp16", {"enabled": True, "loss_scale": 0}),
        ("16-true", "fp16", {"enabled": True, "loss_scale": 0}),
        ("bf16-mixed", "bf16", {"enabled": True}),
        ("bf16-true", "bf16", {"enabled": True}),
    ],
)
def test_precision_becomes_a_section(precision: str, section: str, content: dict[str, Any]) -> None:
    config = completed({}, precision)
    assert config[section] == content
    assert ("fp16" if section == "bf16" else "bf16") not in config


def test_a_section_of_the_user_is_kept() -> None:
    assert completed({"fp16": {"enabled": True, "loss_scale": 128}}, "16-mixed")["fp16"] == {"enabled": True, "loss_scale": 128}


@pytest.mark.parametrize(("config", "precision"), [({"bf16": {"enabled": True}}, "32-true"), ({"fp16": {"enabled": False}}, "16-mixed")])
def test_a_section_that_contradicts_the_precision_is_warned_of(config: dict[str, Any], precision: str) -> None:
    with pytest.warns(UserWarning, match=f"precision='{precision}'"):
        completed(config, precision)


def test_loss_scaling_comes_from_the_arguments() -> None:
    strategy = DeepSpeedStrategy(loss_scale=4.0, hysteresis=3, precision=HalfPrecision("16-true"))
    section = complete(strategy.config, strategy.precision.policy, strategy._loss_scaling)["fp16"]
    assert section == {
        "enabled": True,
        "loss_scale": 4.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 3,
        "min_loss_scale": 1,
    }


def test_evaluation_needs_no_optimizer() -> None:
    config = completed({**DeepSpeedStrategy(stage=3, offload_optimizer=True, offload_parameters=True).config, "optimizer": {}}, "bf16-true")
    left = for_evaluation(config)
    assert "optimizer" not in left
    assert "offload_optimizer" not in left["zero_optimization"]
    assert left["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert left["bf16"] == {"enabled": True}


# ---- precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "inputs", "weights"),
    [
        ("32-true", torch.float32, torch.float32),
        ("16-mixed", torch.float16, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("16-true", torch.float16, torch.float16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_converts_inputs_and_leaves_master_weights(precision: str, inputs: torch.dtype, weights: torch.dtype) -> None:
    plugin = DeepSpeedPrecision(precision)
    batch = plugin.convert_input({"x": torch.ones(2), "i": torch.ones(2, dtype=torch.long)})
    assert (batch["x"].dtype, batch["i"].dtype) == (inputs, torch.long)
    assert plugin.convert_module(torch.nn.Linear(2, 2)).weight.dtype == weights
    with plugin.module_init_context():
        assert torch.nn.Linear(2, 2).weight.dtype == weights
    with plugin.forward_context():
        assert torch.ones(1).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")


def test_precision_of_the_trainer_becomes_that_of_deepspeed() -> None:
    for given in (Precision(), MixedPrecision("bf16-mixed", "cpu"), HalfPrecision("bf16-true"), DeepSpeedPrecision("16-true")):
        precision = DeepSpeedStrategy(precision=given).precision
        assert isinstance(precision, DeepSpeedPrecision)
        assert precision.precision == given.precision
        assert not precision.policy.scaler
    assert DeepSpeedStrategy().precision.precision == "32-true"


def test_double_precision_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"DoublePrecision \('64-true'\) does not run under DeepSpeed"):
        DeepSpeedStrategy(precision=DoublePrecision())
    with pytest.raises(ValueError, match="Accepted: '32-true', '16-true'"):
        DeepSpeedPrecision("64-true")


# ---- names and parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage", "optimizer", "parameters"),
    [
        ("deepspeed", 2, None, None),
        ("deepspeed_stage_1", 1, None, None),
        ("deepspeed_stage_1_offload", 1, "cpu", None),
        ("deepspeed_stage_2", 2, None, None),
        ("deepspeed_stage_2_offload", 2, "cpu", None),
        ("deepspeed_stage_3", 3, None, None),
        ("deepspeed_stage_3_offload", 3, "cpu", "cpu"),
        ("deepspeed_stage_3_offload_nvme", 3, "nvme", "nvme"),
    ],
)
def test_names(name: str, stage: int, optimizer: str | None, parameters: str | None) -> None:
    strategy = STRATEGY_REGISTRY.get(name)
    zero = strategy.config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero.get("offload_optimizer", {}).get("device") == optimizer
    assert zero.get("offload_param", {}).get("device") == parameters
    assert strategy.remote_device == ("nvme" if name.endswith("nvme") else None)


def test_a_checkpoint_plugin_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="DeepSpeed writes its checkpoints itself, and the plugin TorchCheckpointIO"):
        DeepSpeedStrategy(checkpoint_io=TorchCheckpointIO())


def test_clipping_by_value_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="gradient_clip_algorithm='value': DeepSpeed clips gradients by their norm only"):
        DeepSpeedStrategy().prepare_training(1, 0.5, "value")


def test_importing_lightning_does_not_import_deepspeed() -> None:
    code = "import sys, lightning.pytorch.strategies.deepspeed, lightning.pytorch.utilities.deepspeed; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_missing_package_is_named_before_processes_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setattr("lightning.fabric.strategies.deepspeed_config.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'deepspeed"):
        require_deepspeed()
    with pytest.raises(ModuleNotFoundError, match="pip install 'deepspeed"):
        resolve(accelerator="cpu", devices=2, strategy="deepspeed_stage_3")


# ---- directories --------------------------------------------------------------------------------------------------------


class Touching:
    """What a malicious file might hold."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("touched",)


def directory(tmp_path: Path, processes: int = 2, **content: Any) -> Path:
    """What is common to all directories that DeepSpeed writes."""
    folder = tmp_path / "saved.ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("checkpoint")
    facts = {"dp_world_size": processes, "ds_config": {"zero_optimization": {"stage": 2}}, "module": {"weight": torch.ones(2)}}
    torch.save({**facts, **content}, folder / "mp_rank_00_model_states.pt")
    return folder.parent


def test_a_directory_is_read_without_its_weights(tmp_path: Path) -> None:
    saved = directories.open_checkpoint(directory(tmp_path, epoch=3, values=torch.ones(1), lr_scheduler=None))
    assert (saved.tag, saved.stage, saved.processes) == ("checkpoint", 2, 2)
    assert saved.rest == {"epoch": 3, "values": torch.ones(1)}


def test_the_tag_names_another_folder(tmp_path: Path) -> None:
    path = directory(tmp_path)
    (path / "checkpoint").rename(path / "step_7")
    assert directories.open_checkpoint(path, tag="step_7").tag == "step_7"
    with pytest.raises(FileNotFoundError, match="has no folder 'checkpoint'"):
        directories.open_checkpoint(path)


def test_a_directory_that_was_not_finished_is_none(tmp_path: Path) -> None:
    path = directory(tmp_path)
    assert directories.is_deepspeed_checkpoint(path)
    (path / "latest").unlink()
    assert not directories.is_deepspeed_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="was not saved to its end"):
        directories.open_checkpoint(path)
    (path / "latest").write_text("checkpoint")
    (path / "checkpoint" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no file of model states"):
        directories.open_checkpoint(path)


def test_code_in_any_of_the_files_is_found_and_not_run(tmp_path: Path) -> None:
    path = directory(tmp_path)
    assert directories.suspicious(str(path / "checkpoint")) is None
    torch.save({"optimizer_state_dict": Touching()}, path / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    found = directories.suspicious(str(path / "checkpoint"))
    with pytest.raises(pickle.UnpicklingError, match=r"mkdir in zero_pp_rank_1_mp_rank_00_optim_states\.pt.*weights_only=False"):
        directories.refuse("saved.ckpt", found)
    assert not Path("touched").exists()


def test_a_pickle_that_changes_a_class_that_is_allowed_is_found(tmp_path: Path) -> None:
    path = directory(tmp_path)
    class_of_deepspeed, new_attributes = b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n", b"N}X\x01\x00\x00\x00xNs\x86"
    with zipfile.ZipFile(path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + class_of_deepspeed + new_attributes + b"b.")
        file.writestr("archive/version", "3\n")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "zero_pp_rank_0" in str(directories.suspicious(str(path / "checkpoint")))


def test_code_in_a_folder_of_a_universal_checkpoint_is_found(tmp_path: Path) -> None:
    path = directory(tmp_path)
    (path / "checkpoint_universal" / "zero" / "weight").mkdir(parents=True)
    (path / "latest_universal").write_text("checkpoint_universal")
    assert directories.open_together(path, None, Alone()).tag == "checkpoint"
    torch.save(Touching(), path / "checkpoint_universal" / "zero" / "weight" / "fp32.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"mkdir in zero/weight/fp32\.pt"):
        directories.open_together(path, None, Alone())
    assert not Path("touched").exists()


@pytest.mark.parametrize("tag", ["../elsewhere", "/elsewhere", "..", "", "link"])
def test_a_folder_elsewhere_is_not_read(tag: str, tmp_path: Path) -> None:
    path = directory(tmp_path)
    (path / "link").symlink_to(tmp_path)
    (path / "latest").write_text(tag)
    with pytest.raises(RuntimeError, match="not its own"):
        directories.open_checkpoint(path)


class Alone:
    """A strategy of one process, as far as reading asks for it."""

    global_rank, world_size = 0, 1


@pytest.mark.parametrize(
    ("processes", "stage", "optimizer", "message"),
    [
        (4, 2, "AdamW", "number of processes was 2, and here it is 4"),
        (2, 3, "AdamW", "stage of ZeRO was 2, and here it is 3"),
        (2, 2, "SGD", "optimizer was AdamW, and here it is SGD"),
    ],
)
def test_a_directory_is_for_a_run_like_the_one_that_saved_it(
    processes: int, stage: int, optimizer: str, message: str, tmp_path: Path
) -> None:
    saved = directories.open_checkpoint(directory(tmp_path, keraunos={"optimizers": ["AdamW"]}))
    saved.check_fits(2, 2, "AdamW")
    with pytest.raises(MisconfigurationException, match=f"{message}.*convert_zero_checkpoint_to_fp32_state_dict"):
        saved.check_fits(processes, stage, optimizer)


def test_states_of_one_kind_of_optimizer_are_not_given_to_another() -> None:
    for saved in ([], ["SGD"]):
        directories.check_optimizer(saved, "SGD")
    directories.check_optimizer(["AdamW"], "DeepSpeedCPUAdam")
    with pytest.raises(MisconfigurationException, match=r"optimizers \['AdamW'\], and here it is SGD"):
        directories.check_optimizer(["AdamW"], "SGD")


def test_a_file_is_wanted_where_whole_weights_were_announced(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Leave load_full_weights out"):
        DeepSpeedStrategy(stage=3, load_full_weights=True).load_checkpoint(directory(tmp_path))


def test_the_configuration_is_plain_data() -> None:
    assert json.loads(json.dumps(DeepSpeedStrategy().config)) == DEFAULT
