"""Which of several checkpoints is the newest, and whole: by what they say of themselves, never by the clock."""

from __future__ import annotations

import errno
import os
import pickle
import re
from collections.abc import Callable, Iterable
from typing import IO, Any

from lightning.fabric.checkpoint import io, seal, sharded
from lightning.fabric.checkpoint.io import PathLike
from lightning.fabric.checkpoint.seal import DamagedCheckpoint, Generation
from lightning.fabric.utilities.cloud_io import get_filesystem, join_path, local_path
from lightning.fabric.utilities.rank_zero import rank_zero_warn

EXTENSION = ".ckpt"
Reader = Callable[[str], Any]  # reads a checkpoint that may have another format than ours; what it can read is whole


def generation_of(path: PathLike, reader: Reader | None = None) -> Generation | None:
    """Which generation a checkpoint is of, read from its seal: a few bytes, and no tensors.

    Of a file without a seal, such as Lightning writes, the entry ``global_step`` is read, safely, with its tensors left on the disk.

    Args:
        path: of a file, or of the directory of a sharded checkpoint; or a URL.
        reader: reads those without a seal, if they are not as torch writes them.

    Returns:
        The generation; None if the file does not tell any.

    Raises:
        DamagedCheckpoint: if the seal is broken, or the file has another size than it says.
        OSError: if it can't be read.
    """
    text = os.fspath(path)
    found = None if reader is not None and _is_other_directory(text) else _seal_of(text)
    if found is not None:
        return found.generation
    try:
        content = without_tensors(text) if reader is None else reader(text)
    except pickle.UnpicklingError:
        return None  # it holds what only weights_only=False reads, its global_step as well
    step = content.get("global_step") if isinstance(content, dict) else None
    return Generation(step, 0) if type(step) is int else None


def has_seal(path: PathLike) -> bool:
    """Whether a checkpoint is one that we wrote, file or directory."""
    text = os.fspath(path)
    return not _is_other_directory(text) and _seal_of(text) is not None


def _seal_of(text: str) -> seal.Seal | None:
    with _open(text) as file:
        return seal.read_seal(file, repr(text))


def _is_other_directory(text: str) -> bool:
    local = local_path(text)
    return local is not None and os.path.isdir(local) and not sharded.is_sharded_checkpoint(local)


def without_tensors(path: PathLike) -> Any:
    """What a checkpoint holds, read safely, with its tensors left on the disk; it is not compared with its checksum.

    Args:
        path: of a file, or of the directory of a sharded checkpoint; or a URL.
    """
    text = os.fspath(path)
    local = local_path(text)
    if local is not None:
        return io.load(_file(local), "meta", mmap=True, verify=False)
    with _open(text) as file:
        return io.load(file, "meta", verify=False)


def verify(path: PathLike) -> None:
    """Read all of a checkpoint, and see that it is what was written.

    Args:
        path: of a file, or of the directory of a sharded checkpoint; or a URL.

    Raises:
        DamagedCheckpoint: if it is not; it names the part that is broken.
        OSError: if it can't be read.
    """
    text = os.fspath(path)
    local = local_path(text)
    if local is not None and os.path.isdir(local):
        if not sharded.is_sharded_checkpoint(local):
            raise DamagedCheckpoint(f"The directory {text!r} is no checkpoint, or an incomplete one: it has no {sharded.META}.")
        sharded.verify_sharded(local)
        return
    with _open(text) as file:
        seal.verify(file, repr(text))


def newest_valid(
    where: PathLike | Iterable[PathLike], by_name: bool = False, beside: Iterable[PathLike] = (), reader: Reader | None = None
) -> str:
    """The checkpoint of the highest generation that is whole. Modification times are not looked at.

    The candidates are tried from the highest generation down: each is read to its end, so that what is returned can be loaded. Those that
    are damaged are named in a warning. Of two that are equal, the one with the higher numbers in its name
    counts.

    Args:
        where: a folder, whose ``*.ckpt`` are looked at, files and directories; a pattern such as ``runs/*/last*.ckpt``; or paths.
        by_name: let the numbers in the names decide, before the generations.
        beside: more paths, which count like the others once one of those turns out to be damaged; not iterated over before.
        reader: reads all that have no seal, if they are not as torch writes them.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: if there is no checkpoint at all.
        DamagedCheckpoint: if none of them is whole; it lists them.
    """
    paths = _candidates(where)
    if not paths:
        raise FileNotFoundError(errno.ENOENT, "There is no checkpoint", str(where))
    broken: list[str] = []
    ranked = _ranked(paths, by_name, broken, reader)
    stood_by: Iterable[PathLike] | None = beside
    while ranked or (broken and stood_by is not None):
        if broken and stood_by is not None:
            others = [path for path in _candidates(stood_by) if path not in paths]
            ranked = sorted(ranked + _ranked(others, by_name, broken, reader))
            paths, stood_by = paths + others, None
            continue
        path = ranked.pop()[1]
        try:
            if reader is None or has_seal(path):  # else it was read
                verify(path)
        except (DamagedCheckpoint, OSError) as error:
            broken.append(f"{path}: {error}")
            continue
        if broken:
            rank_zero_warn(f"Of the {len(paths)} checkpoints found, these can't be read, and {path} is used instead: " + "; ".join(broken))
        return path
    raise DamagedCheckpoint(f"None of the {len(paths)} checkpoints found can be read: " + "; ".join(broken))


def _ranked(paths: list[str], by_name: bool, broken: list[str], reader: Reader | None) -> list[tuple[Any, str]]:
    """What the paths are compared by, and the paths, from the lowest up; what is wrong with the others goes to ``broken``."""
    ranked: list[tuple[Any, str]] = []
    for path in paths:
        try:
            generation, numbers = generation_of(path, reader) or Generation(-1, 0), _by_numbers(path)
            ranked.append(((numbers, generation) if by_name else (generation, numbers), path))
        except Exception as error:  # whatever the contents of a foreign file lead to
            broken.append(f"{path}: {error}")
    return sorted(ranked)


def _by_numbers(path: str) -> list[tuple[int, str]]:
    """Orders names as people do: ``last-v10`` after ``last-v9``, and both after ``last``."""
    name = path.replace("\\", "/").rpartition("/")[2].removesuffix(EXTENSION)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _candidates(where: PathLike | Iterable[PathLike]) -> list[str]:
    if not isinstance(where, (str, os.PathLike)):
        return sorted({os.fspath(path) for path in where})
    text = os.fspath(where)
    local = local_path(text)
    if local is None:
        return _remote_candidates(text)
    if os.path.isdir(local) and not sharded.is_sharded_checkpoint(local):
        return sorted(os.path.join(local, name) for name in os.listdir(local) if name.endswith(EXTENSION) and name[0] != ".")
    if os.path.exists(local):
        return [local]
    from glob import glob

    return sorted(glob(local))


def _remote_candidates(url: str) -> list[str]:
    filesystem = get_filesystem(url)
    filesystem.invalidate_cache()
    inside = join_path(url, f"*{EXTENSION}") if filesystem.isdir(url) else url
    names = [str(name) for name in filesystem.glob(inside)]
    return sorted(filesystem.unstrip_protocol(name) for name in names if not name.rpartition("/")[2].startswith("."))


def _file(local: str) -> str:
    return os.path.join(local, sharded.META) if os.path.isdir(local) else local


def _open(path: str) -> IO[bytes]:
    local = local_path(path)
    if local is None:
        return get_filesystem(path).open(path, "rb")  # type: ignore[no-any-return]
    return open(_file(local), "rb", buffering=0)
