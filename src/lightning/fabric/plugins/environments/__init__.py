"""Where processes run: ranks, addresses, and who starts them."""

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.kubeflow import KubeflowEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.plugins.environments.xla import XLAEnvironment

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
    "XLAEnvironment",
    "detect_environment",
]


def detect_environment() -> ClusterEnvironment:
    """Return the environment of this process: torchrun's, SLURM's, LSF's or MPI's, in this order; else our own.

    Kubeflow's and XLA's are never chosen here: the first can't be detected, the second comes with its strategy.

    Example::

        >>> type(detect_environment()).__name__
        'LightningEnvironment'
    """
    kinds: tuple[type[ClusterEnvironment], ...] = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    for kind in kinds:
        if kind.detect():
            return kind()
    return LightningEnvironment()
