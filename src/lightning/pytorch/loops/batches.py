"""Batches on their way from a loader to a step: fetched, counted, moved to the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.data import has_iterable_dataset, sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning.pytorch.loops.input_bound import DeviceIdle

Prepare = Callable[[Any], Any]

SHORT = 5e-5  # seconds that are no wait
FIRST_LOOK = 30.0  # seconds of an epoch after which waits are looked at for the first time, if it takes so long
LEAST_SECONDS, LEAST_BATCHES, SHARE = 5.0, 50, 0.3  # from when on, and from which part of the time on, it is worth a word
NEVER = float("inf")


class Waits:
    """How long an epoch has waited for its loader, after its first batch, while the device had nothing to do.

    Args:
        device: says for how much of a wait a device that works behind the host had nothing to do; None where it always has.
        tell: called with this object where it turns out that the loader holds up training, once.

    Attributes:
        seconds: of waiting.
        whole: seconds since the first batch, without ``elsewhere``.
        elsewhere: seconds that were no part of training.
        batches: that were waited for.
    """

    def __init__(self, device: DeviceIdle | None = None, tell: Callable[[Waits], None] | None = None) -> None:
        self.device = device
        self.tell = tell
        self.begin()

    def begin(self) -> None:
        """A new epoch."""
        self.seconds = self.whole = self.elsewhere = 0.0
        self.batches = 0
        self.look_at, self.began = 0.0, NEVER

    def take(self, now: float, index: int) -> None:
        """Look at what was waited until the batch of this number, and again when it will be twice as long."""
        if self.began == NEVER:
            self.began, self.first, self.look_at = now, index, now + FIRST_LOOK
            return
        self.whole, self.batches = now - self.began - self.elsewhere, index - self.first
        self.look_at = now + max(now - self.began, FIRST_LOOK)
        enough = self.whole >= LEAST_SECONDS and self.batches >= LEAST_BATCHES
        if enough and self.tell is not None and self.seconds > SHARE * self.whole:
            tell, self.tell, self.device = self.tell, None, None
            tell(self)


def counted(
    loader: Iterable[Any], start: int, stop: float, prepare: Prepare, begins_at: int = 0, waits: Waits | None = None
) -> Iterator[tuple[Any, bool]]:
    """Yield ``(batch, is_last)`` of a loader whose length is known.

    Args:
        loader: gives raw batches.
        start: the first batch that is wanted, those before it being passed over.
        stop: the number of batches of the epoch, those passed over included.
        prepare: moves a batch to the device.
        begins_at: the number of the batch with which the loader begins; not 0 where it goes on in the middle of an epoch by itself.
        waits: takes the time; the epoch's own.
    """
    index, waits, left = start, waits or Waits(), NEVER
    device = waits.device
    # A loader that is not limited is read to its very end, as by a `for` loop: its sampler and its workers finish.
    for batch in islice(loader, *bounds(start, float("inf") if stop == sized_len(loader) else stop, begins_at)):
        index += 1
        if (now := perf_counter()) - left > SHORT:
            waits.seconds += now - left if device is None else device.idle_between(left, now)
        if now >= waits.look_at:
            waits.take(now, index)
        batch = prepare(batch)  # under the same name: what came from the loader is of no more use
        yield batch, index == stop
        left = perf_counter()
        if device is not None and device.is_timed:
            device.end_step()
    if index > start:
        waits.take(left, index)


def bounds(start: int, stop: float, begins_at: int) -> tuple[int, int | None]:
    """Of the batches that a loader gives, the first that is wanted, and the end: none where an epoch has become shorter than that."""
    first = max(start - begins_at, 0)
    return first, None if stop == float("inf") else max(int(stop) - begins_at, first)


def looked_ahead(
    loader: Iterable[Any], start: int, stop: float, prepare: Prepare, begins_at: int = 0, waits: Waits | None = None
) -> Iterator[tuple[Any, bool]]:
    """Yield ``(batch, is_last)`` of a loader whose length is not known, or not for sure: one raw batch is fetched ahead.

    Args:
        loader: gives raw batches.
        start: as for :func:`counted`, like the others.
        stop: the greatest number of batches, infinity for all.
        prepare: moves a batch to the device.
        begins_at: the number of the batch with which the loader begins.
        waits: takes the time.

    Raises:
        MisconfigurationException: if the loader gives no batch at all.
    """
    source = iter(loader)
    batches = islice(source, *bounds(start, stop, begins_at))
    try:
        batch = next(batches)
    except StopIteration:
        if start == 0:
            kind = type(getattr(loader, "loader", loader)).__name__  # the user's, within what keeps its place
            raise MisconfigurationException(
                f"The training loader, a {kind}, gave no batch in this epoch: there is nothing to train on. "
                "It must give its batches anew in each epoch, which a generator, for one, cannot do."
            ) from None
        return
    index, waits, left = start + 1, waits or Waits(), NEVER
    device = waits.device
    waits.take(perf_counter(), index)
    for following in batches:
        index += 1
        if (now := perf_counter()) - left > SHORT:
            waits.seconds += now - left if device is None else device.idle_between(left, now)
        if now >= waits.look_at:
            waits.take(now, index)
        batch = prepare(batch)
        yield batch, False
        batch = following
        left = perf_counter()
        if device is not None and device.is_timed:
            device.end_step()
    if stop == sized_len(loader) and not has_iterable_dataset(getattr(loader, "loader", loader)):  # of which some give more than they say
        next(source, None)  # as by a `for` loop: its sampler finishes, which may be where it makes ready for the next epoch
    batch, following = prepare(batch), None
    yield batch, True
    waits.take(perf_counter(), index)


def step_with_index(step: Callable[..., Any], name: str) -> Callable[[Any, int], Any]:
    """``step`` as a function of ``(batch, batch_idx)``, whether or not it takes the index.

    Raises:
        MisconfigurationException: if it takes no batch.
    """
    count, variadic, names = parameters_of(step)
    if not variadic and count == 0:
        raise MisconfigurationException(f"`{name}` takes no batch: define it as `{name}(self, batch, batch_idx)`.")
    if "dataloader_iter" in names:
        raise MisconfigurationException(
            f"`{name}(self, dataloader_iter)` is not supported: take `(batch, batch_idx)`, and fetch more from a loader of your own."
        )
    if variadic or count >= 2:
        return step
    return lambda batch, batch_idx: step(batch)


def parameters_of(function: Callable[..., Any]) -> tuple[int, bool, list[str]]:
    """The number of positional parameters of a bound function, whether it takes ``*args``, and the names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0, True, []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional), any(p.kind is p.VAR_POSITIONAL for p in parameters), [p.name for p in parameters]
