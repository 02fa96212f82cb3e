"""Where the parameters of a module are that torch_xla's FSDP has divided, and how they become whole again.

Each process holds, of each parameter, an equal part of its elements in order; the last part is filled up with zeros.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning.fabric.checkpoint import sharded
from lightning.fabric.checkpoint.temporary import temporary_name
from lightning.fabric.strategies import xla_collectives
from lightning.fabric.strategies.xla_device import as_device_data, sync
from lightning.fabric.utilities.cloud_io import local_path
from lightning.fabric.utilities.exceptions import MisconfigurationException

ROOT = "module."  # what the name of everything begins with, below the outermost unit
WRAPPERS = ("_fsdp_wrapped_module.", "_fpw_module.")  # names of torch_xla's modules around the user's
INSTANCE_PATCHES = {  # what torch_xla sets on modules, and what of it stands for a method of the class
    "_nn_linear_forward_original": ("forward",),
    "_xla_checkpointed_forward_original": ("forward", "_xla_checkpointed_forward_no_kwargs"),
}


@dataclass(frozen=True)
class Piece:
    """One parameter of the user's within a divided one; there are several where torch_xla has flattened them into one."""

    name: str
    shape: torch.Size
    offset: int

    @property
    def stop(self) -> int:
        return self.offset + self.shape.numel()


@dataclass(frozen=True)
class Divided:
    """A parameter that is divided among the processes: the part of this process, and what all parts together are."""

    part: Parameter
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> torch.Size:
        """The shape of all parts together."""
        return self.pieces[0].shape if len(self.pieces) == 1 else torch.Size([self.pieces[-1].stop])

    def whole(self, part: Tensor) -> Tensor:
        """What all processes hold, of which ``part`` is what this one does; every process must call it."""
        rows = part.detach() if xla_collectives.world_size() == 1 else xla_collectives.all_gather(part)
        return rows.reshape(-1)[: self.pieces[-1].stop].view(self.shape)

    def own_part(self, whole: Tensor, like: Tensor) -> Tensor:
        """The part of this process, on the CPU."""
        start = xla_collectives.rank() * like.numel()
        part = torch.zeros(like.numel(), dtype=whole.dtype)
        values = whole.detach().cpu().reshape(-1)[start : start + like.numel()]
        part[: values.numel()] = values
        return part.view(like.shape)

    def fill(self, whole: Tensor) -> None:
        """Overwrite the part of this process."""
        with torch.no_grad():
            self.part.copy_(as_device_data(self.own_part(whole, self.part).to(self.part.dtype), self.part.device))


