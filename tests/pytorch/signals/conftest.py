"""Programs of several processes, for the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from programs import run, start

__all__ = ["run", "start"]
