"""Iterate over a nested collection of loaders at once, or over one after the other."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, count, islice, repeat, zip_longest
from typing import Any, Literal

from torch.utils.data import DataLoader

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.types import _Stateful
from lightning.fabric.utilities.warnings import PossibleUserWarning

__all__ = ["CombinedLoader"]

Mode = Literal["min_size", "max_size_cycle", "max_size", "sequential"]
Build = Callable[[Iterable[Any]], Any]

_INF = float("inf")
_PLACES = 5  # of the last batches: as many as a ResumableLoader may have given that don't count, and one more
_LENGTHS: dict[str, Callable[[list[int | float]], int | float]] = {
    "min_size": lambda lengths: min(lengths, default=0),
    "max_size_cycle": lambda lengths: max(lengths, default=0) if all(lengths) else 0,  # nothing to fill in for an empty one
    "max_size": lambda lengths: max(lengths, default=0),
    "sequential": sum,
}


class CombinedLoader(Iterable[tuple[Any, int, int]]):
    """Several iterables as one: each item is ``(batch, batch_idx, dataloader_idx)``.

    With ``"sequential"`` the batches are those of the first iterable, then those of the second, and so on; ``batch_idx``
    counts within the iterable. With the other modes a batch holds one batch of each iterable, in the same structure as
    ``iterables``, and ``dataloader_idx`` is 0.

    Args:
        iterables: an iterable of batches, or a nested collection of such: lists, tuples, named tuples and dicts. The
            iterables need no length. A collection of plain numbers and strings is itself an iterable of batches.
        mode: when iteration ends.

            - ``min_size``: with the shortest iterable.
            - ``max_size_cycle``: with the longest; the others start again as often as needed.
            - ``max_size``: with the longest; those that ended before give ``None``.
            - ``sequential``: after the last iterable.

    Raises:
        ValueError: if ``mode`` is none of these.

    Example::

        >>> loader = CombinedLoader({"a": range(2), "b": range(10, 13)}, "max_size_cycle")
        >>> for batch, batch_idx, dataloader_idx in loader:
        ...     print(batch, batch_idx, dataloader_idx)
        {'a': 0, 'b': 10} 0 0
        {'a': 1, 'b': 11} 1 0
        {'a': 0, 'b': 12} 2 0
        >>> len(loader)
        3
        >>> list(CombinedLoader([range(1), range(10, 12)], "sequential"))
        [(0, 0, 0), (10, 0, 1), (11, 1, 1)]
    """

    def __init__(self, iterables: Any, mode: Mode = "min_size") -> None:
        if mode not in _LENGTHS:
            raise ValueError(f"CombinedLoader(mode={mode!r}): the mode must be one of {list(_LENGTHS)}.")
        self._iterables = iterables
        self._flattened, self._build = _flatten(iterables)
        self._mode = mode
        self._limits: list[int | float] | None = None
        self._limits_in_use: list[int | float] | None = None
        self._iterator: Iterator[tuple[Any, int, int]] | None = None
        self._progress = _Progress.fresh(len(self._flattened))
        self._loaded: dict[str, Any] | None = None

    @property
    def mode(self) -> str:
        """The mode that this loader was made with."""
        return self._mode

    @property
    def iterables(self) -> Any:
        """The iterables, in the collection that they came in."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The iterables as a flat list. Assigning a list of the same length replaces them from the next ``iter`` on.

        Raises:
            ValueError: if a list of another length is assigned.
        """
        return self._flattened

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        if len(flattened) != len(self._flattened):
            raise ValueError(
                f"CombinedLoader.flattened takes {len(self._flattened)} iterables, as many as there were, and got {len(flattened)}."
            )
        self._flattened = list(flattened)
        self._iterables = self._build(self._flattened)

    @property
    def sampler(self) -> Any:
        """The samplers of the iterables in the collection that those came in; None for those without."""
        return self._build([getattr(loader, "sampler", None) for loader in self._flattened])

    @property
    def batch_sampler(self) -> Any:
        """The batch samplers of the iterables in the collection that those came in; None for those without."""
        return self._build([getattr(loader, "batch_sampler", None) for loader in self._flattened])

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches to take of each iterable at most; None takes them all.

        A number holds for each iterable, a list has one for each; ``float("inf")`` stands for no limit. What is
        assigned counts from the next ``iter`` on. With ``max_size_cycle`` an iterable starts again after so many batches.

        Raises:
            ValueError: if the list has another length than the iterables, or a limit is not a whole number >= 0.
            TypeError: if a limit is not a number.
        """
        return self._limits

    @limits.setter
    def limits(self, limits: float | Sequence[int | float] | None) -> None:
        if limits is None:
            self._limits = None
            return
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        if len(limits) != len(self._flattened):
            raise ValueError(f"CombinedLoader.limits takes one limit for each of {len(self._flattened)} iterables, and got {len(limits)}.")
        self._limits = [_whole(limit) for limit in limits]

    def batch_count(self) -> int | float:
        """How many batches the next iteration gives; infinity where that depends on an iterable without a length.

        Unlike ``len`` it can be asked at any time.

        Example::

            >>> CombinedLoader([range(3), range(5)], "sequential").batch_count()
            8
        """
        return self._count(self._limits)

    def _count(self, limits: list[int | float] | None) -> int | float:
        return _LENGTHS[self._mode](self._sizes(limits))

    def _sizes(self, limits: list[int | float] | None) -> list[int | float]:
        sizes = [_INF if (size := sized_len(loader)) is None else size for loader in self._flattened]
        return sizes if limits is None else [min(pair) for pair in zip(sizes, limits)]

    def __len__(self) -> int:
        """The number of batches of the running iteration, or of the last one.

        Raises:
            RuntimeError: before ``iter`` was called.
            TypeError: if it depends on an iterable without a length.
        """
        if self._iterator is None:
            raise RuntimeError("A CombinedLoader has a length once it is iterated over: call `iter(combined_loader)` first.")
        length = self._count(self._limits_in_use)
        if not isinstance(length, int):
            unsized = [type(loader).__name__ for loader in self._flattened if sized_len(loader) is None]
            raise TypeError(f"This CombinedLoader in mode {self._mode!r} has no length, because these iterables have none: {unsized}.")
        return length

    def __next__(self) -> tuple[Any, int, int]:
        if self._iterator is None:
            raise RuntimeError("Call `iter(combined_loader)` before `next(combined_loader)`.")
        return next(self._iterator)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        self._iterator = None  # frees the workers of the iteration before, unless somebody still uses it
        self._iterator = self._begin()
        return self._iterator

    def batches(self) -> Iterator[Any]:
        """The batches of a new iteration, without indices. Unlike those of ``iter`` its workers end when nobody holds it any more.

        Raises:
            TypeError: if one of the iterables is none.

        Example::

            >>> list(CombinedLoader([range(2), range(10, 12)]).batches())
            [[0, 10], [1, 11]]
        """
        return (batch for batch, _, _ in self._begin())

    def _begin(self) -> Iterator[tuple[Any, int, int]]:
        for place, loader in enumerate(self._flattened):
            if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
                raise TypeError(
                    f"CombinedLoader needs iterables of batches; number {place} of {len(self._flattened)} is of type "
                    f"{type(loader).__name__}: {loader!r}."
                )
        self._limits_in_use = self._limits
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self._progress = _Progress.fresh(len(self._flattened))
        progress = self._progress
        progress.note()
        if loaded is not None and loaded.get("over"):
            progress.ended = True
            return iter(())
        limits = [_INF] * len(self._flattened) if self._limits is None else self._limits
        passes = [_Pass(loader, limit, cursor) for loader, limit, cursor in zip(self._flattened, limits, progress.cursors)]
        if self._mode == "sequential":
            return _one_after_another(passes, progress)
        return _side_by_side(self._mode, passes, progress, self._build)

    def reset(self) -> None:
        """Forget the running iteration, and end the worker processes of the loaders, persistent ones too."""
        self._iterator = None
        self._progress = _Progress.fresh(len(self._flattened))
        for loader in self._flattened:
            if isinstance(loader, DataLoader):
                loader._iterator = None  # where a DataLoader keeps persistent workers; they end with the last reference

    def state_dict(self) -> dict[str, Any]:
        """The states of the iterables that have ``state_dict`` and ``load_state_dict``, and how far each iterable got.

        Empty if none of the iterables has a state. After the last batch, and for iterables that were left half-way, it
        says that the next iteration starts anew.
        """
        if self._loaded is not None:
            return self._loaded
        stateful = [place for place, loader in enumerate(self._flattened) if isinstance(loader, _Stateful)]
        if not stateful:
            return {}
        sizes = self._sizes(self._limits_in_use)
        rewinds = [_rewinds(loader) for loader in self._flattened]
        progress = self._progress.settled(sizes, self._mode == "sequential", _LENGTHS[self._mode](sizes), rewinds)
        states: list[Any] = []
        for place in stateful:
            loader, cursor = self._flattened[place], progress.cursors[place]
            if rewinds[place] and (not cursor.live or (cursor.passes > 0 and self._mode != "max_size_cycle")):
                states.append(loader.state_dict(over=True, reads_on=False))
            else:
                states.append(loader.state_dict() if cursor.live else None)
        return {"loaders": states, **progress.state_dict()}

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state after some of this pass's batches, of which a few more may have been taken already: for side by side modes.

        Each iterable must be a :class:`~lightning.fabric.utilities.loader_state.ResumableLoader`. A pass that is over with these
        batches stays over: the next ``iter`` gives nothing.

        Args:
            batches: how many count.

        Returns:
            what :meth:`load_state_dict` takes. With a warning that of a new pass of an iterable which began one in the batches that don't
            count, and not with their first.
        """
        if self._loaded is not None:
            return self._loaded
        progress, over = self._progress, {"over": True, "dataloader_idx": 0, "batch_idx": batches}
        if progress.ended and batches >= progress.places[-1][0]:
            ends = [loader.state_dict(over=True, reads_on=False) for loader in self._flattened]
            return {**over, "loaders": ends, "cursors": _Progress.fresh(len(ends)).state_dict()["cursors"]}
        places = [place for rows, place in progress.places if rows >= batches]
        if not places or progress.places[-len(places)][0] != batches:
            raise ValueError(f"state_after({batches}): of this pass {[rows for rows, _ in progress.places]} batches can be told apart.")
        states, cursors = [], []
        following = places[1] if len(places) > 1 else places[0]
        for loader, now, (given, passes, starts), (_, _, then) in zip(self._flattened, progress.cursors, places[0], following):
            if passes > 0 and self._mode != "max_size_cycle":
                states.append(loader.state_dict(over=True, reads_on=False))
            elif now.starts not in (starts, min(then, starts + 1)):
                _warn_of_new_pass(loader)
                states.append(loader.state_dict(over=True, reads_on=False))
                passes, given = passes + 1, 0
            else:
                passes, given = (passes, given) if now.starts == starts else (passes + 1, 0)
                states.append(loader.state_dict(given))
            cursors.append([given, passes, True])
        return {"batch_idx": batches, "dataloader_idx": 0, "loaders": states, "cursors": cursors}

    def load_state_dict(self, state_dict: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Let the next ``iter`` continue with the batch after the last one, under its ``batch_idx``.

        Iterables with a state continue by themselves; the others are started and read up to the same place.

        Args:
            state_dict: what :meth:`state_dict` returned, or the bare list of the iterables' states, which says nothing
                about places.

        Raises:
            RuntimeError: if it has not as many states as there are iterables that take one.
        """
        states = state_dict.get("loaders", []) if isinstance(state_dict, dict) else state_dict
        stateful = [loader for loader in self._flattened if isinstance(loader, _Stateful)]
        if not states:
            return
        if len(states) != len(stateful):
            raise RuntimeError(
                f"The checkpoint holds the states of {len(states)} loaders, and {len(stateful)} of this CombinedLoader's "
                f"{len(self._flattened)} iterables have `state_dict` and `load_state_dict`. Resume with the loaders of the run "
                "that wrote the checkpoint."
            )
        if isinstance(state_dict, dict):
            self._progress = _Progress.from_state_dict(state_dict, len(self._flattened))
            self._loaded = state_dict
        for loader, state in zip(stateful, states):
            if state is not None:
                loader.load_state_dict(state)

    @property
    def passes_over(self) -> int:
        """The number of batches with which the next ``iter`` does not begin, because an interrupted run was given them."""
        return 0 if self._loaded is None else self._progress.batch_idx

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_iterator": None}  # a running iteration stays in its process