class Layout:
    """What a module was made of before it was divided, and where that is now.

    Args:
        module: the user's, not divided yet.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        state = module.state_dict()
        self.keys = list(state)
        self.metadata = getattr(state, "_metadata", None)
        self.trained: dict[str, bool] = {}
        self.aliases: dict[str, str] = {}  # names of a parameter that several places share, and the first of them
        first: dict[Tensor, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self.aliases[name] = first.setdefault(parameter, name)
            self.trained[name] = parameter.requires_grad
        self.buffers: dict[str, tuple[Any, str, torch.dtype]] = {
            name: (*owner_of(module, name), buffer.dtype) for name, buffer in module.named_buffers()
        }
        self.divided: list[Divided] = []
        self.root: Any = None

    def find(self, root: Module) -> None:
        """Learn where the parameters are, now that ``root`` is torch_xla's FSDP around the module.

        Raises:
            MisconfigurationException: if weights that modules share were divided twice.
        """
        from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel as FSDP

        self.root = root
        units = [(name, unit) for name, unit in root.named_modules() if isinstance(unit, FSDP)]
        for name, unit in units:
            flat = iter(range(len(unit.module.flat_params)))
            for part in unit.sharded_params:
                if "flat_param_" in part._orig_name:
                    names, shapes, _ = unit.module.metadata(next(flat))
                else:
                    names, shapes = [part._orig_name], [part._orig_size]
                self.divided.append(Divided(part, tuple(_pieces(name, names, shapes))))
        twice = {piece.name for each in self.divided for piece in each.pieces} & {n for n, first in self.aliases.items() if n != first}
        if twice:
            name = min(twice)
            raise MisconfigurationException(
                f"{name!r} and {self.aliases[name]!r} share one weight, and auto_wrap_policy has XLAFSDPStrategy divide them apart. Let it "
                "leave the modules that hold them to the outermost unit."
            )
        self._expose(root)

    def _expose(self, root: Any) -> None:
        """Let the module's own ``parameters()``, of which optimizers are made, give those of the outermost unit too."""
        own = set(self.module.modules())
        for (_, holder, name), part in zip(root.full_param_infos, root.sharded_params):
            (holder if holder in own else self.module)._parameters[name] = part

    def of(self, parameter: Tensor) -> Divided | None:
        """What is known of a parameter, as an optimizer holds it."""
        return next((each for each in self.divided if each.part is parameter), None)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def state_dict(self, whole: bool, keep: bool = True) -> dict[str, Any]:
        """The weights of the module under their names.

        Args:
            whole: gathered on the CPU, for which every process must call this; else stand-ins that know the part of this process.
            keep: whether this process gets what is gathered.
        """
        tensors: dict[str, Any] = {}
        for each in self.divided:
            if whole:
                gathered = each.whole(each.part)
                sync()  # one program in all processes, of which only some read the result
                if keep:
                    flat = gathered.cpu().reshape(-1)
                    tensors.update((piece.name, flat[piece.offset : piece.stop].view(piece.shape)) for piece in each.pieces)
            else:
                tensors.update((piece.name, stand_in(each.part, piece)) for piece in each.pieces)
        state: dict[str, Any] = OrderedDict()
        sync()
        for key in self.keys if keep else ():
            if key in self.aliases:
                state[key] = tensors[self.aliases[key]]
            elif key in self.buffers:
                holder, name, dtype = self.buffers[key]
                state[key] = holder._buffers[name].detach().to(dtype).cpu()
            else:
                state[key] = owner_of(self.module, key)[0].get_extra_state()
        if self.metadata is not None:
            state._metadata = self.metadata  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool) -> None:
        """Take whole weights.

        Raises:
            RuntimeError: if ``strict`` and keys do not match, or shapes differ.
        """
        missing, unexpected = [k for k in self.keys if k not in state], [k for k in state if k not in self.keys]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"The weights don't fit: keys that are missing: {missing}; keys that the module does not have: {unexpected}."
            )
        for each in self.divided:
            given = [state[piece.name].reshape(-1) for piece in each.pieces if piece.name in state]
            wrong = [p.name for p in each.pieces if p.name in state and torch.Size(state[p.name].shape) != p.shape]
            if wrong or len(given) not in (0, len(each.pieces)):
                raise RuntimeError(
                    f"The weights don't fit: {wrong or [p.name for p in each.pieces]} have other shapes, or only some are there."
                )
            if given:
                each.fill(torch.cat(given))
        for key, (holder, name, _) in self.buffers.items():
            if key in state:
                holder._buffers[name].copy_(state[key])

    # ---- optimizers -------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Any, whole: bool, keep: bool = True) -> dict[str, Any]:
        """The state of an optimizer; arguments as for :meth:`state_dict`."""
        state: dict[str, Any] = optimizer.state_dict()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        result: dict[int, Any] = {}
        sync()
        for index, values in state["state"].items():
            each = self.of(parameters[index])
            result[index] = {}
            for name, value in values.items():
                if each is not None and isinstance(value, Tensor) and value.shape == each.part.shape and value.dim() > 0:
                    if whole:
                        gathered = each.whole(value)
                        sync()
                        value = gathered.cpu() if keep else None
                    else:
                        value = stand_in(value, Piece(name, each.shape, 0))
                result[index][name] = value
        return {**state, "state": result}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Take a whole state."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own: dict[int, Any] = {}
        for index, values in state["state"].items():
            each = self.of(parameters[index])
            own[index] = {
                name: each.own_part(value, each.part)
                if each is not None and isinstance(value, Tensor) and value.shape == each.shape and value.dim() > 0
                else value
                for name, value in values.items()
            }
        optimizer.load_state_dict({**state, "state": own})

    # ---- the end ----------------------------------------------------------------------------------------------------

    def restore(self, state: Mapping[str, Any]) -> dict[Tensor, Parameter]:
        """Make the module what it was before, with whole parameters on the CPU; returns what took the place of each divided one."""
        for parent in list(self.module.modules()):
            for name, child in list(parent._modules.items()):
                if hasattr(child, "sharded_params"):
                    unit: Any = child
                    parent._modules[name] = unit.module.module
        for module in self.module.modules():
            for mark, patched in INSTANCE_PATCHES.items():
                if mark in vars(module):
                    for name in (mark, *patched):
                        vars(module).pop(name, None)
        for name in [name for name in self.module._parameters if name.startswith("flat_param_")]:
            del self.module._parameters[name]
        made: dict[str, Parameter] = {}
        for name, first in self.aliases.items():
            holder, attribute = owner_of(self.module, name)
            vars(holder).pop(attribute, None)
            holder._parameters.pop(attribute, None)
            if first not in made:
                made[first] = Parameter(state[first], requires_grad=self.trained[first])
            holder._parameters[attribute] = made[first]
        for holder, name, dtype in self.buffers.values():
            holder._buffers[name] = holder._buffers[name].to(dtype).cpu()
        return {each.part: made[each.pieces[0].name] for each in self.divided if len(each.pieces) == 1}


def _pieces(unit: str, names: list[str], shapes: list[torch.Size]) -> Iterator[Piece]:
    offset = 0
    for name, shape in zip(names, shapes):
        full = f"{unit}.{name}" if unit else name
        for wrapper in WRAPPERS:
            full = full.replace(wrapper, "")
        yield Piece(full.removeprefix(ROOT), torch.Size(shape), offset)
        offset += torch.Size(shape).numel()


