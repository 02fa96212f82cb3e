"""Run programs of several processes, and see that they leave no process behind: fixtures for a ``conftest.py`` to import."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

OURS = ("KERAUNOS_", "MASTER_", "SLURM_", "TORCHELASTIC_", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "GROUP_RANK", "OMP_NUM_THREADS")


@dataclass
class Run:
    """A program that has ended, or still runs."""

    process: subprocess.Popen[str]
    mark: str
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    out: str = ""
    error: str = ""

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def results(self) -> list[Any]:
        """What the ranks have printed."""
        return [json.loads(line[1:]) for line in self.out.splitlines() if line.startswith("@")]

    def finish(self, timeout: float = 60) -> Run:
        try:
            self.out, self.error = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.end()
            self.out, self.error = self.process.communicate()
            raise AssertionError(f"still running after {timeout} s:\n{self.out}\n{self.error}") from None
        self.seconds = time.monotonic() - self.began
        return self

    def left(self, patience: float = 3.0) -> list[str]:
        """The commands of its processes that are still there, after they had a moment to vanish."""
        deadline = time.monotonic() + patience
        while (found := [command for _, command in processes(self.mark)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def end(self) -> None:
        for pid, _ in processes(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes(mark: str) -> list[tuple[int, str]]:
    """The processes, with their commands, that carry a mark in the environment with which they began."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
    return found


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Run]]:
    """Start ``command=[...]``, by default the script ``program.py`` beside the test; all its processes are killed after the test."""
    runs = []
    # A short path: the fork server's socket lies there, and the name of a socket may have 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix="launch"))
    (tmp_path / "temporary").symlink_to(temporary)

    def begin(*arguments: str, command: list[str] | None = None, **variables: str) -> Run:
        mark = f"LAUNCHER_TEST={uuid.uuid4()}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        environment |= {"LAUNCHER_TEST": mark.partition("=")[2], "TMPDIR": str(temporary), **variables}
        process = subprocess.Popen(
            [*(command or [sys.executable, str(request.path.parent / "program.py")]), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        runs.append(Run(process, mark))
        return runs[-1]

    yield begin
    shutil.rmtree(temporary, ignore_errors=True)
    for run in runs:
        run.end()
        with suppress(Exception):
            run.process.communicate(timeout=5)


@pytest.fixture
def run(start: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Run a program to its end, and see that neither a process nor a folder of it is left."""

    def run_to_end(*arguments: str, timeout: float = 60, **options: Any) -> Run:
        done = start(*arguments, **options).finish(timeout)
        left = done.left()
        assert not left, f"processes that are left: {left}"
        names = [path.name for path in (tmp_path / "temporary").iterdir()]
        files = [name for name in names if not name.startswith(("torchinductor_", "torchelastic_"))]  # which torch keeps
        assert not files, f"files that are left: {files}"
        return done

    return run_to_end
