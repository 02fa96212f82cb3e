"""The order of samples: counted while it is drawn, and drawn again up to the same place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from marshal import dumps
from typing import Any
from zlib import crc32

from torch.utils.data import BatchSampler

from lightning.fabric.utilities.rank_zero import rank_zero_warn

Expected = dict[str, Any]


class Nothing(list[Any]):
    """The indices of a batch that was given before the run was interrupted: whoever gets them loads nothing."""


class Indices:
    """A sampler, or batch sampler, that knows how much was drawn from it.

    Args:
        inner: the sampler.
        keep: how many of the last draws to remember, so that those which a loader has fetched ahead need not be drawn again; 0 for a
            sampler of which the same random state always draws the same.
        observe: what to call right before the first draw of a pass, for ``first``.
        swallow: how many times ``iter`` shall not reach the sampler: as often as new worker processes make a loader start its
            sampler where the old ones would not have.

    Attributes:
        drawn: how many batches of indices were drawn in the current pass, from the epoch's start.
        digest: tells one order of samples from another.
        first: the random states right before the first draw of this pass.
        ended: whether the sampler was found to have no more.
    """

    def __init__(self, inner: Any, keep: int = 0, observe: Callable[[], Any] | None = None, swallow: int = 0) -> None:
        self.inner = inner
        self.observe = observe
        self.first: Any = None
        self.kept: deque[Any] = deque(maxlen=keep)
        self.swallow = swallow
        self.drawn = self.digest = 0
        self.resumed: Expected | None = None
        self.phantoms = 0
        self.mismatch = self.told = self.ended = False
        self.source: Iterator[Any] = iter(())
        self.returned: deque[Any] = deque()

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __iter__(self) -> Iterator[Any]:
        if self.swallow > 0:
            self.swallow -= 1
            return iter(())
        self.drawn = self.digest = 0
        self.ended = False
        self.first = None
        self.kept.clear()
        self.returned.clear()
        self.source = iter(self.inner)  # now, not with the first draw: some samplers draw their whole order here
        return chain((Nothing() for _ in range(self.phantoms)), self._draw())

    def resume(self, resumed: Expected | None, phantoms: int) -> None:
        """Let the next passes start after some batches.

        Args:
            resumed: ``batches``, the number to pass over, and what :meth:`state` returned; None for a whole pass.
            phantoms: how many empty lists to give before the first indices.
        """
        self.resumed, self.phantoms = resumed, phantoms

    def pass_over(self) -> None:
        """Draw what the interrupted run had used; done by the first draw too."""
        resumed, self.resumed = self.resumed, None
        if resumed is None:
            return
        journal = resumed["journal"]
        target = resumed["batches"] if journal is None else resumed["drawn"]
        while self.drawn < target:
            try:
                self._count(next(self.source))
            except StopIteration:
                self.mismatch = True  # there are fewer samples now
                return
        self._compare(resumed)
        if journal is not None:
            self.returned.extend(journal)
            self.drawn -= len(journal)
        elif self.drawn < resumed["drawn"]:
            self.resumed = resumed  # compared when the loader, which fetches ahead, has drawn as much

    def draw_first(self) -> None:
        """Draw the indices of the first batch before they are asked for, and with them the random numbers that an order takes."""
        for indices in islice(self.source, 1):
            self._count(indices)
            if self.resumed is not None:
                self._compare(self.resumed)
            self.drawn -= 1
            self.returned.append(indices)

    def reach_end(self) -> None:
        """Ask the sampler for more than it has, as was done in the interrupted run: some draw random numbers at their end."""
        if not self.ended:
            self.returned.extend(islice(self.source, 1))
            self.ended = not self.returned

    def _draw(self) -> Iterator[Any]:
        if self.observe is not None and self.first is None:
            self.first = self.observe()
        if self.resumed is not None:
            self.pass_over()
        while self.returned:
            indices = self.returned.popleft()
            self.drawn += 1
            self.kept.append(indices)
            yield indices
        watched = self.resumed
        self.resumed = None
        for indices in self.source:
            # As in _count, without a call for each batch.
            self.drawn += 1
            self.kept.append(indices)
            try:
                several = isinstance(indices, (list, tuple)) and len(indices) > 0
                known = (len(indices), indices[0], indices[-1]) if several else indices
                self.digest = crc32(dumps(known, 0), self.digest)
            except ValueError:
                pass
            if watched is not None and self.drawn == watched["drawn"]:
                self._compare(watched)
                self.warn_of_mismatch()
                watched = None
            yield indices
        self.ended = True

    def _count(self, indices: Any) -> None:
        self.drawn += 1
        try:
            several = isinstance(indices, (list, tuple)) and len(indices) > 0
            known = (len(indices), indices[0], indices[-1]) if several else indices
            self.digest = crc32(dumps(known, 0), self.digest)
        except ValueError:  # indices of some other kind can't be compared
            pass
        self.kept.append(indices)

    def _compare(self, resumed: Expected) -> None:
        if self.drawn == resumed["drawn"] and self.digest != resumed["digest"]:
            self.mismatch = True

    @property
    def total(self) -> int:
        """How much was drawn from the sampler, of which some may be given yet."""
        return self.drawn + len(self.returned)

    def warn_of_mismatch(self) -> None:
        """Tell, once, that the order of the samples is not that of the interrupted run."""
        if self.mismatch and not self.told:
            self.told = True
            name = type(innermost(self.inner)).__name__
            rank_zero_warn(
                f"The sampler {name} did not draw the samples again that the interrupted run had used, so some may "
                "come twice in this epoch, and some not at all. The data or the sampler have changed, or the sampler's order depends on "
                "more than the random state at the start of the epoch: then give it `state_dict` and `load_state_dict`."
            )

    def state(self, batches: int) -> Expected:
        """What :meth:`resume` needs, when ``batches`` of the drawn ones count as used."""
        journal = None
        if self.kept.maxlen:
            ahead = self.drawn - batches
            journal = [*list(self.kept)[len(self.kept) - ahead :], *self.returned]
        return {"drawn": self.total, "ended": self.ended, "first": self.first, "digest": self.digest, "journal": journal}


def innermost(sampler: Any) -> Any:
    """What decides on the order: the sampler within torch's own batch sampler."""
    return innermost(sampler.sampler) if type(sampler) is BatchSampler else sampler