def owner_of(module: Module, name: str) -> tuple[Module, str]:
    """The submodule that has a parameter or buffer, and its name there."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


# ---- checkpoints to which every process writes its parts --------------------------------------------------------------


def stand_in(part: Tensor, piece: Piece) -> Tensor:
    """A tensor without memory for one that is divided, which knows the part of this process."""
    result = torch.empty(piece.shape, dtype=part.dtype, device="meta")
    result.part, result.piece = part.detach(), piece  # type: ignore[attr-defined]
    return result


def save_divided(checkpoint: dict[str, Any], path: Any, rank: int, in_turns: bool) -> None:
    """Write a checkpoint into a directory, in the form of :mod:`lightning.fabric.checkpoint.sharded`; every process must call it.

    Args:
        checkpoint: with stand-ins for what is divided.
        path: of the directory, on a disk that all processes see.
        rank: of this process.
        in_turns: one process after another holds its parts in the memory of the host.

    Raises:
        ValueError: for a URL.
    """
    target = local_path(path)
    if target is None:
        raise ValueError(f"A sharded checkpoint can't be written to {os.fspath(path)!r}: it needs a disk that all processes see.")
    target = os.path.abspath(target)
    folder = os.path.join(os.path.dirname(target), xla_collectives.broadcast(temporary_name() if rank == 0 else ""))
    found: dict[str, tuple[Tensor, list[Box]]] = {}

    def take(tensor: Tensor, name: str) -> Tensor:
        part = vars(tensor).get("part")
        if part is None:
            return tensor
        found[name] = tensor, list(_boxes_of(part, vars(tensor)["piece"], rank))
        return sharded.stand_in(tensor, name)

    plain = sharded.map_tensors(take, checkpoint)
    sync()
    if rank == 0:
        os.makedirs(folder)
    xla_collectives.barrier()
    _write(found, folder, rank, in_turns)
    if rank == 0:
        sharded.commit(plain, folder, target)
    xla_collectives.barrier()


@dataclass(frozen=True)
class Box:
    """Elements of a tensor that form a box, and where this process has them."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    part: Tensor
    start: int

    def read(self, host: Tensor) -> Tensor:
        """The elements, of a copy of the part on the CPU."""
        return host.reshape(-1)[self.start : self.start + torch.Size(self.sizes).numel()].view(self.sizes)


def _boxes_of(part: Tensor, piece: Piece, rank: int) -> Iterator[Box]:
    begin = rank * part.numel()
    start, stop = max(begin, piece.offset), min(begin + part.numel(), piece.stop)
    position = start - begin
    for offsets, sizes in boxes(tuple(piece.shape), start - piece.offset, stop - piece.offset):
        yield Box(offsets, sizes, part, position)
        position += torch.Size(sizes).numel()


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut consecutive elements of a tensor into boxes, each with its offsets and sizes.

    Args:
        shape: of the tensor.
        start: the first element, in the order of memory.
        stop: one after the last.

    Example::

        >>> list(boxes((3, 4), 2, 9))
        [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return
    if len(shape) == 0:
        yield (), ()
    elif len(shape) == 1:
        yield (start,), (stop - start,)
    else:
        row = torch.Size(shape[1:]).numel()
        while start < stop:
            index, rest = divmod(start, row)
            if rest == 0 and stop - start >= row:
                count = (stop - start) // row
                yield (index, *[0] * len(shape[1:])), (count, *shape[1:])
                start += count * row
            else:
                end = min(stop, (index + 1) * row)
                for offsets, sizes in boxes(shape[1:], rest, end - index * row):
                    yield (index, *offsets), (1, *sizes)
                start = end


def _write(found: dict[str, tuple[Tensor, list[Box]]], folder: str, rank: int, in_turns: bool) -> None:
    """Write parts as ``torch.distributed.checkpoint`` does, whose own way needs a process group."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            box = by_index[write_item.index]
            return box.read(host[id(box.part)])

    host: dict[int, Tensor] = {}
    by_index: dict[Any, Box] = {}
    items = []
    for name, (tensor, own) in found.items():
        properties = TensorProperties(dtype=tensor.dtype)
        for box in own:
            index = MetadataIndex(name, torch.Size(box.offsets))
            chunk = ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
            data = TensorWriteData(chunk=chunk, properties=properties, size=tensor.shape)
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
            by_index[index] = box
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(rank == 0)
    plans, metadata = create_default_global_save_plan(xla_collectives.gather_object(writer.prepare_local_plan(SavePlan(items))))
    plan = writer.prepare_global_plan(plans)[rank]
    written: list[Any] = []
    for turn in range(len(plans)) if in_turns else (rank,):
        if turn == rank:
            # Also parts of which nothing is written: were one process alone to look at a weight, its programs would differ from then on.
            for tensor, _ in found.values():
                part = vars(tensor)["part"]
                host.setdefault(id(part), part.cpu())
            written = writer.write_data(plan, Planner()).wait()
            # The class above lives until Python collects its cycles. What it could hold on to would be a part of this process's programs
            # for as long, and not of the others'.
            host.clear()
            by_index.clear()
        if in_turns:
            xla_collectives.barrier()
    results = xla_collectives.gather_object(written)
    if rank == 0:
        writer.finish(metadata, results)
