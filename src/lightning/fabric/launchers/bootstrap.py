"""Ties a process to the one that started it, so that it does not outlive that one.

Also a program of its own, which becomes the command that it is given; so it imports nothing but the standard library::

    python -I -S bootstrap.py PARENT COMMAND [ARGUMENTS]

Here rather than in ``subprocess.Popen(preexec_fn=...)``, which runs Python between fork and exec, where the locks of
other threads may be held for good.
"""

from __future__ import annotations

import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def tie_to_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends, however it ends (on Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before the line above
        os._exit(1)


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
