"""DeepSpeed's sharded checkpoints: a directory, to which each process writes its part of weights and optimizer.

In the directory stand the file ``latest``, which names a folder, and that folder: in it one file of model states for each
process (with ZeRO 3; else a single one, with whole weights), which also holds everything that is not DeepSpeed's, and one file
of optimizer states for each process.
"""

from __future__ import annotations

import contextlib
import io as streams
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.checkpoint import io
from lightning.fabric.checkpoint.format import encode
from lightning.fabric.checkpoint.temporary import temporary_name
from lightning.fabric.collectives import gather_object
from lightning.fabric.strategies.deepspeed_config import zero_stage
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.cloud_io import local_path
from lightning.fabric.utilities.exceptions import MisconfigurationException

TAG = "checkpoint"
LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
MODEL_STATES, OPTIMIZER_STATES = "_model_states.pt", "_optim_states.pt"

# What DeepSpeed writes into the file of model states; the rest is ours.
OF_DEEPSPEED = frozenset(
    (
        *("module", "buffer_names", "param_shapes", "shared_params", "frozen_param_shapes", "frozen_param_fragments"),
        *("optimizer", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps", "global_samples"),
        *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "universal_checkpoint_info", "num_experts"),
        *("ds_config", "ds_version"),
    )
)
TO_UNIVERSAL = (
    "python -m deepspeed.checkpoint.ds_to_universal --input_folder {0}/checkpoint --output_folder {0}/checkpoint_universal "
    "--inject_missing_state"
)
ADAMS = {"Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam"}  # which keep the same states
# Classes that DeepSpeed pickles into its files, none of which does anything but hold what it is given.
HARMLESS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that DeepSpeed has written.

    Args:
        path: of the directory.
        tag: the name of the folder in it.
        facts: what DeepSpeed says of the run that wrote it.
        rest: everything in it but weights and states of optimizers.
    """

    path: str
    tag: str
    facts: dict[str, Any] = field(repr=False)
    rest: dict[str, Any] = field(repr=False)

    @property
    def folder(self) -> str:
        return os.path.join(self.path, self.tag)

    @property
    def stage(self) -> int:
        """The stage of ZeRO of the run that wrote it."""
        return zero_stage(self.facts.get("ds_config") or {})

    @property
    def processes(self) -> int:
        """The number of processes that wrote it."""
        return int(self.facts["dp_world_size"])

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the module, from memory of its own."""
        content = io.load(model_file(self.folder), io.keep_on_cpu, mmap=True)
        return {name: content["module"][name].clone() for name in content["buffer_names"] if name in content["module"]}

    def check_fits(self, processes: int, stage: int, optimizer: str) -> None:
        """Make sure that each process of a run finds its part in it.

        Args:
            processes: of the run.
            stage: of ZeRO.
            optimizer: the name of its class.

        Raises:
            MisconfigurationException: if the run is unlike the one that wrote it.
        """
        optimizers = (self.rest.get("keraunos") or {}).get("optimizers") or [optimizer]
        for what, theirs, ours in (
            ("number of processes", self.processes, processes),
            ("stage of ZeRO", self.stage, stage),
            ("optimizer", optimizers[0], optimizer),
        ):
            if theirs != ours:
                raise MisconfigurationException(
                    f"The DeepSpeed checkpoint {self.path!r} was saved by a run whose {what} was {theirs}, and here it is {ours}: "
                    "its parts are for a run like that one. To go on with its weights alone, make one file of them with "
                    "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict, and load that. "
                    f"For another number of processes there is also `{TO_UNIVERSAL.format(self.path)}`; resume from the same directory "
                    "then, with 'checkpoint': {'load_universal': True} in the DeepSpeed configuration."
                )


def check_optimizer(saved: Sequence[str], here: str) -> None:
    """Refuse to give the state of one kind of optimizer to another.

    Args:
        saved: the names of the classes in a checkpoint; none if they are not known.
        here: the name of the class.

    Raises:
        MisconfigurationException: if they keep other states.
    """
    if any(name != here and not {name, here} <= ADAMS for name in saved):
        raise MisconfigurationException(
            f"The checkpoint was saved with the optimizers {list(saved)}, and here it is {here}. Return the same one to resume; "
            "to start anew from the weights, use `Model.load_from_checkpoint(path)`."
        )


