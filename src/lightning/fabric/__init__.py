"""The device runtime: accelerators, precision, strategies, checkpoint files, loggers. It knows nothing of the Trainer."""

from lightning.fabric.utilities.seed import seed_everything

__all__ = ["seed_everything"]
