"""Hooks, resolved once per run: who overrides what, in which order, bound and ready to call."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.hooks import EVENTS as STRATEGY_EVENTS
from lightning.fabric.strategies.hooks import StrategyHooks
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.callbacks.checkpoint import Checkpoint
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.hooks import DATA_HOOKS, EVENT_HOOKS, MODULE_HOOKS, REMOVED_HOOKS
from lightning.pytorch.core.module import LightningModule

if TYPE_CHECKING:
    from lightning.pytorch.metrics import Metrics

Hook = Callable[..., Any]

SETTABLE_HOOKS = frozenset((*EVENT_HOOKS, *MODULE_HOOKS, *DATA_HOOKS, "clip_gradients"))

SAVED_AT = ("on_train_batch_end", "on_validation_end")  # where checkpoint callbacks come after the module, beside the epoch's end

# Removed hooks of the module whose results code relies on, and where they were called; the other removed ones only warn.
REFUSED_HOOKS = {"training_epoch_end": ("fit",), "validation_epoch_end": ("fit", "validate"), "test_epoch_end": ("test",)}


def no_op(*args: Any) -> None:
    """The hook that nobody overrides: all of them are this one function."""


def override_of(owner: Any, name: str, base: type) -> Hook | None:
    """The bound method ``name`` of ``owner`` if its class, or the instance itself, overrides that of ``base``."""
    if name in owner.__dict__:
        return getattr(owner, name)  # type: ignore[no-any-return]
    if getattr(type(owner), name, None) is getattr(base, name, None):
        return None
    return getattr(owner, name)  # type: ignore[no-any-return]


class Hooks:
    """One attribute for each event: call it with the arguments of the module's hook of that name.

    For each event the callbacks come in their order, then the module. Where checkpoint callbacks save, they come after the module, so that
    a checkpoint holds what its hook did; their ``on_train_epoch_end`` is an event of its own, ``on_train_epoch_end_checkpoints``.

    Args:
        trainer: passed to the callbacks as their first argument.
        module: the module, passed to the callbacks as their second.
        callbacks: in the order in which they run.
        metrics: told which hook runs, so that ``self.log`` knows where it is called from.
        profiler: spans around each hook; None for no spans.
    """

    def __init__(
        self, trainer: Any, module: LightningModule, callbacks: Sequence[Callback], metrics: Metrics, profiler: Any = None
    ) -> None:
        self._context = trainer, module, metrics, profiler
        self._resolve_all(callbacks)

    def _resolve_all(self, callbacks: Sequence[Callback]) -> None:
        trainer, module, metrics, profiler = self._context
        # What a checkpoint callback saves must hold what the module, and at the epoch's end schedulers, did.
        savers = [c for c in callbacks if isinstance(c, Checkpoint)]
        others = [c for c in callbacks if not isinstance(c, Checkpoint)]
        for name in EVENT_HOOKS:
            heard, last = (others, []) if name == "on_train_epoch_end" else (others, savers) if name in SAVED_AT else (callbacks, [])
            setattr(self, name, _resolve(name, trainer, module, heard, metrics, profiler, last))
        self.on_train_epoch_end_checkpoints = _resolve("on_train_epoch_end", trainer, None, savers, metrics, profiler)
        for name in STRATEGY_EVENTS:
            own = override_of(trainer.strategy, name, StrategyHooks)
            if own is not None:
                setattr(self, name, _followed_by(getattr(self, name), own))
        self._owners = [module, *callbacks]
        self._set_on_instances = _set_on_instances(self._owners)

    def refresh(self, callbacks: Sequence[Callback]) -> bool:
        """Resolve anew if callbacks came or went, or hooks were set on an instance, in mid-run.

        Returns:
            whether anything has changed.
        """
        owners = [self._context[1], *callbacks]
        if list(map(id, owners)) == list(map(id, self._owners)) and _set_on_instances(owners) == self._set_on_instances:
            return False
        self._resolve_all(callbacks)
        return True

    def __getattr__(self, name: str) -> Hook:  # for the type checker: __init__ sets one attribute per event
        raise AttributeError(name)


def _set_on_instances(owners: Sequence[Any]) -> list[dict[str, Any]]:
    """The hooks that were set on the instances themselves, for each owner."""
    return [{name: vars(owner)[name] for name in vars(owner).keys() & SETTABLE_HOOKS} for owner in owners]


def _resolve(
    name: str,
    trainer: Any,
    module: LightningModule | None,
    callbacks: Sequence[Callback],
    metrics: Metrics,
    profiler: Any,
    last: Sequence[Callback] = (),
) -> Hook:
    """The function of one event: callbacks, the module, and callbacks that come after it.

    ``module`` is None where only callbacks are asked.
    """
    functions = _heard(callbacks, name, trainer, profiler)
    own = override_of(module, name, LightningModule) if module is not None and hasattr(LightningModule, name) else None
    if own is not None and profiler is not None:
        own = spanned(own, profiler, f"[LightningModule]{type(module).__name__}.{name}")
    if after := _heard(last, name, trainer, profiler):
        functions, own = [*functions, *([] if own is None else [own]), *after], None
    if not functions:
        return no_op if own is None else scoped(own, name, metrics)
    return scoped(_chain(functions, own), name, metrics)


def _followed_by(first: Hook, second: Hook) -> Hook:
    def both(*args: Any) -> Any:
        result = first(*args)
        second(*args)
        return result

    return both


def _heard(callbacks: Sequence[Callback], name: str, trainer: Any, profiler: Any) -> list[Hook]:
    """The functions of those callbacks that listen to an event."""
    functions: list[Hook] = []
    for callback in callbacks:
        function = override_of(callback, name, Callback)
        if function is not None:
            function = partial(function, trainer, trainer.lightning_module)
            functions.append(function if profiler is None else spanned(function, profiler, f"[Callback]{callback.state_key}.{name}"))
    return functions


def _chain(functions: list[Hook], own: Hook | None) -> Hook:
    """One function that calls all; it returns what the module's hook returns, since callbacks' values mean nothing."""

    def call_all(*args: Any) -> Any:
        for function in functions:
            function(*args)
        return own(*args) if own is not None else None

    return call_all


def scoped(function: Hook, name: str, metrics: Metrics) -> Hook:
    """``function`` with ``metrics.scope`` set to ``name`` while it runs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        outer = metrics.scope
        metrics.scope = name
        try:
            return function(*args, **kwargs)
        finally:
            metrics.scope = outer

    return call