def _rewinds(loader: Any) -> bool:
    """Whether a loader tells its place after any batch, as a ResumableLoader does."""
    return hasattr(loader, "passes_over")


def _warn_of_new_pass(loader: Any) -> None:
    rank_zero_warn(
        f"A training loader, a {type(loader.loader).__name__}, began anew in the batches that were fetched ahead, after some of those that "
        "this checkpoint leaves to the resumed run: there it begins anew at once, so that a few of its samples are left out, and the order "
        "is another. The other loaders go on where they were. The checkpoints of the next batches, and of the end of the epoch, are exact."
    )


def _whole(limit: Any) -> int | float:
    if not isinstance(limit, (int, float)):
        raise TypeError(f"CombinedLoader.limits takes numbers, and got {limit!r} of type {type(limit).__name__}.")
    if limit == _INF:
        return _INF
    if limit < 0 or limit != limit // 1:
        raise ValueError(f'CombinedLoader.limits takes whole numbers >= 0, float("inf") or None, and got {limit!r}.')
    return int(limit)


# --- The collection: its leaves, and how to build one like it ---


def _flatten(tree: Any) -> tuple[list[Any], Build]:
    """The iterables in ``tree``, and a function that puts as many other values into a collection of the same structure."""
    children = _children(tree)
    if children is None:
        return [tree], _only
    parts = [_flatten(child) for child in children]
    leaves = [leaf for part, _ in parts for leaf in part]
    if all(build is _only for _, build in parts):
        return leaves, _assembler(tree)
    return leaves, partial(_build_nested, _assembler(tree), [(len(part), build) for part, build in parts])


