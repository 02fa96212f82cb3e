"""File names: templates, values, versions, prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning.pytorch.callbacks.checkpoint_names import pattern
from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint

tensor = torch.tensor


@pytest.mark.parametrize(
    ("template", "metrics", "name"),
    [
        (None, {"epoch": 1, "step": 2}, "epoch=1-step=2"),
        ("", {"epoch": 1, "step": 2}, "epoch=1-step=2"),
        (None, {}, "epoch=0-step=0"),
        ("{epoch:02d}-{step:05d}", {"epoch": tensor(1), "step": tensor(2)}, "epoch=01-step=00002"),
        ("{val_loss}", {"val_loss": 0.1}, "val_loss=0.1"),
        ("{val_loss}", {"val_loss": tensor(0.1)}, "val_loss=0.10000000149011612"),
        ("{val_loss:.3f}", {"val_loss": tensor(0.12345)}, "val_loss=0.123"),
        ("{val/loss:.3f}", {"val/loss": tensor(0.12345)}, "val/loss=0.123"),
        ("{val.loss:.1f}", {"val.loss": 1.0}, "val.loss=1.0"),
        ("{val loss}", {"val loss": 1.0}, "val loss=1.0"),
        ("{a[0]}", {"a[0]": 1.0}, "a[0]=1.0"),
        ("{0}", {"0": 1.0}, "0=1.0"),
        ("{ab}{a}", {"a": 1.0, "ab": 2.0}, "ab=2.0a=1.0"),
        ("{a}-x-{a:.2f}", {"a": 1}, "a=1-x-a=1.00"),
        ("a={a}", {"a": 1}, "a=a=1"),
        ("{acc:02.0f}", {"acc": 1.12}, "acc=01"),
        ("{acc}", {"acc": tensor(True)}, "acc=True"),
        ("{acc}", {"acc": tensor(float("nan"))}, "acc=nan"),
        ("{missing}", {}, "missing=0"),
        ("{missing:d}", {}, "missing=0"),
        ("{missing:.2f}", {}, "missing=0.00"),
        ("f/{epoch}/g", {"epoch": 1}, "f/epoch=1/g"),
        ("x.y{epoch}.z", {"epoch": 1}, "x.yepoch=1.z"),
        ("plain", {"epoch": 1}, "plain"),
    ],
)
def test_template_is_filled(template: str | None, metrics: dict[str, Any], name: str) -> None:
    assert ModelCheckpoint(filename=template).format_checkpoint_name(metrics) == f"{name}.ckpt"


@pytest.mark.parametrize(
    ("template", "metrics", "name"),
    [
        ("epoch={epoch}-val={val/loss:.2f}", {"epoch": 1, "val/loss": 0.123}, "epoch=1-val=0.12"),
        ("{val/loss:.3f}", {"val/loss": tensor(0.12345)}, "0.123"),
        ("{missing}", {}, "0"),
    ],
)
def test_names_are_left_out_without_auto_insert(template: str, metrics: dict[str, Any], name: str) -> None:
    checkpoint = ModelCheckpoint(filename=template, auto_insert_metric_name=False)
    assert checkpoint.format_checkpoint_name(metrics) == f"{name}.ckpt"


def test_name_with_version_prefix_and_other_template() -> None:
    checkpoint = ModelCheckpoint(filename="a{epoch}")
    assert checkpoint.format_checkpoint_name({"epoch": 1}, ver=0) == "aepoch=1-v0.ckpt"
    assert checkpoint.format_checkpoint_name({"epoch": 1}, prefix="pre", ver=2) == "pre-aepoch=1-v2.ckpt"
    assert checkpoint.format_checkpoint_name({"epoch": 1}, prefix="") == "-aepoch=1.ckpt"
    assert checkpoint.format_checkpoint_name({"step": 3}, "{step}") == "step=3.ckpt"


def test_characters_of_names_are_attributes() -> None:
    checkpoint = ModelCheckpoint()
    checkpoint.CHECKPOINT_JOIN_CHAR, checkpoint.CHECKPOINT_EQUALS_CHAR, checkpoint.FILE_EXTENSION = "+", "_", ".pt"
    assert checkpoint.format_checkpoint_name({"epoch": 1, "step": 2}, ver=1, prefix="p") == "p+epoch_1+step_2+v1.pt"


def test_name_lies_in_dirpath(tmp_path: Any) -> None:
    assert ModelCheckpoint(dirpath=tmp_path / "d", filename="{epoch}").format_checkpoint_name({"epoch": 1}) == str(
        tmp_path / "d/epoch=1.ckpt"
    )
    assert ModelCheckpoint(dirpath="memory://d", filename="x").format_checkpoint_name({}) == "memory://d/x.ckpt"


def test_formatting_leaves_the_metrics_alone() -> None:
    metrics = {"epoch": tensor(1)}
    ModelCheckpoint(filename="{missing}").format_checkpoint_name(metrics)
    assert metrics == {"epoch": tensor(1)}


@pytest.mark.parametrize("template", ["a{a", "{a}}", "{}", "{:.2f}"])
def test_broken_template_is_refused_at_once(template: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        ModelCheckpoint(filename=template)


def test_format_that_does_not_suit_names_metric_and_value() -> None:
    with pytest.raises(ValueError, match=r"'acc' with 'd'.*1\.5"):
        ModelCheckpoint(filename="{acc:d}").format_checkpoint_name({"acc": tensor(1.5)})


@pytest.mark.parametrize(
    ("template", "name", "matches"),
    [
        ("last", "last.ckpt", True),
        ("last", "last-v12.ckpt", True),
        ("last", "last-vx.ckpt", False),
        ("last", "lastly.ckpt", False),
        ("{epoch}-last", "epoch=3-last.ckpt", True),
        ("{epoch}-last", "epoch=3-last-v1.ckpt", True),
        ("{epoch}-last", "3-last.ckpt", False),
        ("a.b", "axb.ckpt", False),
    ],
)
def test_pattern_matches_what_the_template_makes(template: str, name: str, matches: bool) -> None:
    assert bool(pattern(template, "-", ".ckpt").fullmatch(name)) is matches