def spanned(function: Hook, profiler: Any, action: str) -> Hook:
    """``function`` inside a span of the profiler."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action):
            return function(*args, **kwargs)

    return call


def sorted_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """The callbacks in their order, checkpoint callbacks last."""
    ordinary = [c for c in callbacks if not isinstance(c, Checkpoint)]
    return ordinary + [c for c in callbacks if isinstance(c, Checkpoint)]


def check_names(module: LightningModule, datamodule: LightningDataModule | None, callbacks: Sequence[Callback]) -> None:
    """Find methods that look like hooks and never run: removed and misspelt ones warn.

    Raises:
        NotImplementedError: for a hook of the module that Lightning 2.0 removed and that this run would have called.
    """
    module_hooks = [name for name in (*EVENT_HOOKS, *MODULE_HOOKS, *DATA_HOOKS) if hasattr(LightningModule, name)]
    callback_hooks = [*EVENT_HOOKS, "on_exception", "on_save_checkpoint", "on_load_checkpoint"]
    data_hooks = [*DATA_HOOKS, "on_exception"]
    owners: list[tuple[Any, type, list[str]]] = [(module, LightningModule, module_hooks)]
    owners += [(callback, Callback, callback_hooks) for callback in callbacks]
    if datamodule is not None:
        owners.append((datamodule, LightningDataModule, data_hooks))
    for owner, base, hooks in owners:
        _check_owner(owner, base, hooks)


def _check_owner(owner: Any, base: type, hooks: list[str]) -> None:
    defined = {name for cls in type(owner).__mro__ if cls not in base.__mro__ for name, value in vars(cls).items() if callable(value)}
    known = set(dir(base))
    for name in sorted(defined - known):
        if name in REMOVED_HOOKS and base is not LightningDataModule:
            message = (
                f"`{type(owner).__name__}.{name}` would never run: that hook was removed in Lightning 2.0. "
                f"Use `{REMOVED_HOOKS[name]}` instead."
            )
            if base is LightningModule and owner.trainer.state.fn in REFUSED_HOOKS.get(name, ()):
                raise NotImplementedError(message)
            rank_zero_warn(message)
            continue
        if not name.startswith("_"):
            close = difflib.get_close_matches(name, hooks, n=1, cutoff=0.85)
            if close and close[0] not in defined:
                rank_zero_warn(
                    f"`{type(owner).__name__}.{name}` is not a hook and will not be called by the trainer. Did you mean `{close[0]}`?"
                )
