"""Checkpoints written in the background, while training goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lightning.fabric.checkpoint.background import BackgroundCheckpointIO, Write
from lightning.fabric.checkpoint.io import CheckpointIO, PathLike


class AsyncCheckpointIO(BackgroundCheckpointIO):
    """Copies a checkpoint to the memory of the host, and lets another CheckpointIO write the copy in the background.

    Training waits for the copy only. One save is under way at a time: the next one waits for it. What it takes beside: host memory
    for a second copy of the checkpoint (pinned, for what lies on a GPU), kept from save to save.

    A removal that is asked for while a save is under way happens once that save is on the disk; after a save that has failed, no
    checkpoint is removed until one succeeds. So, after the first, there is always a whole checkpoint on the disk.

    Args:
        checkpoint_io: who writes, reads and removes. None stands for :class:`TorchCheckpointIO`.

    Example::

        trainer = Trainer(plugins=[AsyncCheckpointIO()])  # or Trainer(async_checkpointing=True)

    Note:
        A save that fails raises its error once: in the Trainer after the next batch, else by the next call of :meth:`poll`,
        :meth:`save_checkpoint` or :meth:`teardown`. Saves after that are as any other.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io)

    def submit(self, path: PathLike, data: Any, write: Write, agree: Callable[[int], int] | None = None) -> None:
        target = os.fspath(path)
        older = self._prepare(target)
        self._start(self._stage(target, data, write, agree), older)
