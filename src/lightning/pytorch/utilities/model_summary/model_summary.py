"""A table of a model's layers: names, types, parameters, modes, and with an example input also sizes and FLOPs."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning.fabric.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["LayerSummary", "ModelSummary", "get_formatted_model_size", "get_human_readable_count", "parse_batch_shape", "summarize"]

UNITS = (" ", "K", "M", "B", "T")
UNKNOWN_SIZE = "?"
LEFTOVER_NAME = "other params"
NOT_APPLICABLE = "n/a"


class LayerSummary:
    """What is known of one layer. Its input and output sizes are known after the first forward pass.

    Args:
        module: the layer.

    Example::

        >>> layer = nn.Linear(3, 2)
        >>> summary = LayerSummary(layer)
        >>> _ = layer(torch.rand(5, 3))
        >>> summary.layer_type, summary.num_parameters, summary.in_size, summary.out_size
        ('Linear', 8, [5, 3], [5, 2])
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._in_size: str | list[Any] | None = None
        self._out_size: str | list[Any] | None = None
        self._detach: Callable[[], object] | None = self._register_hook()

    def _register_hook(self) -> Callable[[], object] | None:
        if isinstance(self._module, torch.jit.ScriptModule):
            return None  # takes no hooks, so that its sizes stay unknown
        this = weakref.ref(self)

        def remember_sizes(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            summary = this()
            if summary is not None:
                inputs = args or tuple(kwargs.values())
                summary._in_size = parse_batch_shape(inputs[0] if len(inputs) == 1 else inputs)
                summary._out_size = parse_batch_shape(output)
                summary.detach_hook()

        handle = self._module.register_forward_hook(remember_sizes, with_kwargs=True)
        return weakref.finalize(self, handle.remove)  # the hook goes with its summary, whatever happens

    def detach_hook(self) -> None:
        """Stop watching the layer. Happens by itself after the first forward pass."""
        if self._detach is not None:
            self._detach()

    @property
    def in_size(self) -> str | list[Any]:
        """The size of the input, a list of them for several inputs, ``"?"`` while it is not known."""
        return UNKNOWN_SIZE if self._in_size is None else self._in_size

    @property
    def out_size(self) -> str | list[Any]:
        """The size of the output, a list of them for several outputs, ``"?"`` while it is not known."""
        return UNKNOWN_SIZE if self._out_size is None else self._out_size

    @property
    def layer_type(self) -> str:
        """The name of the layer's class."""
        return str(self._module.__class__.__name__)

    @property
    def num_parameters(self) -> int:
        """The number of parameters in the layer, those of its own layers included."""
        return count_elements(self._module.parameters())

    @property
    def training(self) -> bool:
        """Whether the layer is in train mode."""
        return self._module.training


class ModelSummary:
    """The layers of a model, down to a given depth, and their totals.

    If the model has an ``example_input_array``, it is run through the model once, in eval mode and without gradients, to
    find the layers' input and output sizes and FLOPs: a tensor as ``model(x)``, a tuple as ``model(*x)``, a dict as
    ``model(**x)``. Modes and random generators are the same afterwards.

    Args:
        model: the model.
        max_depth: down to which depth layers are listed: 1 for the model's own attributes, 0 for none, -1 for all.

    Raises:
        ValueError: if ``max_depth`` is something else.

    Example::

        >>> from lightning.pytorch.core.module import LightningModule
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512))
        ...         self.example_input_array = torch.zeros(10, 256)
        ...     def forward(self, x):
        ...         return self.net(x)
        >>> ModelSummary(Net(), max_depth=-1)
          | Name  | Type        | Params | Mode  | FLOPs | In sizes  | Out sizes
        ---------------------------------------------------------------------------
        0 | net   | Sequential  | 132 K  | train | 2.6 M | [10, 256] | [10, 512]
        1 | net.0 | Linear      | 131 K  | train | 2.6 M | [10, 256] | [10, 512]
        2 | net.1 | BatchNorm1d | 1.0 K  | train | 0     | [10, 512] | [10, 512]
        ---------------------------------------------------------------------------
        132 K     Trainable params
        0         Non-trainable params
        132 K     Total params
        0.530     Total estimated model params size (MB)
        3         Modules in train mode
        0         Modules in eval mode
        2.6 M     Total FLOPs
    """

    def __init__(self, model: pl.LightningModule, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(f"ModelSummary(`max_depth`) must be -1 for all layers, 0 for none, or how deep to go; got {max_depth!r}.")
        self._model = model
        self._max_depth = max_depth
        self._flop_counts: dict[str, dict[Any, int]] = {}
        self._total_flops = 0

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The layers that are listed, with their names."""
        depth = self._max_depth
        modules = ((name, module) for name, module in self._model.named_modules() if name)
        return [(name, module) for name, module in modules if depth == -1 or name.count(".") < depth]

    @cached_property
    def _layers(self) -> dict[str, LayerSummary]:
        return self.summarize()

    @property
    def layer_names(self) -> list[str]:
        """The name of each layer."""
        return list(self._layers)

    @property
    def layer_types(self) -> list[str]:
        """The class of each layer."""
        return [layer.layer_type for layer in self._layers.values()]

    @property
    def in_sizes(self) -> list[Any]:
        """The input size of each layer."""
        return [layer.in_size for layer in self._layers.values()]

    @property
    def out_sizes(self) -> list[Any]:
        """The output size of each layer."""
        return [layer.out_size for layer in self._layers.values()]

    @property
    def param_nums(self) -> list[int]:
        """The number of parameters of each layer."""
        return [layer.num_parameters for layer in self._layers.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each layer is in train mode."""
        return [layer.training for layer in self._layers.values()]

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many modules are in ``train`` and in ``eval`` mode, at any depth; the model itself is not counted."""
        modes = [module.training for module in self._model.modules()][1:]
        return {"train": sum(modes), "eval": len(modes) - sum(modes)}

    @property
    def total_parameters(self) -> int:
        """The number of parameters; one that is shared counts once."""
        return count_elements(self._model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """The number of parameters that require gradients."""
        return count_elements(p for p in self._model.parameters() if p.requires_grad)

    @property
    def total_layer_params(self) -> int:
        """The number of parameters in the listed layers; one that is in several of them counts once."""
        inside = {parameter for _, module in self.named_modules for parameter in module.parameters()}
        return count_elements(inside)

    @property
    def model_size(self) -> float:
        """The size of the parameters in memory, each in its own precision, in megabytes (10**6 bytes)."""
        return sum((count_elements([p]) * p.dtype.itemsize for p in self._model.parameters()), 0.0) / 1e6

    @property
    def total_flops(self) -> int:
        """The floating point operations of a forward pass with the example input; 0 without one."""
        _ = self._layers
        return self._total_flops

    @property
    def flop_counts(self) -> dict[str, dict[Any, int]]:
        """For each layer, how many floating point operations each operator did with the example input."""
        _ = self._layers
        return self._flop_counts

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at the model anew, and return what is known of each layer, by name."""
        layers = {name: LayerSummary(module) for name, module in self.named_modules}
        try:
            if self._model.example_input_array is not None:
                self._forward_example_input()
            else:
                self._flop_counts, self._total_flops = {name: {} for name in layers}, 0
        finally:
            for layer in layers.values():
                layer.detach_hook()
        if any(isinstance(parameter, UninitializedParameter) for parameter in self._model.parameters()):
            rank_zero_warn(
                "The model has lazy parameters, whose sizes are not known yet: the numbers of parameters leave them out."
                " Set `self.example_input_array` in the module to have them initialized for the summary."
            )
        self.__dict__["_layers"] = layers
        return layers

    def _forward_example_input(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        from lightning.fabric.utilities.seed import collect_rng_states, set_rng_states

        model = self._model
        example = model.transfer_batch_to_device(model.example_input_array, model.device, 0)
        trainer: pl.Trainer | None = model.__dict__["_trainer"]  # `model.trainer` raises without one
        plugin = None if trainer is None else trainer.precision_plugin
        if plugin is not None:
            example = plugin.convert_input(example)
        counter = FlopCounterMode(display=False)
        modes = {module: module.training for module in model.modules()}
        random_states = collect_rng_states(include_cuda=model.device.type == "cuda")
        model.eval()
        try:
            with torch.no_grad(), uncompiled(), counter, nullcontext() if plugin is None else plugin.forward_context():
                if isinstance(example, tuple):
                    model(*example)
                elif isinstance(example, dict):
                    model(**example)
                else:
                    model(example)
        finally:
            set_rng_states(random_states)
            for module, training in modes.items():
                module.training = training
        counts = counter.get_flop_counts()
        self._flop_counts = {name: dict(counts.get(f"{type(model).__name__}.{name}", {})) for name, _ in self.named_modules}
        self._total_flops = counter.get_total_flops()

    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        """The table's columns, each with its title; what belongs to no listed layer stands in a last row."""
        layers = self._layers
        columns = {
            " ": [str(i) for i in range(len(layers))],
            "Name": self.layer_names,
            "Type": self.layer_types,
            "Params": [get_human_readable_count(number) for number in self.param_nums],
            "Mode": ["train" if training else "eval" for training in self.training_modes],
            "FLOPs": [get_human_readable_count(sum(self._flop_counts[name].values())) for name in layers],
        }
        if self._model.example_input_array is not None:
            columns["In sizes"] = [str(size) for size in self.in_sizes]
            columns["Out sizes"] = [str(size) for size in self.out_sizes]
        leftover = self.total_parameters - self.total_layer_params
        if leftover > 0:
            row = {" ": " ", "Name": LEFTOVER_NAME, "Params": get_human_readable_count(leftover)}
            for title, column in columns.items():
                column.append(row.get(title, NOT_APPLICABLE))
        return list(columns.items())

    def __str__(self) -> str:
        return _format_summary_table(
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
            *self._get_summary_data(),
        )

    def __repr__(self) -> str:
        return str(self)


@contextmanager
def uncompiled() -> Generator[None, None, None]:
    """Run compiled modules as they were written: compiling them for one pass in eval mode would be wasted time."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it is slow
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")  # those that count FLOPs
        yield


def count_elements(parameters: Iterable[Tensor]) -> int:
    """The number of elements of ``parameters``; lazy ones that are not initialized yet have none, those that DeepSpeed divides all."""
    return sum(0 if isinstance(p, UninitializedParameter) else getattr(p, "ds_numel", p.numel()) for p in parameters)


def parse_batch_shape(batch: Any) -> str | list[Any]:
    """The size of a tensor as a list, a list of sizes for a list or tuple, and ``"?"`` for everything else.

    Example::

        >>> parse_batch_shape((torch.zeros(2, 3), [torch.zeros(4), "text"]))
        [[2, 3], [[4], '?']]
    """
    if hasattr(batch, "shape"):
        return list(batch.shape)
    if isinstance(batch, (list, tuple)):
        return [parse_batch_shape(element) for element in batch]
    return UNKNOWN_SIZE


def get_formatted_model_size(total_model_size: float) -> str:
    """A size in megabytes with three decimals.

    Example::

        >>> get_formatted_model_size(1234.5)
        '1,234.500'
    """
    return f"{total_model_size:,.3f}"


def get_human_readable_count(number: int) -> str:
    """``number`` in thousands (K), millions (M), billions (B) or trillions (T): with one decimal below a hundred, whole above.

    Args:
        number: at least 0.

    Raises:
        ValueError: if it is negative.

    Example::

        >>> [get_human_readable_count(n) for n in (123, 1234, 2_000_000, 400 * 10**12, 5 * 10**15)]
        ['123  ', '1.2 K', '2.0 M', '400 T', '5,000 T']
    """
    if number < 0:
        raise ValueError(f"get_human_readable_count(`number`) must be at least 0, got {number!r}.")
    value, unit = float(number), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value /= 1000
        unit += 1
    return f"{value:.1f} {UNITS[unit]}" if unit and value < 100 else f"{int(value):,d} {UNITS[unit]}"


def _format_summary_table(
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    total_training_modes: dict[str, int],
    total_flops: int,
    *cols: tuple[str, list[str]],
) -> str:
    """The columns side by side, and the totals below."""
    columns = [[title, *(cell.rstrip() or " " for cell in cells)] for title, cells in cols]
    widths = [max(map(len, column)) for column in columns]
    header, *rows = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in zip(*columns)]
    line = "-" * (len(header) + 3)
    totals = summary_totals(total_parameters, trainable_parameters, model_size, total_training_modes, total_flops)
    lines = [header, line, *rows, line, *(f"{value.rstrip():<10}{title}" for title, value in totals.items())]
    return "\n".join(text.rstrip() for text in lines)


def summary_totals(
    total_parameters: int, trainable_parameters: int, model_size: float, total_training_modes: dict[str, int], total_flops: int
) -> dict[str, str]:
    """What stands below the table: a title and a value for each line."""
    return {
        "Trainable params": get_human_readable_count(trainable_parameters),
        "Non-trainable params": get_human_readable_count(total_parameters - trainable_parameters),
        "Total params": get_human_readable_count(total_parameters),
        "Total estimated model params size (MB)": get_formatted_model_size(model_size),
        "Modules in train mode": str(total_training_modes["train"]),
        "Modules in eval mode": str(total_training_modes["eval"]),
        "Total FLOPs": get_human_readable_count(total_flops),
    }


def summarize(lightning_module: pl.LightningModule, max_depth: int = 1) -> ModelSummary:
    """Summarize a module; print the result to see the table.

    Args:
        lightning_module: the module.
        max_depth: down to which depth layers are listed: 1 for the module's own attributes, 0 for none, -1 for all.

    Raises:
        ValueError: if ``max_depth`` is something else.
    """
    summary = ModelSummary(lightning_module, max_depth=max_depth)
    summary.summarize()
    return summary
