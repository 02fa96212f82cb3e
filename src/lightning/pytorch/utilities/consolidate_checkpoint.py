"""The documented path of the command: ``python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER``."""

import sys

from lightning.fabric.utilities.consolidate_checkpoint import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
