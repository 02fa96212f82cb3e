"""The examples run as a user starts them, warn of nothing, and reach what they promise."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(name: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), "--accelerator", "cpu", "--output", "out", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number_after(text: str, output: str) -> float:
    found = re.search(re.escape(text) + r"\s*([0-9.]+)", output)
    assert found, f"no number after {text!r} in:\n{output}"
    return float(found[1])


def column(name: str, file: Path) -> list[float]:
    with file.open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row[name]]


def assert_is_picture(file: Path, *, at_least: tuple[int, int]) -> None:
    pixels = matplotlib.image.imread(file)
    assert pixels.shape[0] >= at_least[0]
    assert pixels.shape[1] >= at_least[1]
    assert pixels.std() > 0.05, "the picture is empty"


@pytest.mark.slow
def test_digits_reaches_its_accuracy_and_leaves_logs_checkpoint_and_picture() -> None:
    output = run_example("digits.py", "--max-epochs", "12")

    accuracy = number_after("Test accuracy:", output)
    assert accuracy >= 0.98
    assert "Total params" in output
    logs = Path("out/csv/version_0")
    assert len(column("val/acc", logs / "metrics.csv")) == 12
    assert column("test/acc", logs / "metrics.csv") == [pytest.approx(accuracy, abs=1e-4)]
    [checkpoint] = logs.glob("checkpoints/*.ckpt")
    assert f"{max(column('val/acc', logs / 'metrics.csv')):.4f}" in checkpoint.name
    assert list(Path("out/tensorboard/version_0").glob("events.out.tfevents.*"))
    assert f"Picture: {Path('out/digits.png').resolve()}" in output
    assert_is_picture(Path("out/digits.png"), at_least=(600, 1200))


@pytest.mark.slow
def test_gpt_learns_more_than_the_frequencies_of_letters_and_writes_text() -> None:
    output = run_example("gpt.py", "--quick")

    assert number_after("Nats per letter:", output) < number_after("At best", output) - 0.5
    losses = column("train/loss", Path("out/lightning_logs/version_0/metrics.csv"))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.7
    rates = column("lr-AdamW", Path("out/lightning_logs/version_0/metrics.csv"))
    assert rates[0] < max(rates) > rates[-1]
    written = output[output.index('The "assert" statement') : output.index("Nats per letter")]
    assert len(written) > 400
    assert len(set(written.split())) > 20


@pytest.mark.slow
def test_gan_draws_digits_far_nearer_to_real_ones_than_before_training() -> None:
    output = run_example("gan.py", "--quick")

    untrained, trained, real = (number_after(f"  {name}:", output) for name in ("untrained", "trained", "real digits"))
    assert real < trained < untrained / 3
    assert_is_picture(Path("out/gan.png"), at_least=(300, 600))
