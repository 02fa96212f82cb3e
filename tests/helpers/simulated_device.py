"""A device that works behind its host, as CUDA does, on a clock that stands still unless somebody takes time."""

from __future__ import annotations

from typing import Any


class World:
    """A host and a device with one clock; also what the tests give as the device's stream."""

    def __init__(self) -> None:
        self.now = self.free = 1000.0
        self.waited = 0  # how often the host waited for the device

    def launch(self, seconds: float) -> None:
        """Work for the device."""
        self.free = max(self.now, self.free) + seconds

    def query(self) -> bool:
        """Whether the device has done everything."""
        return self.free <= self.now

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)


class Event:
    """An event in the device's queue."""

    def __init__(self, world: World) -> None:
        self.world, self.at = world, 0.0

    def record(self, stream: Any) -> None:
        self.at = max(self.world.now, self.world.free)

    def query(self) -> bool:
        return self.at <= self.world.now

    def synchronize(self) -> None:
        self.world.waited += not self.query()
        self.world.now = max(self.world.now, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert self.query()  # else it can't be asked for
        assert end.query()
        return (end.at - self.at) * 1000
