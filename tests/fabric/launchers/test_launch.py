"""What the script launcher checks before it starts anything, and which command it runs again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning.fabric.launchers import Launcher, ScriptLauncher, is_interactive
from lightning.fabric.launchers.script import LOCAL_PROCESSES
from lightning.fabric.plugins.environments import KubeflowEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

SHOW = "import json\nfrom lightning.fabric.launchers.script import command_of_this_process\nprint(json.dumps(command_of_this_process()))\n"


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "KERAUNOS_")):
            monkeypatch.delenv(name)


def command_of(*arguments: str, **options: Any) -> list[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stderr
    command: list[str] = json.loads(done.stdout)
    assert command[0] == sys.executable
    return [word for word in command[1:] if word != "-B"]  # set by an environment variable, perhaps


def test_script_runs_again_with_options_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SHOW)
    command = command_of("-O", "-W", "ignore", "train.py", "--lr", "a b")
    assert command == ["-O", "-Wignore", str(tmp_path / "train.py"), "--lr", "a b"]


def test_module_runs_again_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(SHOW)
    (tmp_path / "package" / "train.py").write_text(SHOW)
    assert command_of("-m", "package.train", "fit") == ["-m", "package.train", "fit"]
    assert command_of("-m", "package", "fit") == ["-m", "package", "fit"]


def test_code_of_the_command_line_runs_again() -> None:
    assert command_of("-c", SHOW, "-c", "fit") == ["-c", SHOW, "-c", "fit"]


def test_script_under_a_profiler_runs_without_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SHOW)
    assert command_of("-m", "cProfile", "-o", "profile", "train.py", "fit") == [str(tmp_path / "train.py"), "fit"]


def test_program_from_standard_input_is_refused() -> None:
    done = subprocess.run([sys.executable, "-"], input=SHOW, capture_output=True, text=True, timeout=60)
    assert "MisconfigurationException: The other processes have to run the same program, and there is no file of it" in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_external_processes_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    for name, value in {"WORLD_SIZE": str(ranks * 2), "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    launcher = ScriptLauncher(KubeflowEnvironment(), ranks, 2)
    assert launcher.launch(lambda a, *, b: (a, b), 1, b=2) == (1, 2)
    launcher.kill(15)
    assert dict(os.environ) == before


def test_one_process_starts_no_others_and_sets_nothing() -> None:
    before = dict(os.environ)
    assert ScriptLauncher(LightningEnvironment(), 1).launch(lambda: 5) == 5
    assert dict(os.environ) == before


def test_cluster_that_contradicts_is_refused_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="devices=2 was given, and the SLURM job was submitted with --ntasks-per-node=4"):
        ScriptLauncher(SLURMEnvironment(), 2).launch(print)


def test_port_in_use_is_refused_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(RuntimeError, match="is used by another process"):
            ScriptLauncher(LightningEnvironment(), 2).launch(print)
    assert "LOCAL_RANK" not in os.environ


def test_interactive_session_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_interactive()
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert is_interactive()
    launcher = ScriptLauncher(LightningEnvironment(), 2)
    assert not launcher.is_interactive_compatible
    with pytest.raises(MisconfigurationException, match="strategy='ddp_notebook'"):
        launcher.launch(print)


def test_number_of_processes_can_not_change_within_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL_PROCESSES, "2")
    with pytest.raises(MisconfigurationException, match="devices=3: this script runs in 2 processes"):
        ScriptLauncher(LightningEnvironment(), 3).launch(print)


def test_own_launcher_needs_two_methods() -> None:
    class Mine(Launcher):
        is_interactive_compatible = True

        def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    assert Mine().launch(max, 1, 2) == 2
    assert Mine().kill(15) is None  # type: ignore[func-returns-value]
    with pytest.raises(TypeError, match="abstract"):
        Launcher()  # type: ignore[abstract]
