"""Trainings of several processes in which one fails: the whole run ends soon, says why, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
RAISING = ["training_step", "validation_step", "hook", "setup", "configure_optimizers"]
SOON = 60  # seconds for start, failure and end, on a busy machine; a collective alone waits for 120
HANG = ("--limit", "6")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def check_cause(text: str, cause: str) -> None:
    assert f"The run failed: {cause}" in text


def check_what_is_left(saved: bool = True, rank: int = 0) -> None:
    """Callbacks have heard of the failure, loggers were closed, and the checkpoint of the state at the failure is complete."""
    import torch

    assert Path(f"heard-{rank}").exists()
    assert Path(f"finalized-{rank}").read_text() == "failed"
    if saved:
        assert torch.load("exception/failed.ckpt", weights_only=True)["state_dict"]


# ---- processes that run the script again ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "cause"),
    [
        ("raise_in_training_step", "rank 1 raised ValueError: bad batch."),
        ("kill", "rank 1 was killed by SIGKILL"),
        pytest.param("exit", "rank 1 ended with exit code 3", marks=pytest.mark.slow),
        *(pytest.param(f"raise_in_{place}", "rank 1 raised ValueError: bad batch.", marks=pytest.mark.slow) for place in RAISING[1:]),
    ],
)
def test_rank_that_fails_ends_the_script(run: Run, deed: str, cause: str) -> None:
    done = run(deed, timeout=SOON)
    assert done.code == 1
    check_cause(done.error, cause)
    check_what_is_left(saved="setup" not in deed and "configure" not in deed)


@pytest.mark.slow
def test_rank_zero_that_fails_ends_the_others(run: Run) -> None:
    done = run("--culprit", "0", "raise_in_training_step", timeout=SOON)
    assert done.code == 1
    assert "ValueError: bad batch" in done.error
    check_what_is_left()


@pytest.mark.slow
def test_preparation_that_fails_ends_those_that_wait_for_it(run: Run) -> None:
    done = run("raise_in_prepare_data", timeout=SOON)
    assert done.code == 1
    assert "ValueError: bad batch" in done.error


@pytest.mark.parametrize(
    "deed",
    [
        "hang",
        *(
            pytest.param(deed, marks=pytest.mark.slow)
            for deed in ("hang_in_validation_step", "hang_in_hook", "hang_in_setup", "spin", "hold")
        ),
    ],
)
def test_rank_that_stands_still_ends_the_script(run: Run, deed: str) -> None:
    done = run(*HANG, deed, timeout=SOON)
    assert done.code == 1
    check_cause(done.error, "rank 1 stands still: it has made no progress for 6 s")
    places = {"hang": "training_step", "spin": "in spin", "hold": "training_step", "hang_in_hook": "on_train_batch_end"}
    place = places.get(deed, deed.removeprefix("hang_in_"))
    assert place in done.error[done.error.index("On rank 1, which stands here:") :]
    check_what_is_left(saved=deed != "hang_in_setup")


@pytest.mark.slow
def test_rank_in_a_collective_of_its_own_ends_the_script(run: Run) -> None:
    done = run(*HANG, "collect_alone", timeout=SOON)
    assert done.code != 0
    assert "has made no progress for 6 s" in done.error
    assert "in barrier" in done.error


# ---- processes that are copies of this one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_failures_of_copies_are_raised_here_and_the_next_run_is_well(run: Run, strategy: str) -> None:
    causes = {
        "raise_in_training_step": "ProcessRaisedException: The run failed: rank 1 raised ValueError: bad batch.",
        "raise_in_validation_step": "ProcessRaisedException: The run failed: rank 1 raised ValueError: bad batch.",
        "raise_in_prepare_data": "ProcessRaisedException: The run failed: rank 0 raised ValueError: bad batch.",
        "raise_in_configure_optimizers": "ProcessRaisedException: The run failed: rank 1 raised ValueError: bad batch.",
        "kill": "ProcessExitedException: The run failed: rank 1 was killed by SIGKILL",
        "exit": "ProcessExitedException: The run failed: rank 1 ended with exit code 3",
        "hang": "ProcessRaisedException: The run failed: rank 1 stands still: it has made no progress for 6 s",
    }
    done = run(*HANG, "--strategy", strategy, *causes, "nothing", timeout=3 * SOON)
    assert done.code == 0
    *failed, well = done.results
    for (deed, message, seconds), (name, cause) in zip(failed, causes.items(), strict=True):
        assert deed == name
        assert message.startswith(cause)
        assert seconds < SOON
    assert well[:2] == ["nothing", 4]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_copies_that_fail_close_what_they_hold(run: Run, strategy: str) -> None:
    run("--strategy", strategy, "raise_in_training_step", timeout=SOON)
    check_what_is_left()


# ---- torchrun -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "cause"),
    [
        ("raise_in_training_step", "ValueError: bad batch"),
        ("kill", "exitcode  : -9"),
        ("exit", "exitcode  : 3"),
        ("hang", "rank 1 stands still: it has made no progress for 6 s"),
    ],
)
def test_torchrun_shows_the_first_cause(run: Run, deed: str, cause: str) -> None:
    script = str(Path(__file__).parent / "program.py")
    done = run(*HANG, deed, command=[*TORCHRUN, script], timeout=SOON)
    assert done.code == 1
    assert "Root Cause" in done.error, done.error
    summary = done.error[done.error.index("Root Cause") :]
    assert "rank      : 1" in summary
    assert cause in summary


# ---- before any process starts ------------------------------------------------------------------------------------------------


def test_port_in_use_is_told_before_any_process_starts(run: Run) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        done = run("nothing", MASTER_PORT=str(server.getsockname()[1]))
    assert done.code == 1
    assert "is used by another process on this machine" in done.error
    assert "All 2 processes" not in done.error


def test_second_trainer_with_another_number_of_devices_is_refused(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "from lightning.pytorch import Trainer\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "options = dict(accelerator='cpu', strategy='ddp', max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False,\n"
        "    enable_progress_bar=False, enable_model_summary=False)\n"
        "Trainer(devices=2, **options).fit(BoringModel())\n"
        "Trainer(devices=3, **options).fit(BoringModel())\n"
    )
    done = run(command=[sys.executable, str(script)])
    assert done.code == 1
    assert "devices=3: this script runs in 2 processes" in done.error


def test_more_devices_than_there_are_are_refused_at_once() -> None:
    from lightning.fabric.accelerators import CPUAccelerator
    from lightning.fabric.utilities import device_parser
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer

    class One(CPUAccelerator):
        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return device_parser.parse_devices(devices, [0], "toy")

    with pytest.raises(MisconfigurationException, match="devices=2"):
        Trainer(accelerator=One(), devices=2, strategy="ddp")
