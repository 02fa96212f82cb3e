"""The documented import path of ModelParallelStrategy."""

from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

__all__ = ["ModelParallelStrategy"]
