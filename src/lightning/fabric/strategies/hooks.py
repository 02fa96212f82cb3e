"""What a strategy of one's own may hear of a Trainer's run, and do in its own way. What is not overridden is not called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.strategies.strategy import Strategy

EVENTS = (
    "on_train_start", "on_train_end", "on_train_batch_start", "on_validation_start", "on_validation_end",
    "on_test_start", "on_test_end", "on_predict_start", "on_predict_end",
)  # fmt: skip


class StrategyHooks:
    """The part of a :class:`~lightning.fabric.strategies.strategy.Strategy` that the Trainer calls where a subclass overrides it."""

    lightning_restore_optimizer = True  # whether the Trainer restores optimizers when a run is resumed; False: the strategy does
    handles_gradient_accumulation = False  # whether an engine accumulates gradients by itself

    # ---- events: after the hooks of callbacks and module ------------------------------------------------------------

    def on_train_start(self) -> None:
        """Training begins."""

    def on_train_end(self) -> None:
        """Training ends."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A batch is about to be trained on."""

    def on_validation_start(self) -> None:
        """Validation begins, also within fit."""

    def on_validation_end(self) -> None:
        """Validation ends."""

    def on_test_start(self) -> None:
        """Testing begins."""

    def on_test_end(self) -> None:
        """Testing ends."""

    def on_predict_start(self) -> None:
        """Prediction begins."""

    def on_predict_end(self) -> None:
        """Prediction ends."""

    # ---- steps ------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``training_step`` as it runs under this strategy."""
        return self.bind("training_step")(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``validation_step`` as it runs under this strategy."""
        return self.bind("validation_step")(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``test_step`` as it runs under this strategy."""
        return self.bind("test_step")(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``predict_step`` as it runs under this strategy."""
        return self.bind("predict_step")(*args, **kwargs)

    def step_of(self, name: str) -> Callable[..., Any]:
        """What the loops call for the step ``name``: the method of a subclass, else the module's as it is bound."""
        bound = self.bind(name)
        if getattr(type(self), name) is getattr(StrategyHooks, name):
            return bound
        own = getattr(self, name)

        @wraps(bound)  # it has the parameters of the module's
        def step(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

        return step

    def bind(self, name: str) -> Callable[..., Any]:
        """The step function ``name`` of the module, to be called as it runs under this strategy."""
        raise NotImplementedError

    def post_training_step(self) -> None:
        """``training_step`` has run, backward not yet."""

    def post_backward(self, closure_loss: Any) -> None:
        """Backward has run on ``closure_loss``, which is detached."""

    # ---- the module and its optimizers ------------------------------------------------------------------------------

    def setup(self: Strategy, trainer: Any) -> None:  # type: ignore[misc]
        """Make the module as it runs, and in fit its optimizers, after ``configure_model``.

        Args:
            trainer: whose run it is.
        """
        assert self.module is not None
        fitting = trainer.state.fn == "fit"
        self.model = self.setup_module(self.module, training=fitting)
        if fitting:
            self.setup_optimizers(trainer)

    def setup_optimizers(self, trainer: Any) -> None:
        """Have the module configure optimizers and schedulers, and make them as they run.

        Args:
            trainer: whose run it is.
        """
        trainer._configure_optimizers()

    def model_sharded_context(self) -> AbstractContextManager[Any]:
        """The context of ``configure_model``, in which a module may be divided; all processes enter it."""
        return nullcontext()

    def model_to_device(self: Strategy) -> None:  # type: ignore[misc]
        """Move the module to the device of this process."""
        assert self.module is not None
        self.module_to_device(self.module)

    def load_optimizer_state_dict(self: Strategy, checkpoint: Mapping[str, Any]) -> None:  # type: ignore[misc]
        """Load the states of all optimizers.

        Args:
            checkpoint: holds them under ``"optimizer_states"``, in their order.
        """
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            self.load_optimizer_state(optimizer, state)
