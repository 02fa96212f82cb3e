"""Processes that Kubeflow's PyTorchJob starts, one in each pod."""

from __future__ import annotations

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment, compare_processes, read_number, read_variable

HINT = "Kubeflow's training operator sets it in each pod of a PyTorchJob."


class KubeflowEnvironment(ClusterEnvironment):
    """Reads what Kubeflow's PyTorchJob sets: ``MASTER_ADDR``, ``MASTER_PORT``, ``WORLD_SIZE`` and ``RANK``.

    Each pod is a machine with one process. For pods with several devices let the job start torchrun, which is detected
    by itself. This environment is not: pass it in ``plugins=[KubeflowEnvironment()]``.
    """

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return read_variable("MASTER_ADDR", HINT)

    @property
    def main_port(self) -> int:
        return read_number("MASTER_PORT", HINT)

    def world_size(self) -> int:
        return read_number("WORLD_SIZE", HINT)

    def global_rank(self) -> int:
        return read_number("RANK", HINT)

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.global_rank()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare with the number of processes that the job has started.

        Raises:
            ValueError: if it is not ``num_devices * num_nodes``.
        """
        advice = "Each pod is a machine with one process: set devices=1 and num_nodes to the number of pods."
        compare_processes("The PyTorchJob", self.world_size(), num_devices, num_nodes, advice)

    @staticmethod
    def detect() -> bool:
        """Not possible: the variables could be anybody's.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Kubeflow's variables are those of others too. Pass plugins=[KubeflowEnvironment()] to use it.")
