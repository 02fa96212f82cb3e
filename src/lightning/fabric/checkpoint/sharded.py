"""Checkpoints in a directory, to which each process writes the parts of tensors that it holds.

The tensors that are divided among processes (``DTensor``) go through ``torch.distributed.checkpoint``. In their places stand
tensors without memory, which know the name under which theirs is kept; with them, everything else is in the file ``meta.pt``,
whose presence makes the directory a checkpoint: it is written last.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.checkpoint import io
from lightning.fabric.checkpoint.io import DamagedCheckpoint, PathLike
from lightning.fabric.utilities.cloud_io import local_path

META = "meta.pt"
LEFT_UNREAD = ("state_dict", "optimizer_states")  # the entries of a run's checkpoint that are large


def is_sharded_checkpoint(path: PathLike) -> bool:
    """Whether a path is that of a complete sharded checkpoint."""
    local = local_path(path)
    return local is not None and os.path.isfile(os.path.join(local, META))


# ---- stand-ins --------------------------------------------------------------------------------------------------------


def stand_in(tensor: Tensor, name: str) -> Tensor:
    """A tensor without memory, of the same shape and dtype, for one that is kept under ``name``."""
    result = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    result.stored_as = name  # type: ignore[attr-defined]
    return result


def stored_name(value: Any) -> str | None:
    """The name under which the tensor is kept for which this one stands; None for any other value."""
    return vars(value).get("stored_as") if isinstance(value, Tensor) and value.is_meta else None


def map_tensors(function: Callable[[Tensor, str], Tensor], tree: Any, name: str = "") -> Any:
    """A structure of dicts, lists and tuples with each tensor replaced; what holds none stays the same object.

    Args:
        function: called with a tensor and the keys on the way to it, joined by dots.
        tree: the structure.
        name: of the structure itself.
    """
    if isinstance(tree, Tensor):
        return function(tree, name)
    if isinstance(tree, dict):
        values = {key: map_tensors(function, value, f"{name}.{key}" if name else str(key)) for key, value in tree.items()}
        if all(values[key] is value for key, value in tree.items()):
            return tree
        result = copy.copy(tree)  # with its attributes, such as the versions that a module's state_dict carries
        result.update(values)
        return result
    if type(tree) in (list, tuple):
        parts = [map_tensors(function, value, f"{name}.{index}" if name else str(index)) for index, value in enumerate(tree)]
        return tree if all(new is old for new, old in zip(parts, tree)) else type(tree)(parts)
    return tree


# ---- writing ----------------------------------------------------------------------------------------------------------


def split(checkpoint: Any) -> tuple[Any, dict[str, Tensor]]:
    """A checkpoint with stand-ins for its sharded tensors, and these by name."""
    module = sys.modules.get("torch.distributed.tensor")
    found: dict[str, Tensor] = {}

    def take(tensor: Tensor, name: str) -> Tensor:
        if module is None or not isinstance(tensor, module.DTensor):
            return tensor
        while name in found:  # keys that differ may join to the same name
            name += "'"
        found[name] = tensor.detach()
        return stand_in(tensor, name)

    return map_tensors(take, checkpoint), found


def write_shards(tensors: dict[str, Tensor], folder: str) -> None:
    """Write the parts of tensors that this process holds; in a run of several processes, all of them must call it.

    Args:
        tensors: by name, the same names in all processes.
        folder: is there, and visible to all processes.

    Raises:
        OSError: in every process, if any of them failed.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    with warnings.catch_warnings():
        if alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=alone)
        except CheckpointException as error:  # which is no Exception, so that handlers of those would not see it
            failed = "; ".join(f"rank {rank}: {reason[0]!r}" for rank, reason in sorted(error.failures.items()))
            raise OSError(f"The sharded checkpoint could not be written ({failed}).") from error


def commit(plain: Any, folder: str, target: str) -> None:
    """Write what makes the directory of shards a checkpoint, and move it to its place. One process calls it.

    Args:
        plain: from :func:`split`.
        folder: holds all shards; it lies beside ``target``.
        target: where the checkpoint will be; what is there now is replaced.
    """
    io.save(plain, os.path.join(folder, META))  # flushes the directory too
    io.replace(folder, target)


# ---- reading ----------------------------------------------------------------------------------------------------------


