"""The base class that marks a callback as one that saves checkpoints."""

from lightning.pytorch.callbacks.callback import Callback


class Checkpoint(Callback):
    """A callback that saves checkpoints: it runs after all others, so that what it saves holds their final state."""
