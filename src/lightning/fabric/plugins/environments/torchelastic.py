"""Processes that ``torchrun`` starts."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment, compare_processes, read_number
from lightning.fabric.utilities.rank_zero import rank_zero_warn

HINT = "torchrun sets it in each process: start the script with `torchrun --nproc-per-node=N script.py`."


class TorchElasticEnvironment(ClusterEnvironment):
    """Reads what ``torchrun`` (torch elastic) sets in each process: ranks, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return _default("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        _default("MASTER_PORT", "12910")
        return read_number("MASTER_PORT", HINT)

    def world_size(self) -> int:
        return read_number("WORLD_SIZE", HINT)

    def global_rank(self) -> int:
        return read_number("RANK", HINT)

    def local_rank(self) -> int:
        return read_number("LOCAL_RANK", HINT)

    def node_rank(self) -> int:
        return read_number("GROUP_RANK", HINT) if "GROUP_RANK" in os.environ else 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare with the number of processes that torchrun has started.

        Raises:
            ValueError: if it is not ``num_devices * num_nodes``.
        """
        advice = "Let devices be torchrun's --nproc-per-node, and num_nodes its --nnodes."
        compare_processes("torchrun", self.world_size(), num_devices, num_nodes, advice)

    @staticmethod
    def detect() -> bool:
        """Whether torchrun has started this process."""
        # What torch.distributed.is_torchelastic_launched() looks at, without the import of torch.distributed.
        return "TORCHELASTIC_RUN_ID" in os.environ


def _default(name: str, value: str) -> str:
    """The variable; set to ``value``, with a warning, if it is not there."""
    if name not in os.environ:
        rank_zero_warn(f"The environment variable {name} is not set; it was set to {value}.")
        os.environ[name] = value
    return os.environ[name]