def _children(tree: Any) -> list[Any] | None:
    """What a collection holds; None if it is to be iterated over as it is: another type, or of plain values only."""
    if type(tree) in (dict, OrderedDict, defaultdict):
        children = list(tree.values())
    elif type(tree) in (list, tuple, deque) or (isinstance(tree, tuple) and hasattr(tree, "_fields")):
        children = list(tree)
    else:
        return None
    return None if all(isinstance(child, (int, float, str)) for child in children) else children


def _assembler(tree: Any) -> Build:
    """A picklable function from values to a collection like ``tree`` of them."""
    kind: Any = type(tree)
    if kind is list or kind is tuple:
        return kind
    if kind is deque:
        return partial(deque, maxlen=tree.maxlen)
    if isinstance(tree, tuple):
        return kind._make  # type: ignore[no-any-return]
    make = partial(defaultdict, tree.default_factory) if kind is defaultdict else kind
    return partial(_build_mapping, make, tuple(tree))


def _only(values: Iterable[Any]) -> Any:
    (value,) = values
    return value


def _build_mapping(make: Build, keys: tuple[Any, ...], values: Iterable[Any]) -> Any:
    return make(zip(keys, values))


def _build_nested(assemble: Build, parts: list[tuple[int, Build]], values: Iterable[Any]) -> Any:
    iterator = iter(values)
    return assemble([build(islice(iterator, size)) for size, build in parts])


