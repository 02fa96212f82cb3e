"""The summary of a model whose weights DeepSpeed divides among the processes (ZeRO 3)."""

from __future__ import annotations

from torch.nn import Module, Parameter

from lightning.pytorch.utilities.model_summary.model_summary import (
    NOT_APPLICABLE,
    LayerSummary,
    ModelSummary,
    count_elements,
    get_human_readable_count,
)


def deepspeed_param_size(p: Parameter) -> int:
    """The number of elements of a whole parameter, of which this process may hold a part only."""
    return count_elements([p])


def elements_here(module: Module) -> int:
    """The number of parameters that this process holds of a module."""
    return sum(p.partition_numel() if hasattr(p, "partition_numel") else p.numel() for p in module.parameters())


class DeepSpeedLayerSummary(LayerSummary):
    """What is known of one layer, and what a process holds of it."""

    @property
    def average_shard_parameters(self) -> int:
        """The number of parameters that a process holds of the layer."""
        return elements_here(self._module)


class DeepSpeedSummary(ModelSummary):
    """A :class:`~lightning.pytorch.utilities.model_summary.ModelSummary` that says as well how many parameters each process holds."""

    @property
    def parameters_per_layer(self) -> list[int]:
        """The number of parameters that a process holds of each layer."""
        return [elements_here(module) for _, module in self.named_modules]

    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        columns = dict(super()._get_summary_data())
        ours = [get_human_readable_count(number) for number in self.parameters_per_layer]
        ours += [NOT_APPLICABLE] * (len(columns["Name"]) - len(ours))
        titles = list(columns)
        place = titles.index("Params") + 1
        return [
            *((title, columns[title]) for title in titles[:place]),
            ("Params per Device", ours),
            *((t, columns[t]) for t in titles[place:]),
        ]