def read_sharded(path: PathLike, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Read a sharded checkpoint with all its tensors whole, in one process and without the others.

    Args:
        path: of the directory.
        map_location: where tensors go, as for :func:`torch.load`; those that were sharded go to the CPU if it is None.
        weights_only: False unpickles anything in ``meta.pt``; for checkpoints from a source you trust.

    Raises:
        RuntimeError: if it is incomplete or damaged.
    """
    checkpoint = io.load(os.path.join(os.fspath(path), META), map_location, weights_only)
    targets: dict[str, Tensor] = {}

    def make_room(tensor: Tensor, name: str) -> Tensor:
        stored = stored_name(tensor)
        if stored is None:
            return tensor
        return targets.setdefault(stored, torch.empty(tensor.shape, dtype=tensor.dtype))

    result = map_tensors(make_room, checkpoint)
    fill(path, targets)
    return result if map_location is None else map_tensors(lambda tensor, name: _placed(tensor, map_location), result)


def _placed(tensor: Tensor, map_location: Any) -> Tensor:
    """The tensor where ``map_location`` sends one that is on the CPU. Only devices send it elsewhere."""
    return tensor.to(map_location) if isinstance(map_location, (str, torch.device)) and not tensor.is_meta else tensor


def open_sharded(path: PathLike, weights_only: bool | None = None, left_unread: Iterable[str] = LEFT_UNREAD) -> dict[str, Any]:
    """Read a sharded checkpoint but for the tensors of some entries, in whose places are stand-ins for :func:`fill`.

    Args:
        path: of the directory.
        weights_only: as for :func:`read_sharded`.
        left_unread: the names of these entries.
    """
    checkpoint = io.load(os.path.join(os.fspath(path), META), io.keep_on_cpu, weights_only)
    folder = os.path.abspath(os.fspath(path))

    def note(tensor: Tensor, name: str) -> Tensor:
        if stored_name(tensor) is not None:
            tensor.stored_in = folder  # type: ignore[attr-defined]
        return tensor

    unread = set(left_unread)
    noted = map_tensors(note, checkpoint)
    return {**noted, **materialized({key: value for key, value in noted.items() if key not in unread})}


def materialized(tree: Any) -> Any:
    """A structure from :func:`open_sharded` with its stand-ins replaced by their tensors, whole and on the CPU."""
    folders: dict[str, dict[str, Tensor]] = {}

    def make_room(tensor: Tensor, name: str) -> Tensor:
        stored = stored_name(tensor)
        if stored is None:
            return tensor
        return folders.setdefault(vars(tensor)["stored_in"], {}).setdefault(stored, torch.empty(tensor.shape, dtype=tensor.dtype))

    result = map_tensors(make_room, tree)
    for folder, targets in folders.items():
        fill(folder, targets)
    return result


def fill(path: PathLike, targets: Mapping[str, Tensor]) -> None:
    """Read tensors in place. Each process reads what it needs of them, without the others.

    Args:
        path: of the directory.
        targets: by the names under which they are kept: plain ones, filled whole, or sharded ones, of which this process's part is.

    Raises:
        RuntimeError: if a tensor is not there, has another shape, or the checkpoint is damaged.
    """
    if not targets:
        return
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

    folder = os.fspath(path)
    try:
        metadata = _metadata(folder)
        _check(metadata, targets, folder)
        reader = FileSystemReader(folder)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, True)
        with torch.no_grad():
            reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
    except (OSError, LookupError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise DamagedCheckpoint(
            f"The sharded checkpoint {folder!r} is incomplete or damaged. Was it copied completely? ({error})"
        ) from error


def _check(metadata: Any, targets: Mapping[str, Tensor], folder: str) -> None:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for name, target in targets.items():
        stored = metadata.state_dict_metadata.get(name)
        # Anything but a tensor would be unpickled, and could run any code.
        if not isinstance(stored, TensorStorageMetadata):
            raise DamagedCheckpoint(f"The sharded checkpoint {folder!r} has no tensor {name!r}. Was it copied completely?")
        if stored.size != target.shape:
            raise RuntimeError(
                f"The tensor {name!r} has the shape {tuple(stored.size)} in the checkpoint {folder!r}, and {tuple(target.shape)} here."
            )
    for info in metadata.storage_data.values():
        if os.path.basename(info.relative_path) != info.relative_path:
            raise DamagedCheckpoint(f"The sharded checkpoint {folder!r} refers to the file {info.relative_path!r}, which is not its own.")


def _metadata(folder: str) -> Any:
    """What torch.distributed.checkpoint wrote of the tensors and their parts, which it pickles; read without running any code."""
    with open(os.path.join(folder, ".metadata"), "rb") as file:
        return _MetadataUnpickler(file).load()


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of which the metadata consist, all of which only hold what they are given."""

    def find_class(self, module: str, name: str) -> Any:
        known = _classes_of_metadata()
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"its metadata hold {module}.{name}, which is no part of them")
        return known[module, name]


@cache
def _classes_of_metadata() -> dict[tuple[str, str], Any]:
    from torch.distributed.checkpoint import filesystem, metadata

    own = (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.TensorStorageMetadata,
        metadata.TensorProperties,
        metadata.ChunkStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
    known: dict[tuple[str, str], Any] = {(kind.__module__, kind.__qualname__): kind for kind in own}
    known.update({("torch", str(value).removeprefix("torch.")): value for value in vars(torch).values() if isinstance(value, torch.dtype)})
    known["torch", "Size"] = torch.Size
    known["torch.serialization", "_get_layout"] = torch.serialization._get_layout  # looks up a layout by its name
    for module in ("pathlib", "pathlib._local"):  # the second is where Python 3.13 keeps them
        known.update({(module, "PosixPath"): PurePosixPath, (module, "WindowsPath"): PureWindowsPath})
    return known


# ---- into one file ----------------------------------------------------------------------------------------------------


def consolidate(path: PathLike, output: PathLike) -> None:
    """Turn a sharded checkpoint into one file, which any strategy, and ``torch.load``, reads. It needs memory for all of it.

    Args:
        path: of the directory.
        output: of the new file.

    Raises:
        ValueError: if ``path`` is not that of a complete sharded checkpoint.
        FileExistsError: if ``output`` is there already.
    """
    if not is_sharded_checkpoint(path):
        raise ValueError(
            f"{os.fspath(path)!r} is not a complete sharded checkpoint: it must be a directory that holds the file {META!r}. "
            "Give the path that the checkpoint was saved under."
        )
    if os.path.lexists(output):
        raise FileExistsError(f"{os.fspath(output)!r} is there already. Give another output file, or remove it.")
    io.save(read_sharded(path), output)
