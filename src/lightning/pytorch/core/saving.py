"""Modules and datamodules from checkpoints, and hyperparameter files."""

from __future__ import annotations

import ast
import csv
import inspect
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from warnings import warn

import torch

from lightning.fabric.checkpoint.format import find_placeholders
from lightning.fabric.checkpoint.io import load
from lightning.fabric.utilities.cloud_io import get_filesystem, is_local, replacing
from lightning.fabric.utilities.logger import plain_data
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.migration import migrate_checkpoint

__all__ = [
    "convert",
    "load_hparams_from_tags_csv",
    "load_hparams_from_yaml",
    "save_hparams_to_tags_csv",
    "save_hparams_to_yaml",
    "update_hparams",
]

# Put among the hyperparameters by Lightning's command line: names of code to run, which a file has no say in.
INTERNAL = ("_instantiator", "_class_path")
MOST_VALUES = 1_000_000  # of a file of hyperparameters


# --- load_from_checkpoint -------------------------------------------------------------------------------------------


def _load_from_checkpoint(
    cls: Any,
    checkpoint_path: str | Path | IO[bytes],
    map_location: Any = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Any:
    """What ``load_from_checkpoint`` of modules and datamodules does; see there.

    In order: the file is read, the object made from the stored hyperparameters and ``kwargs``; for a module then
    ``configure_model()``, ``on_load_checkpoint(checkpoint)``, the weights, and the move to the device they came from.

    Raises:
        TypeError: if ``__init__`` needs an argument that is neither stored nor given, or one that could not be restored.
        KeyError: if the file holds no ``state_dict``.
        RuntimeError: if keys or shapes of the weights do not fit.
    """
    checkpoint = load(checkpoint_path, _where_available if map_location is None else map_location, weights_only)
    if not isinstance(checkpoint, dict):
        raise TypeError(
            f"{_shown(checkpoint_path)} holds a {type(checkpoint).__name__}, not a checkpoint (a dict with the key 'state_dict')."
        )
    is_module = issubclass(cls, torch.nn.Module)
    if is_module and "state_dict" not in checkpoint:
        weights = ", or weights saved alone (load them with `model.load_state_dict(torch.load(path))`)"
        only = checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values())
        raise KeyError(
            f"There is no 'state_dict' in {_shown(checkpoint_path)}: it is not a checkpoint of a trainer{weights if only else ''}."
        )
    checkpoint = migrate_checkpoint(checkpoint)
    if hparams_file is not None:
        checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = _load_hparams_file(hparams_file)
    stored = _merged(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY), kwargs)
    checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = stored
    args, arguments = _arguments(cls, stored, checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME), kwargs)
    obj = cls(*args, **arguments)
    if is_module:
        return _restore_module(obj, checkpoint, strict, checkpoint_path)
    if cls.__qualname__ in checkpoint:
        obj.load_state_dict(checkpoint[cls.__qualname__])
    return obj


def _restore_module(model: Any, checkpoint: dict[str, Any], strict: bool | None, checkpoint_path: Any) -> Any:
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    state = checkpoint["state_dict"]
    strict = model.strict_loading if strict is None else strict
    keys = model.load_state_dict(state, strict=strict)
    if not strict and keys is not None:
        if keys.missing_keys:
            rank_zero_warn(
                f"The checkpoint has no weights for these keys of {type(model).__name__}, which stay as they are: {keys.missing_keys}"
            )
        if keys.unexpected_keys:
            rank_zero_warn(
                f"{type(model).__name__} has no place for these keys of the checkpoint, which are ignored: {keys.unexpected_keys}"
            )
    device = next((value.device for value in state.values() if isinstance(value, torch.Tensor)), None)
    if device is None:
        rank_zero_warn(f"The state_dict in {_shown(checkpoint_path)} contains no parameters.")
        return model
    return model.to(device)


