"""One seed for every random generator, and their states as plain data."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
from typing import Any

import torch

from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn

__all__ = ["collect_rng_states", "pl_worker_init_function", "reset_seed", "seed_everything", "set_rng_states"]

log = logging.getLogger(__name__)
log_seed = rank_zero_only(log.info)

MIN_SEED = 0
MAX_SEED = 2**32 - 1  # numpy's generator takes no more


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed python's, numpy's and torch's random generators, on every device, and remember the seed for child processes.

    Args:
        seed: from 0 to 4294967295. None takes the environment variable ``PL_GLOBAL_SEED``, or 0 if that is not set.
        workers: whether the worker processes of loaders that have no ``worker_init_fn`` get seeds of their own.
        verbose: whether to log the seed.

    Returns:
        The seed.

    Raises:
        ValueError: if the seed, or that of the environment, is not a whole number within the bounds.

    Example::

        >>> seed_everything(42)
        42
        >>> first = torch.rand(2)
        >>> seed_everything(42)
        42
        >>> torch.equal(first, torch.rand(2))
        True
    """
    if seed is None:
        seed = _seed_from_environment()
        if seed is None:
            seed = 0
            rank_zero_warn("No seed was given, and PL_GLOBAL_SEED is not set: the seed is 0.")
    else:
        seed = _checked(seed, "seed_everything(seed=...)")
    if verbose:
        log_seed(f"Seed set to {seed}")
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    _seed_all(seed, seed, seed)
    return seed


def reset_seed() -> None:
    """Seed everything again as the last :func:`seed_everything` did, in this process or its parent; without one do nothing."""
    seed = _seed_from_environment()
    if seed is not None:
        seed_everything(seed, workers=os.environ.get("PL_SEED_WORKERS", "0") == "1", verbose=False)


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Give a loader's worker process seeds of its own: for each worker, each rank and each generator another.

    They follow from the seed of the training process, so the same run gives the same numbers again. For the
    ``worker_init_fn`` of a :class:`~torch.utils.data.DataLoader`; ``seed_everything(workers=True)`` has it set.

    Args:
        worker_id: the number of the worker.
        rank: the global rank of the training process; None for the rank known here.
    """
    rank = rank_zero_only.rank if rank is None else rank  # type: ignore[attr-defined]
    base = torch.initial_seed() - worker_id  # torch has added the number of the worker to the process's seed
    digest = hashlib.sha256(f"{base}/{rank}/{worker_id}".encode()).digest()
    python_seed, torch_seed = int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big")
    _seed_all(python_seed, int.from_bytes(digest[24:28], "big"), torch_seed)


def collect_rng_states(include_cuda: bool = True) -> dict[str, Any]:
    """The states of the random generators of python, numpy, torch and each CUDA device.

    It consists of tensors, lists, tuples and numbers alone, so that ``torch.load(weights_only=True)`` reads it. numpy is
    in it if its generator was ever used, the CUDA devices if CUDA was: looking wakes no device up.

    Args:
        include_cuda: whether to take the CUDA devices in.

    Example::

        >>> states = collect_rng_states()
        >>> first = torch.rand(2)
        >>> set_rng_states(states)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy.random" in sys.modules:
        import numpy as np

        states["numpy"] = _without_arrays(np.random.get_state(legacy=False))
    if include_cuda:
        states["torch.cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return states


def set_rng_states(states: dict[str, Any]) -> None:
    """Let the random generators continue from what :func:`collect_rng_states` returned.

    Generators that are not in ``states`` stay as they are; so do CUDA devices, where there are more or fewer of them now.
    """
    torch.set_rng_state(states["torch"].cpu())
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in states:
        import numpy as np

        np.random.set_state(_with_arrays(states["numpy"]))
    for device, state in enumerate(states.get("torch.cuda", ())):
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(state.cpu(), device)


def _seed_all(python_seed: int, numpy_seed: int, torch_seed: int) -> None:
    import numpy as np

    random.seed(python_seed)
    np.random.seed(numpy_seed)
    torch.manual_seed(torch_seed)


def _seed_from_environment() -> int | None:
    text = os.environ.get("PL_GLOBAL_SEED")
    return None if text is None else _checked(text, "the environment variable PL_GLOBAL_SEED")


def _checked(seed: Any, source: str) -> int:
    try:
        value = int(seed)
        whole = isinstance(seed, str) or value == seed
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"Invalid seed {seed!r} from {source}: it must be a whole number from {MIN_SEED} to {MAX_SEED}.")
    if not MIN_SEED <= value <= MAX_SEED:
        raise ValueError(f"The seed {value} from {source} is not in bounds: numpy accepts from {MIN_SEED} to {MAX_SEED}.")
    return value


def _without_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """numpy's state with lists for arrays, and numbers that are Python's own."""
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            plain[key] = _without_arrays(value)
        else:
            plain[key] = value.tolist() if hasattr(value, "tolist") else value
    return plain


def _with_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_without_arrays`: each of numpy's bit generators takes its words as an array."""
    import numpy as np

    word = np.uint32 if state["bit_generator"] == "MT19937" else np.uint64
    inner = {key: np.asarray(value, dtype=word) if isinstance(value, list) else value for key, value in state["state"].items()}
    buffers = {key: np.asarray(value, dtype=word) for key, value in state.items() if isinstance(value, list)}
    return {**state, **buffers, "state": inner}
