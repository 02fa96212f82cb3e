"""What ``configure_optimizers`` may return, what it becomes, and what is refused."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import DataLoader

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import NoOptimizer, configure_optimizers
from lightning.pytorch.utilities.types import LRSchedulerConfig

Form = Callable[[Optimizer], Any]


class Model(LightningModule):
    def __init__(self, form: Form, automatic: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.form = form
        self.automatic_optimization = automatic
        self.optimizer = SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.form(self.optimizer)


def other() -> Optimizer:
    return Adam([nn.Parameter(torch.ones(1))])


def step_lr(optimizer: Optimizer) -> StepLR:
    return StepLR(optimizer, 1)


class NotTorchs:
    """A scheduler that can be saved and has nothing else of torch's."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


FORMS: dict[str, tuple[Form, list[type], list[type]]] = {
    "an optimizer": (lambda o: o, [SGD], []),
    "a list of one": (lambda o: [o], [SGD], []),
    "a tuple of one": (lambda o: (o,), [SGD], []),
    "a list of two": (lambda o: [o, other()], [SGD, Adam], []),
    "a tuple of two": (lambda o: (o, other()), [SGD, Adam], []),
    "two lists": (lambda o: ([o], [step_lr(o)]), [SGD], [StepLR]),
    "two lists, several of each": (lambda o: [[o, other()], [step_lr(o), step_lr(o)]], [SGD, Adam], [StepLR, StepLR]),
    "two lists without schedulers": (lambda o: ([o], []), [SGD], []),
    "two lists with None as scheduler": (lambda o: ([o], [None]), [SGD], []),
    "two lists with a scheduler dict": (lambda o: ([o], [{"scheduler": step_lr(o)}]), [SGD], [StepLR]),
    "a list and a scheduler": (lambda o: ([o], step_lr(o)), [SGD], [StepLR]),
    "a dict": (lambda o: {"optimizer": o}, [SGD], []),
    "a dict of another type": (lambda o: OrderedDict(optimizer=o), [SGD], []),
    "a dict with a scheduler": (lambda o: {"optimizer": o, "lr_scheduler": step_lr(o)}, [SGD], [StepLR]),
    "a dict with a scheduler dict": (lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o)}}, [SGD], [StepLR]),
    "a dict with None as scheduler": (lambda o: {"optimizer": o, "lr_scheduler": None}, [SGD], []),
    "a dict with one scheduler in a list": (lambda o: {"optimizer": o, "lr_scheduler": [step_lr(o)]}, [SGD], [StepLR]),
    "a list of a dict": (lambda o: [{"optimizer": o, "lr_scheduler": step_lr(o)}], [SGD], [StepLR]),
    "a tuple of dicts": (lambda o: ({"optimizer": o, "lr_scheduler": step_lr(o)}, {"optimizer": other()}), [SGD, Adam], [StepLR]),
    "a scheduler of schedulers": (lambda o: ([o], [SequentialLR(o, [step_lr(o), step_lr(o)], [1])]), [SGD], [SequentialLR]),
    "a chain of schedulers": (lambda o: ([o], [ChainedScheduler([step_lr(o)])]), [SGD], [ChainedScheduler]),
    "a finished setting": (lambda o: ([o], [LRSchedulerConfig(step_lr(o))]), [SGD], [StepLR]),
}


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_documented_form_gives_optimizers_and_schedulers(form: str, automatic: bool) -> None:
    build, optimizers, schedulers = FORMS[form]
    model = Model(build, automatic)
    found, configs = configure_optimizers(model)
    assert [type(optimizer) for optimizer in found] == optimizers
    assert found[0] is model.optimizer
    assert [type(config.scheduler) for config in configs] == schedulers
    assert all((c.interval, c.frequency, c.reduce_on_plateau, c.monitor) == ("epoch", 1, False, None) for c in configs)


@pytest.mark.parametrize("automatic", [True, False])
def test_none_trains_nothing_with_a_warning(automatic: bool) -> None:
    with pytest.warns(UserWarning, match="returned None: this fit will train nothing"):
        optimizers, configs = configure_optimizers(Model(lambda o: None, automatic))
    assert [type(optimizer) for optimizer in optimizers] == [NoOptimizer]
    assert configs == []


@pytest.mark.parametrize("empty", [[], (), ([], []), [[], []]])
def test_no_optimizer_at_all_is_for_manual_optimization_only(empty: Any) -> None:
    assert configure_optimizers(Model(lambda o: empty, automatic=False)) == ([], [])
    with pytest.raises(MisconfigurationException, match=r"returned no optimizer.* Return one, or None to train nothing"):
        configure_optimizers(Model(lambda o: empty))


# ---- the settings of a scheduler -------------------------------------------------------------------------------------


