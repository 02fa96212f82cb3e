"""The checkpoint that ``ckpt_path`` means."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

CHOSEN = ("best", "last", "hpc", "auto")  # the words that stand for a checkpoint
OF_THE_RUN = re.compile(r"(hpc_ckpt_\d+|last(-v\d+)?)\.ckpt")  # names of what runs save in the trainer's folder by themselves


def resolve_path(trainer: Trainer, ckpt_path: Any, model_given: bool) -> Any:
    """The checkpoint that ``ckpt_path`` means: a path or URL, ``"best"``, ``"last"``, ``"hpc"``, ``"auto"``, or none.

    Args:
        trainer: whose callbacks know the best and the last.
        ckpt_path: what was given to fit, validate, test or predict.
        model_given: whether a model was given too; without one, evaluation means the best of the last fit.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    function = trainer.state.fn.value if trainer.state.fn is not None else "fit"
    fitting = function == "fit"
    call = f".{function}(ckpt_path={ckpt_path!r})"
    if ckpt_path is None and (model_given or fitting):
        return None
    if ckpt_path is None:
        if not (trainer.checkpoint_callback and trainer.checkpoint_callback.best_model_path):  # type: ignore[attr-defined]
            return None
        rank_zero_warn(
            f"`{call}` was called without a model: the best checkpoint of the last fit is loaded. To use the weights as they are, "
            "pass the model; to say it explicitly, pass ckpt_path='best'."
        )
        ckpt_path = "best"
    if ckpt_path == "best":
        return _best(trainer, call)
    if ckpt_path == "last":
        return _last(trainer, call, fitting)
    if ckpt_path == "auto":
        if not fitting:
            raise ValueError(f"`{call}`: 'auto' goes on with an interrupted fit. Here 'best', 'last' and paths are accepted.")
        return _auto(trainer)
    if ckpt_path == "hpc":
        found = _newest_hpc(trainer)
        if found is None:
            raise ValueError(f"`{call}`: there is no checkpoint hpc_ckpt_*.ckpt in {trainer.default_root_dir}.")
        return found
    if ckpt_path == "":
        raise ValueError(f"`{call}`: an empty path is no checkpoint; leave ckpt_path out to start without one.")
    if not isinstance(ckpt_path, str) and not hasattr(ckpt_path, "__fspath__"):
        raise TypeError(f"`{call}`: ckpt_path must be a path, a URL, 'best', 'last', 'hpc' or 'auto'.")
    return ckpt_path


def path_for_all(trainer: Trainer, ckpt_path: Any, model_given: bool) -> Any:
    """:func:`resolve_path` as rank 0 sees it, the same in all processes; each of them must call it once they have met.

    Disks, clocks and callbacks of other processes may tell something else. A path that was given is nobody's choice, and stays.
    """
    strategy = trainer.strategy
    chosen = ckpt_path is None or (isinstance(ckpt_path, str) and ckpt_path in CHOSEN)
    if not chosen or strategy.world_size == 1 or (ckpt_path is None and (model_given or trainer.state.fn == "fit")):
        return resolve_path(trainer, ckpt_path, model_given)
    found: Any = None
    error: Exception | None = None
    if strategy.is_global_zero:
        try:
            found = resolve_path(trainer, ckpt_path, model_given)
        except Exception as raised:
            error = raised
    found, told = strategy.broadcast((found, _sendable(error)))
    if told is not None:
        raise error or told
    return found


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one of its text if it can't be sent to other processes."""
    import pickle

    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) and str(copy) == str(error) else RuntimeError(f"{type(error).__name__}: {error}")


def _reader(trainer: Trainer) -> Callable[[str], dict[str, Any]] | None:
    """What reads the files of a CheckpointIO of the user's own, which may have any format; None where ours are used."""
    files = trainer.strategy.checkpoint_io
    while (inside := getattr(files, "checkpoint_io", None)) is not None:
        files = inside
    if type(files).load_checkpoint.__module__.startswith("lightning.fabric."):
        return None
    known: dict[str, dict[str, Any]] = {}

    def read(path: str) -> dict[str, Any]:
        if path not in known:
            known[path] = _facts(files.load_checkpoint(path, map_location="cpu"))
        return known[path]

    return read


def _facts(content: Any) -> dict[str, Any]:
    """What is asked for of a checkpoint, without what is large."""
    if not isinstance(content, dict):
        return {}
    own = content.get("keraunos")
    versions = own.get("versions", []) if isinstance(own, dict) else []
    goes_on = {"optimizer_states": ()} if "optimizer_states" in content else {}
    return {"global_step": content.get("global_step"), "keraunos": {"versions": versions}, **goes_on}


def _best(trainer: Trainer, call: str) -> str:
    callbacks = [c for c in trainer.checkpoint_callbacks if hasattr(c, "best_model_path")]
    if not callbacks:
        raise ValueError(f"`{call}`: the trainer has no ModelCheckpoint that could know which is best. Add one, or pass a path.")
    if len(callbacks) > 1:
        rank_zero_warn(f"`{call}`: there are {len(callbacks)} checkpoint callbacks; the best of the first one is used.")
    path = str(callbacks[0].best_model_path)
    if not path:
        hint = " fast_dev_run saves no checkpoints." if trainer.fast_dev_run else ""
        raise ValueError(f"`{call}`: no best checkpoint was saved yet.{hint} Call fit first, or pass a path.")
    return path


