"""Collectives over torch.distributed."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning.fabric.plugins.collectives.collective import Collective
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.fabric.utilities.types import RedOpType, ReduceOp


class TorchCollective(Collective):
    """Every operation over torch.distributed.

    Operations are named as torch does, such as ``"sum"``, in any case, or are a ``torch.distributed.ReduceOp``.

    Example::

        collective = TorchCollective().setup(main_address="localhost", main_port="12355", backend="gloo", rank=rank, world_size=2)
        collective.all_reduce(tensor, op="sum")
        collective.teardown()
    """

    manages_default_group = False
    addr_key = "MASTER_ADDR"
    port_key = "MASTER_PORT"

    def __init__(self) -> None:
        super().__init__()
        if not self.is_available():
            raise RuntimeError("This build of torch has no torch.distributed, which TorchCollective needs. Install another build.")

    @property
    def group(self) -> Any:
        """The group; that of all processes, where there is one and this object has no other.

        Raises:
            RuntimeError: before there is one.
        """
        if self._group is None and self.is_initialized():
            return torch.distributed.group.WORLD
        return super().group

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return torch.distributed.get_world_size(self.group)

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        torch.distributed.broadcast(tensor, src, group=self.group)
        return tensor

    def all_reduce(self, tensor: Tensor, op: str | ReduceOp | RedOpType = "sum") -> Tensor:
        torch.distributed.all_reduce(tensor, self._convert_to_native_op(op), group=self.group)
        return tensor

    def reduce(self, tensor: Tensor, dst: int, op: str | ReduceOp | RedOpType = "sum") -> Tensor:
        torch.distributed.reduce(tensor, dst, self._convert_to_native_op(op), group=self.group)
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        torch.distributed.all_gather(tensor_list, tensor, group=self.group)
        return tensor_list

    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        torch.distributed.gather(tensor, gather_list, dst, group=self.group)
        return gather_list

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        torch.distributed.scatter(tensor, scatter_list, src, group=self.group)
        return tensor

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: str | ReduceOp | RedOpType = "sum") -> Tensor:
        torch.distributed.reduce_scatter(output, input_list, self._convert_to_native_op(op), group=self.group)
        return output

    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        torch.distributed.all_to_all(output_tensor_list, input_tensor_list, group=self.group)
        return output_tensor_list

    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        torch.distributed.send(tensor, dst, tag=tag, group=self.group)

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        torch.distributed.recv(tensor, src, tag=tag, group=self.group)
        return tensor

    # ---- objects ----------------------------------------------------------------------------------------------------

    def all_gather_object(self, object_list: list[Any], obj: Any) -> list[Any]:
        """Fill ``object_list`` with the objects of all processes, and return it."""
        torch.distributed.all_gather_object(object_list, obj, group=self.group)
        return object_list

    def broadcast_object_list(self, object_list: list[Any], src: int, device: torch.device | None = None) -> list[Any]:
        """Overwrite ``object_list`` with that of process ``src``, and return it."""
        torch.distributed.broadcast_object_list(object_list, src, group=self.group, device=device)
        return object_list

    def gather_object(self, obj: Any, object_gather_list: list[Any], dst: int = 0) -> list[Any]:
        """Fill ``object_gather_list`` of process ``dst`` with the objects of all processes, and return it."""
        torch.distributed.gather_object(obj, object_gather_list, dst, group=self.group)
        return object_gather_list

    def scatter_object_list(self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any], src: int = 0) -> list[Any]:
        """Put this process's part of the list of process ``src`` into the output list, and return it."""
        torch.distributed.scatter_object_list(scatter_object_output_list, scatter_object_input_list, src, group=self.group)
        return scatter_object_output_list

    # ---- waiting ----------------------------------------------------------------------------------------------------

    def barrier(self, device_ids: list[int] | None = None) -> None:
        torch.distributed.barrier(group=self.group, device_ids=device_ids)

    def monitored_barrier(self, timeout: datetime.timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait until all processes are here, and raise with the rank of one (or of all) that doesn't come in time."""
        torch.distributed.monitored_barrier(group=self.group, timeout=timeout, wait_all_ranks=wait_all_ranks)

    # ---- the group's life -------------------------------------------------------------------------------------------

    def setup(self, main_address: str | None = None, main_port: str | None = None, **kwargs: Any) -> Self:
        """Join the group of all processes, unless this process belongs to it, and take it as this object's group.

        Args:
            main_address: where the process of rank 0 runs; None takes the environment's ``MASTER_ADDR``.
            main_port: the port that it listens on; None takes the environment's ``MASTER_PORT``.
            kwargs: go to ``torch.distributed.init_process_group``: ``backend``, ``rank``, ``world_size``, ``timeout``, ...

        Raises:
            RuntimeError: if it has a group already.
        """
        if self._group is not None:
            raise RuntimeError(f"`{type(self).__name__}` already owns a group: call `teardown()` before it gets another.")
        if not self.is_initialized():
            given = {self.addr_key: main_address, self.port_key: main_port}
            before = {key: os.environ.get(key) for key in given}
            os.environ.update({key: str(value) for key, value in given.items() if value is not None})
            try:
                self.init_group(**kwargs)
            finally:  # the variables are the way to tell torch; they are no setting of the process
                _restore(before)
            self.manages_default_group = True
        self._group = torch.distributed.group.WORLD
        return self

    def teardown(self) -> Self:
        """Leave the group; that of all processes only if this object made it.

        Raises:
            RuntimeError: if there is none.
        """
        if self._group is torch.distributed.group.WORLD and self._group is not None and not self.manages_default_group:
            self._group = None
            return self
        self.destroy_group(super().group)
        self._group = None
        self.manages_default_group = False
        return self

    @classmethod
    def is_available(cls) -> bool:
        return torch.distributed.is_available()

    @classmethod
    def is_initialized(cls) -> bool:
        return _distributed_is_initialized()

    @classmethod
    def init_group(cls, **kwargs: Any) -> None:
        torch.distributed.init_process_group(**kwargs)

    @classmethod
    def new_group(cls, **kwargs: Any) -> Any:
        return torch.distributed.new_group(**kwargs)

    @classmethod
    def destroy_group(cls, group: Any) -> None:
        if group is not torch.distributed.GroupMember.NON_GROUP_MEMBER:
            torch.distributed.destroy_process_group(group)

    @classmethod
    def _convert_to_native_op(cls, op: str | ReduceOp | RedOpType) -> Any:
        if not isinstance(op, str):
            return op
        native = getattr(torch.distributed.ReduceOp, op.upper(), None)
        if native is None:
            names = ", ".join(repr(name.lower()) for name in torch.distributed.ReduceOp.RedOpType.__members__ if name.isupper())
            raise ValueError(f"op={op!r} is not a member of `ReduceOp`. Accepted: {names}.")
        return native


def _restore(variables: dict[str, str | None]) -> None:
    for key, value in variables.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