def _shown(path: Any) -> str:
    return f"the file {os.fspath(path)!r}" if isinstance(path, (str, os.PathLike)) else "the file"


def _where_available(storage: Any, location: str) -> Any:
    """A ``map_location`` that restores tensors to the device they were saved from if it is there, else to the CPU."""
    kind, _, index = location.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        return storage
    if kind == "mps" and not torch.backends.mps.is_available():
        return storage
    return None


def _merged(stored: Any, kwargs: dict[str, Any]) -> Any:
    """The stored hyperparameters with ``kwargs`` in the place of those of the same name."""
    if stored is None:
        return kwargs
    if isinstance(stored, Namespace):
        stored = dict(vars(stored))
    if not isinstance(stored, Mapping):
        raise TypeError(f"The checkpoint's hyperparameters are not a mapping: {stored!r}")
    if not kwargs or not type(stored).__module__.startswith("omegaconf."):
        return {**stored, **kwargs} if kwargs else stored
    from omegaconf import OmegaConf

    merged: Any = OmegaConf.create(OmegaConf.to_container(stored, resolve=False), flags={"allow_objects": True})
    for name, value in kwargs.items():
        merged[name] = value
    return merged


def _arguments(cls: type, stored: Any, name: str | None, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments for ``cls.__init__``, positional-only ones apart.

    Args:
        cls: the class to instantiate.
        stored: the hyperparameters, with ``kwargs`` among them.
        name: the argument that takes all of them in one container, if they were saved from one.
        kwargs: what the user has passed.

    Raises:
        TypeError: if an argument is missing, or is there as a placeholder only.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    single = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    by_command_line = "_instantiator" in stored
    if isinstance(stored, dict):
        stored = {key: value for key, value in stored.items() if key not in INTERNAL}
    if name in single:
        given = {name: stored, **kwargs}
        # what was saved besides the container, if it is needed
        given.update({key: stored[key] for key, p in single.items() if p.default is p.empty and key not in given and key in stored})
    else:
        given = {key: stored[key] for key in stored}
    given = {key: value for key, value in given.items() if takes_any or key in single}
    missing = [p.name for p in single.values() if p.default is p.empty and p.name not in given]
    if missing:
        raise TypeError(_missing_message(cls, missing, stored))
    for key, value in given.items():
        if key not in kwargs:
            _check_restored(cls, key, value, by_command_line)
    positional = [p.name for p in single.values() if p.kind is p.POSITIONAL_ONLY and p.name in given]
    return [given[key] for key in positional], {key: value for key, value in given.items() if key not in positional}


def _missing_message(cls: type, missing: list[str], stored: Any) -> str:
    holds = f"its hyperparameters are {sorted(map(str, stored))}" if stored else "it holds no hyperparameters"
    call = ", ".join(f"{name}=..." for name in missing)
    names = ", ".join(f"'{name}'" for name in missing)
    return (
        f"{cls.__qualname__}.__init__() requires {names}, which the checkpoint does not hold; {holds}. "
        f"Pass what is missing: `{cls.__qualname__}.load_from_checkpoint(path, {call})`. "
        "For later checkpoints, call `self.save_hyperparameters()` in `__init__`."
    )


def _check_restored(cls: type, name: str, value: Any, by_command_line: bool) -> None:
    placeholders = find_placeholders(value, name)
    if placeholders:
        path, placeholder = placeholders[0]
        raise TypeError(
            f"The hyperparameter `{path}` of {cls.__qualname__} could not be restored: {placeholder!r}. "
            f"Otherwise pass it: `{cls.__qualname__}.load_from_checkpoint(path, {name}=...)`."
        )
    if by_command_line and isinstance(value, dict) and "class_path" in value:
        raise TypeError(
            f"The checkpoint describes the argument {name!r} of {cls.__qualname__} by the class path {value['class_path']!r}. "
            "No code is run because a file names it: make the object and pass it, "
            f"`{cls.__qualname__}.load_from_checkpoint(path, {name}=...)`."
        )


# --- hyperparameter files -------------------------------------------------------------------------------------------


def _load_hparams_file(path: str | Path) -> Any:
    extension = os.path.splitext(os.fspath(path))[1].lower()
    if extension == ".csv":
        return load_hparams_from_tags_csv(path)
    if extension in (".yml", ".yaml"):
        return load_hparams_from_yaml(path)
    raise ValueError(f"hparams_file={os.fspath(path)!r} must be a .csv, .yml or .yaml file.")


def update_hparams(hparams: dict[str, Any], updates: dict[str, Any]) -> None:
    """Put ``updates`` into ``hparams``, dict by nested dict.

    Args:
        hparams: changed in place.
        updates: entries to add or replace.

    Example::

        >>> hparams = {"optim": {"lr": 0.1, "name": "sgd"}}
        >>> update_hparams(hparams, {"optim": {"lr": 0.2}, "epochs": 3})
        >>> hparams
        {'optim': {'lr': 0.2, 'name': 'sgd'}, 'epochs': 3}
    """
    for key, value in updates.items():
        if isinstance(value, dict) and isinstance(hparams.get(key), dict):
            update_hparams(hparams[key], value)
        else:
            hparams[key] = value


def convert(val: str) -> Any:
    """The Python literal that ``val`` spells, or ``val`` itself.

    Example::

        >>> convert("0.5"), convert("[1, 2]"), convert("adam"), convert("1 + 1")
        (0.5, [1, 2], 'adam', '1 + 1')
    """
    try:
        return ast.literal_eval(val)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return val


def _entries(hparams: Any) -> Mapping[str, Any]:
    if isinstance(hparams, Namespace):
        return vars(hparams)
    if isinstance(hparams, Mapping):
        return hparams
    raise TypeError(f"hparams must be a dict, a Namespace or an OmegaConf dict, not {type(hparams).__name__}.")


def _check_folder(path: str | Path) -> None:
    folder = os.path.dirname(os.fspath(path))
    if folder and is_local(path) and not get_filesystem(path).isdir(folder):
        raise RuntimeError(f"Missing folder: {folder}. Create it before hyperparameters are written to it.")


def _exists(path: str | Path) -> bool:
    if get_filesystem(path).exists(os.fspath(path)):
        return True
    warn(f"There is no hyperparameter file {os.fspath(path)!r}, so no hyperparameters are read.", category=RuntimeWarning, stacklevel=3)
    return False


def load_hparams_from_tags_csv(tags_csv: str | Path) -> dict[str, Any]:
    """Hyperparameters from a CSV file with the columns ``key`` and ``value``.

    Args:
        tags_csv: a local path or a URL. If it does not exist, a warning is given and the result is empty.

    Example::

        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "hparams.csv")
        >>> save_hparams_to_tags_csv(path, {"lr": 0.1, "optimizer": "adam"})
        >>> load_hparams_from_tags_csv(path)
        {'lr': 0.1, 'optimizer': 'adam'}
    """
    if not _exists(tags_csv):
        return {}
    with get_filesystem(tags_csv).open(os.fspath(tags_csv), "r", newline="") as file:
        return {row["key"]: convert(row["value"]) for row in csv.DictReader(file)}


def save_hparams_to_tags_csv(tags_csv: str | Path, hparams: dict[str, Any] | Namespace) -> None:
    """Write hyperparameters to a CSV file with the columns ``key`` and ``value``.

    Args:
        tags_csv: a local path or a URL, in a folder that exists.
        hparams: values are written as ``str`` shows them.

    Raises:
        RuntimeError: if the folder does not exist.
    """
    _check_folder(tags_csv)
    with replacing(tags_csv) as file:
        writer = csv.DictWriter(file, fieldnames=["key", "value"], lineterminator="\n")
        writer.writeheader()
        for key, value in _entries(hparams).items():
            writer.writerow({"key": key, "value": value})


def load_hparams_from_yaml(config_yaml: str | Path, use_omegaconf: bool = True) -> dict[str, Any]:
    """Hyperparameters from a YAML file. No tag in it can make Python objects, let alone run code.

    Args:
        config_yaml: a local path or a URL. If it does not exist, a warning is given and the result is empty.
        use_omegaconf: return an OmegaConf container if the program uses OmegaConf. Interpolations that call functions
            (``${oc.env:HOME}``) stay text.

    Raises:
        ValueError: if the file is not YAML, needs Python objects, or is not a mapping.

    Example::

        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "hparams.yaml")
        >>> save_hparams_to_yaml(path, {"lr": 0.1, "data": Path("train")})
        >>> load_hparams_from_yaml(path)
        {'data': 'train', 'lr': 0.1}
    """
    import sys

    import yaml

    if not _exists(config_yaml):
        return {}
    with get_filesystem(config_yaml).open(os.fspath(config_yaml), "r") as file:
        loader = _plain_loader()(file)
        try:
            node = loader.get_single_node()
            _refuse_endless(node)
            hparams = None if node is None else loader.construct_document(node)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(config_yaml)!r} can't be read as plain YAML: {error}") from error
        finally:
            loader.dispose()
    if hparams is None:
        return {}
    if not isinstance(hparams, dict):
        raise ValueError(f"{os.fspath(config_yaml)!r} holds a {type(hparams).__name__}, not a mapping of hyperparameters.")
    if use_omegaconf and "omegaconf" in sys.modules:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from lightning.fabric.checkpoint.omega import as_text, holds_resolver_calls

        try:
            return OmegaConf.create(as_text(hparams) if holds_resolver_calls(hparams) else hparams)  # type: ignore[return-value]
        except OmegaConfBaseException:  # values that it does not take (dates, sets)
            return hparams
    return hparams


