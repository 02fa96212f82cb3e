"""Do it once: functions, messages and warnings on global rank 0 only."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")
R = TypeVar("R")

# Launchers set one of these before Python starts; a run without any of them is rank 0.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")

log = logging.getLogger("lightning.fabric")


class LightningDeprecationWarning(DeprecationWarning):
    """Something that still works and has a better replacement, which the message names."""


def rank_from_environment() -> int | None:
    """The global rank that a launcher put into the environment, or None without a launcher."""
    for name in RANK_VARIABLES:
        value = os.environ.get(name)
        if value is not None:
            return int(value)
    return None


@overload
def rank_zero_only(fn: Callable[..., T]) -> Callable[..., T | None]: ...
@overload
def rank_zero_only(fn: Callable[..., T], default: R) -> Callable[..., T | R]: ...
def rank_zero_only(fn: Callable[..., T], default: Any = None) -> Callable[..., Any]:
    """Make ``fn`` run on global rank 0 only; elsewhere the call returns ``default``.

    The rank is read at each call from ``rank_zero_only.rank``, which the strategy sets as soon as it knows.

    Example::

        >>> @rank_zero_only
        ... def greet():
        ...     return "hello"
        >>> greet()
        'hello'
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            return fn(*args, **kwargs)
        return default

    return wrapped


rank_zero_only.rank = rank_from_environment() or 0  # type: ignore[attr-defined]


# A stacklevel of 4 means the caller of these functions, as code written for Lightning has it; one of its frames is not here.


@rank_zero_only
def rank_zero_warn(message: str | Warning, stacklevel: int = 4, **kwargs: Any) -> None:
    """Warn on rank 0; ``category`` and the other keywords are those of :func:`warnings.warn`."""
    warnings.warn(message, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_info(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log a message of level INFO on rank 0."""
    log.info(*args, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_debug(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log a message of level DEBUG on rank 0."""
    log.debug(*args, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_deprecation(message: str | Warning, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warn of a deprecation on rank 0."""
    kwargs.setdefault("category", LightningDeprecationWarning)
    warnings.warn(message, stacklevel=stacklevel - 2, **kwargs)
