"""A callback made of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks.callback import Callback

Hook = Callable[..., Any]


class LambdaCallback(Callback):
    """A callback whose hooks are given as functions.

    Args:
        setup: called as :meth:`Callback.setup <lightning.pytorch.callbacks.Callback.setup>` would be, and so each other
            argument as the hook of its name; the trainer and the module come first.

    Raises:
        TypeError: if a hook is not callable, or there is none of that name.

    Example::

        >>> from lightning.pytorch.callbacks.lambda_function import LambdaCallback
        >>> callback = LambdaCallback(on_train_start=lambda trainer, module: print("training starts"))
        >>> callback.on_train_start(None, None)
        training starts
    """

    def __init__(
        self,
        setup: Hook | None = None,
        teardown: Hook | None = None,
        on_fit_start: Hook | None = None,
        on_fit_end: Hook | None = None,
        on_sanity_check_start: Hook | None = None,
        on_sanity_check_end: Hook | None = None,
        on_train_batch_start: Hook | None = None,
        on_train_batch_end: Hook | None = None,
        on_train_epoch_start: Hook | None = None,
        on_train_epoch_end: Hook | None = None,
        on_validation_epoch_start: Hook | None = None,
        on_validation_epoch_end: Hook | None = None,
        on_test_epoch_start: Hook | None = None,
        on_test_epoch_end: Hook | None = None,
        on_validation_batch_start: Hook | None = None,
        on_validation_batch_end: Hook | None = None,
        on_test_batch_start: Hook | None = None,
        on_test_batch_end: Hook | None = None,
        on_train_start: Hook | None = None,
        on_train_end: Hook | None = None,
        on_validation_start: Hook | None = None,
        on_validation_end: Hook | None = None,
        on_test_start: Hook | None = None,
        on_test_end: Hook | None = None,
        on_exception: Hook | None = None,
        on_save_checkpoint: Hook | None = None,
        on_load_checkpoint: Hook | None = None,
        on_before_backward: Hook | None = None,
        on_after_backward: Hook | None = None,
        on_before_optimizer_step: Hook | None = None,
        on_before_zero_grad: Hook | None = None,
        on_predict_start: Hook | None = None,
        on_predict_end: Hook | None = None,
        on_predict_batch_start: Hook | None = None,
        on_predict_batch_end: Hook | None = None,
        on_predict_epoch_start: Hook | None = None,
        on_predict_epoch_end: Hook | None = None,
    ) -> None:
        # The arguments, and nothing else, are the local variables here.
        hooks = {name: function for name, function in locals().items() if function is not None and name not in ("self", "__class__")}
        super().__init__()
        for name, function in hooks.items():
            if not callable(function):
                raise TypeError(f"`LambdaCallback({name}={function!r})`: a function is needed, got {type(function).__name__}.")
            # A function on the instance counts as an override of the hook.
            setattr(self, name, function)
