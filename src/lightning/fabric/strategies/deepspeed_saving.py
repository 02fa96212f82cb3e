"""How a strategy whose module an engine of DeepSpeed trains saves and restores it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric.strategies import deepspeed_checkpoint as directories
from lightning.fabric.strategies import deepspeed_state as states
from lightning.fabric.strategies.deepspeed_config import Config, zero_stage
from lightning.fabric.strategies.deepspeed_engine import Engine
from lightning.fabric.strategies.objects import collect, restore
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn


class SavesDirectories(ParallelStrategy):
    """The part of :class:`~lightning.fabric.strategies.deepspeed.DeepSpeedStrategy` that deals with checkpoints.

    A directory that DeepSpeed has written is read in two steps: :meth:`load_checkpoint` returns what is ours, and
    :meth:`load_model_state_dict`, once there is an engine, lets each process read its part of weights and optimizer.
    """

    restore_checkpoint_after_setup = True
    engine: Engine | None
    config: Config
    load_full_weights: bool
    exclude_frozen_parameters: bool
    _saved: directories.SavedCheckpoint | None  # the directory that is being restored from
    _optimizers_of_file: list[str]  # the names of those whose state is in the file that is being restored from
    _rounded: list[tuple[Tensor, Tensor]]  # weights that were rounded for evaluation, and what they were

    def connect(self, model: Module) -> None:
        super().connect(model)
        self._saved = None

    @property
    def zero_stage_3(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return zero_stage(self.config) == 3

    @property
    def _running(self) -> Engine:
        assert self.engine is not None, "there is no engine before the optimizers were set up"
        return self.engine

    @property
    def _training(self) -> Engine | None:
        """The engine of a training run of the module."""
        engine = self.engine
        return engine if engine is not None and engine.trains and engine.module is self.module else None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of the user's module; in training with ZeRO 3 none: they go from each process to its part of a checkpoint."""
        assert self.module is not None
        return {} if self._training is not None and self.zero_stage_3 else self.get_module_state_dict(self.module)

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """The whole weights of a module; where they are divided among the processes, they are brought to rank 0."""
        divided = any(states.is_partitioned(parameter) for parameter in module.parameters())
        return states.gather_weights(module, self.is_global_zero) if divided else module.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint: in training a directory, to which all processes write; else one file.

        Raises:
            TypeError: for storage options.
            ValueError: for a path that is not on a file system of this machine.
        """
        engine = self._training
        if engine is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r}: DeepSpeed writes to the file system of this machine. Leave them out.")
        rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        ours = {name: value for name, value in rest.get("keraunos", {}).items() if name != "gradients"}  # they are divided too
        if "optimizers" in ours:
            ours["optimizers"] = [type(engine.basic_optimizer).__name__]
        directories.write(engine.raw, filepath, {**rest, "keraunos": ours}, self.exclude_frozen_parameters, self)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint: a file as it is, of a directory everything but what :meth:`load_model_state_dict` loads.

        Args:
            checkpoint_path: of a file, or of a directory that DeepSpeed wrote.
            weights_only: False unpickles anything; for checkpoints from a source you trust.

        Raises:
            pickle.UnpicklingError: if a directory holds anything that could run code.
            MisconfigurationException: for a directory, where ``load_full_weights`` announced a file.
        """
        self._saved = None
        if directories.is_deepspeed_checkpoint(checkpoint_path):
            if self.load_full_weights:
                raise MisconfigurationException(
                    f"load_full_weights=True is for a file with whole weights, and {os.fspath(checkpoint_path)!r} is a directory that "
                    "DeepSpeed has written. Leave load_full_weights out."
                )
            self._saved = directories.open_together(checkpoint_path, weights_only, self)
            checkpoint = {**self._saved.rest, "state_dict": {}}
            if "lr_schedulers" in checkpoint:  # it is not of weights only
                checkpoint["optimizer_states"] = [{}]
        else:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        ours = dict(checkpoint.get("keraunos", {}))
        self._optimizers_of_file = ours.pop("optimizers", [])  # compared here, since what the trainer sees is DeepSpeed's
        return {**checkpoint, "keraunos": ours}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights; from a directory, in training, the optimizer's state too. All processes must call it.

        Args:
            checkpoint: from :meth:`load_checkpoint`.
            strict: whether all keys must match.

        Raises:
            RuntimeError: if ``strict`` and keys do not match, or shapes differ.
            MisconfigurationException: for a directory, if it was saved by a run unlike this one.
        """
        assert self.module is not None
        self._rounded.clear()
        if self._saved is not None and self._training is not None:
            self._load_directory(self._training, self._saved, strict)
        else:
            weights = checkpoint["state_dict"] if self._saved is None else directories.whole_weights(self._saved)
            self.load_module_state_dict(self.module, weights, strict)

    def _load_directory(self, engine: Engine, saved: directories.SavedCheckpoint, strict: bool) -> None:
        strict = strict and not self.exclude_frozen_parameters
        if not engine.raw.load_universal_checkpoint():
            saved.check_fits(self.world_size, zero_stage(self.config), type(engine.basic_optimizer).__name__)
            engine.raw.load_checkpoint(saved.path, saved.tag, load_module_strict=strict, load_lr_scheduler_states=False)
            return
        engine.raw.load_checkpoint(saved.path, load_lr_scheduler_states=False)  # from a folder of its own, which has no buffers
        here = dict(engine.module.named_buffers())
        for name, buffer in saved.buffers().items():
            if name in here:
                here[name].copy_(buffer)

    def load_module_state_dict(self, module: Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights, which each process divides as it holds them; all processes must call it, with the same ones."""
        states.load_weights(module, state_dict, strict)
        engine = self.engine
        if engine is not None and engine.trains and engine.module is module:
            states.set_master_weights(module, state_dict, engine.raw.optimizer)

    def save_state(self, path: Any, state: Mapping[str, Any], filter: Mapping[str, Callable[[str, Any], bool]] | None = None) -> None:
        """Write objects to a checkpoint: a directory, if the module that the engine trains is among them.

        Raises:
            TypeError: for a filter, with such a directory.
        """
        engine = self.engine
        if engine is None or not engine.trains or all(value is not engine.module for value in state.values()):
            super().save_state(path, state, filter)
            return
        if filter:
            raise TypeError(f"filter={filter!r}: DeepSpeed saves all of the module and its optimizer. Leave it out.")
        others = {name: value for name, value in state.items() if value is not engine.module and value is not engine.raw.optimizer}
        directories.write(engine.raw, path, collect(self, others, {}), self.exclude_frozen_parameters, self)

    def load_state(
        self, path: Any, state: MutableMapping[str, Any] | None = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint into objects, and return what is left of it; see :meth:`save_state`."""
        engine = self.engine
        if state is None or engine is None or not directories.is_deepspeed_checkpoint(path):
            return super().load_state(path, state, strict, weights_only)
        saved = directories.open_together(path, weights_only, self)
        self._load_directory(engine, saved, strict)
        others = {name: value for name, value in state.items() if value is not engine.module and value is not engine.raw.optimizer}
        left = restore(self, saved.rest, others, strict)
        state.update(others)
        return left

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: each process writes its part of the state to the checkpoint."""
        return {}

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load the state of an optimizer from a file; a directory's was loaded with its weights.

        Raises:
            MisconfigurationException: if it is that of another kind of optimizer.
        """
        if self._saved is not None:
            return
        engine = self._running
        directories.check_optimizer(self._optimizers_of_file, type(engine.basic_optimizer).__name__)
        if not states.load_optimizer_state(engine.raw.optimizer, engine.basic_optimizer, engine.parameters, state):
            rank_zero_warn(
                "The checkpoint is a file with the state of an optimizer that can't be divided as DeepSpeed divides this one. The weights "
                "were loaded, and the optimizer starts anew. To keep its state, resume from a checkpoint that DeepSpeed has saved."
            )
