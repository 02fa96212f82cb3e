"""``self.log``: where values go, and the flush, which is the only place where they are read from the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.delivery import Delivery
from lightning.pytorch.metric_entry import BATCH_DEFAULTS, BATCH_TRAIN, Entry, check_value, is_metric, resolve_options
from lightning.pytorch.reduction import reduce_epoch, reduce_steps

if TYPE_CHECKING:
    from lightning.pytorch.core.module import LightningModule

Entries = dict[tuple[Any, str, Any], Entry]

NEVER = float("inf")
NOTHING = -1  # the serial of no batch
PUBLISHED = ("_callback", "_steps", "_logged", "_bar", "_bar_snapshot")


class HostCopy:
    """Values on their way to the host: one copy for each device that holds any, without waiting for it.

    Args:
        values: tensors of one element, or numbers, by name.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.copies: list[tuple[list[str], Tensor, Any]] = []
        by_device: dict[torch.device, list[str]] = {}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.device.type != "cpu":
                by_device.setdefault(value.device, []).append(name)
        for device, names in by_device.items():
            wide = torch.float32 if device.type in ("mps", "xla") else torch.float64
            stacked = torch.stack([values[name].detach().to(wide).reshape(()) for name in names])
            if device.type == "cuda":
                host = torch.empty(stacked.shape, dtype=wide, pin_memory=True)
                host.copy_(stacked, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
                self.copies.append((names, host, event))
            else:
                self.copies.append((names, stacked.cpu(), None))

    def ready(self) -> bool:
        """Whether reading would not wait."""
        return all(event is None or event.query() for _, _, event in self.copies)

    def read(self) -> dict[str, float]:
        """The values as floats, in the order of the names; waits if it must."""
        result = {
            name: value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value) for name, value in self.values.items()
        }
        for names, host, event in self.copies:
            if event is not None:
                event.synchronize()
            result.update(zip(names, host.tolist()))
        return result  # type: ignore[return-value]


