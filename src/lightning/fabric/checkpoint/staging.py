"""Copies of a checkpoint in host memory, which stay as they are while training changes the original."""

from __future__ import annotations

import copy
import ctypes
import os
import threading
from typing import Any

import torch
from torch import Tensor

PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
PIECE = 1 << 21  # bytes that a thread copies at a time
THREADS = 4  # memory is not faster for more
WORTH_A_THREAD = 8 << 20  # bytes


def tensor_is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a view of memory that can be copied as a whole."""
    return tensor.device.type in ("cpu", "cuda") and tensor.layout is torch.strided and not tensor.is_quantized


class Staging:
    """Memory for copies, used again for each. On a machine with CUDA it is pinned, so that devices copy while training goes on."""

    def __init__(self) -> None:
        self.free: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}
        self.used: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}
        self.copies: dict[int, torch.UntypedStorage] = {}
        self.memo: dict[int, Any] = {}
        self.events: list[torch.cuda.Event] = []
        self.devices: set[torch.device] = set()
        self.moves: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []  # from memory to memory: where to, and from where

    def stage(self, checkpoint: Any) -> Any:
        """A copy of a checkpoint; its tensors are on the CPU, and filled once :meth:`wait` returns.

        The memory of the copy before is used again: it must not be in use any more.
        """
        for key, storages in self.used.items():
            self.free.setdefault(key, []).extend(storages)
        self.used = {}
        result = self._copy(checkpoint)
        move(self.moves)
        for device in self.devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self.events.append(event)
        self.copies, self.memo, self.devices, self.moves = {}, {}, set(), []
        self.free = {}  # what this checkpoint did not need, the next will not either
        return result

    def wait(self) -> None:
        """Wait for devices to have filled the copy. Any thread may call it."""
        for event in self.events:
            event.synchronize()
        self.events = []

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind is list and set(map(type, value)) <= PLAIN:
            return value.copy()
        done = self.memo.get(id(value))
        if done is not None:
            return done[1]
        if isinstance(value, dict):
            result = copy.copy(value)  # with the attributes that a module's state_dict carries
            self.memo[id(value)] = value, result
            for key, part in value.items():
                result[key] = self._copy(part)
            return result
        if kind is list:
            parts: list[Any] = []
            self.memo[id(value)] = value, parts
            parts.extend(self._copy(part) for part in value)
            return parts
        if kind is tuple:
            return tuple(self._copy(part) for part in value)
        result = copy.deepcopy(value)
        self.memo[id(value)] = value, result
        return result

    def _tensor(self, tensor: Tensor) -> Tensor:
        done = self.memo.get(id(tensor))
        if done is not None:
            return done[1]  # type: ignore[no-any-return]
        if tensor.is_meta:
            return tensor
        source = tensor.detach()
        if type(source) is not Tensor and hasattr(source, "__tensor_flatten__"):  # such as a DTensor: what it consists of is copied
            names, context = source.__tensor_flatten__()
            found = {name: getattr(source, name) for name in names}  # tensors, and perhaps the mesh of devices
            parts = {name: self._tensor(part) if isinstance(part, Tensor) else part for name, part in found.items()}
            kind: Any = type(source)
            result: Tensor = kind.__tensor_unflatten__(parts, context, source.size(), source.stride())
        elif type(source) is not Tensor or not tensor_is_plain(source):
            result = source.clone() if source.device.type == "cpu" else source.cpu()
        else:
            source = source.resolve_conj().resolve_neg()
            storage = self._storage(source.untyped_storage())
            result = torch.empty(0, dtype=source.dtype).set_(storage, source.storage_offset(), source.size(), source.stride())
        if isinstance(tensor, torch.nn.Parameter):
            result = torch.nn.Parameter(result, tensor.requires_grad)
        elif tensor.requires_grad and result.is_floating_point():
            result.requires_grad_()
        if attributes := vars(tensor):
            own = vars(result)
            own.update({name: value for name, value in attributes.items() if name not in own})
        self.memo[id(tensor)] = tensor, result
        return result

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """A copy; tensors that share memory share the copy too."""
        done = self.copies.get(storage._cdata)
        if done is not None:
            return done
        cuda = storage.device.type == "cuda"
        key = (storage.nbytes(), cuda)
        spare = self.free.get(key)
        target = spare.pop() if spare else torch.empty(key[0], dtype=torch.uint8, pin_memory=cuda).untyped_storage()
        self.used.setdefault(key, []).append(target)
        if cuda:
            target.copy_(storage, non_blocking=True)
            self.devices.add(storage.device)
        elif key[0] > 0:
            self.moves.append((target, storage))
        self.copies[storage._cdata] = target
        return target


def move(pairs: list[tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> None:
    """Copy from memory to memory with several threads, none of which holds Python's lock while it copies: one can't use all of the bus.

    torch's own threads wait for each other in a loop, which is slow where other programs keep the cores busy.
    """
    total = sum(target.nbytes() for target, _ in pairs)
    pieces = iter(
        [
            (target.data_ptr() + start, source.data_ptr() + start, min(PIECE, target.nbytes() - start))
            for target, source in pairs
            for start in range(0, target.nbytes(), PIECE)
        ]
    )

    def work() -> None:
        while (piece := next(pieces, None)) is not None:
            ctypes.memmove(*piece)

    count = min(THREADS, _cores(), total // WORTH_A_THREAD)
    helpers = [threading.Thread(target=work, name="staging") for _ in range(count - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
