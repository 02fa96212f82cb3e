"""Arguments that the trainer does not have: those that Lightning once had, and misspelt ones."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., None])

# What took the place of the arguments that Lightning removed.
REPLACEMENTS = {
    "gpus": "`accelerator='gpu', devices=...`",
    "auto_select_gpus": "`accelerator='gpu', devices=...`",
    "tpu_cores": "`accelerator='tpu', devices=...`",
    "num_processes": "`accelerator='cpu', devices=...`",
    "distributed_backend": "`strategy=...`",
    "replace_sampler_ddp": "`use_distributed_sampler=...`",
    "amp_backend": "`precision='16-mixed'`, or `'bf16-mixed'`",
    "amp_level": "`precision='16-mixed'`, or `'bf16-mixed'`",
    "resume_from_checkpoint": "`trainer.fit(..., ckpt_path=...)`",
    "checkpoint_callback": "`enable_checkpointing=...`, with a `ModelCheckpoint` in `callbacks` for options",
    "early_stop_callback": "an `EarlyStopping` in `callbacks`",
    "stochastic_weight_avg": "a callback for weight averaging in `callbacks`",
    "weights_save_path": "`default_root_dir=...`, or `ModelCheckpoint(dirpath=...)` in `callbacks`",
    "progress_bar_refresh_rate": "`TQDMProgressBar(refresh_rate=...)` in `callbacks`, or `enable_progress_bar=False`",
    "process_position": "`TQDMProgressBar(process_position=...)` in `callbacks`",
    "weights_summary": "`enable_model_summary=...`, or `ModelSummary(max_depth=...)` in `callbacks`",
    "flush_logs_every_n_steps": "the argument of that name of the logger",
    "log_gpu_memory": "a `DeviceStatsMonitor` in `callbacks`",
    "track_grad_norm": "`self.log_dict(grad_norm(self, norm_type=2))` in `on_before_optimizer_step`",
    "terminate_on_nan": "`detect_anomaly=True`, or `EarlyStopping(check_finite=True)` in `callbacks`",
    "auto_lr_find": "the learning rate finder of `lightning.pytorch.tuner`",
    "auto_scale_batch_size": "the batch size finder of `lightning.pytorch.tuner`",
    "multiple_trainloader_mode": "`CombinedLoader(loaders, mode=...)` as the training loader",
    "reload_dataloaders_every_epoch": "`reload_dataloaders_every_n_epochs=1`",
    "prepare_data_per_node": "the attribute of that name of the module, or of the datamodule",
    "truncated_bptt_steps": "manual optimization",
    "move_metrics_to_cpu": None,
    "ipus": None,
    "hpus": None,
}


def only_known(init: F) -> F:
    """Let ``__init__`` say more about an argument that it does not have than Python would.

    Example::

        >>> class Trainer:
        ...     @only_known
        ...     def __init__(self, *, max_epochs=None): ...
        >>> Trainer(max_epoch=3)
        Traceback (most recent call last):
            ...
        TypeError: `Trainer` has no argument `max_epoch`. Did you mean `max_epochs`?
    """
    names = list(inspect.signature(init).parameters)[1:]

    @wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        unknown = [name for name in given if name not in names]
        if unknown:
            raise TypeError(" ".join(_explained(name, names) for name in unknown))
        if args:
            raise TypeError(f"`Trainer` takes no positional arguments: give each by its name, such as `accelerator=...`; got {args!r}.")
        init(self, **given)

    return checked  # type: ignore[return-value]


def _explained(name: str, names: list[str]) -> str:
    message = f"`Trainer` has no argument `{name}`"
    if name in REPLACEMENTS:
        instead = REPLACEMENTS[name]
        return f"{message} any more. " + (f"Use {instead} instead." if instead is not None else "Leave it out.")
    close = difflib.get_close_matches(name, names, n=1)
    return f"{message}. " + (f"Did you mean `{close[0]}`?" if close else f"It has: {', '.join(names)}.")
