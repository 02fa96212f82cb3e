"""Hyperparameters from the arguments of ``__init__``, and attributes looked up on a module and what belongs to it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from argparse import Namespace
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = [
    "AttributeDict",
    "clean_namespace",
    "collect_init_args",
    "get_init_args",
    "is_picklable",
    "lightning_getattr",
    "lightning_hasattr",
    "lightning_setattr",
    "parse_class_init_keys",
    "save_hyperparameters",
]

PRIMITIVES = (bool, int, float, str)


def is_picklable(obj: object) -> bool:
    """Whether ``obj`` can be pickled.

    Example::

        >>> is_picklable([1, 2]), is_picklable(lambda: 1)
        (True, False)
    """
    try:
        pickle.dumps(obj)
    except Exception:  # whatever the object's own __reduce__ raises
        return False
    return True


def clean_namespace(hparams: MutableMapping[str, Any]) -> None:
    """Remove from ``hparams`` what can't be pickled, with a warning for each.

    Args:
        hparams: changed in place.
    """
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        rank_zero_warn(
            f"The hyperparameter {name!r} was removed because it cannot be pickled. "
            f"Leave it out yourself with `self.save_hyperparameters(ignore=[{name!r}])`."
        )
        del hparams[name]


# --- the arguments of __init__ --------------------------------------------------------------------------------------


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """The names that ``cls.__init__`` has for the instance, for ``*args`` and for ``**kwargs``; None for those it lacks.

    Example::

        >>> class Model:
        ...     def __init__(self, width, *rest, **more): ...
        >>> parse_class_init_keys(Model)
        ('self', 'rest', 'more')
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())  # type: ignore[misc]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    more = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    return parameters[0].name, rest, more


def get_init_args(frame: FrameType) -> dict[str, Any]:
    """The arguments that the ``__init__`` running in ``frame`` was given, ``**kwargs`` spread out; without ``self`` and ``*args``.

    Args:
        frame: of any function; the result is empty if it is no ``__init__``.
    """
    instance = _instance_of(frame)
    if instance is None:
        return {}
    names, _, more, values = inspect.getargvalues(frame)
    arguments = {name: values[name] for name in names[1:] if name in values}  # a `del` may have removed some
    for name, value in arguments.items():
        if type(value) is type(dataclasses.MISSING) or type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
            arguments[name] = getattr(instance, name)  # a dataclass's __init__ makes the default itself
    return {**arguments, **(values.get(more) or {})} if more else arguments


def _instance_of(frame: FrameType) -> Any:
    """The object that the ``__init__`` running in ``frame`` initialises, or None if it runs something else."""
    code = frame.f_code
    if code.co_name != "__init__" or code.co_argcount == 0:
        return None
    return frame.f_locals.get(code.co_varnames[0])


def _init_frames(frame: FrameType | None, instance: Any) -> Iterator[FrameType]:
    """The frames of ``__init__`` of one object, innermost first: its class's and those of the bases it has called."""
    while frame is not None:
        found = _instance_of(frame)
        if found is not None and (instance is None or found is instance):
            instance = found
            yield frame
        frame = frame.f_back


def collect_init_args(
    frame: FrameType, path_args: list[dict[str, Any]], inside: bool = False, classes: tuple[type, ...] = ()
) -> list[dict[str, Any]]:
    """The arguments of each ``__init__`` on the way to ``frame`` that initialises the same object, innermost first.

    Args:
        frame: where to begin.
        path_args: what was collected so far; extended and returned.
        inside: has no effect; whether a frame belongs is seen from the object.
        classes: collect only if the object is an instance of one of these.
    """
    path_args.extend(get_init_args(init) for init in _init_frames(frame, None) if not classes or isinstance(_instance_of(init), classes))
    return path_args


def save_hyperparameters(
    obj: Any,
    *args: Any,
    ignore: Sequence[str] | str | None = None,
    frame: FrameType | None = None,
    given_hparams: dict[str, Any] | None = None,
) -> None:
    """What ``obj.save_hyperparameters(*args)`` does; see there.

    Args:
        obj: a module, a datamodule, or another :class:`HyperparametersMixin`.
        *args: names of arguments, or a container of hyperparameters.
        ignore: names to leave out.
        frame: where to look for the ``__init__`` of ``obj``; the caller's if not given.
        given_hparams: the arguments of ``__init__``, if they should not be looked for.

    Raises:
        KeyError: if there is no argument of a given name.
        ValueError: if a container of another type is given.
    """
    if len(args) == 1 and not isinstance(args[0], str) and _is_empty(args[0]):
        return
    ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
    arguments: dict[str, Any] = dict(given_hparams or {})
    if given_hparams is None:
        current = inspect.currentframe()
        for init in _init_frames(frame or (current.f_back if current is not None else None), obj):
            arguments.update(get_init_args(init))
    arguments = {name: value for name, value in arguments.items() if name not in ignored}
    name, hparams = _chosen(obj, args, arguments, ignored)
    obj._hparams_name = name
    if ignored:
        obj.remove_ignored_hparams(sorted(ignored))
    for key, value in () if _is_omega(hparams) else hparams.items():
        if isinstance(value, nn.Module):
            rank_zero_warn(
                f"The hyperparameter {key!r} is an `nn.Module`, whose weights checkpoints hold already. "
                f"Leave it out with `self.save_hyperparameters(ignore=[{key!r}])`."
            )
    obj._set_hparams(hparams)
    obj._hparams_initial = copy_of(obj.hparams)


