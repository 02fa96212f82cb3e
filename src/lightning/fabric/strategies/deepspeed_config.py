"""What DeepSpeed is told: its configuration, from arguments, a dict, a file or the environment; and the package itself."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from lightning.fabric.precision import PrecisionPolicy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

ENVIRONMENT_VARIABLE = "PL_DEEPSPEED_CONFIG_PATH"
OLDEST = "0.19"
INSTALL = f"pip install 'deepspeed>={OLDEST}'"

Config = dict[str, Any]


def build_config(
    *,
    zero_optimization: bool,
    stage: int,
    offload_optimizer: bool,
    offload_parameters: bool,
    offload_params_device: str,
    offload_optimizer_device: str,
    nvme_path: str,
    params_buffer_count: int,
    params_buffer_size: int,
    max_in_cpu: int,
    optimizer_buffer_count: int,
    pin_memory: bool,
    sub_group_size: int,
    zero_allow_untested_optimizer: bool,
    communication: Mapping[str, Any],
    aio: Mapping[str, Any],
    activation_checkpointing: Mapping[str, Any],
) -> Config:
    """The configuration that the arguments of ``DeepSpeedStrategy`` mean; it documents them.

    Raises:
        MisconfigurationException: for a stage that there isn't.
    """
    config: Config = {"activation_checkpointing": dict(activation_checkpointing), "aio": dict(aio)}
    if not zero_optimization:
        return config
    if stage not in (0, 1, 2, 3):
        raise MisconfigurationException(f"DeepSpeedStrategy(stage={stage!r}): ZeRO has the stages 1, 2 and 3; 0 turns it off.")
    zero: Config = {"stage": stage, **communication, "sub_group_size": sub_group_size}
    if offload_optimizer:
        zero["offload_optimizer"] = {
            "device": offload_optimizer_device,
            "nvme_path": nvme_path,
            "buffer_count": optimizer_buffer_count,
            "pin_memory": pin_memory,
        }
    if offload_parameters:
        zero["offload_param"] = {
            "device": offload_params_device,
            "nvme_path": nvme_path,
            "buffer_count": params_buffer_count,
            "buffer_size": params_buffer_size,
            "max_in_cpu": max_in_cpu,
            "pin_memory": pin_memory,
        }
    return {"zero_allow_untested_optimizer": zero_allow_untested_optimizer, "zero_optimization": zero, **config}


def given_config(config: Any) -> Config | None:
    """The configuration that was given as a dict or a file; None if there is none, in the environment neither.

    Args:
        config: the argument: a dict, the path of a JSON file, or None.

    Raises:
        MisconfigurationException: if the file is not there, or holds no JSON object.
        TypeError: for anything else.
    """
    source = "config"
    if config is None:
        config = os.environ.get(ENVIRONMENT_VARIABLE)
        if config is None:
            return None
        source = ENVIRONMENT_VARIABLE
        rank_zero_info(f"The DeepSpeed configuration is read from {config}, which {ENVIRONMENT_VARIABLE} names.")
    if isinstance(config, Mapping):
        return deepcopy(dict(config))
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"DeepSpeedStrategy(config={config!r}): give a dict, or the path of a JSON file.")
    if not os.path.isfile(config):
        raise MisconfigurationException(f"{source}={os.fspath(config)!r}: there is no such file. Give the path of a JSON file, or a dict.")
    with open(config, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise MisconfigurationException(f"{source}={os.fspath(config)!r}: the file holds no JSON: {error}") from error
    if not isinstance(content, dict):
        raise MisconfigurationException(f"{source}={os.fspath(config)!r}: the file holds {content!r}, and a JSON object is needed.")
    return content


def zero_stage(config: Mapping[str, Any]) -> int:
    """The stage of ZeRO; 0 without.

    Example::

        >>> zero_stage({"zero_optimization": {"stage": 3}}), zero_stage({})
        (3, 0)
    """
    zero = config.get("zero_optimization")
    if isinstance(zero, bool):  # an old spelling of stage 1
        return int(zero)
    return int(zero.get("stage", 0)) if zero else 0


def complete(config: Config, policy: PrecisionPolicy, loss_scaling: Mapping[str, Any], batch_size: int | None = None) -> Config:
    """The configuration of a run: with the precision, and what DeepSpeed wants to know of batches.

    Args:
        config: the user's; it stays as it is.
        policy: the precision of the run.
        loss_scaling: the section ``fp16``, where the precision needs one and the configuration has none.
        batch_size: samples in the batch of one process, which only DeepSpeed's log speaks of; None if it is not known.

    Raises:
        MisconfigurationException: if the configuration accumulates gradients, which the loop does.
    """
    config = deepcopy(config)
    if config.get("gradient_accumulation_steps", 1) != 1:
        raise MisconfigurationException(
            f"The DeepSpeed configuration has gradient_accumulation_steps={config['gradient_accumulation_steps']!r}. Leave it out, and use "
            "accumulate_grad_batches, by which the loop knows too when an optimizer step is due."
        )
    config["gradient_accumulation_steps"] = 1  # the loop decides when to step, and scales the loss
    config.setdefault("gradient_clipping", 0.0)  # DeepSpeed's default is a norm of 1
    if "train_micro_batch_size_per_gpu" not in config and "train_batch_size" not in config:
        config["train_micro_batch_size_per_gpu"] = batch_size or 1
    wanted = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(policy.compute_dtype)
    if wanted is not None and wanted not in config:
        config[wanted] = {"enabled": True, **(loss_scaling if wanted == "fp16" else {})}
    enabled = [name for name in ("fp16", "bf16") if isinstance(config.get(name), Mapping) and config[name].get("enabled")]
    if enabled != ([wanted] if wanted else []):
        rank_zero_warn(
            f"The DeepSpeed configuration enables {' and '.join(enabled) or 'neither fp16 nor bf16'}, and the run has "
            f"precision={policy.name!r}: batches are not converted to what the model computes in. Let both say the same."
        )
    return config


def for_evaluation(config: Config) -> Config:
    """What is left of a completed configuration without an optimizer, where weights are sharded all the same."""
    numbers = ("fp16", "bf16", "train_batch_size", "train_micro_batch_size_per_gpu")
    config = {name: config[name] for name in ("zero_allow_untested_optimizer", "zero_optimization", "aio", *numbers) if name in config}
    zero = {name: value for name, value in config.get("zero_optimization", {}).items() if name != "offload_optimizer"}
    return {**config, "zero_optimization": zero}


@dataclass
class StepwiseScheduler:
    """A scheduler from the configuration, as a training loop sees schedulers: stepped after each optimizer step."""

    scheduler: Any
    name: str | None = None
    interval: str = "step"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


_OFFLOADED = {"offload_optimizer": True, "offload_parameters": True}
_TO_NVME = {"remote_device": "nvme", "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}

# The names of the strategy, each with a line about it and the arguments that it stands for.
NAMES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("deepspeed", "DeepSpeed with its defaults: ZeRO 2", {}),
    ("deepspeed_stage_1", "ZeRO 1: optimizer states are divided", {"stage": 1}),
    ("deepspeed_stage_1_offload", "ZeRO 1, and the optimizer on the CPU", {"stage": 1, "offload_optimizer": True}),
    ("deepspeed_stage_2", "ZeRO 2: gradients are divided too", {"stage": 2}),
    ("deepspeed_stage_2_offload", "ZeRO 2, and the optimizer on the CPU", {"stage": 2, "offload_optimizer": True}),
    ("deepspeed_stage_3", "ZeRO 3: weights are divided too", {"stage": 3}),
    ("deepspeed_stage_3_offload", "ZeRO 3, and optimizer and weights on the CPU", {"stage": 3, **_OFFLOADED}),
    ("deepspeed_stage_3_offload_nvme", "ZeRO 3, and optimizer and weights on NVMe", {"stage": 3, **_OFFLOADED, **_TO_NVME}),
)


# ---- the package ----------------------------------------------------------------------------------------------------


def require_deepspeed() -> None:
    """Make sure that the package is there, without importing it.

    Raises:
        ModuleNotFoundError: if it is not.
    """
    if "deepspeed" not in sys.modules and find_spec("deepspeed") is None:
        raise ModuleNotFoundError(f"DeepSpeedStrategy needs the package deepspeed, which is not installed: {INSTALL}", name="deepspeed")


def import_deepspeed(device: torch.device) -> Any:
    """The package, running on the kind of device of the run.

    Raises:
        ModuleNotFoundError: if it is not installed.
        ImportError: if it is too old.
        MisconfigurationException: if it runs on devices of another kind.
    """
    require_deepspeed()
    if "deepspeed" not in sys.modules:
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it takes a GPU wherever there is one
    # In every step it calls collectives by names that torch is about to drop.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    import deepspeed
    from packaging.version import Version

    if Version(deepspeed.__version__) < Version(OLDEST):
        raise ImportError(f"DeepSpeedStrategy needs deepspeed {OLDEST} or later, and {deepspeed.__version__} is installed: {INSTALL} -U")
    runs_on = deepspeed.get_accelerator().device_name()
    if runs_on != device.type:
        chosen = f"DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}" if "DS_ACCELERATOR" in os.environ else "it was imported before"
        raise MisconfigurationException(
            f"The run is on {str(device)!r}, and DeepSpeed has decided for {runs_on!r} ({chosen}). "
            f"Set the environment variable DS_ACCELERATOR={device.type} before the program starts."
        )
    return deepspeed
