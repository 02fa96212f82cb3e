"""Turns a sharded checkpoint into one file: ``python -m lightning.fabric.utilities.consolidate_checkpoint FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def output_path(checkpoint_folder: Path) -> Path:
    """Where the file goes if nothing else is asked for: beside the folder.

    Example::

        >>> output_path(Path("runs/last.ckpt")).name
        'last.ckpt.consolidated'
    """
    return checkpoint_folder.with_name(f"{checkpoint_folder.name}.consolidated")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and do what it asks for; the exit code."""
    from lightning.fabric.checkpoint.sharded import consolidate

    parser = argparse.ArgumentParser(
        description="Turn a sharded checkpoint, a directory, into one file, which every strategy and torch.load read. "
        "It needs memory for all of it, and neither GPUs nor other processes."
    )
    parser.add_argument("checkpoint_folder", type=Path, help="the directory, as it was saved by FSDP or ModelParallelStrategy")
    parser.add_argument("--output_file", type=Path, help="the new file; beside the directory, with the suffix .consolidated, if not given")
    given = parser.parse_args(arguments)
    output = given.output_file or output_path(given.checkpoint_folder.absolute())
    try:
        consolidate(given.checkpoint_folder, output)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
