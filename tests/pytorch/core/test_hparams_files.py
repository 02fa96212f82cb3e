"""Hyperparameters in YAML and CSV files."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from lightning.pytorch.core.saving import (
    convert,
    load_hparams_from_tags_csv,
    load_hparams_from_yaml,
    save_hparams_to_tags_csv,
    save_hparams_to_yaml,
    update_hparams,
)
from lightning.pytorch.utilities.parsing import AttributeDict


class Mode(enum.Enum):
    MIN = 1


@dataclasses.dataclass
class Config:
    x: int = 1


EVERYTHING: dict[str, Any] = {
    "number": 1.5,
    "nothing": None,
    "nested": {"list": [1, {"a": True}], "tuple": (1, 2), "ü": "ü"},
    "path": Path("data"),
    "mode": Mode.MIN,
    "config": Config(),
    "module": torch.nn.Linear(1, 1),
    "function": len,
    "tensor": torch.ones(2),
    "attributes": AttributeDict(z=1),
    "namespace": argparse.Namespace(z=1),
}


def test_yaml_is_plain_data_that_any_reader_takes() -> None:
    save_hparams_to_yaml("h.yaml", EVERYTHING)
    plain = yaml.safe_load(Path("h.yaml").read_text(encoding="utf-8"))
    assert plain == load_hparams_from_yaml("h.yaml", use_omegaconf=False)
    assert plain["nested"] == {"list": [1, {"a": True}], "tuple": [1, 2], "ü": "ü"}
    assert (plain["path"], plain["config"], plain["attributes"], plain["namespace"]) == ("data", {"x": 1}, {"z": 1}, {"z": 1})
    assert isinstance(plain["module"], str)


@pytest.mark.parametrize(
    "hparams", [{"a": 1}, argparse.Namespace(a=1), AttributeDict(a=1), OmegaConf.create({"a": 1})], ids=lambda h: type(h).__name__
)
@pytest.mark.parametrize("target", ["h.yaml", "memory://hparams/h.yaml"])
def test_yaml_of_any_container_is_read_again(hparams: Any, target: str) -> None:
    save_hparams_to_yaml(target, {"old": 1})
    save_hparams_to_yaml(target, hparams)
    assert load_hparams_from_yaml(target) == {"a": 1}


def test_yaml_becomes_an_omegaconf_container_if_the_program_uses_it() -> None:
    Path("h.yaml").write_text("a: 1\nb: ${a}\nc: ${oc.env:HOME}\n")
    hparams: Any = load_hparams_from_yaml("h.yaml")
    assert isinstance(hparams, DictConfig)
    assert hparams.c == "${oc.env:HOME}"
    Path("h.yaml").write_text("a: 1\nb: ${a}\n")
    assert load_hparams_from_yaml("h.yaml").b == 1  # type: ignore[attr-defined]
    code = "from lightning.pytorch.core.saving import load_hparams_from_yaml as load; print(type(load('h.yaml')).__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "dict\n"


def test_tuples_and_complex_numbers_in_files_of_lightning_are_read() -> None:
    Path("h.yaml").write_text("betas: !!python/tuple [0.9, 0.99]\nz: !!python/complex 1j\n")
    assert load_hparams_from_yaml("h.yaml", use_omegaconf=False) == {"betas": (0.9, 0.99), "z": 1j}


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch executed']",
        "a: !!python/object/new:os.system ['touch executed']",
        "a: !!python/object:subprocess.Popen {args: [touch, executed]}",
        "a: !!python/name:os.system",
        "a: !!python/module:antigravity",
        "!!python/object/apply:eval [\"__import__('os').system('touch executed')\"]: 1",
        "- 1",
        "a: [",
        "just text",
    ],
)
def test_yaml_of_python_objects_or_without_keys_is_refused(text: str) -> None:
    Path("h.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"h\.yaml"):
        load_hparams_from_yaml("h.yaml")
    assert not os.path.exists("executed")
    assert "antigravity" not in sys.modules


def test_empty_yaml_holds_nothing() -> None:
    Path("h.yaml").write_text("")
    assert load_hparams_from_yaml("h.yaml") == {}


@pytest.mark.parametrize("read", [load_hparams_from_yaml, load_hparams_from_tags_csv])
def test_missing_file_is_warned_of(read: Any) -> None:
    with pytest.warns(RuntimeWarning, match=r"no hyperparameter file 'nope'"):
        assert read("nope") == {}


@pytest.mark.parametrize("write", [save_hparams_to_yaml, save_hparams_to_tags_csv])
def test_missing_folder_and_wrong_type_are_refused(write: Any) -> None:
    with pytest.raises(RuntimeError, match="Missing folder: nowhere"):
        write("nowhere/h", {})
    with pytest.raises(TypeError, match="int"):
        write("h", 5)
    assert os.listdir() == []


def test_csv_comes_back_as_literals_and_strings() -> None:
    for hparams in ({"a": 1, "b": [1, "x"], "c": "text, quoted", "d": Path("p")}, argparse.Namespace(a=1)):
        save_hparams_to_tags_csv("h.csv", hparams)
        expected = vars(hparams) if isinstance(hparams, argparse.Namespace) else {**hparams, "d": "p"}
        assert load_hparams_from_tags_csv("h.csv") == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1.5", 1.5), ("True", True), ("None", None), ("{'a': 1}", {"a": 1}), ("x", "x"), ("", ""), ("__import__('os')",) * 2],
)
def test_convert_reads_literals_only(text: str, value: Any) -> None:
    assert convert(text) == value


def test_update_reaches_nested_dicts() -> None:
    hparams = {"x": {"y": 1}, "l": [1], "s": 1}
    update_hparams(hparams, {"x": {"z": 2}, "n": {"q": 3}, "l": [2], "s": {"t": 1}})
    assert hparams == {"x": {"y": 1, "z": 2}, "n": {"q": 3}, "l": [2], "s": {"t": 1}}
