"""Checkpoints made to do harm, through every way that a module, a datamodule or a trainer reads one."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightning.fabric.checkpoint.format import TAG
from lightning.fabric.checkpoint.io import save
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

MARK = "executed"


class Model(BoringModel):
    def __init__(self, a: Any = None, **rest: Any) -> None:
        super().__init__()
        self.a, self.rest = a, rest
        self.save_hyperparameters()


class Data(BoringDataModule):
    def __init__(self, a: Any = None, **rest: Any) -> None:
        super().__init__()
        self.a, self.rest = a, rest


class Gadget:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


@pytest.fixture(autouse=True)
def nothing_is_executed() -> Iterator[None]:
    before = set(sys.modules)
    yield
    assert not Path(MARK).exists()
    assert not {"antigravity", "this", "lightning.pytorch.cli"} & (set(sys.modules) - before)


def quiet_trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, fast_dev_run=True, **options
    )


WAYS: dict[str, Callable[[], Any]] = {
    "module": lambda: Model.load_from_checkpoint("bad.ckpt"),
    "module, explicitly safe": lambda: Model.load_from_checkpoint("bad.ckpt", weights_only=True),
    "datamodule": lambda: Data.load_from_checkpoint("bad.ckpt"),
    "fit": lambda: quiet_trainer().fit(Model(), ckpt_path="bad.ckpt"),
    "validate": lambda: quiet_trainer().validate(Model(), ckpt_path="bad.ckpt", verbose=False),
    "test": lambda: quiet_trainer().test(Model(), ckpt_path="bad.ckpt", verbose=False),
    "predict": lambda: quiet_trainer().predict(Model(), ckpt_path="bad.ckpt"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["hyper_parameters", "datamodule_hyper_parameters", "callbacks", "loops", "state_dict", "anything"])
def test_pickled_gadget_is_refused_wherever_it_stands(way: str, key: str) -> None:
    torch.save({"state_dict": Model().state_dict(), "epoch": 0, "global_step": 0, key: {"a": Gadget()}}, "bad.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="system"):
        WAYS[way]()


@pytest.mark.parametrize("way", WAYS)
def test_file_that_is_a_pickle_and_nothing_else_is_refused(way: str) -> None:
    Path("bad.ckpt").write_bytes(pickle.dumps(Gadget()))
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        WAYS[way]()


@pytest.mark.parametrize("cls", [Model, Data])
@pytest.mark.parametrize("name", ["_instantiator", "_class_path"])
def test_code_named_by_the_command_line_keys_is_not_run(cls: Any, name: str) -> None:
    hparams = {"a": 5, name: "os.system", "__class__": "os.system"}
    save({"state_dict": Model().state_dict(), cls.CHECKPOINT_HYPER_PARAMS_KEY: hparams}, "bad.ckpt")
    loaded = cls.load_from_checkpoint("bad.ckpt")
    assert type(loaded) is cls
    assert loaded.a == 5
    assert name not in loaded.rest


def test_argument_described_by_a_class_path_has_to_be_given() -> None:
    described = {"class_path": "os.system", "init_args": {"command": f"touch {MARK}"}}
    hparams = {"a": described, "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    save({"state_dict": Model().state_dict(), "hyper_parameters": hparams}, "bad.ckpt")
    with pytest.raises(TypeError, match=r"argument 'a' of Model by the class path 'os\.system'"):
        Model.load_from_checkpoint("bad.ckpt")
    assert Model.load_from_checkpoint("bad.ckpt", a=1).a == 1


@pytest.mark.parametrize("module", ["antigravity", "os", "subprocess", "lightning.pytorch.cli"])
@pytest.mark.parametrize("kind", ["dataclass", "enum", "namedtuple", "opaque"])
def test_tag_with_the_name_of_code_is_not_followed(module: str, kind: str) -> None:
    tag = {TAG: kind, "module": module, "qualname": "system", "value": {"name": "x", "value": 1}, "type": "t", "excerpt": "e"}
    torch.save({"state_dict": Model().state_dict(), "hyper_parameters": {"a": tag}}, "bad.ckpt")
    with pytest.raises((TypeError, UserWarning), match="could not be re"):
        Model.load_from_checkpoint("bad.ckpt")


def test_interpolation_in_the_hyperparameters_calls_nothing() -> None:
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
    register("run", lambda command: os.system(command))
    try:
        content = {"x": f"${{run:touch {MARK}}}", "nested": [f"a${{run:touch {MARK}}}"]}
        tag = {TAG: "omegaconf", "readonly": None, "struct": None, "value": {"content": content, "resolved": None}}
        torch.save({"state_dict": Model().state_dict(), "hyper_parameters": tag}, "bad.ckpt")
        loaded = Model.load_from_checkpoint("bad.ckpt")
        assert loaded.rest["x"] == content["x"]
        assert OmegaConf.to_container(loaded.rest["nested"], resolve=True) == content["nested"]
        Path("h.yaml").write_text(f"a: ${{run:touch {MARK}}}\n")
        assert Model.load_from_checkpoint("bad.ckpt", hparams_file="h.yaml").a == f"${{run:touch {MARK}}}"
    finally:
        OmegaConf.clear_resolver("run")


def test_hyperparameter_file_runs_nothing() -> None:
    save({"state_dict": Model().state_dict()}, "good.ckpt")
    Path("h.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {MARK}']\n")
    with pytest.raises(ValueError, match="plain YAML"):
        Model.load_from_checkpoint("good.ckpt", hparams_file="h.yaml")
    Path("h.csv").write_text(f"key,value\na,__import__('os').system('touch {MARK}')\n")
    assert Model.load_from_checkpoint("good.ckpt", hparams_file="h.csv").a == f"__import__('os').system('touch {MARK}')"