def is_deepspeed_checkpoint(path: io.PathLike) -> bool:
    """Whether a path is that of a directory that DeepSpeed has written, and has written to its end."""
    local = local_path(path)
    return local is not None and os.path.isfile(os.path.join(local, LATEST))


def open_checkpoint(path: io.PathLike, tag: str | None = None, weights_only: bool | None = None) -> SavedCheckpoint:
    """Read what a directory holds beside weights and optimizers.

    Args:
        path: of the directory.
        tag: the name of the folder in it; None for the latest.
        weights_only: False unpickles anything; for checkpoints from a source you trust.

    Raises:
        FileNotFoundError: if there is no such folder, or no file of model states in it.
    """
    folder = tag_folder(path, tag)
    content = io.load(model_file(folder), io.keep_on_cpu, weights_only, mmap=True)
    facts = {name: content.get(name) for name in ("ds_config", "dp_world_size", "global_steps")}
    rest = {name: value for name, value in content.items() if name not in OF_DEEPSPEED}
    # Copied out of the file, which may be replaced or removed while they are in use.
    rest = apply_to_collection(rest, Tensor, Tensor.clone)
    return SavedCheckpoint(os.path.dirname(folder), os.path.basename(folder), facts, rest)


def tag_folder(path: io.PathLike, tag: str | None = None, latest: str = LATEST) -> str:
    """The folder in a checkpoint directory that holds the files.

    Args:
        path: of the directory.
        tag: the name of the folder; None for the one that the file ``latest`` names.
        latest: the name of that file.

    Raises:
        FileNotFoundError: if there is none.
        DamagedCheckpoint: if the file names a folder elsewhere.
    """
    directory = os.path.abspath(local_path(path) or os.fspath(path))
    if tag is None:
        try:
            with open(os.path.join(directory, latest), errors="replace") as file:
                tag = file.read(4096).strip()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{directory!r} is no DeepSpeed checkpoint, or one that was not saved to its end: it has no file {latest!r}. "
                "Give the directory that the checkpoint was saved as, or the name of a folder in it as the tag."
            ) from None
        if os.path.basename(tag) != tag or tag in ("", ".", "..") or os.path.islink(os.path.join(directory, tag)):
            raise io.DamagedCheckpoint(f"The DeepSpeed checkpoint {directory!r} refers to the folder {tag!r}, which is not its own.")
    folder = os.path.join(directory, tag)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"The DeepSpeed checkpoint {directory!r} has no folder {tag!r}. Was it copied completely?")
    return folder


def model_file(folder: str) -> str:
    """The file of model states of the first process.

    Raises:
        FileNotFoundError: if there is none.
    """
    for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):
        file = os.path.join(folder, name + MODEL_STATES)
        if os.path.isfile(file):
            return file
    raise FileNotFoundError(f"The DeepSpeed checkpoint {folder!r} has no file of model states. Was it copied completely?")


def open_together(path: io.PathLike, weights_only: bool | None, strategy: Any) -> SavedCheckpoint:
    """:func:`open_checkpoint`, after all processes have looked through the files for anything that could run code.

    Raises:
        pickle.UnpicklingError: in all of them, if there is something and ``weights_only`` is not False.
    """
    saved = open_checkpoint(path, weights_only=weights_only)
    if weights_only is not False:
        for folder in dict.fromkeys((saved.folder, *_universal_folder(saved.path))):
            found = suspicious(folder, lambda files: files[strategy.global_rank :: strategy.world_size])
            refuse(folder, next((each for each in gather_object(found) if each), None))
    return saved


def _universal_folder(directory: str) -> list[str]:
    """The folder that DeepSpeed reads instead, if the run asks for a universal checkpoint, and there is one."""
    return [tag_folder(directory, latest=LATEST_UNIVERSAL)] if os.path.isfile(os.path.join(directory, LATEST_UNIVERSAL)) else []