# --- The iteration: built of C iterators; Python runs per batch only where places must be known for a state ---


class _Cursor:
    """The place in one iterable.

    Args:
        batches: taken since it was last started.
        passes: how often it was read to its end, or its limit.
        live: whether its own state says where it is: it was started, and then not left half-way.

    Attributes:
        starts: how often it was started here.
    """

    __slots__ = ("batches", "live", "passes", "starts")

    def __init__(self, batches: int = 0, passes: int = 0, live: bool = False) -> None:
        self.batches = batches
        self.passes = passes
        self.live = live
        self.starts = 0


class _Progress:
    """The place in all iterables: the next ``batch_idx``, the iterable that is being read one after the other, each cursor.

    Attributes:
        places: side by side, the last ``batch_idx``, and for each the batches, passes and starts of the cursors then.
        ended: whether this pass was found to have no more.
    """

    __slots__ = ("batch_idx", "cursors", "dataloader_idx", "ended", "places")

    def __init__(self, batch_idx: int, dataloader_idx: int, cursors: list[_Cursor]) -> None:
        self.batch_idx = batch_idx
        self.dataloader_idx = dataloader_idx
        self.cursors = cursors
        self.places: deque[tuple[int, list[tuple[int, int, int]]]] = deque(maxlen=_PLACES)
        self.ended = False

    @classmethod
    def fresh(cls, size: int) -> _Progress:
        return cls(0, 0, [_Cursor() for _ in range(size)])

    def note(self) -> None:
        self.places.append((self.batch_idx, [(cursor.batches, cursor.passes, cursor.starts) for cursor in self.cursors]))

    def restart(self) -> None:
        self.ended = True
        self.batch_idx = self.dataloader_idx = 0
        for cursor in self.cursors:
            cursor.live = cursor.live and cursor.batches == 0
            cursor.batches = cursor.passes = 0

    def settled(self, sizes: list[int | float], sequential: bool, total: int | float, rewinds: list[bool]) -> _Progress:
        """The same place, where what gave its last batch is over, though nobody has asked it for one more.

        One that ``rewinds`` goes on even from there; the state of another would let its next pass be at its end.
        """
        left = sum(sizes[self.dataloader_idx :]) if sequential else total
        if 0 < self.batch_idx >= left:
            return _Progress.fresh(len(self.cursors))
        each = zip(self.cursors, sizes, rewinds)
        cursors = [_Cursor(0, c.passes + 1) if 0 < c.batches >= size and not again else c for c, size, again in each]
        return _Progress(self.batch_idx, self.dataloader_idx, cursors)

    def state_dict(self) -> dict[str, Any]:
        cursors = [[cursor.batches, cursor.passes, cursor.live] for cursor in self.cursors]
        return {"batch_idx": self.batch_idx, "dataloader_idx": self.dataloader_idx, "cursors": cursors}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], size: int) -> _Progress:
        if len(state["cursors"]) != size:
            raise RuntimeError(f"The checkpoint was written with {len(state['cursors'])} loaders, and this CombinedLoader has {size}.")
        return cls(state["batch_idx"], state["dataloader_idx"], [_Cursor(*cursor) for cursor in state["cursors"]])


