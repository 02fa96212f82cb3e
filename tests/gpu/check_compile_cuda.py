"""Check ``Trainer(compile=...)`` on a CUDA machine: ``tests/gpu/run.sh``, or ``python tests/gpu/check_compile_cuda.py``.

A plain script that needs torch only. It prints a line for each check, then all of them in a table, and ends with 1 if one failed.
``--device cpu`` runs what needs no GPU, with a stand-in for CUDA graphs.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from trainer_checks import changes, compiled, fallbacks
from trainer_checks.common import Outcome, Place, print_table, run_check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only the checks in whose name this regular expression is found")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; without it cuBLAS is not deterministic
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    place = Place(torch.device(args.device))
    if place.is_cuda:
        torch.cuda.set_device(place.device)
    found = [*compiled.checks(place), *changes.checks(place), *fallbacks.checks(place)]
    outcomes: list[Outcome] = []
    for name, function in found:
        if re.search(args.only, name):
            outcomes.append(run_check(place, name, function))
    if not outcomes:
        sys.exit(f"No check's name matches {args.only!r}. There are: " + "; ".join(name for name, _ in found))
    sys.exit(1 if print_table(outcomes) else 0)


if __name__ == "__main__":
    main()