def suspicious(folder: str, share: Callable[[list[str]], Iterable[str]] = iter) -> str | None:
    """What in a checkpoint can't be read safely, and would be when DeepSpeed unpickles it; None if nothing is.

    Each file is read as torch's safe reader does it, with its tensors left on the disk: to look for names in it would not be enough, since
    also harmless classes and functions can be changed by what a pickle does with them.

    Args:
        folder: with the files, and with folders of them in a universal checkpoint.
        share: picks those that this process looks through.
    """
    files: list[str] = []
    for place, folders, names in os.walk(folder):
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                return f"a link to another folder, {name!r},"
        files += [os.path.relpath(os.path.join(place, name), folder) for name in names if name.endswith(".pt")]
    for name in share(sorted(files)):
        try:
            with torch.serialization.safe_globals([(Held, known) for known in HARMLESS]):
                io.load(os.path.join(folder, name), "meta", mmap=True, verify=False)
        except (pickle.UnpicklingError, io.DamagedCheckpoint) as error:
            found = re.search(r" holds (\S+) that", str(error))
            return f"{found[1] if found else 'something'} in {name}"
    return None


class Held:
    """What :func:`suspicious` makes in the place of objects of DeepSpeed's."""

    def __init__(self, *args: Any) -> None:
        pass


def refuse(folder: str, found: str | None) -> None:
    """Stop before anything suspicious is unpickled.

    Raises:
        pickle.UnpicklingError: if there is something.
    """
    if found is not None:
        raise pickle.UnpicklingError(
            f"The DeepSpeed checkpoint {folder!r} holds {found}: unpickling it could run any code. "
            "If you trust the source of the files, pass weights_only=False."
        )


# ---- writing ----------------------------------------------------------------------------------------------------------


def write(engine: Any, path: io.PathLike, rest: Mapping[str, Any], exclude_frozen_parameters: bool, strategy: Any) -> None:
    """Save engine and ``rest`` as a directory: whole, or not at all. All processes must call it.

    Args:
        engine: DeepSpeed's.
        path: where to; what is there now is replaced.
        rest: everything but weights and optimizers.
        exclude_frozen_parameters: leave out weights that are not trained.
        strategy: lets the processes talk to each other.

    Raises:
        ValueError: for a path that is not on a file system of this machine.
    """
    local = local_path(path)
    if local is None:
        raise ValueError(f"{os.fspath(path)!r}: DeepSpeed writes to file systems of this machine, not to URLs. Give a path, and copy it.")
    content = encode(dict(rest))
    target = os.path.abspath(local)
    if engine.checkpoint_engine.is_decoupled():  # it goes on writing when this function is done
        engine.save_checkpoint(target, tag=TAG, client_state=content, exclude_frozen_parameters=exclude_frozen_parameters)
        return
    name = strategy.broadcast(temporary_name() if strategy.is_global_zero else "")
    temporary = os.path.join(os.path.dirname(target), name)
    engine.save_checkpoint(temporary, tag=TAG, client_state=content, exclude_frozen_parameters=exclude_frozen_parameters)
    if strategy.local_rank == 0 if engine.use_node_local_storage() else strategy.is_global_zero:
        flush(temporary)
        io.replace(temporary, target)
    strategy.barrier("save_checkpoint")


def flush(directory: str) -> None:
    """Bring what was written to a directory onto the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        io.sync_folder(folder)


# ---- whole weights ----------------------------------------------------------------------------------------------------


def whole_weights(saved: SavedCheckpoint) -> dict[str, Any]:
    """All weights of a checkpoint in float32, and the buffers, put together from what the processes have written.

    Each value is a tensor, or something whose ``contiguous()`` reads one: together they may be more than memory holds.
    """
    content = io.load(model_file(saved.folder), io.keep_on_cpu, False, mmap=True)
    weights: dict[str, Any] = {}
    if any(name.endswith(OPTIMIZER_STATES) for name in os.listdir(saved.folder)):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(streams.StringIO()), contextlib.redirect_stderr(streams.StringIO()):  # its progress
            weights.update(get_fp32_state_dict_from_zero_checkpoint(saved.path, saved.tag, lazy_mode=True))
    if saved.stage < 3:  # then weights that are not trained stand here, and without ZeRO all do
        weights = {**{name: value for name, value in content["module"].items() if name not in weights}, **weights}
    return {name.removeprefix("module."): value for name, value in weights.items()} if _is_wrapped(saved) else weights


def _is_wrapped(saved: SavedCheckpoint) -> bool:
    """Whether the module was saved inside of another one, as Lightning did before 2.1."""
    from packaging.version import Version

    return Version(str(saved.rest.get("pytorch-lightning_version", "2.6"))) < Version("2.1")


def materialized(value: Any) -> Any:
    """The tensor that a value of :func:`whole_weights` stands for."""
    return value.contiguous() if hasattr(value, "contiguous") else value
