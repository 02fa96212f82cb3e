"""What signals mean to a run, once all processes have come to a stop between two batches: save what is there, and end, or be requeued."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.cloud_io import get_filesystem, join_path
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.trainer.signals import STOP, Signals
from lightning.pytorch.utilities.exceptions import SIGTERMException

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

LAST = "last.ckpt"  # in the trainer's folder, where no ModelCheckpoint says another place


def signals_of(trainer: Trainer) -> Signals:
    """The signals that a run of the trainer listens to: SIGTERM, Ctrl-C, and the one on which SLURM's job is to be requeued."""
    strategy, progress, metrics = trainer.strategy, trainer.fit_loop.progress, trainer._metrics
    numbers: list[int] = [signal.SIGTERM, signal.SIGINT]
    environment = slurm_of(trainer)
    if environment is not None and environment.requeue_signal is not None:
        numbers.append(environment.requeue_signal)

    def position() -> tuple[int, int, bool]:
        return progress.total_batches, metrics.serial, trainer.training

    channel, trains = getattr(strategy, "side_channel", None), trainer.state.fn == "fit"
    return Signals(numbers, position, channel, strategy.forward_is_collective, partial(act, trainer), trains)


def slurm_of(trainer: Trainer) -> SLURMEnvironment | None:
    """The SLURM job that is put back into the queue before its time is over, if this is one."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None and SLURMEnvironment.job_id() is not None and SLURMEnvironment.detect():
        with suppress(RuntimeError):  # of --ntasks without --ntasks-per-node, which is nothing to a run of one process
            environment = SLURMEnvironment()  # a strategy of one process asks for no environment
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def act(trainer: Trainer, number: int) -> None:
    """Do what the signal asks for, in all processes, between two batches.

    Raises:
        SIGTERMException: on SIGTERM.
        KeyboardInterrupt: on Ctrl-C.
    """
    environment = slurm_of(trainer)
    if number == STOP:
        trainer.should_stop = trainer.fit_loop.stop_is_agreed = True
    elif environment is not None and number == environment.requeue_signal:
        requeue(trainer)
    elif number in (signal.SIGTERM, signal.SIGINT):
        is_saved = trainer._signals is not None and trainer._signals.is_saved
        path = None if is_saved else save(trainer)
        trainer.strategy.checkpoint_io.wait()
        trainer.strategy.barrier()  # nobody leaves before it is on the disk
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if path is not None:
            rank_zero_info(f"{name}: the run ends here, and is saved at {path}; fit(ckpt_path='auto') goes on from there.")
        if trainer._signals is not None and trainer._signals.channel is not None:
            trainer._signals.channel.ends_together = True
        raise error_of(number)


def error_of(number: int) -> BaseException:
    """What ends a run on a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else SIGTERMException(128 + number)


@contextmanager
def blamed_on_signal(trainer: Trainer) -> Iterator[None]:
    """Where workers of a loader have got a signal as well, and ended by it before the run did, the signal is what ended the run."""
    try:
        yield
    except RuntimeError as error:
        received = trainer._signals.received if trainer._signals is not None else []
        number = next((each for each in received if each in (signal.SIGTERM, signal.SIGINT)), None)
        if number is None or not str(error).startswith("DataLoader worker"):
            raise
        raise error_of(number) from error


def save(trainer: Trainer) -> str | None:
    """Save a fit where a signal ends it, so that ``ckpt_path="auto"`` and ``"last"`` go on from there; all processes must call it.

    The first ModelCheckpoint says where, by its folder and its name of the last checkpoint, whatever else it saves and when; or else an
    OnExceptionCheckpoint; for other callbacks that save, it is ``last.ckpt`` in the trainer's folder. Nothing is saved where the trainer
    saves no checkpoints at all, and before training has begun; nothing again if the last one is of this very state.

    Returns:
        the path; None if there is no such checkpoint.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

    callbacks: list[Any] = trainer.checkpoint_callbacks
    began = trainer._signals is not None and trainer._signals.in_loop and not trainer.sanity_checking
    if trainer.state.fn != "fit" or not began or not callbacks or trainer.fast_dev_run:
        return None
    for kind in (ModelCheckpoint, OnExceptionCheckpoint):
        for callback in callbacks:
            if isinstance(callback, kind):
                return callback.save_to_go_on(trainer)
    path = join_path(trainer.default_root_dir, LAST)
    trainer.save_checkpoint(path)
    return path


def requeue(trainer: Trainer) -> None:
    """Save a checkpoint of a fit, from which the same command goes on, and put the SLURM job back into the queue.

    SLURM then ends the job, with SIGTERM at first, and starts it again when there is room. Until then the run goes on.
    """
    if trainer.state.fn == "fit":
        path = trainer.strategy.broadcast(next_path(trainer) if trainer.is_global_zero else "")
        rank_zero_info(f"The job's time is nearly over: saving {path}, to go on from there in the next job.")
        trainer.save_checkpoint(path)
        trainer.strategy.checkpoint_io.settle()  # SLURM gives what it ends half a minute
    requeued = trainer.strategy.broadcast(trainer.is_global_zero and call_scontrol())
    if requeued and trainer._signals is not None:
        trainer._signals.is_saved = True


def next_path(trainer: Trainer) -> str:
    """``hpc_ckpt_N.ckpt`` in the trainer's folder, with the next number."""
    folder = str(trainer.default_root_dir)
    filesystem = get_filesystem(folder)
    names = filesystem.ls(folder, detail=False) if filesystem.isdir(folder) else []
    numbers = [int(match.group(1)) for name in names if (match := re.search(r"hpc_ckpt_(\d+)\.ckpt$", str(name)))]
    return os.path.join(folder, f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt")


def call_scontrol() -> bool:
    """Have SLURM requeue the job that this process belongs to; returns whether it will. A failure is a warning."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ.get("SLURM_JOB_ID", "") if task is None else f"{os.environ.get('SLURM_ARRAY_JOB_ID', '')}_{task}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    else:
        problem = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
    if problem:
        rank_zero_warn(f"The SLURM job {job} could not be requeued: `scontrol requeue {job}` failed ({problem}). Submit it again by hand.")
        return False
    rank_zero_info(f"SLURM job {job} was put back into the queue.")
    return True
