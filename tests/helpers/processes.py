"""Run a function in several real processes, joined in a gloo group, and collect what each returns or raises.

Use it as ``outcomes = run(function, 2, ...)``. The function is called as ``function(rank, size, *arguments)``; it must
stand at the top of its file, and its arguments and result must be plain data.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

# The server imports these once; each process is forked from it, and so starts in milliseconds. Unlike a fork of the test
# process itself, it has no threads whose locks could be held.
PRELOADED = ["torch", "torch._dynamo", "pytest", "lightning.fabric.strategies.ddp", "lightning.pytorch"]


@dataclass
class Outcome:
    """How one process ended: with a value, or with the type, message and traceback of an error."""

    value: Any = None
    error: str | None = None
    message: str = ""
    trace: str = ""
    seconds: float = 0.0


def run(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 60, group: bool = True) -> list[Any]:
    """What the function returned in each process, by rank.

    Args:
        function: called as ``function(rank, size, *arguments)``.
        size: the number of processes.
        arguments: plain data.
        timeout: seconds after which processes that are still running are killed.
        group: join the processes in a gloo group before the call.

    Raises:
        AssertionError: if any of them raised, died, or took too long.
    """
    outcomes = run_to_end(function, size, *arguments, timeout=timeout, group=group)
    failed = [f"rank {rank}: {outcome.trace}" for rank, outcome in enumerate(outcomes) if outcome.error]
    assert not failed, "\n".join(failed)
    return [outcome.value for outcome in outcomes]


def run_to_end(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 60, group: bool = True) -> list[Outcome]:
    """How each process ended, by rank; see :func:`run`."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    where = (sys.modules[function.__module__].__file__, function.__qualname__)
    with tempfile.TemporaryDirectory() as folder:
        children, pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = str(Path(folder) / "store") if group else None
            child = context.Process(target=_child, args=(theirs, where, rank, size, arguments, store, timeout), daemon=True)
            child.start()
            theirs.close()
            children.append(child)
            pipes.append(ours)
        try:
            return _collect(pipes, children, time.monotonic() + timeout)
        finally:
            for child, pipe in zip(children, pipes):
                pipe.close()  # tells the process that it may go
                child.join(5)
                if child.is_alive():
                    child.kill()
                    child.join()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(pipes: list[Any], children: list[Any], deadline: float) -> list[Outcome]:
    outcomes = [Outcome(error="TimeoutError", trace="it was still running (see the stacks on stderr)")] * len(pipes)
    waiting = dict(zip(pipes, range(len(pipes))))
    while waiting and time.monotonic() < deadline:
        for pipe in connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            rank = waiting.pop(pipe)
            try:
                outcomes[rank] = pipe.recv()
            except EOFError:
                children[rank].join(5)
                outcomes[rank] = Outcome(error="Died", trace=f"it died with exit code {children[rank].exitcode}")
    return outcomes


def _child(pipe: Any, where: tuple[str, str], rank: int, size: int, arguments: tuple[Any, ...], store: str | None, timeout: float) -> None:
    import torch

    faulthandler.dump_traceback_later(max(timeout - 1, 1), exit=False)
    # The fork server keeps the environment of the test that started it.
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*does not have many workers")  # on a machine with many cores
    started = time.monotonic()
    try:
        if store is not None:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
        started = time.monotonic()
        outcome = Outcome(value=_load(*where)(rank, size, *arguments))
    except BaseException as error:
        outcome = Outcome(error=type(error).__name__, message=str(error), trace=traceback.format_exc())
    outcome.seconds = time.monotonic() - started
    faulthandler.cancel_dump_traceback_later()
    with suppress(EOFError, OSError):
        pipe.send(outcome)
        pipe.recv()  # until the others are done too: they may still read what this process sent them
    os._exit(0)  # nothing that a failed run left behind can hold up the end


def _load(path: str, qualname: str) -> Callable[..., Any]:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled
    spec.loader.exec_module(module)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]