class _Pass:
    """One iterable, how many batches to take in a pass over it, and where it stands."""

    __slots__ = ("cursor", "limit", "loader", "stateful")

    def __init__(self, loader: Any, limit: int | float, cursor: _Cursor) -> None:
        self.loader = loader
        self.limit = limit
        self.cursor = cursor
        self.stateful = isinstance(loader, _Stateful)

    def start(self, tracked: bool = False) -> Iterator[Any]:
        """The batches from the cursor on; the cursor follows if ``tracked``."""
        done = self.cursor.batches
        self.cursor.live = True
        self.cursor.starts += 1
        iterator = iter(self.loader)
        if done and not self.stateful:
            deque(islice(iterator, done), maxlen=0)
        if self.limit != _INF:
            iterator = islice(iterator, max(0, int(self.limit) - done))
        return self._track(iterator) if tracked else iterator

    def _track(self, iterator: Iterator[Any]) -> Iterator[Any]:
        cursor = self.cursor
        for batch in iterator:
            cursor.batches += 1
            yield batch
        cursor.live = cursor.batches < self.limit
        cursor.batches = 0
        cursor.passes += 1


def _side_by_side(mode: str, passes: list[_Pass], progress: _Progress, build: Build) -> Iterator[tuple[Any, int, int]]:
    tracked = any(each.stateful for each in passes)
    ended = [mode != "max_size_cycle" and each.cursor.passes > 0 for each in passes]
    iterators: list[Iterator[Any]] = [iter(()) if over else each.start(tracked) for each, over in zip(passes, ended)]
    rows: Iterator[Any]
    if mode == "max_size_cycle":
        rows = _cycle(passes, iterators, tracked)
    else:
        rows = zip(*iterators) if mode == "min_size" else zip_longest(*iterators)
    first = progress.batch_idx
    if tracked:
        progress.places.clear()
        progress.note()
        rows = _count_rows(rows, progress)
    return zip(map(build, rows), count(first), repeat(0))