def config_of(form: Form, automatic: bool = True) -> LRSchedulerConfig:
    _, (config,) = configure_optimizers(Model(form, automatic))
    return config


def test_settings_of_a_scheduler_are_taken_over() -> None:
    given = {"interval": "step", "frequency": 3, "name": "rate", "monitor": "x", "strict": False, "reduce_on_plateau": True}
    config = config_of(lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o), **given}})
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    "form",
    [
        lambda o: {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o), "monitor": "x"},
        lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": ReduceLROnPlateau(o), "monitor": "x"}},
        lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": ReduceLROnPlateau(o), "monitor": "x"}, "monitor": "y"},
        lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": ReduceLROnPlateau(o)}, "monitor": "x"},
        lambda o: [{"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o), "monitor": "x"}],
        lambda o: ([o], [{"scheduler": ReduceLROnPlateau(o), "monitor": "x"}]),
    ],
)
def test_a_plateau_scheduler_finds_its_monitor_the_nearest_first(form: Form) -> None:
    config = config_of(form)
    assert (config.monitor, config.reduce_on_plateau) == ("x", True)


def test_each_of_several_dicts_keeps_its_own_monitor() -> None:
    second = other()
    model = Model(
        lambda o: [
            {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o), "monitor": "x"},
            {"optimizer": second, "lr_scheduler": ReduceLROnPlateau(second), "monitor": "y"},
        ]
    )
    assert [config.monitor for config in configure_optimizers(model)[1]] == ["x", "y"]


@pytest.mark.parametrize(
    "form",
    [
        lambda o: {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o)},
        lambda o: ([o], [ReduceLROnPlateau(o)]),
        lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": ReduceLROnPlateau(o)}},
    ],
)
def test_a_plateau_scheduler_without_monitor_is_refused_unless_stepped_by_hand(form: Form) -> None:
    with pytest.raises(MisconfigurationException, match=r'which metric the scheduler ReduceLROnPlateau watches.*"monitor": "val_loss"'):
        configure_optimizers(Model(form))
    assert config_of(form, automatic=False).reduce_on_plateau is False


def test_what_a_scheduler_watches_means_nothing_in_manual_optimization() -> None:
    settings = {"monitor": "x", "strict": False, "reduce_on_plateau": True}
    with pytest.warns(RuntimeWarning, match=r"\['monitor', 'reduce_on_plateau', 'strict'\], which mean nothing in manual optimization"):
        config = config_of(lambda o: ([o], [{"scheduler": ReduceLROnPlateau(o), **settings}]), automatic=False)
    assert (config.monitor, config.strict, config.reduce_on_plateau) == (None, True, False)


def test_a_frequency_may_be_a_whole_float() -> None:
    assert config_of(lambda o: ([o], [{"scheduler": step_lr(o), "frequency": 2.0}])).frequency == 2


@pytest.mark.parametrize("frequency", [0, -1, 1.5, "2", None, float("inf"), float("nan")])
def test_a_wrong_frequency_is_refused(frequency: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"frequency={frequency!r}; a positive whole number is needed"):
        configure_optimizers(Model(lambda o: ([o], [{"scheduler": step_lr(o), "frequency": frequency}])))


@pytest.mark.parametrize("interval", ["day", None, 1])
def test_a_wrong_interval_is_refused(interval: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"interval={interval!r}; accepted are 'epoch' and 'step'"):
        configure_optimizers(Model(lambda o: ([o], [{"scheduler": step_lr(o), "interval": interval}])))


def test_unknown_keys_of_a_scheduler_dict_warn() -> None:
    with pytest.warns(RuntimeWarning, match=r"has the keys \['intervall'\], which are ignored; known are .*'interval'"):
        assert config_of(lambda o: ([o], [{"scheduler": step_lr(o), "intervall": "step"}])).interval == "epoch"


def test_unknown_keys_of_an_optimizer_dict_warn() -> None:
    with pytest.warns(RuntimeWarning, match=r"the keys \['scheduler'\], which are ignored; known are 'optimizer', 'lr_scheduler'"):
        assert configure_optimizers(Model(lambda o: {"optimizer": o, "scheduler": step_lr(o)}))[1] == []


def test_a_one_cycle_scheduler_by_epochs_warns_where_settings_were_given() -> None:
    def form(**settings: Any) -> Form:
        return lambda o: ([o], [{"scheduler": OneCycleLR(o, 0.1, total_steps=9), **settings}])

    with pytest.warns(RuntimeWarning, match="usually meant for interval='step'"):
        config_of(form())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_of(form(interval="step"))
        config_of(form(), automatic=False)
        config_of(lambda o: ([o], [OneCycleLR(o, 0.1, total_steps=9)]))


# ---- schedulers that are not torch's ---------------------------------------------------------------------------------


