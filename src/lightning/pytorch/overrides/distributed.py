"""The documented import path of samplers without repetition, and of DDP's preparation for a backward pass."""

from lightning.fabric.strategies.ddp import prepare_for_backward
from lightning.fabric.utilities.samplers import UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper

__all__ = ["UnrepeatedDistributedSampler", "UnrepeatedDistributedSamplerWrapper", "prepare_for_backward"]
