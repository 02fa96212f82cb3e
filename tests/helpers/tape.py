"""A recorder for the CPU: what CUDA graphs are to a GPU, by repeating each operation on the memory that it had when it was recorded."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning.pytorch import LightningModule
from lightning.pytorch.loops import graph_recording
from lightning.pytorch.loops.graph_watch import place

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")  # operations whose result the host would have to wait for


class CannotRecord(RuntimeError):
    """As CUDA raises it in the middle of a capture."""


class Tape(TorchDispatchMode):
    """Keeps the operations with the very tensors that they read and wrote. Nothing of a step counts until it is replayed.

    CUDA runs nothing while it records. Here operations do run, since the CPU has no other way; what they have changed in place is put
    back at the end of the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # tensors that are older than the recording, as they were
        self.made: set[int] = set()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in READS:
            raise CannotRecord(f"{name} is not permitted while recording")
        if name == "detach" or func.is_view:
            result = func(*args, **kwargs)
        else:
            mutable = func._schema.is_mutable or "batch_norm" in name  # whose schema does not tell of running statistics
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, Tensor) and mutable and each.untyped_storage().data_ptr() not in self.made:
                    self.before.setdefault(each.untyped_storage().data_ptr(), (each, each.clone()))
            result = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        inputs = {id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        if not func.is_view and name != "detach":
            self.made.update(each.untyped_storage().data_ptr() for each in outputs if id(each) not in inputs)
        fresh = [each for each in outputs if id(each) not in inputs and not func.is_view and name != "detach"]
        self.operations.append((func, args, kwargs, fresh))
        self.kept.append((args, kwargs, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, fresh in self.operations:
                tensors = tuple(each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
                with torch.autograd._unsafe_preserve_version_counter(tensors):  # autograd sees nothing of a replay
                    result = func(*args, **kwargs)
                again = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
                for old, new in zip(fresh, again[: len(fresh)]):
                    old.data.copy_(new)

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.data.copy_(value)


class TapeRecorder:
    """Records on the CPU.

    Attributes:
        recordings: how often a recording was begun.
        replays: how often one was replayed.
    """

    def __init__(self) -> None:
        self.recordings = self.replays = 0
        self.tape: Tape | None = None
        self.random: Tensor | None = None

    def begin(self) -> None:
        self.recordings += 1
        self.random = torch.get_rng_state()
        self.tape = Tape()
        self.tape.__enter__()

    def _stop(self) -> Tape:
        tape, self.tape = self.tape, None
        assert tape is not None
        assert self.random is not None
        tape.__exit__(None, None, None)
        tape.undo()
        torch.set_rng_state(self.random)  # CUDA draws no random numbers while it records
        return tape

    def end(self) -> Callable[[], None]:
        tape = self._stop()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay

    def abandon(self) -> None:
        if self.tape is not None:
            self._stop()

    @contextmanager
    def noticing(self, watch: Any) -> Iterator[None]:
        """The same as CUDA's synchronisation warnings."""

        class Noticing(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func._schema.name.partition("::")[2] in READS:
                    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
                    watch.note(f"it reads from the device{place(frames)}")
                return func(*args, **(kwargs or {}))

        with Noticing():
            yield


def record_on_tapes(put: Callable[[Any, str, Any], None] = setattr) -> list[TapeRecorder]:
    """Let the CPU record; gives the recorders that are used from now on.

    Args:
        put: sets an attribute, such as the method of ``pytest.MonkeyPatch`` that takes it back.
    """
    used: list[TapeRecorder] = []

    def recorder_of(device: torch.device) -> TapeRecorder:
        used.append(TapeRecorder())
        return used[-1]

    put(graph_recording, "recorder_of", recorder_of)
    return used


class SmallNet(LightningModule):
    """With what keeps running statistics and draws random numbers; its steps note in ``seen`` what others see of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 1))
        self.seen: list[Any] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01, fused=True)
