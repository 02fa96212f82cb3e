"""The documented import path of the cluster environments, which fabric owns."""

from lightning.fabric.plugins.environments import *  # noqa: F403
from lightning.fabric.plugins.environments import __all__ as __all__
