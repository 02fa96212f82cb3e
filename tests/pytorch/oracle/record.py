"""Record facts: run scenarios, each in a process of its own, and write what they return.

    REFERENCE_PYTHON tests/pytorch/oracle/record.py [NAME ...]     the facts of the reference, into ``facts``
    python tests/pytorch/oracle/record.py --ours NAME ...          where ours differs on purpose, into ``ours``

The first form needs an interpreter that has Lightning 2.6.6 installed; without names it records every scenario and
removes the files of those that are gone.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def run(name: str, scenario: Callable[[], Any], plain: Callable[[Any], Any], folder: Path) -> None:
    """One scenario, in an empty directory and with a fixed random state."""
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        torch.manual_seed(1)
        start = time.perf_counter()
        try:
            facts = plain(scenario())
        except BaseException as error:
            lines = [
                f"{Path(frame.filename).name}:{frame.lineno}"
                for frame in traceback.extract_tb(error.__traceback__)
                if "oracle" in frame.filename
            ]
            print(f"FAILED {name}: {type(error).__name__}: {error} ({', '.join(lines)})")
            return
        took = time.perf_counter() - start
        os.chdir(HERE)
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (folder / f"{name}.json").write_text(text)
    print(f"{took:6.2f} s {len(text):8} bytes  {name}")


def record(names: list[str], folder: Path) -> None:
    """Run each in a fork, so that nothing that one leaves behind, such as a warning given once, reaches another."""
    sys.path.insert(0, str(HERE))
    import torch
    from scenarios import SCENARIOS, plain

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder.mkdir(exist_ok=True)
    for name in names or list(SCENARIOS):
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                run(name, SCENARIOS[name], plain, folder)
                sys.stdout.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    if not names:
        for file in folder.glob("*.json"):
            if file.stem not in SCENARIOS:
                file.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        record(sys.argv[2:], HERE / "ours")
    else:
        record(sys.argv[1:], HERE / "facts")
