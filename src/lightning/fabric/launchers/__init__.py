"""How the processes of a run are started, watched and ended."""

from lightning.fabric.launchers.failures import Failure, PeerFailure, first_failure, report_failure
from lightning.fabric.launchers.launcher import Launcher, is_interactive
from lightning.fabric.launchers.multiprocessing import MultiprocessingLauncher
from lightning.fabric.launchers.script import ScriptLauncher
from lightning.fabric.launchers.xla import XLALauncher

__all__ = [
    "Failure",
    "Launcher",
    "MultiprocessingLauncher",
    "PeerFailure",
    "ScriptLauncher",
    "XLALauncher",
    "first_failure",
    "is_interactive",
    "report_failure",
]