def test_a_scheduler_of_another_kind_needs_a_way_to_step() -> None:
    def form(o: Optimizer) -> Any:
        return {"optimizer": o, "lr_scheduler": NotTorchs()}

    with pytest.raises(MisconfigurationException, match=r"of type NotTorchs.* is none of torch's: override `lr_scheduler_step`"):
        configure_optimizers(Model(form))

    class Stepping(Model):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            pass

    for model in (Stepping(form), Model(form, automatic=False)):
        assert [type(config.scheduler) for config in configure_optimizers(model)[1]] == [NotTorchs]


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("wrong", ["cosine", 0.1, StepLR.__name__, object()])
def test_what_cannot_be_saved_is_no_scheduler(wrong: Any, automatic: bool) -> None:
    with pytest.raises(TypeError, match=r"returned the scheduler .* which has no `state_dict` and `load_state_dict`"):
        configure_optimizers(Model(lambda o: ([o], [wrong]), automatic))


# ---- what is refused -------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Form, str]] = {
    "a string": (lambda o: "sgd", r"returned 'sgd' \(of type str\); accepted are an optimizer;"),
    "a number": (lambda o: 0.1, r"returned 0.1 \(of type float\)"),
    "a class": (lambda o: SGD, r"SGD.* \(of type type\)"),
    "a generator": (lambda o: (x for x in [o]), "of type generator"),
    "an optimizer and a scheduler": (lambda o: (o, step_lr(o)), "returned a tuple of SGD, StepLR"),
    "an optimizer and a dict": (lambda o: [o, {"optimizer": other()}], "returned a list of SGD, dict"),
    "three lists": (lambda o: ([o], [], []), "returned a tuple of list, list, list"),
    "lists the wrong way round": (lambda o: ([step_lr(o)], [o]), "returned a tuple of list, list"),
    "an empty dict": (lambda o: {}, "a dict with no key 'optimizer'; an optimizer is needed there"),
    "a dict without optimizer": (lambda o: {"lr_scheduler": step_lr(o)}, "a dict with no key 'optimizer'"),
    "a dict with a name": (lambda o: {"optimizer": "sgd"}, r"a dict with 'sgd' \(of type str\) under 'optimizer'"),
    "a dict with a list": (lambda o: {"optimizer": [o]}, "a dict with a list of SGD under 'optimizer'"),
    "a dict with two schedulers": (lambda o: {"optimizer": o, "lr_scheduler": [step_lr(o)] * 2}, "several schedulers in one dict"),
    "a scheduler dict without scheduler": (lambda o: ([o], [{"interval": "step"}]), "needs the key 'scheduler'"),
    "a scheduler of another optimizer": (lambda o: ([o], [step_lr(other())]), "a scheduler of an optimizer that it did not return"),
}


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused_and_described(name: str, automatic: bool) -> None:
    form, message = WRONG[name]
    with pytest.raises(MisconfigurationException, match=message):
        configure_optimizers(Model(form, automatic))


def test_long_values_are_shortened_in_errors() -> None:
    with pytest.raises(MisconfigurationException) as error:
        configure_optimizers(Model(lambda o: "x" * 5000))
    assert len(str(error.value)) < 500


# ---- in a run --------------------------------------------------------------------------------------------------------


class Trained(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(torch.ones(1, 2)).sum() if self.automatic_optimization else None


def test_several_optimizers_are_for_manual_optimization(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match=r"returned 2 optimizers.*Set `self.automatic_optimization = False`"):
        make_trainer().fit(Trained(lambda o: [o, other()]), DataLoader(range(1)))
    trainer = make_trainer()
    model = Trained(lambda o: [o, other()], automatic=False)
    trainer.fit(model, DataLoader(range(1)))
    assert [type(o).__name__ for o in model.optimizers()] == ["LightningSGD", "LightningAdam"]
    assert [type(o) for o in trainer.optimizers] == [SGD, Adam]


@pytest.mark.filterwarnings("ignore:`configure_optimizers` returned None")
def test_without_an_optimizer_steps_run_and_nothing_changes(make_trainer: Callable[..., Any]) -> None:
    model = Trained(lambda o: None)
    before = model.layer.weight.clone()
    trainer = make_trainer()
    trainer.fit(model, DataLoader(range(2)))
    assert torch.equal(model.layer.weight, before)
    assert trainer.global_step == 2
    assert repr(trainer.optimizers) == "[No Optimizer]"
    assert trainer.optimizers[0].state_dict() == {}


def test_a_plateau_scheduler_is_stepped_by_hand_with_any_metric(make_trainer: Callable[..., Any]) -> None:
    class ByHand(Trained):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.lr_schedulers().step(1.0)  # type: ignore[union-attr, call-arg, arg-type]

    model = ByHand(lambda o: ([o], [ReduceLROnPlateau(o, patience=0)]), automatic=False)
    make_trainer().fit(model, DataLoader(range(3)))
    assert model.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
