from __future__ import annotations

import copy
import io
import math
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

import lightning.pytorch.callbacks.progress.tqdm_progress as tqdm_progress
from lightning.pytorch.callbacks.progress import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, convert_inf

Screen = Callable[[], list[str]]


def undelayed(bar: Any) -> Any:
    bar.mininterval = 0
    return bar


class Undelayed(TQDMProgressBar):
    """Draws whenever a refresh is due, however short the time since the last one."""

    def init_train_tqdm(self) -> Tqdm:
        return undelayed(super().init_train_tqdm())

    def init_validation_tqdm(self) -> Tqdm:
        return undelayed(super().init_validation_tqdm())


def counts(text: str, description: str) -> list[str]:
    """The progress that each drawing of a bar shows."""
    return re.findall(rf"{description}: +(?:\d+%)?\|[^|]*\| ([\d/?]+) ", text)


def test_training_bar_stays_and_the_others_go(run: Any, screen: Screen) -> None:
    run(TQDMProgressBar())()
    (line,) = screen()
    assert line.startswith("Epoch 1: 100%|██████████| 5/5 [")
    assert line.endswith("loss=4.500, val=1.000, loss_epoch=7.000, late=9.000]")


def test_bar_of_each_epoch_stays_with_leave(run: Any, screen: Screen) -> None:
    run(TQDMProgressBar(leave=True))()
    assert [line.split("%")[0] for line in screen()] == ["Epoch 0: 100", "Epoch 1: 100"]


@pytest.mark.parametrize(("fn", "text"), [("validate", "Validation"), ("test", "Testing"), ("predict", "Predicting")])
def test_bar_of_an_evaluation_stays(run: Any, screen: Screen, fn: str, text: str) -> None:
    run(TQDMProgressBar(), fn=fn, loaders=2)()
    (line,) = screen()
    assert line.startswith(f"{text} DataLoader 1: 100%|██████████| 3/3")


