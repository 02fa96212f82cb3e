"""A loader that can be continued after any of its batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, MapDataPipe

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.loader_state.common import Batches, Cursor, State
from lightning.fabric.utilities.loader_state.map_style import MapStyle
from lightning.fabric.utilities.loader_state.randomness import is_stateful
from lightning.fabric.utilities.loader_state.stream import Stream
from lightning.fabric.utilities.rank_zero import rank_zero_warn

__all__ = ["ResumableLoader", "has_indices"]


class ResumableLoader:
    """Gives the batches of a loader, and can say where it is: another process goes on with the next batch, bit for bit.

    A pass that nobody interrupts is that of the loader itself: the same batches from the same random numbers. The loader stays as
    it is. After :meth:`load_state_dict` the next ``iter`` gives the rest of the pass:

    - a :class:`~torch.utils.data.DataLoader` of a dataset with indices draws its order again, and loads nothing that was given; its
      workers go on with their own random states;
    - a loader with ``state_dict`` and ``load_state_dict``, or without workers and with a dataset that has them, does so itself;
    - anything else is read again up to the same place, and a warning says so.

    That ``iter`` leaves the random generators of this process as they are, so it does not matter whether they are restored before or after
    it; it must be before the first ``next``, or, without workers, the first batch draws other numbers.

    Args:
        loader: any iterable of batches.
        looks_ahead: whether the loop fetches batches before it has used those before them. Where batches are loaded in this process,
            the random states before each of the last ones are then kept (30 µs for a batch).

    Example::

        >>> import torch
        >>> loader = ResumableLoader(DataLoader(range(4), shuffle=True))
        >>> batches = iter(loader)
        >>> first = next(batches)
        >>> state, rng = loader.state_dict(), torch.get_rng_state()
        >>> rest = [int(batch) for batch in batches]
        >>> other = ResumableLoader(DataLoader(range(4), shuffle=True))
        >>> other.load_state_dict(state)
        >>> [int(batch) for batch in other] == rest
        True
    """

    def __init__(self, loader: Iterable[Any], looks_ahead: bool = False) -> None:
        self.loader = loader
        self.source: MapStyle | Stream = _source(loader, looks_ahead)
        self.cursor: Cursor | None = None
        self.pending: State | None = None

    def look_ahead(self) -> None:
        """Prepare for a loop that fetches batches before it has used those before them; to be called before the first pass."""
        self.source = _source(self.loader, looks_ahead=True)

    def __reduce__(self) -> Any:
        return ResumableLoader, (self.loader, self.source.looks_ahead)  # a running pass stays with the original

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    @property
    def stays(self) -> bool:
        """Whether the next pass depends on more than random states of this process: on workers that stay, or on a place in the data."""
        return self.source.keeps_on

    @property
    def passes_over(self) -> int:
        """The number of batches with which the next ``iter`` does not begin, because an interrupted run was given them."""
        return 0 if self.pending is None else self.pending["batches"] or 0

    @property
    def order_drawn_from(self) -> State | None:
        """The random states from which a sampler of torch's drew the order of this pass, before its first batch; None if not known."""
        return self.source.order_drawn_from if isinstance(self.source, MapStyle) else None

    def __iter__(self) -> Batches:
        self.cursor = None  # with its iterator's workers, if nobody uses them
        pending, self.pending = self.pending, None
        resumes = pending is not None and pending["batches"] is not None
        batches = self.source.resume(pending) if pending is not None and resumes else self.source.open(pending)
        self.cursor = batches.cursor
        return batches

    def close(self) -> None:
        """End the workers that stay between passes; where the loader is can still be asked."""
        for loader in (self.loader, getattr(self.source, "clone", None)):
            if isinstance(loader, DataLoader):
                loader._iterator = None

    def state_dict(self, batches: int | None = None, over: bool = False, reads_on: bool = True) -> State:
        """Where the loader is, as tensors and plain data.

        Args:
            batches: how many batches of this pass are used; None for all that were given. Up to four fewer, where a loop fetches ahead.
            over: whether this pass counts as over, though it may have been left before its end: the next ``iter`` begins a new one.
            reads_on: whether the loop is going to ask for a batch after the last one, as a ``for`` loop does; it matters to samplers that
                draw random numbers at their end.

        Raises:
            ValueError: if ``batches`` is more than were given, or much less.
        """
        if self.pending is not None:
            return self.pending
        if over or self.cursor is None or (batches is None and self.cursor.over):
            at_end = reads_on and self.cursor is not None and self.cursor.given == sized_len(self.loader)
            state = self.source.state_between(at_end)
        else:
            state = self.source.state(self.cursor, self.cursor.given if batches is None else batches)
        return {"kind": self.source.kind, "loader": self.source.describe(), **state}

    def load_state_dict(self, state: State) -> None:
        """Let the next ``iter`` go on where :meth:`state_dict` was called. Warns of what is not as it was then.

        Args:
            state: from :meth:`state_dict`, of a loader like this one.
        """
        if state["kind"] != self.source.kind:
            rank_zero_warn(
                f"The checkpoint was saved with another kind of training loader than this {type(self.loader).__name__}: "
                "in the epoch in which it was saved, the batches that this one gives first are passed over in place of those used."
            )
            return
        self._compare(state["loader"], state["batches"])
        if state["batches"] is None:
            self.source.load_between(state)
        if state["batches"] is not None or self.source.keeps_on:
            self.pending = state

    def _compare(self, saved: State, batches: int | None) -> None:
        here = self.source.describe()
        changed = [f"{name}: {saved.get(name)} then, {value} now" for name, value in here.items() if saved.get(name) != value]
        if not changed:
            return
        others = [name for name in here if saved.get(name) != here[name] and name != "workers"]
        effects = []
        if others and batches:
            effects.append(
                f"the first {batches} batches of the loader as it is are left out, and in this epoch some samples may come twice or never"
            )
        if here["workers"] != saved.get("workers"):
            effects.append("what the dataset draws at random for the rest of the epoch differs; the order of the samples does not")
        if effects:
            rank_zero_warn(f"The training loader is not the one of the checkpoint ({'; '.join(changed)}): {', and '.join(effects)}.")


def _source(loader: Any, looks_ahead: bool) -> MapStyle | Stream:
    return MapStyle(loader, looks_ahead) if has_indices(loader) else Stream(loader, looks_ahead)


def has_indices(loader: Any) -> bool:
    """Whether the loader's order can be drawn without loading anything."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, (IterableDataset, IterDataPipe, MapDataPipe)):
        return False
    if type(loader).__module__.startswith("torchdata."):
        return True  # its own state leaves out what the workers draw at random
    return type(loader).__iter__ is DataLoader.__iter__ and not is_stateful(loader)
