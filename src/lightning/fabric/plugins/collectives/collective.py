"""Collective: what a group of processes can do together, whichever library carries it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from typing_extensions import Self

from lightning.fabric.utilities.types import CollectibleGroup


class Collective(ABC):
    """Operations of a group of processes, and the group's life: ``setup`` or ``create_group`` first, ``teardown`` last.

    Derive from it to carry the operations over another library.
    """

    def __init__(self) -> None:
        self._group: CollectibleGroup | None = None

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process's index in the group."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of processes in the group."""

    @property
    def group(self) -> CollectibleGroup:
        """The group.

        Raises:
            RuntimeError: before there is one.
        """
        if self._group is None:
            raise RuntimeError(f"`{type(self).__name__}` does not own a group: call `setup()` or `create_group()` first.")
        return self._group

    # ---- one for all, all for one ---------------------------------------------------------------------------------

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite ``tensor`` with that of process ``src``, and return it."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Reduce ``tensor`` in place over all processes, and return it."""

    @abstractmethod
    def reduce(self, tensor: Tensor, dst: int, op: str) -> Tensor:
        """Reduce ``tensor`` in place in process ``dst``, and return it."""

    @abstractmethod
    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        """Fill ``tensor_list`` with the tensors of all processes, and return it."""

    @abstractmethod
    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        """Fill ``gather_list`` of process ``dst`` with the tensors of all processes, and return it."""

    @abstractmethod
    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        """Overwrite ``tensor`` with this process's part of the ``scatter_list`` of process ``src``, and return it."""

    @abstractmethod
    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: str) -> Tensor:
        """Reduce the lists of all processes item by item, write this process's item into ``output``, and return it."""

    @abstractmethod
    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        """Send each process its item of ``input_tensor_list``, collect theirs in ``output_tensor_list``, and return it."""

    @abstractmethod
    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        """Send ``tensor`` to process ``dst``."""

    @abstractmethod
    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        """Overwrite ``tensor`` with what process ``src``, or any, sends, and return it."""

    @abstractmethod
    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Wait until all processes are here."""

    # ---- the group's life -------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def is_available(cls) -> bool:
        """Whether the library is there."""

    @classmethod
    @abstractmethod
    def is_initialized(cls) -> bool:
        """Whether this process belongs to a group already."""

    @classmethod
    @abstractmethod
    def init_group(cls, **kwargs: Any) -> None:
        """Join the group of all processes."""

    @classmethod
    @abstractmethod
    def new_group(cls, **kwargs: Any) -> CollectibleGroup:
        """A new group of some of the processes; all of them must call it."""

    @classmethod
    @abstractmethod
    def destroy_group(cls, group: CollectibleGroup) -> None:
        """Leave a group."""

    def setup(self, **kwargs: Any) -> Self:
        """Join the group of all processes, unless this process belongs to it, and take it as this object's group."""
        if not self.is_initialized():
            self.init_group(**kwargs)
        return self

    def create_group(self, **kwargs: Any) -> Self:
        """Take a new group of some of the processes as this object's.

        Raises:
            RuntimeError: if it has one.
        """
        if self._group is not None:
            raise RuntimeError(f"`{type(self).__name__}` already owns a group: call `teardown()` before it gets another.")
        self._group = self.new_group(**kwargs)
        return self

    def teardown(self) -> Self:
        """Leave the group.

        Raises:
            RuntimeError: if there is none.
        """
        self.destroy_group(self.group)
        self._group = None
        return self