def _last(trainer: Trainer, call: str, fitting: bool) -> str | None:
    """The newest whole one of the checkpoints named ``last``; if one of them is damaged, of all checkpoints beside them.

    Raises:
        DamagedCheckpoint: if there are some, and none of them is whole.
    """
    from lightning.fabric.checkpoint.generations import newest_valid
    from lightning.pytorch.callbacks.checkpoint_files import lies_at

    savers = [callback for callback in trainer.checkpoint_callbacks if hasattr(callback, "_find_last_checkpoints")]
    candidates = {str(path) for callback in savers for path in callback._find_last_checkpoints(trainer) if lies_at(path)}
    if not candidates:
        rank_zero_warn(f"`{call}`: no last checkpoint was found, so none is loaded. 'auto' looks for checkpoints of other names too.")
        return None
    reader = _reader(trainer)
    return newest_valid(candidates, beside=_beside(trainer, savers, fitting, reader), reader=reader)


def _beside(trainer: Trainer, savers: list[Any], fitting: bool, reader: Any) -> Iterator[str]:
    """All checkpoints in the folders of these callbacks; for ``fit``, those from which training goes on, and those that can't be read."""
    from lightning.pytorch.callbacks.checkpoint_files import find, folder_of_run

    for saver in savers:
        for path in sorted(find(getattr(saver, "dirpath", None) or folder_of_run(trainer), _named(saver))):
            with suppress(Exception):  # which newest_valid meets, and tells
                if fitting and "optimizer_states" not in _content(path, reader):
                    continue
            yield path


def _named(saver: Any, inside: str = "") -> re.Pattern[str]:
    """What the names of all files of a callback match."""
    return re.compile(rf"{inside}(?:.*/)?[^./][^/]*{re.escape(getattr(saver, 'FILE_EXTENSION', '.ckpt'))}")


def _newest_hpc(trainer: Trainer) -> str | None:
    """The one with the highest number of those that preempted jobs left whole in the run's folder."""
    from glob import escape

    from lightning.fabric.checkpoint.generations import newest_valid
    from lightning.fabric.utilities.cloud_io import join_path

    try:
        return newest_valid(join_path(escape(str(trainer.default_root_dir)), "hpc_ckpt_*.ckpt"), by_name=True, reader=_reader(trainer))
    except FileNotFoundError:
        return None


# ---- auto -----------------------------------------------------------------------------------------------------------


def _auto(trainer: Trainer) -> str | None:
    """The newest whole checkpoint of the run, from which the same command goes on; None if there is no checkpoint yet.

    Raises:
        DamagedCheckpoint: if there are some, and none of them is whole.
    """
    from lightning.fabric.checkpoint.generations import newest_valid

    places, found, passed_over = _places(trainer), set[str](), list[str]()
    for folder, wanted in places:
        found |= _find(folder, wanted)
    reader = _reader(trainer)
    while found:
        path = newest_valid(found, reader=reader)
        if "optimizer_states" in _content(path, reader):
            return path
        found.discard(path)
        passed_over.append(path)
    if passed_over:
        rank_zero_warn(
            f"ckpt_path='auto': the run starts anew, since no training goes on from the files {sorted(passed_over)}: they hold weights, "
            "or something else. Have a ModelCheckpoint without save_weights_only save beside them."
        )
        return None
    rank_zero_info(f"ckpt_path='auto': the run starts, since there is no checkpoint of it yet in {sorted({str(f) for f, _ in places})}.")
    return None


def _places(trainer: Trainer) -> list[tuple[str, re.Pattern[str]]]:
    """The folders in which checkpoints of this run may be, whichever version a logger gave it, and their names there."""
    places = [(str(trainer.default_root_dir), OF_THE_RUN)]
    for callback in trainer.checkpoint_callbacks:
        given = getattr(callback, "dirpath", None)
        root, inside = (str(given), "") if given is not None else _folder_of_runs(trainer)
        places.append((root, _named(callback, inside)))
    return places


def _folder_of_runs(trainer: Trainer) -> tuple[str, str]:
    """The folder of all versions of the first logger, and a pattern of the checkpoint folders in it."""
    from lightning.fabric.loggers.logger import FolderLogger
    from lightning.pytorch.callbacks.checkpoint_files import folder_of_run

    first = trainer.loggers[0] if trainer.loggers else None
    if isinstance(first, FolderLogger) and first._version is None:
        return first._versions_dir, r"version_\d+/checkpoints/"
    return folder_of_run(trainer), ""


def _find(folder: str, wanted: re.Pattern[str]) -> set[str]:
    from lightning.fabric.utilities.cloud_io import get_filesystem, join_path, local_path
    from lightning.pytorch.callbacks.checkpoint_files import find

    if wanted is not OF_THE_RUN:
        return find(folder, wanted)
    local = local_path(folder)  # whose other folders are nobody's business
    if local is not None:
        names = os.listdir(local) if os.path.isdir(local) else []
    else:
        filesystem = get_filesystem(folder)
        names = [str(path).rpartition("/")[2] for path in filesystem.ls(folder, detail=False)] if filesystem.isdir(folder) else []
    return {join_path(folder, name) for name in names if wanted.fullmatch(name)}


def _content(path: str, reader: Callable[[str], dict[str, Any]] | None) -> dict[str, Any]:
    """A checkpoint without its tensors."""
    from lightning.fabric.checkpoint.generations import has_seal, without_tensors

    if reader is not None and not has_seal(path):
        return reader(path)
    content = without_tensors(path)
    return content if isinstance(content, dict) else {}


def go_on_logging(trainer: Trainer, path: str) -> None:
    """Let loggers that would take the next free version go on with that of the run which saved the checkpoint."""
    from lightning.fabric.loggers.logger import FolderLogger

    versions = _content(path, _reader(trainer)).get("keraunos", {}).get("versions", [])
    for logger, version in zip(trainer.loggers, versions):
        if isinstance(logger, FolderLogger) and logger._version is None and version is not None:
            logger._version = version
