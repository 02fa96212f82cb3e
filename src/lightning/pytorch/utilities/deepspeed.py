"""One file out of a checkpoint that DeepSpeed has written as a directory."""

from __future__ import annotations

import os
from typing import Any, Union

from torch import Tensor

from lightning.fabric.checkpoint import io
from lightning.fabric.strategies import deepspeed_checkpoint as directories
from lightning.fabric.strategies.deepspeed_config import require_deepspeed
from lightning.fabric.utilities.rank_zero import rank_zero_info

Path = Union[str, "os.PathLike[str]"]


def ds_checkpoint_dir(checkpoint_dir: Path, tag: str | None = None) -> str:
    """The folder in a checkpoint directory that holds DeepSpeed's files.

    Args:
        checkpoint_dir: the directory, as the checkpoint was saved.
        tag: the name of the folder; None for the latest.

    Raises:
        FileNotFoundError: if there is none.
    """
    return directories.tag_folder(checkpoint_dir, tag)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: Path, output_file: Path, tag: str | None = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """Make one file with whole weights in float32 out of a directory that was saved under DeepSpeed.

    The file holds everything else too, but the states of optimizers: ``LightningModule.load_from_checkpoint`` loads it, and so does
    any strategy. It is put together in the memory of one process, which needs room for the whole weights.

    Args:
        checkpoint_dir: the directory, as the checkpoint was saved.
        output_file: where the file goes; what is there now is replaced.
        tag: the name of the folder in the directory; None for the latest.
        weights_only: False unpickles anything in the directory: only for sources you trust.

    Returns:
        what the file holds.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ModuleNotFoundError: if the package deepspeed is not installed, which knows how the parts fit together.
        pickle.UnpicklingError: if the directory holds anything that could run code.

    Example::

        convert_zero_checkpoint_to_fp32_state_dict("checkpoints/epoch=3-step=1000.ckpt", "model.ckpt")
        model = Model.load_from_checkpoint("model.ckpt")
    """
    require_deepspeed()
    saved = directories.open_checkpoint(checkpoint_dir, tag, weights_only)
    if weights_only is not False:
        directories.refuse(saved.folder, directories.suspicious(saved.folder))
    weights = {name: directories.materialized(value) for name, value in directories.whole_weights(saved).items()}
    weights = {name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in weights.items()}
    checkpoint = {**saved.rest, "state_dict": weights}
    io.save(checkpoint, output_file)
    rank_zero_info(f"The checkpoint {os.fspath(checkpoint_dir)} is in the file {os.fspath(output_file)} now, with weights in float32.")
    return checkpoint
