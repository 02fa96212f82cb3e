"""Checkpoints that Lightning wrote, in the form that is read here.

A checkpoint of Lightning 2.x is one dict. What its keys hold, by example (Lightning 2.6, two epochs of eight batches, saved
in the middle of the second)::

    epoch: 1                                   # the epoch in which it was saved, from 0; after fit, the number of epochs
    global_step: 13                            # optimizer steps; with manual optimization the steps of all optimizers
    pytorch-lightning_version: "2.6.6"
    state_dict: OrderedDict                    # of the LightningModule
    loops: dict                                # see below
    callbacks: {state_key: state}              # ModelCheckpoint{'monitor': ...}, EarlyStopping{...}, Timer, ...
    optimizer_states: [state_dict, ...]        # in the order of configure_optimizers; absent in weights-only checkpoints,
    lr_schedulers: [state_dict, ...]           # as are callbacks and lr_schedulers
    MixedPrecision: GradScaler.state_dict()    # with precision "16-mixed"
    hparams_name: "kwargs"                     # or the argument of __init__ that was a container of all of them, or None
    hyper_parameters: dict                     # or an OmegaConf container, with its class under hparams_type
    datamodule_hparams_name, datamodule_hyper_parameters: likewise, of the datamodule
    <qualified name of the datamodule's class>: datamodule.state_dict()

``loops`` has ``fit_loop``, ``validate_loop``, ``test_loop`` and ``predict_loop``. A progress counts ``ready``, ``started``,
``processed`` and ``completed`` (some only the first and the last), in ``total`` and in the ``current`` epoch or run::

    fit_loop:
        state_dict: {}                         # and combined_loader: [state, ...] if loaders are stateful
        epoch_progress                         # completed lags behind ready while an epoch runs
        epoch_loop.state_dict: {_batches_that_stepped: 12}      # the x of loggers
        epoch_loop.batch_progress              # and is_last_batch; completed lags by one in on_train_batch_end
        epoch_loop.scheduler_progress          # ready, completed
        epoch_loop.automatic_optimization.state_dict: {}
        epoch_loop.automatic_optimization.optim_progress: {optimizer: {step, zero_grad}}
        epoch_loop.manual_optimization.state_dict: {}
        epoch_loop.manual_optimization.optim_step_progress      # ready, completed; of all optimizers together
        epoch_loop.val_loop.state_dict: {}
        epoch_loop.val_loop.batch_progress     # and is_last_batch
    validate_loop, test_loop: {state_dict, batch_progress with is_last_batch}
    predict_loop: {state_dict, batch_progress}
"""

from __future__ import annotations

import re
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn

__all__ = ["migrate_checkpoint"]

VERSION_KEY = "pytorch-lightning_version"
NEWEST_MAJOR = 2

# Lightning 1.x had one more loop between the epoch and the optimization.
RENAMED_LOOPS = {
    "epoch_loop.batch_loop.optimizer_loop.": "epoch_loop.automatic_optimization.",
    "epoch_loop.batch_loop.manual_loop.": "epoch_loop.manual_optimization.",
    "epoch_loop.val_loop.epoch_loop.batch_progress": "epoch_loop.val_loop.batch_progress",
}
RENAMED_KEYS = {"native_amp_scaling_state": "MixedPrecision", "MixedPrecisionPlugin": "MixedPrecision"}


def migrate_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of Lightning 2.x, or of the last 1.x, under the keys that are read here.

    Args:
        checkpoint: what was loaded. It is not changed, parts that need no change are shared with the result.

    Example::

        >>> migrate_checkpoint({"state_dict": {}, "native_amp_scaling_state": {"scale": 2.0}})
        {'state_dict': {}, 'MixedPrecision': {'scale': 2.0}}
    """
    major = _major(checkpoint.get(VERSION_KEY))
    if major is not None and major > NEWEST_MAJOR:
        rank_zero_warn(
            f"The checkpoint was written by version {checkpoint[VERSION_KEY]} of Lightning. Checkpoints are known up to version "
            f"{NEWEST_MAJOR}.x; parts of this one may not be understood."
        )
    migrated = {}
    for key, value in checkpoint.items():
        migrated[RENAMED_KEYS.get(key, key) if isinstance(key, str) else key] = value
    callbacks = migrated.get("callbacks")
    if isinstance(callbacks, dict) and any(isinstance(key, type) for key in callbacks):  # before 1.5, classes were the keys
        migrated["callbacks"] = {key.__qualname__ if isinstance(key, type) else key: state for key, state in callbacks.items()}
    loops = migrated.get("loops")
    if isinstance(loops, dict) and isinstance(loops.get("fit_loop"), dict):
        migrated["loops"] = {**loops, "fit_loop": {_renamed(key): value for key, value in loops["fit_loop"].items()}}
    return migrated


def _renamed(key: str) -> str:
    for old, new in RENAMED_LOOPS.items():
        if isinstance(key, str) and key.startswith(old):
            return new + key[len(old) :]
    return key


def _major(version: Any) -> int | None:
    match = re.match(r"(\d+)\.", version) if isinstance(version, str) else None
    return int(match.group(1)) if match else None
