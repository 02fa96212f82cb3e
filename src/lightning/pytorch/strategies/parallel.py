"""The documented import path of ParallelStrategy."""

from lightning.fabric.strategies.parallel import ParallelStrategy

__all__ = ["ParallelStrategy"]
