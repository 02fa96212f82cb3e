"""When validation runs, and where epochs and runs end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from .base import loader, scenario, stream
from .tracing import Run


def _steps(run: Run) -> dict[str, Any]:
    kept = ("training_step", "validation_step", "epoch_start", "epoch_end", "lr_scheduler_step", "SGD.step")
    facts = run.facts()
    facts["trace"] = [line for line in facts["trace"] if any(word in line for word in kept)]
    return facts


def _run(train: int = 4, **arguments: Any) -> dict[str, Any]:
    arguments.setdefault("num_sanity_val_steps", 0)
    return _steps(Run("", **arguments).do(train_dataloaders=loader(train), val_dataloaders=loader(1, 100)))


@scenario
def validation_every_half_epoch() -> Any:
    return {"even": _run(4, val_check_interval=0.5, max_epochs=2), "odd": _run(5, val_check_interval=0.5)}


@scenario
def validation_in_uneven_fractions() -> Any:
    return {str(share): _run(10, val_check_interval=share)["trace"] for share in (0.25, 0.3, 0.34, 0.7)}


@scenario
def validation_every_three_batches() -> Any:
    return {"within": _run(7, val_check_interval=3, max_epochs=2), "exact": _run(6, val_check_interval=3)}


@scenario
def validation_of_a_whole_epoch_as_int_one_or_the_length() -> Any:
    return {"one": _run(3, val_check_interval=1), "length": _run(3, val_check_interval=3, max_epochs=2)}


@scenario
def validation_every_second_epoch() -> Any:
    return {
        "2": _run(2, check_val_every_n_epoch=2, max_epochs=5),
        "with interval": _run(4, check_val_every_n_epoch=2, val_check_interval=2, max_epochs=3),
    }


@scenario
def validation_counted_across_epochs() -> Any:
    facts = _run(4, check_val_every_n_epoch=None, val_check_interval=3, max_epochs=3)
    long = _run(4, check_val_every_n_epoch=None, val_check_interval=10, max_epochs=3)
    return {"3": facts, "10": long}


@scenario
def validation_counted_across_epochs_on_a_stream() -> Any:
    run = Run("", check_val_every_n_epoch=None, val_check_interval=3, max_epochs=2, num_sanity_val_steps=0)
    return _steps(run.do(train_dataloaders=stream(4), val_dataloaders=loader(1, 100)))


@scenario
def validation_with_accumulation_in_mid_window() -> Any:
    return _run(7, val_check_interval=2, accumulate_grad_batches=3)


@scenario
def validation_by_time() -> Any:
    return _run(3, val_check_interval=timedelta(hours=1), max_epochs=2)


@scenario
def stop_by_max_steps_in_mid_epoch() -> Any:
    return {
        "two": _run(4, max_steps=2),
        "six": _run(4, max_steps=6, max_epochs=None),
        "exact": _run(4, max_steps=4, max_epochs=5),
        "accumulated": _run(7, max_steps=2, accumulate_grad_batches=3),
        "with interval": _run(4, max_steps=3, val_check_interval=2),
        "interval at the end": _run(4, max_steps=2, val_check_interval=2),
    }


@scenario
def stop_by_max_epochs_or_max_steps() -> Any:
    return {
        "epochs first": _run(3, max_epochs=1, max_steps=10)["global_step"],
        "steps first": _run(3, max_epochs=9, max_steps=5)["global_step"],
        "both": _run(3, max_epochs=2, max_steps=6)["global_step"],
    }


@scenario
def stop_by_max_time_zero() -> Any:
    return _run(3, max_time=timedelta(0))


@scenario
def accumulation_of_three_over_seven_batches() -> Any:
    return Run("cb", accumulate_grad_batches=3, max_epochs=2).do(train_dataloaders=loader(7), val_dataloaders=loader(1, 100)).facts()


@scenario
def accumulation_on_a_stream() -> Any:
    return Run("", accumulate_grad_batches=3, limit_val_batches=0).do(train_dataloaders=stream(5)).facts()


@scenario
def accumulation_beyond_the_epoch() -> Any:
    return _run(3, accumulate_grad_batches=5, max_epochs=2)


@scenario
def limits_as_counts_and_fractions() -> Any:
    facts = {}
    for limit in (1, 2, 9, 0.5, 0.34, 1.0):
        run = Run("", limit_train_batches=limit, limit_val_batches=limit)
        run.do(train_dataloaders=loader(5), val_dataloaders=[loader(4, 100), loader(2, 200)] if limit != 0.34 else loader(4, 100))
        facts[repr(limit)] = [run.trainer.num_training_batches, run.trainer.num_val_batches, run.trainer.global_step]
    return facts


@scenario
def sanity_checks_of_different_lengths() -> Any:
    facts = {}
    for count in (0, 1, 3, -1):
        run = Run("", num_sanity_val_steps=count, limit_train_batches=1)
        run.do(val_dataloaders=[loader(2, 100), loader(4, 200)], train_dataloaders=loader(1))
        before = run.trace.lines.index(next(line for line in run.trace.lines if "on_train_start" in line))
        facts[str(count)] = {
            "steps": [line for line in run.trace.lines[:before] if "validation_step" in line],
            "batches": run.trainer.num_sanity_val_batches,
            "num_val_batches": run.trainer.num_val_batches,
        }
    return facts
