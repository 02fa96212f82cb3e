"""load_from_checkpoint: which arguments reach ``__init__``, in which order things happen, what the errors say."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning.fabric.checkpoint.io import load, save
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.saving import _where_available

events: list[Any] = []


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 3
    data: Path = Path("data")


class Mode(enum.Enum):
    MIN = "min"


class Model(LightningModule):
    def __init__(self, a: Any, b: Any = 2) -> None:
        super().__init__()
        events.append(("init", a, b))
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def configure_model(self) -> None:
        events.append("configure_model")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        events.append(("on_load_checkpoint", dict(checkpoint["hyper_parameters"])))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        events.append(("load_state_dict", kwargs))
        return super().load_state_dict(*args, **kwargs)


class Wider(Model):
    def __init__(self, a: Any, b: Any = 2) -> None:
        super().__init__(a, b)
        self.more = nn.Linear(1, 1)


class Conf(LightningModule):
    def __init__(self, conf: Any, b: int = 1, **rest: Any) -> None:
        super().__init__()
        self.conf, self.b, self.rest = conf, b, rest
        self.layer = nn.Linear(1, 1)
        self.save_hyperparameters(conf)


class Data(LightningDataModule):
    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.state: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 3}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def checkpoint_of(model: LightningModule, **more: Any) -> dict[str, Any]:
    """What a trainer saves of a module, as far as loading the module goes."""
    hparams = model.hparams if isinstance(model.hparams, DictConfig) else dict(model.hparams)
    return {"state_dict": model.state_dict(), "hparams_name": model._hparams_name, "hyper_parameters": hparams, "epoch": 0, **more}


def saved(model: LightningModule, path: str = "model.ckpt", **more: Any) -> str:
    save({key: value for key, value in checkpoint_of(model, **more).items() if value is not ...}, path)
    events.clear()
    return path


def test_module_comes_back_with_hyperparameters_and_weights() -> None:
    model = Model(Config(), [Mode.MIN, Path("x")])
    loaded = Model.load_from_checkpoint(saved(model))
    assert loaded.hparams == model.hparams
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    assert loaded.training


def test_events_come_in_the_documented_order() -> None:
    Model.load_from_checkpoint(saved(Model(1)), b=5)
    assert events == [("init", 1, 5), "configure_model", ("on_load_checkpoint", {"a": 1, "b": 5}), ("load_state_dict", {"strict": True})]


def test_keyword_arguments_replace_stored_ones_and_unknown_ones_are_dropped() -> None:
    assert Model.load_from_checkpoint(saved(Model(1, 3)), b=7, unknown=1).hparams == {"a": 1, "b": 7}


def test_stored_values_that_init_does_not_take_are_dropped() -> None:
    model = Model(1)
    model.hparams.more = 5
    assert Model.load_from_checkpoint(saved(model)).hparams == {"a": 1, "b": 2}


def test_init_with_kwargs_gets_everything() -> None:
    class Open(Model):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(1)
            self.got = kwargs

    assert Open.load_from_checkpoint(saved(Model(1, 3)), c=1).got == {"a": 1, "b": 3, "c": 1}


def test_positional_only_arguments_are_passed_as_such() -> None:
    class Positional(Model):
        def __init__(self, a: Any, /, b: Any = 2) -> None:
            super().__init__(a, b)

    assert Positional.load_from_checkpoint(saved(Positional(1, 3))).hparams == {"a": 1, "b": 3}


@pytest.mark.parametrize("conf", [{"x": 1}, argparse.Namespace(x=1), Config()], ids=lambda c: type(c).__name__)
def test_container_comes_back_as_one_argument(conf: Any) -> None:
    loaded = Conf.load_from_checkpoint(saved(Conf(conf)), b=9)
    assert loaded.conf == {**(conf if isinstance(conf, dict) else vars(conf)), "b": 9}
    assert (loaded.b, loaded.rest) == (9, {})


def test_container_can_be_replaced_or_changed() -> None:
    path = saved(Conf({"x": 1, "y": 2}))
    assert Conf.load_from_checkpoint(path, conf={"q": 1}).conf == {"q": 1}
    changed = Conf.load_from_checkpoint(path, x=5)
    assert (changed.conf, changed.rest) == ({"x": 5, "y": 2}, {"x": 5})


def test_omegaconf_container_comes_back_with_changes() -> None:
    path = saved(Conf(OmegaConf.create({"x": 1, "twice": "${x}${x}"})))
    loaded = Conf.load_from_checkpoint(path, x=5)
    assert isinstance(loaded.conf, DictConfig)
    assert loaded.conf.twice == "55"
    assert Conf.load_from_checkpoint(path).conf == {"x": 1, "twice": "11"}


def test_what_was_saved_besides_the_container_is_passed_if_needed() -> None:
    class Both(LightningModule):
        def __init__(self, conf: Any, extra: int) -> None:
            super().__init__()
            self.save_hyperparameters(conf)
            self.save_hyperparameters("extra")
            self.layer = nn.Linear(1, 1)

    assert Both.load_from_checkpoint(saved(Both({"x": 1}, 4))).hparams == {"x": 1, "extra": 4}


def test_missing_argument_is_named_with_what_to_do() -> None:
    class Needy(Model):
        def __init__(self, a: Any, net: Any, other: Any) -> None:
            super().__init__(a)

    with pytest.raises(TypeError, match=r"requires 'net', 'other'.*\['a', 'b'\].*load_from_checkpoint\(path, net=\.\.\., other=\.\.\.\)"):
        Needy.load_from_checkpoint(saved(Model(1)))
    assert isinstance(Needy.load_from_checkpoint("model.ckpt", net=1, other=2), Needy)
    with pytest.raises(TypeError, match="holds no hyperparameters"):
        Model.load_from_checkpoint(saved(Model(1), hyper_parameters=...))


def test_module_stored_as_a_hyperparameter_needs_trust_or_an_argument() -> None:
    with pytest.warns(UserWarning, match=r"nn\.Module"):
        path = saved(Model(nn.ReLU()))
    with pytest.raises(TypeError, match=r"`a` of Model could not be restored: <Opaque torch.*ReLU.*weights_only=False.*\(path, a=\.\.\.\)"):
        Model.load_from_checkpoint(path)
    assert Model.load_from_checkpoint(path, a=1).hparams.a == 1
    with pytest.warns(UserWarning, match=r"nn\.Module"):
        assert isinstance(Model.load_from_checkpoint(path, weights_only=False).hparams.a, nn.ReLU)


def test_placeholder_that_init_does_not_take_does_not_matter() -> None:
    model = Model(1)
    model.hparams["function"] = len
    assert Model.load_from_checkpoint(saved(model)).hparams.a == 1


# --- weights --------------------------------------------------------------------------------------------------------


def test_mismatched_keys_are_listed() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "more.weight", "more.bias"'):
        Wider.load_from_checkpoint(saved(Model(1)))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more.weight", "more.bias"'):
        Model.load_from_checkpoint(saved(Wider(1)))


def test_mismatched_keys_are_warned_of_if_not_strict() -> None:
    with pytest.warns(UserWarning, match=r"no weights for these keys of Wider.*\['more.weight', 'more.bias'\]"):
        Wider.load_from_checkpoint(saved(Model(1)), strict=False)
    with pytest.warns(UserWarning, match=r"no place for these keys.*\['more.weight', 'more.bias'\]"):
        Model.load_from_checkpoint(saved(Wider(1)), strict=False)


def test_strict_loading_of_the_module_counts_unless_strict_is_given() -> None:
    class Lenient(Wider):
        def __init__(self, a: Any, b: Any = 2) -> None:
            super().__init__(a, b)
            self.strict_loading = False

    path = saved(Model(1))
    with pytest.warns(UserWarning, match="no weights"):
        Lenient.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match="Missing key"):
        Lenient.load_from_checkpoint(path, strict=True)


def test_mismatched_shape_is_an_error_even_if_not_strict() -> None:
    class Other(Model):
        def __init__(self, a: Any, b: Any = 2) -> None:
            super().__init__(a, b)
            self.layer = nn.Linear(3, 3)

    with pytest.raises(RuntimeError, match=r"size mismatch for layer\.weight"):
        Other.load_from_checkpoint(saved(Model(1)), strict=False)


def test_layers_made_in_configure_model_get_their_weights() -> None:
    class Late(LightningModule):
        def configure_model(self) -> None:
            self.layer = nn.Linear(2, 1)

    model = Late()
    model.configure_model()
    assert torch.equal(Late.load_from_checkpoint(saved(model)).layer.weight, model.layer.weight)


def test_on_load_checkpoint_may_change_the_weights() -> None:
    class Renaming(Model):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["layer.bias"] = torch.full((1,), 7.0)

    assert Renaming.load_from_checkpoint(saved(Model(1))).layer.bias.item() == 7


def test_checkpoint_without_parameters_gets_a_warning() -> None:
    with pytest.warns(UserWarning, match="contains no parameters"):
        LightningModule.load_from_checkpoint(saved(LightningModule()))


def test_tensors_of_an_absent_gpu_go_to_the_cpu() -> None:
    saved(Model(1))
    with zipfile.ZipFile("model.ckpt") as source, zipfile.ZipFile("gpu.ckpt", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x07\x00\x00\x00cuda:99")
            target.writestr(name, content)
    with pytest.raises(RuntimeError, match="CUDA"):
        load("gpu.ckpt")
    assert Model.load_from_checkpoint("gpu.ckpt").device.type == "cpu"
    assert Model.load_from_checkpoint("gpu.ckpt", map_location="cpu").device.type == "cpu"


def test_location_that_is_there_is_left_to_torch() -> None:
    assert _where_available("storage", "cpu") is None
    assert _where_available("storage", "meta") is None
    assert _where_available("storage", f"cuda:{torch.cuda.device_count()}") == "storage"


# --- the file -------------------------------------------------------------------------------------------------------


def test_path_url_and_open_file_are_taken() -> None:
    saved(Model(1))
    save(load("model.ckpt"), "memory://saving/model.ckpt")
    for source in (Path("model.ckpt"), "memory://saving/model.ckpt", io.BytesIO(Path("model.ckpt").read_bytes())):
        assert Model.load_from_checkpoint(source).hparams.a == 1


def test_file_that_is_no_checkpoint_says_so() -> None:
    save([1], "list.ckpt")
    with pytest.raises(TypeError, match=r"'list\.ckpt' holds a list"):
        Model.load_from_checkpoint("list.ckpt")
    save(Model(1).state_dict(), "weights.ckpt")
    with pytest.raises(KeyError, match=r"no 'state_dict' in the file 'weights\.ckpt'.*model\.load_state_dict"):
        Model.load_from_checkpoint("weights.ckpt")
    save({"state_dict": {}, "hyper_parameters": [1]}, "odd.ckpt")
    with pytest.raises(TypeError, match="hyperparameters are not a mapping"):
        Model.load_from_checkpoint("odd.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nope\.ckpt"):
        Model.load_from_checkpoint("nope.ckpt")


def test_call_on_an_instance_is_refused() -> None:
    path = saved(Model(1))
    for instance in (Model(1), Data(1)):
        with pytest.raises(TypeError, match="cannot be called on an instance"):
            instance.load_from_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "content"), [("h.yaml", "a: 11\nb: [1, x]\n"), ("h.yml", "{a: 11, b: [1, x]}"), ("h.csv", "key,value\na,11\nb,\"[1, 'x']\"\n")]
)
def test_hyperparameters_can_come_from_a_file(name: str, content: str) -> None:
    Path(name).write_text(content)
    path = saved(Model(1), hyper_parameters=...)
    loaded = Model.load_from_checkpoint(path, hparams_file=name)
    assert (loaded.hparams.a, list(loaded.hparams.b)) == (11, [1, "x"])
    assert Model.load_from_checkpoint(path, hparams_file=name, b=1).hparams == {"a": 11, "b": 1}


def test_hyperparameter_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hparams_file='h\.json' must be a \.csv, \.yml or \.yaml file"):
        Model.load_from_checkpoint(saved(Model(1)), hparams_file="h.json")


# --- datamodules, and the trainer -----------------------------------------------------------------------------------


def test_datamodule_comes_back_with_hyperparameters_and_state() -> None:
    data = Data(5)
    save({"datamodule_hyper_parameters": dict(data.hparams), "datamodule_hparams_name": "kwargs", "Data": data.state_dict()}, "data.ckpt")
    loaded = Data.load_from_checkpoint("data.ckpt", seed=3)
    assert (loaded.hparams, loaded.state) == ({"size": 5, "seed": 3}, {"seen": 3})
    with pytest.raises(TypeError, match=r"Data.__init__\(\) requires 'size'"):
        Data.load_from_checkpoint(saved(Model(1)))


def test_what_a_trainer_saves_is_loaded() -> None:
    class Trained(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Loaded(Data):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(self.hparams.size, 2))

    model = Trained(Config(), Mode.MIN)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, **options)
    trainer.fit(model, datamodule=Loaded(4))
    trainer.save_checkpoint("run.ckpt")
    loaded = Trained.load_from_checkpoint("run.ckpt")
    assert loaded.hparams == {"a": Config(), "b": Mode.MIN}
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    assert Loaded.load_from_checkpoint("run.ckpt").hparams.size == 4