def _count_rows(rows: Iterator[Any], progress: _Progress) -> Iterator[Any]:
    for row in rows:
        progress.batch_idx += 1
        progress.note()
        yield row
        del row  # which `zip` fills again, and would keep if it could not
    progress.restart()


def _cycle(passes: list[_Pass], iterators: list[Iterator[Any]], tracked: bool) -> Iterator[list[Any]]:
    """Rows of one batch of each; what ends starts again, until each has been at its end."""
    unfinished = {place for place, each in enumerate(passes) if each.cursor.passes == 0}
    nothing = object()
    while unfinished:
        row = []
        for place, iterator in enumerate(iterators):
            batch = next(iterator, nothing)
            if batch is nothing:
                unfinished.discard(place)
                if not unfinished:
                    return
                iterators[place] = passes[place].start(tracked)
                batch = next(iterators[place], nothing)
                if batch is nothing:
                    _warn_of_single_pass(place, passes[place])
                    return
            row.append(batch)
        yield row


def _warn_of_single_pass(place: int, each: _Pass) -> None:
    if each.limit > 0 and sized_len(each.loader) != 0:
        rank_zero_warn(
            f"In mode 'max_size_cycle' iterable number {place} ({type(each.loader).__name__}) gave no batch when it was started "
            "again, so iteration ends before the longest iterable does. It is empty, or can be read only once, like a generator; "
            "give an iterable that starts anew at each `iter`.",
            category=PossibleUserWarning,
        )


def _one_after_another(passes: list[_Pass], progress: _Progress) -> Iterator[tuple[Any, int, int]]:
    """The batches of each in turn; only the one being read is started, the first of them here and now."""
    todo = [place for place, each in enumerate(passes) if each.limit > 0 and each.cursor.passes == 0]
    tracked = any(each.stateful for each in passes)
    ready = [passes[place].start(tracked) for place in todo[:1]]

    def parts() -> Iterator[Iterator[tuple[Any, int, int]]]:
        for place in todo:
            first = passes[place].cursor.batches
            part = zip(ready.pop() if ready else passes[place].start(tracked), count(first), repeat(place))
            yield _count_items(part, progress) if tracked else part
            del part  # and with it the workers, before the next one starts
        progress.restart()

    return chain.from_iterable(parts())


def _count_items(part: Iterator[tuple[Any, int, int]], progress: _Progress) -> Iterator[tuple[Any, int, int]]:
    for item in part:
        progress.batch_idx, progress.dataloader_idx = item[1] + 1, item[2]
        yield item
        del item