class Metrics:
    """Collects what hooks log, reduces it, and hands it to callbacks, loggers and the progress bar.

    One object lives as long as its trainer. ``scope``, ``batch``, ``batch_size``, ``dataloader_idx`` and ``serial`` are set by
    the loops: which hook runs, for which batch of which loader, and a count of batches.
    """

    def __init__(self) -> None:
        self.scope: str | None = None
        self.batch: Any = None
        self.batch_size: int | None = None
        self.dataloader_idx: int | None = None
        self.serial = 0
        self.entries: Entries | None = None  # of the loop that runs; None outside of one
        self.strategy: Any = None  # where there are several processes
        self.module: Any = None
        self.disabled = False  # barebones: log() does nothing
        self.loggers: list[Any] = []
        self.delivery = Delivery()
        self.muted = False  # the sanity check sends no rows
        self.discards = False  # whether what is logged right now counts nothing
        self.every = 0  # log_every_n_steps
        self.flush_at: float = NEVER
        self.progress: Any = None  # the fit loop's progress: global_step, epoch
        self.epoch_ended = False  # whether epoch values of the entries count already
        self._callback: dict[str, Any] = {}
        self._steps: dict[str, int] = {}
        self._logged: dict[str, Any] = {}
        self._bar: dict[str, Any] = {}
        self._bar_copy: HostCopy | None = None
        self._bar_snapshot: dict[str, float] = {}
        self._pending: deque[tuple[Any, int]] = deque()

    # ---- self.log -------------------------------------------------------------------------------------------------

    def log(self, module: LightningModule, name: str, value: Any, given: tuple[Any, ...], batch_size: int | None) -> None:
        """Add one value; see :meth:`LightningModule.log`. Runs in every step: no read from the device, no allocation to speak of."""
        entries = self.entries
        entry = entries.get((self.scope, name, self.dataloader_idx)) if entries is not None else None
        if entry is None or entry.given != given:
            entry = self._register(module, name, value, given, entry)
            if entry is None:
                return
        weight: float = 1
        if entry.weighted:
            weight = batch_size if batch_size is not None else (self.batch_size or self._infer_batch_size())
        entry.add(value, weight)
        entry.serial = self.serial
        entry.merged = False

    def _infer_batch_size(self) -> int:
        from lightning.pytorch.utilities.data import extract_batch_size

        self.batch_size = extract_batch_size(self.batch) if self.batch is not None else 1
        return self.batch_size

    def _register(self, module: LightningModule, name: str, value: Any, given: tuple[Any, ...], known: Entry | None) -> Entry | None:
        if self.disabled:
            rank_zero_warn("`self.log` does nothing with `Trainer(barebones=True)`.")
            return None
        check_value(name, value)
        if self.entries is None:
            raise MisconfigurationException(
                f"`self.log({name!r}, ...)` is not possible {f'inside `{self.scope}`' if self.scope else 'here'}: "
                "no training, validation or test loop is running that would collect the value."
            )
        options = resolve_options(name, self.scope, given)
        if known is not None and options != known.options:
            raise MisconfigurationException(
                f"`self.log({name!r}, ...)` was called twice in `{self.scope}` with different arguments; the trainer would not know "
                "which of them to follow. Use the same arguments, or another name."
            )
        if known is not None:
            known.given = given  # the same in other words; of a resumed run it was not known
            return known
        assert self.scope is not None
        if not options.add_dataloader_idx and any(
            other.name == name and other.scope == self.scope and other.dataloader_idx != self.dataloader_idx
            for other in self.entries.values()
        ):
            raise MisconfigurationException(
                f"`self.log({name!r}, add_dataloader_idx=False)` was called for several loaders in `{self.scope}`, whose values would mix "
                "under one name. Give each loader a name of its own, or leave out `add_dataloader_idx`."
            )
        entry = Entry(name, self.scope, self.dataloader_idx, given, options)
        if is_metric(value):
            _find_attribute(module, name, value, options.metric_attribute)
            entry.take_metric()
        self.entries[self.scope, name, self.dataloader_idx] = entry
        return entry

    # ---- loops open and close the collection ------------------------------------------------------------------------

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Forget what is logged inside this context: of a batch that only keeps this process in step with the others."""
        outer, self.entries, self.discards = self.entries, {}, True
        try:
            yield
        finally:
            self.entries, self.discards = outer, False

    @contextmanager
    def collecting(self, entries: Entries) -> Iterator[None]:
        """Collect into ``entries`` inside this context; a validation run nests in the training epoch."""
        outer = (self.entries, self.scope, self.batch, self.batch_size, self.dataloader_idx, self.epoch_ended)
        if self.entries is not None:
            self.merge_steps()
        self.entries, self.scope, self.batch, self.batch_size, self.dataloader_idx, self.epoch_ended = (
            entries,
            None,
            None,
            None,
            None,
            False,
        )
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self.merge_steps()  # what the failed step logged, for on_exception
            raise
        finally:
            self.entries, self.scope, self.batch, self.batch_size, self.dataloader_idx, self.epoch_ended = outer

    def start(self, *loops: Entries) -> None:
        """Forget everything before a task, and what a failed one left in the entries of ``loops``."""
        for entries in loops:
            self.reset(entries)
            entries.clear()
        self._pending.clear()
        self.delivery.open()
        self.muted = False
        self.clear()

    def clear(self) -> None:
        """Forget all values: before each task, and after the sanity check."""
        self._callback, self._steps, self._logged, self._bar = {}, {}, {}, {}
        self._bar_copy, self._bar_snapshot = None, {}

    def send_to(self, loggers: list[Any]) -> None:
        """Take the loggers, also in the middle of a run."""
        self.loggers = loggers
        self.restart_flush(self.progress.stepped)

    def restart_flush(self, stepped: int) -> None:
        """Set when the next flush is due, ``stepped`` batches having been stepped on."""
        wanted = self.loggers or self.strategy is not None  # of several processes, others may have a logger
        self.flush_at = (stepped // self.every + 1) * self.every if wanted and self.every > 0 else NEVER

    # ---- what others read -------------------------------------------------------------------------------------------

    def published(self) -> dict[str, Any]:
        """All that others read, as data."""
        return {name: dict(getattr(self, name)) for name in PUBLISHED}

    def publish(self, values: dict[str, Any]) -> None:
        """Take over what :meth:`published` gave in another process."""
        vars(self).update(values)

    def merge_steps(self) -> None:
        """Bring the step values of the running loop, and its epoch values at its end, into the dictionaries. Reads no device."""
        for entry in (self.entries or {}).values():
            if entry.merged or entry.value is None or entry.scope not in BATCH_DEFAULTS or self.epoch_ended:
                continue
            entry.merged = True
            if entry.borrowed:
                entry.own()
            forked = entry.forked(True)
            if entry.options.prog_bar:
                self._bar[forked] = entry.value
            if entry.options.logger:
                self._logged[forked] = entry.value
            if entry.scope in BATCH_TRAIN:  # decisions on evaluation metrics are made on whole epochs
                fresh = entry.serial == self.serial
                for name in {entry.name + entry.suffix, forked}:
                    self._callback[name] = entry.value
                    if fresh and self.progress is not None:
                        self._steps[name] = self.progress.global_step
        if self.epoch_ended:
            self._merge_epoch()

    def _merge_epoch(self) -> dict[str, Any]:
        """Bring the epoch values of the running loop into the dictionaries; returns what loggers get."""
        for_loggers: dict[str, Any] = {}
        for entry in (self.entries or {}).values():
            if not entry.has_epoch_value:
                continue
            value, forked = entry.epoch_value(), entry.forked(False)
            for name in (entry.name + entry.suffix, forked):
                self._callback[name] = value
                if self.progress is not None:
                    self._steps[name] = self.progress.global_step
            if entry.options.prog_bar:
                self._bar[forked] = value
            if entry.options.logger:
                for_loggers[forked] = self._logged[forked] = value
        return for_loggers

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """All metrics by name, as tensors on the devices where they were logged."""
        self.merge_steps()
        return {name: _as_tensor(value) for name, value in self._callback.items()}

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The metrics that go to the loggers, latest values."""
        self.merge_steps()
        return {name: _as_tensor(value) for name, value in self._logged.items()}

    @property
    def metric_steps(self) -> dict[str, int]:
        """The global step at which each of the callback metrics was measured."""
        self.merge_steps()
        return dict(self._steps)

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The metrics of the progress bar as numbers: the newest that have reached the host; never waits for a device."""
        self.merge_steps()
        if self._bar_copy is None or self._bar_copy.ready():
            if self._bar_copy is not None and self._bar_copy.copies:
                self._bar_snapshot.update(self._bar_copy.read())
            self._bar_copy = HostCopy(dict(self._bar))
            if self._bar_copy.ready():
                self._bar_snapshot.update(self._bar_copy.read())
        return dict(self._bar_snapshot)

    def settle_bar(self) -> None:
        """Make the bar's numbers current, waiting for the device: at the end of an epoch."""
        self.merge_steps()
        self._bar_copy = None
        self._bar_snapshot.update(HostCopy(dict(self._bar)).read())

    def add_callback_metrics(self, values: dict[str, Any]) -> None:
        """Let a callback publish values of its own under ``callback_metrics``."""
        self._callback.update(values)
        if self.progress is not None:
            self._steps.update(dict.fromkeys(values, self.progress.global_step))

    # ---- flush ------------------------------------------------------------------------------------------------------

    def flush(self, stepped: int, step: int, stopping: bool = False) -> None:
        """Start sending the step values to the loggers if due, and deliver what has arrived on the host.

        Args:
            stepped: how many batches were stepped on, which decides what is due.
            step: the x value of the rows.
            stopping: whether a stop was asked for, so that there may be no later step to send.
        """
        due = self.every and stepped % self.every == 0
        if due and self.strategy is not None and self.strategy.world_size > 1:
            serial = NOTHING if self.discards else self.serial
            reduce_steps(self.entries if self.entries is not None else {}, self.strategy, self.module, serial)
        if due or (stopping and self.every):
            self.send_step_values(step)
        self._deliver(wait=False)
        self.restart_flush(stepped)
        if self._pending:
            self.flush_at = stepped + 1  # look again after the next step

    def send_step_values(self, step: int, with_epoch: bool = True) -> None:
        """Start sending the values of the current step to the loggers."""
        self.merge_steps()
        values = {
            entry.forked(True): entry.value
            for entry in (self.entries or {}).values()
            if entry.value is not None
            and entry.options.logger
            and entry.scope in BATCH_DEFAULTS
            and entry.dataloader_idx == self.dataloader_idx
        }
        if values:
            self.send(values, step, with_epoch)

    def send(self, values: dict[str, Any], step: int, with_epoch: bool = True) -> None:
        """Start sending a row to the loggers; rows arrive in the order in which they are sent."""
        self._logged.update(values)
        if not self.loggers or self.muted or not values:
            return
        values = dict(values)
        if "step" in values:  # logging a metric of this name moves the row along the x axis
            step = int(values.pop("step"))
        elif with_epoch:
            values.setdefault("epoch", self.progress.epoch if self.progress is not None else 0)
        self._pending.append((HostCopy(values), step))

    def send_row(self, values: Any, step: int) -> None:
        """Send a row of somebody else's, as it is, in its turn: a dict, or what will be ``ready()`` and can be ``read()`` then."""
        if self.loggers:
            self._pending.append((HostCopy(dict(values)) if isinstance(values, dict) else values, step))
            self._deliver(wait=False)

    def _deliver(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][0].ready()):
            copy, step = self._pending.popleft()
            values = copy.read()
            if not isinstance(copy, HostCopy):
                self._logged.update({name: value for name, value in values.items() if name != "epoch"})
            if "epoch" in values:
                values["epoch"] = int(values["epoch"])
            self.delivery.send(self.loggers, values, step)

    def settle(self) -> None:
        """Deliver everything that was sent, waiting for the device; loggers that take their rows promptly have them then."""
        self._deliver(wait=True)
        self.delivery.settle()

    def flush_loggers(self, seconds: float) -> bool:
        """Deliver everything, and wait for the loggers as long as they get on; returns whether they have everything."""
        self._deliver(wait=True)
        return self.delivery.flush(seconds)

    def close(self) -> None:
        """Deliver everything that was sent, and wait for the loggers."""
        try:
            self._deliver(wait=True)
        finally:  # whatever became of the device
            self.delivery.close()

    def close_epoch(self) -> None:
        """From here on the epoch's values count: hooks of the epoch's end see them."""
        self.merge_steps()
        self.delivery.settle()  # so that what these hooks give to a logger themselves comes after the rows before
        self.epoch_ended = True
        self.reduce_epoch()

    def reduce_epoch(self) -> None:
        """Reduce over all processes the epoch's values that asked for it, and were logged since this was called last."""
        strategy = self.strategy
        if strategy is not None and strategy.world_size > 1 and self.entries is not None:
            reduce_epoch(self.entries, strategy, self.module)

    def end_epoch(self, step: int) -> None:
        """Reduce, publish and log the epoch's values, and start anew."""
        values = self._merge_epoch()
        if values:
            self.send(values, step)
        self.settle()
        self.settle_bar()
        self.forget_unused()
        self.reset(self.entries or {})
        self.epoch_ended = False

    def forget_unused(self) -> None:
        """Drop the entries of names that were not logged in this epoch, so that no later step looks at them."""
        entries = self.entries or {}
        for key in [key for key, entry in entries.items() if entry.is_unused]:
            del entries[key]

    @staticmethod
    def reset(entries: Entries) -> None:
        """Empty the entries; each Metric is reset once."""
        seen: set[int] = set()
        with torch.inference_mode(False):  # a Metric's new state may serve in training as well
            for entry in entries.values():
                if entry.source is not None and id(entry.source) in seen:
                    entry.source = None  # logged under two names: it was reset with the first
                elif entry.source is not None:
                    seen.add(id(entry.source))
                entry.reset()


def _as_tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.get_default_dtype())


def _find_attribute(module: LightningModule, name: str, metric: Any, attribute: str | None) -> None:
    """A logged Metric must be reachable from the module, else it would be neither moved nor saved with it."""
    attributes = {path for path, submodule in module.named_modules() if submodule is metric}
    known = [path for path, submodule in module.named_modules() if is_metric(submodule)]
    if attribute is not None and attribute not in known:
        raise MisconfigurationException(
            f"`self.log({name!r}, ..., metric_attribute={attribute!r})`: {type(module).__name__} has no such Metric; it has {known}."
        )
    if attribute is None and not attributes:
        raise MisconfigurationException(
            f"`self.log({name!r}, ...)` got a Metric that is no attribute of {type(module).__name__}: assign it to `self` in `__init__`, "
            f"or pass `metric_attribute=`. The module has {known or 'no Metrics'}."
        )