def test_texts_name_the_stage_and_the_loader(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(TQDMProgressBar(), loaders=2)()
    out = capsys.readouterr().out
    positions = [
        out.index(text)
        for text in (
            "Sanity Checking: ",
            "Sanity Checking DataLoader 0:   0%|          | 0/2",
            "Sanity Checking DataLoader 1: ",
            "Training: ",
            "Epoch 0:   0%|          | 0/5",
            "Validation DataLoader 0:   0%|          | 0/3",
            "Validation DataLoader 1: ",
            "Epoch 1: ",
        )
    ]
    assert positions == sorted(positions)


def test_validation_bar_stands_below_the_training_bar(run: Any, screen: Screen) -> None:
    test = run(TQDMProgressBar(), epochs=1)
    shown = []
    test.at = lambda event: shown.append(screen()) if event == "validation 0 0" else None
    test()
    assert [[line.split(":")[0] for line in lines] for lines in shown] == [
        ["Sanity Checking DataLoader 0"],
        ["Epoch 0", "Validation DataLoader 0"],
    ]


@pytest.mark.parametrize(("refresh_rate", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (100, [5])])
def test_bar_is_drawn_every_refresh_rate_batches_and_at_the_last(
    run: Any, capsys: pytest.CaptureFixture[str], refresh_rate: int, expected: list[int]
) -> None:
    run(Undelayed(refresh_rate=refresh_rate), epochs=1)()
    drawn = list(dict.fromkeys(counts(capsys.readouterr().out, "Epoch 0")))
    assert drawn == [f"{n}/5" for n in [0, *expected]]


def test_bar_is_not_drawn_again_at_once(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bar = TQDMProgressBar()
    bar.init_train_tqdm = lambda: setattr(made := TQDMProgressBar.init_train_tqdm(bar), "mininterval", 1e9) or made  # type: ignore
    run(bar, epochs=1)()
    assert set(counts(capsys.readouterr().out, "Epoch 0")) == {"0/5", "5/5"}


def test_no_metrics_are_asked_for_while_no_refresh_is_due(run: Any) -> None:
    class Counting(TQDMProgressBar):
        asked = 0

        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            self.asked += 1
            return super().get_metrics(trainer, pl_module)

    test = run(Counting(refresh_rate=1000), batches=5000, epochs=1)
    asked = []
    test.at = lambda event: asked.append(test.bar.asked) if event in ("train 0", "train 998") else None
    test()
    assert asked == [0, 0]


def test_unknown_length_shows_a_question_mark_and_ends_with_the_right_number(run: Any, screen: Screen) -> None:
    run(TQDMProgressBar(refresh_rate=3), batches=math.inf, epochs=1)()
    (line,) = screen()
    assert line.startswith("Epoch 0: |          | 5/? [")


def test_length_that_becomes_unknown_is_shown_so(run: Any, screen: Screen) -> None:
    test = run(TQDMProgressBar())
    test.at = lambda event: setattr(test.trainer, "num_training_batches", math.inf) if event == "epoch end" else None
    test()
    (line,) = screen()
    assert "| 5/? [" in line


def test_resume_in_the_middle_of_an_epoch_goes_on_from_there(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    test = run(Undelayed(), epochs=1)(first_batch=3)
    assert list(dict.fromkeys(counts(capsys.readouterr().out, "Epoch 0")))[-2:] == ["4/5", "5/5"]
    assert test.bar.train_progress_bar.initial == 3


def test_print_stands_above_the_bar(run: Any, screen: Screen) -> None:
    test = run(TQDMProgressBar(), epochs=1)
    test.at = lambda event: test.bar.print("hello", 2, sep="-", flush=True) if event == "train 2" else None
    test()
    above, line = screen()
    assert above == "hello-2"
    assert line.startswith("Epoch 0: 100%")


def test_print_without_a_bar_prints(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bar = TQDMProgressBar()
    bar.print("before")
    file = io.StringIO()
    bar.print("elsewhere", file=file)
    assert (capsys.readouterr().out, file.getvalue()) == ("before\n", "elsewhere\n")
    test = run(bar)
    test.trainer.is_global_zero = False
    test()
    bar.print("on another process")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", ["refresh_rate", "disable", "rank"])
def test_disabled_bar_writes_nothing(run: Any, capsys: pytest.CaptureFixture[str], how: str) -> None:
    bar = TQDMProgressBar(refresh_rate=0 if how == "refresh_rate" else 1)
    if how == "disable":
        bar.disable()
    for fn in ("fit", "validate", "test", "predict"):
        test = run(bar, fn=fn)
        test.trainer.is_global_zero = how != "rank"
        test()
    assert bar.is_disabled
    assert not bar.is_enabled
    assert capsys.readouterr() == ("", "")


def test_disable_in_the_middle_stops_drawing_and_enable_goes_on(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    test = run(Undelayed(), epochs=1)
    test.at = lambda event: {"train 1": test.bar.disable, "train 4": test.bar.enable}.get(event, lambda: None)()
    test()
    assert list(dict.fromkeys(counts(capsys.readouterr().out, "Epoch 0"))) == ["0/5", "1/5", "5/5"]


def test_enabled_after_disable() -> None:
    bar = TQDMProgressBar()
    bar.disable()
    bar.enable()
    assert bar.is_enabled


@pytest.mark.parametrize(
    ("environment", "given", "rate"),
    [
        ({}, 1, 1),
        ({"COLAB_GPU": "1"}, 1, 20),
        ({"COLAB_GPU": "1"}, 5, 5),
        ({"TQDM_MINITERS": "7"}, 1, 7),
        ({"TQDM_MINITERS": "7"}, 13, 13),
        ({"TQDM_MINITERS": "7"}, 0, 0),
        ({"TQDM_MINITERS": ""}, 2, 2),
    ],
)
def test_refresh_rate_with_the_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], given: int, rate: int) -> None:
    for name in ("COLAB_GPU", "TQDM_MINITERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert TQDMProgressBar(refresh_rate=given).refresh_rate == rate


@pytest.mark.parametrize("argument", ["refresh_rate", "process_position"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError)])
def test_wrong_argument_raises(argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"TQDMProgressBar\(`{argument}`\) must be .*at least 0, got"):
        TQDMProgressBar(**{argument: value})


@pytest.mark.parametrize(("position", "train", "validation"), [(0, 0, -1), (2, -4, -5)])
def test_process_position_leaves_two_lines_for_each_process(run: Any, position: int, train: int, validation: int) -> None:
    test = run(TQDMProgressBar(process_position=position), epochs=1)
    seen = {}
    test.at = lambda event: (
        seen.update({event: (test.bar.train_progress_bar.pos, test.bar.val_progress_bar.pos)})
        if (event == "validation 0 0" and not test.trainer.sanity_checking)
        else None
    )
    test()
    assert seen == {"validation 0 0": (train, validation)}
    assert test.bar.process_position == position


def test_bar_before_its_loop_raises() -> None:
    for name in ("train", "val", "test", "predict"):
        with pytest.raises(TypeError, match=rf"TQDMProgressBar.{name}_progress_bar` is not set yet"):
            getattr(TQDMProgressBar(), f"{name}_progress_bar")


def test_overridden_init_method_and_descriptions_are_used(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Own(TQDMProgressBar):
        sanity_check_description = "Looking"
        BAR_FORMAT = "{desc} {n_fmt} of {total_fmt}{postfix}"

        def init_test_tqdm(self) -> Tqdm:
            bar = super().init_test_tqdm()
            bar.leave = False
            return bar

        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            return {"own": 2}

    run(Own(), epochs=1)()
    out = capsys.readouterr().out
    assert "Looking DataLoader 0:  2 of 2" in out
    assert "Epoch 0:  5 of 5, own=2" in out
    run(Own(), fn="test")()
    assert capsys.readouterr().out.endswith("\r")


def test_exception_leaves_the_bar_on_a_line_of_its_own(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    test = run(TQDMProgressBar(), epochs=1)

    def fail(event: str) -> None:
        if event == "train 3":
            raise RuntimeError

    test.at = fail
    test()
    out = capsys.readouterr().out
    assert counts(out, "Epoch 0")[-1] == "3/5"
    assert out.endswith("\n")


def test_bar_survives_pickle_and_copy(run: Any) -> None:
    test = run(TQDMProgressBar(refresh_rate=3, leave=True))()
    test.bar._trainer = None  # the stand-in has functions that can't be pickled
    for copied in (pickle.loads(pickle.dumps(test.bar)), copy.deepcopy(test.bar)):
        assert (copied.refresh_rate, copied.is_enabled) == (3, True)
        run(copied)()


def test_tqdm_may_be_replaced_in_the_module(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Recording(Tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(kwargs["desc"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(tqdm_progress, "Tqdm", Recording)
    run(TQDMProgressBar(), epochs=1)()
    assert made == ["Sanity Checking", "Training", "Validation"]


def test_bar_starts_no_thread(run: Any) -> None:
    before = sys.modules["threading"].active_count()
    test = run(TQDMProgressBar(), epochs=1)
    during = []
    test.at = lambda event: during.append(sys.modules["threading"].active_count())
    test()
    assert set(during) == {before}


def test_module_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'tqdm'"):
        _ = tqdm_progress.tqdm


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (1234567, "1234567"),
        (0.5, "0.500"),
        (123.456, "123.0"),
        (1e-7, "1e-7"),
        (100000.0, "1e+5"),
        (-0.5, "-0.50"),
        (1 / 3, "0.333"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("on_7", "on_7"),
    ],
)
def test_metrics_keep_their_width(number: float | str, text: str) -> None:
    assert Tqdm.format_num(number) == text


def test_infinite_total_is_unknown() -> None:
    assert [convert_inf(x) for x in (math.inf, -math.inf, math.nan, None, 3, 3.5)] == [None, None, None, None, 3, 3.5]
