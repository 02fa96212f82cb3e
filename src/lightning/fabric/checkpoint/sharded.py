"""Checkpoints in a directory, to which each process writes the parts of tensors that it holds.

The tensors that are divided among processes (``DTensor``) go through ``torch.distributed.checkpoint``. In their places stand
tensors without memory, which know the name under which theirs is kept; with them, everything else is in the file ``meta.pt``,
whose presence makes the directory a checkpoint: it is written last. Before it, ``manifest.json``, with the size and the checksum of each
file; its own are in the seal of ``meta.pt``.
"""

from __future__ import annotations

import copy
import errno
import io as streams
import json
import os
import pickle
import secrets
import sys
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.checkpoint import io, seal
from lightning.fabric.checkpoint.io import DamagedCheckpoint, PathLike
from lightning.fabric.checkpoint.pickles import look_through
from lightning.fabric.utilities.cloud_io import local_path

META = "meta.pt"
MANIFEST = "manifest.json"
SUMS = ".sums-"  # begins the names of files in which processes leave the checksums of what they wrote
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


def write_shards(tensors: dict[str, Tensor], folder: str, group: Any = None) -> None:
    """Write the parts of tensors that this process holds; in a run of several processes, all of them must call it.

    Args:
        tensors: by name, the same names in all processes.
        folder: is there, and visible to all processes.
        group: of all processes; None for the one of the run.

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
            dcp.save(tensors, storage_writer=_summing_writer(folder), process_group=group, no_dist=alone)
        except CheckpointException as error:  # which is no Exception, so that handlers of those would not see it
            failed = "; ".join(f"rank {rank}: {reason[0]!r}" for rank, reason in sorted(error.failures.items()))
            causes = [reason[0] for reason in error.failures.values()]
            number = next((cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno is not None), errno.EIO)
            raise OSError(number, f"The sharded checkpoint could not be written ({failed})", folder) from error


def _summing_writer(folder: str) -> Any:
    """Writes shards, and beside them their sizes and checksums, before the processes tell each other that they are done."""
    from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

    sums: dict[str, tuple[int, int]] = {}

    class SummingFileSystem(FileSystem):
        @contextmanager
        def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
            with super().create_stream(path, mode) as stream:
                if mode != "wb":
                    yield stream
                    return
                summing = seal.Summing(stream)  # type: ignore[arg-type]
                yield summing
                sums[os.path.basename(path)] = (summing.size, summing.crc32)

    class SummingWriter(FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            try:
                written = super().write_data(plan, planner)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # which torch hides, as in io
                    raise OSError(error.__context__.errno, error.__context__.strerror, folder) from error
                raise
            _write_json(os.path.join(folder, f"{SUMS}{secrets.token_hex(8)}"), sums)
            return written

    writer = SummingWriter(folder)
    writer.fs = SummingFileSystem()
    return writer


def _write_json(path: str, content: Any) -> tuple[int, int]:
    """Write a file and flush it to the disk; returns its size and checksum."""
    text = json.dumps(content, separators=(",", ":"), sort_keys=True).encode()
    with open(path, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return len(text), zlib.crc32(text)


def commit(plain: Any, folder: str, target: str) -> None:
    """Write what makes the directory of shards a checkpoint, and move it to its place. One process calls it.

    Args:
        plain: from :func:`split`.
        folder: holds all shards; it lies beside ``target``.
        target: where the checkpoint will be; what is there now is replaced.
    """
    sums: dict[str, tuple[int, int]] = {}
    names = os.listdir(folder)
    for name in names:
        if name.startswith(SUMS):
            path = os.path.join(folder, name)
            with open(path, encoding="utf-8") as file:
                sums.update(json.load(file))
            os.unlink(path)
    files = [name for name in names if not name.startswith(SUMS)]
    manifest = {name: sums.get(name) or seal.checksum_of(os.path.join(folder, name)) for name in files}
    described = _write_json(os.path.join(folder, MANIFEST), {"version": 1, "files": manifest})
    io.save(plain, os.path.join(folder, META), manifest=described)  # flushes the directory too
    io.replace(folder, target)


# ---- reading ----------------------------------------------------------------------------------------------------------


def read_sharded(path: PathLike, map_location: Any = None, weights_only: bool | None = None, verify: bool = True) -> Any:
    """Read a sharded checkpoint with all its tensors whole, in one process and without the others.

    Args:
        path: of the directory.
        map_location: where tensors go, as for :func:`torch.load`; those that were sharded go to the CPU if it is None.
        weights_only: False unpickles anything in ``meta.pt``; for checkpoints from a source you trust.
        verify: compare the checksums of the files first.

    Raises:
        RuntimeError: if it is incomplete or damaged.
    """
    if verify:
        check_sizes(path)
    checkpoint = io.load(os.path.join(os.fspath(path), META), map_location, weights_only, verify=verify)
    targets: dict[str, Tensor] = {}

    def make_room(tensor: Tensor, name: str) -> Tensor:
        stored = stored_name(tensor)
        if stored is None:
            return tensor
        return targets.setdefault(stored, torch.empty(tensor.shape, dtype=tensor.dtype))

    result = map_tensors(make_room, checkpoint)
    fill(path, targets, verify)
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
    check_sizes(path)
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


def fill(path: PathLike, targets: Mapping[str, Tensor], verify: bool = True) -> None:
    """Read tensors in place. Each process reads what it needs of them, without the others.

    Args:
        path: of the directory.
        targets: by the names under which they are kept: plain ones, filled whole, or sharded ones, of which this process's part is.
        verify: compare the checksums of the files first, of those that are read.

    Raises:
        RuntimeError: if a tensor is not there, has another shape, or the checkpoint is damaged.
    """
    if not targets:
        return
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

    folder = os.fspath(path)
    manifest = read_manifest(folder) if verify else {}
    try:
        _refuse_devices(folder, {".metadata"})
        _verify(folder, manifest, {".metadata"})
        metadata = _metadata(folder)
        _check(metadata, targets, folder)
        reader = FileSystemReader(folder)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, True)
        plan = planner.create_local_plan()
        parts = [metadata.storage_data[item.storage_index] for item in plan.items]
        _refuse_devices(folder, {part.relative_path for part in parts})
        _verify(folder, manifest, {part.relative_path for part in parts})
        _refuse_bombs(folder, parts)
        with torch.no_grad():
            reader.read_data(reader.prepare_local_plan(plan), planner).wait()
    except Exception as error:  # whatever torch.distributed.checkpoint makes of files that are not its own
        told = isinstance(error, RuntimeError) and folder in str(error)
        if told or isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
            raise
        raise DamagedCheckpoint(
            f"The sharded checkpoint {folder!r} is incomplete or damaged. Was it copied completely? ({error})"
        ) from error


# ---- checking ---------------------------------------------------------------------------------------------------------

_verified: set[tuple[Any, ...]] = set()  # files that this process has read to their end: weights and optimizers are read in turns


def read_manifest(path: PathLike) -> dict[str, tuple[int, int]]:
    """The names of the files of a sharded checkpoint, with their sizes and checksums; none for one without a manifest.

    Raises:
        DamagedCheckpoint: if the manifest is not what was written.
    """
    folder = os.fspath(path)
    with open(os.path.join(folder, META), "rb") as file:
        sealed = seal.read_seal(file, repr(os.path.join(folder, META)))
    if sealed is None or sealed.manifest is None:
        return {}
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            text = file.read(sealed.manifest[0] + 1)
    except FileNotFoundError:
        text = b""
    if (len(text), zlib.crc32(text)) != sealed.manifest:
        raise _damaged(folder, MANIFEST, "is missing" if not text else "is not what was written")
    files = {name: (size, crc32) for name, (size, crc32) in json.loads(text)["files"].items()}
    if strange := [name for name in files if os.path.basename(name) != name]:
        raise _damaged(folder, MANIFEST, f"refers to {strange[0]!r}, which is not its own")
    return files


def check_sizes(path: PathLike) -> dict[str, tuple[int, int]]:
    """See that all files of a sharded checkpoint are there and have their sizes, without reading them; returns its manifest.

    Raises:
        DamagedCheckpoint: if one is missing, or has another size.
    """
    folder = os.fspath(path)
    manifest = read_manifest(folder)
    for name, (size, _) in manifest.items():
        try:
            found = os.stat(os.path.join(folder, name)).st_size
        except FileNotFoundError:
            raise _damaged(folder, name, "is missing") from None
        if found != size:
            raise _damaged(folder, name, f"has {found} bytes instead of {size}")
    _refuse_devices(folder, manifest)
    return manifest


def _refuse_devices(folder: str, names: Iterable[str]) -> None:
    """Refuse links to what has no end, such as a device."""
    for name in names:
        path = os.path.join(folder, name)
        if os.path.exists(path) and not os.path.isfile(path):
            raise _damaged(folder, name, "is no file")


def _refuse_bombs(folder: str, parts: Iterable[Any]) -> None:
    """See that what torch.distributed.checkpoint will load takes no more memory than its parts of the files do."""
    by_file: dict[str, list[Any]] = {}
    for part in parts:
        if part.transform_descriptors:  # compressed, for example
            raise _damaged(folder, part.relative_path, f"is transformed in a way that is not known here ({part.transform_descriptors})")
        by_file.setdefault(part.relative_path, []).append(part)
    for name, inside in by_file.items():
        with open(os.path.join(folder, name), "rb") as file:
            for part in inside:
                seal.refuse_bombs(seal.part_of(file, part.offset, part.length), repr(os.path.join(folder, name)))


def verify_sharded(path: PathLike) -> None:
    """Read every file of a sharded checkpoint and compare its checksum.

    Raises:
        DamagedCheckpoint: if one is missing or not what was written.
    """
    folder = os.fspath(path)
    manifest = check_sizes(folder)
    with open(os.path.join(folder, META), "rb") as file:
        seal.verify(file, repr(os.path.join(folder, META)))
    _verify(folder, manifest, set(manifest))


def _verify(folder: str, manifest: Mapping[str, tuple[int, int]], names: set[str]) -> None:
    for name in sorted(names & manifest.keys()):
        path = os.path.join(folder, name)
        try:
            found = os.stat(path)
        except FileNotFoundError:
            raise _damaged(folder, name, "is missing") from None
        same = (path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, manifest[name])
        if same not in _verified:
            if seal.checksum_of(path) != tuple(manifest[name]):
                raise _damaged(folder, name, "is not what was written")
            _verified.add(same)


def _damaged(folder: str, name: str, problem: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"The sharded checkpoint {folder!r} is incomplete or damaged: its file {name!r} {problem}. "
        "Was it copied completely? Copy it anew, or use the checkpoint before it."
    )


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
        content = file.read()
    if look_through(content) != len(content):
        raise pickle.UnpicklingError("its metadata are not such as torch.distributed.checkpoint writes")
    return _MetadataUnpickler(streams.BytesIO(content)).load()


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