def _chosen(obj: Any, args: tuple[Any, ...], arguments: dict[str, Any], ignored: set[str]) -> tuple[str | None, Any]:
    """The hyperparameters that ``args`` ask for, and the argument that held them (``"kwargs"`` if they are arguments themselves)."""
    if not args:
        return ("kwargs" if arguments else None), arguments
    names = [arg for arg in args if isinstance(arg, str) and arg not in ignored]
    containers = [arg for arg in args if not isinstance(arg, str)]
    for name in names:
        if name not in arguments:
            raise KeyError(
                f"save_hyperparameters({name!r}): `{type(obj).__qualname__}.__init__` has no argument {name!r}; "
                f"it has {sorted(arguments)}. To save a value under a name of its own: save_hyperparameters({{{name!r}: value}})."
            )
    if not containers:
        # a container saved earlier stays the argument that gets all of them back
        earlier = getattr(obj, "_hparams_name", None)
        return (earlier if earlier in arguments else "kwargs"), {name: arguments[name] for name in names}
    if len(containers) == 1 and not names:
        hparams = _without(as_hparams(containers[0]), ignored)
    else:
        entries = {key: value for container in containers for key, value in as_hparams(container).items()}
        entries.update((name, arguments[name]) for name in names)
        hparams = _without(entries, ignored)
    holder = next((name for name, value in arguments.items() if any(_same(value, container) for container in containers)), None)
    return holder, hparams


def _same(value: Any, container: Any) -> bool:
    return value is container or (type(value) is type(container) and isinstance(value, (dict, Namespace)) and value == container)


def _is_empty(container: Any) -> bool:
    if isinstance(container, Namespace):
        return not vars(container)
    return container is None or (isinstance(container, (Mapping, list, tuple)) and not container)


def _is_omega(value: Any) -> bool:
    return type(value).__module__.startswith("omegaconf.")


def _without(hparams: Any, ignored: set[str]) -> Any:
    if not any(name in hparams for name in ignored):
        return hparams
    kept = [key for key in hparams if key not in ignored]
    if _is_omega(hparams):
        from omegaconf import OmegaConf

        return OmegaConf.masked_copy(hparams, kept)
    return {key: hparams[key] for key in kept}


def as_hparams(hparams: Any) -> Any:
    """``hparams`` as an :class:`AttributeDict`; an OmegaConf container stays what it is.

    Raises:
        ValueError: if it is neither a mapping, a ``Namespace`` nor a dataclass instance.
    """
    if _is_omega(hparams):
        return hparams
    if isinstance(hparams, Namespace):
        return AttributeDict(vars(hparams))
    if isinstance(hparams, Mapping):
        return AttributeDict(hparams)
    if dataclasses.is_dataclass(hparams) and not isinstance(hparams, type):
        return AttributeDict({field.name: getattr(hparams, field.name) for field in dataclasses.fields(hparams)})
    given = f"{type(hparams).__module__}.{type(hparams).__qualname__}"
    if isinstance(hparams, PRIMITIVES):
        raise ValueError(f"Hyperparameters can't be a primitive ({given} {hparams!r}): pass the name of an argument, or a dict of them.")
    raise ValueError(
        f"Unsupported type of hyperparameters {given}: pass names of arguments, a dict, a Namespace, a dataclass or OmegaConf."
    )


def copy_of(hparams: Any) -> Any:
    """A deep copy that shares modules and tensors, which may be large, and what can't be copied."""
    if not isinstance(hparams, dict):
        return copy.deepcopy(hparams)
    result = type(hparams)()
    for name, value in hparams.items():
        try:
            result[name] = value if isinstance(value, (nn.Module, Tensor)) else copy.deepcopy(value)
        except Exception:  # locks, generators, handles, whatever __deepcopy__ raises: they are shown, not used
            result[name] = value
    return result


# --- attributes of a module and what belongs to it ------------------------------------------------------------------


def _holders(model: pl.LightningModule, attribute: str) -> list[Any]:
    """Whatever of the module, its hyperparameters and the datamodule has the attribute; most specific first."""
    holders: list[Any] = []
    trainer = getattr(model, "_trainer", None)
    if hasattr(model, attribute):
        holders.append(model)
    hparams = getattr(model, "hparams", None)
    if hparams is not None and (attribute in hparams if isinstance(hparams, Mapping) else hasattr(hparams, attribute)):
        holders.append(hparams)
    if trainer is not None and trainer.datamodule is not None:
        datamodule = trainer.datamodule
        if hasattr(datamodule, attribute):
            holders.append(datamodule)
        if attribute in datamodule.hparams:
            holders.append(datamodule.hparams)
    if not holders:
        raise AttributeError(
            f"{attribute!r} is neither an attribute nor a hyperparameter of {type(model).__name__}, nor of the datamodule."
        )
    return holders


def lightning_hasattr(model: pl.LightningModule, attribute: str) -> bool:
    """Whether ``attribute`` is an attribute or hyperparameter of the module, or of its trainer's datamodule."""
    try:
        return bool(_holders(model, attribute))
    except AttributeError:
        return False


def lightning_getattr(model: pl.LightningModule, attribute: str) -> Any:
    """The value of ``attribute``: the datamodule's if it has one, else the hyperparameter, else the module's.

    Raises:
        AttributeError: if there is none.
    """
    holder = _holders(model, attribute)[-1]
    return holder[attribute] if isinstance(holder, Mapping) else getattr(holder, attribute)


def lightning_setattr(model: pl.LightningModule, attribute: str, value: Any) -> None:
    """Set ``attribute`` wherever it exists: on the module, its hyperparameters, and the datamodule.

    Raises:
        AttributeError: if there is none.
    """
    for holder in _holders(model, attribute):
        if isinstance(holder, MutableMapping):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)
