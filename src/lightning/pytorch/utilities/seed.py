"""Keep random numbers out of the way of the run."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from lightning.fabric.utilities.seed import collect_rng_states, set_rng_states

__all__ = ["isolate_rng"]


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Generator[None, None, None]:
    """A context after which the random generators are where they were before: of python, numpy, torch and CUDA.

    Args:
        include_cuda: whether that holds for the generators of the CUDA devices too. False where the context is entered in a
            process that must not touch them.

    Example::

        >>> torch.manual_seed(1)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> with isolate_rng():
        ...     first = torch.rand(1)
        >>> torch.equal(first, torch.rand(1))
        True
    """
    states = collect_rng_states(include_cuda)
    unused = include_cuda and not torch.cuda.is_initialized()
    try:
        yield
    finally:
        set_rng_states(states)
        if unused and torch.cuda.is_initialized():
            for generator in torch.cuda.default_generators:
                generator.manual_seed(generator.initial_seed())  # as they stood before their first use