def _refuse_endless(node: Any) -> None:
    """Refuse a document whose aliases stand for the same parts so often that to go through all of them would take for ever.

    Raises:
        ValueError: if they do.
    """
    counted: dict[int, int] = {}

    def count(part: Any) -> int:
        if id(part) not in counted:
            counted[id(part)] = 1  # within itself
            inside = part.value if isinstance(part.value, list) else []
            counted[id(part)] = 1 + sum(sum(map(count, each)) if isinstance(each, tuple) else count(each) for each in inside)
        if counted[id(part)] > MOST_VALUES:
            raise ValueError(f"with its aliases it would have more than {MOST_VALUES} values")
        return counted[id(part)]

    if node is not None:
        count(node)


def _plain_loader() -> Any:
    """YAML's safe loader, plus the tags under which Lightning has written tuples and complex numbers."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def make_tuple(loader: Loader, node: Any) -> tuple[Any, ...]:
        return tuple(loader.construct_sequence(node, deep=True))

    def make_complex(loader: Loader, node: Any) -> complex:
        return complex(loader.construct_scalar(node))

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", make_tuple)
    Loader.add_constructor("tag:yaml.org,2002:python/complex", make_complex)
    return Loader


def save_hparams_to_yaml(config_yaml: str | Path, hparams: dict[str, Any] | Namespace, use_omegaconf: bool = True) -> None:
    """Write hyperparameters to a YAML file that any reader takes: plain data as it is, everything else in string form.

    Args:
        config_yaml: a local path or a URL, in a folder that exists.
        hparams: a dict, a ``Namespace`` or an OmegaConf container.
        use_omegaconf: has no effect; containers of OmegaConf are written with their interpolations resolved.

    Raises:
        RuntimeError: if the folder does not exist.
        TypeError: if ``hparams`` is something else.
    """
    import yaml

    _check_folder(config_yaml)
    content = plain_data(_entries(hparams))
    with replacing(config_yaml) as file:
        yaml.safe_dump(content, file, allow_unicode=True)
