"""What a checkpoint holds, and how a run continues from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning._version import KERAUNOS_VERSION, __version__
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.dispatch import override_of
from lightning.pytorch.loops.progress import Next
from lightning.pytorch.position import describe
from lightning.pytorch.trainer.states import TrainerStatus

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

Checkpoint = dict[str, Any]

FORMAT = 1  # of what stands under "keraunos" and in loops.fit_loop.progress


# ---- saving ---------------------------------------------------------------------------------------------------------


def compose(trainer: Trainer, weights_only: bool = False) -> Checkpoint:
    """The checkpoint of the run as it stands, under Lightning's public keys.

    Args:
        trainer: whose run.
        weights_only: leave out what only a continued training needs.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    checkpoint: Checkpoint = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": __version__.split("+")[0],
        "state_dict": strategy.lightning_module_state_dict(),
        "loops": _loops_state(trainer),
        "keraunos": {"version": KERAUNOS_VERSION, "torch": str(torch.__version__), "format": FORMAT},
    }
    if not weights_only:
        checkpoint["callbacks"] = _callback_states(trainer)
        checkpoint["optimizer_states"] = [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        checkpoint["keraunos"]["optimizers"] = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        checkpoint["keraunos"]["parameters"] = _parameter_names(trainer)
        checkpoint["keraunos"]["configured"] = trainer.fit_loop.configured
        checkpoint["keraunos"]["lr_schedulers"] = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        precision = strategy.precision
        state = precision.state_dict()
        if state:
            checkpoint[type(precision).__qualname__] = state
        precision.on_save_checkpoint(checkpoint)
        from lightning.pytorch import resume, window

        loop = trainer.fit_loop
        # What a process that fails has gathered can't be averaged with what the others have.
        alone = strategy.world_size == 1 or trainer.state.status is not TrainerStatus.INTERRUPTED
        names = window.names_to_keep(trainer) if alone else set()
        if names:
            checkpoint["keraunos"]["gradients"] = {name: each for name, each in strategy.accumulated_gradients().items() if name in names}
        checkpoint["keraunos"]["window"] = window.state_of(trainer)
        if alone:
            checkpoint["keraunos"]["engine"] = strategy.engine_state()
        batches = loop.progress.position()["batch_idx"]
        if loop.loader is not None and batches > 0:
            checkpoint["keraunos"]["data"] = describe(loop.loader, batches, trainer._data.replicas[0])
        checkpoint["keraunos"]["processes"] = resume.states(trainer, names, checkpoint["callbacks"])
        checkpoint["keraunos"]["versions"] = [getattr(logger, "_version", None) for logger in trainer.loggers]
    for owner in (module, trainer.datamodule):
        if owner is not None and owner.hparams:
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_NAME] = getattr(owner, "_hparams_name", None)
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY] = owner.hparams if _is_omega(owner.hparams) else dict(owner.hparams)
    datamodule = trainer.datamodule
    if datamodule is not None:
        state = datamodule.state_dict()
        if state:
            checkpoint[type(datamodule).__qualname__] = state
    if not weights_only:
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, checkpoint)
    if datamodule is not None and override_of(datamodule, "on_save_checkpoint", LightningDataModule) is not None:
        datamodule.on_save_checkpoint(checkpoint)  # type: ignore[attr-defined]
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _is_omega(value: Any) -> bool:
    return type(value).__module__.startswith("omegaconf")


def _loops_state(trainer: Trainer) -> dict[str, Any]:
    interrupted = trainer.fit_loop.before_validation
    seen = trainer.validate_loop.seen if interrupted is None else interrupted["seen"]
    return {
        "fit_loop": {"state_dict": {}, "progress": trainer.fit_loop.progress.position()},
        "validate_loop": {"state_dict": {}, "seen": list(seen)},
        "test_loop": {"state_dict": {}},
        "predict_loop": {"state_dict": {}},
    }


def _callback_states(trainer: Trainer) -> dict[str, Any]:
    states: dict[str, Any] = {}
    for callback in trainer.callbacks:
        state = callback.state_dict()
        if state:
            states[callback.state_key] = state
    return states


# ---- restoring ------------------------------------------------------------------------------------------------------


def restore_modules(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Give weights, datamodule and callbacks what the checkpoint holds for them. Optimizers come later."""
    module, datamodule, strategy = trainer.lightning_module, trainer.datamodule, trainer.strategy
    strategy.precision.on_load_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    if datamodule is not None:
        state = checkpoint.get(type(datamodule).__qualname__)
        if state is not None:
            datamodule.load_state_dict(state)
        if hasattr(datamodule, "on_load_checkpoint"):
            datamodule.on_load_checkpoint(checkpoint)
    _restore_callbacks(trainer, checkpoint)


def _restore_callbacks(trainer: Trainer, checkpoint: Checkpoint) -> None:
    states = checkpoint.get("callbacks")
    for callback in trainer.callbacks:
        if override_of(callback, "on_load_checkpoint", Callback) is not None:
            callback.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
    if states is None:
        return
    here = {callback.state_key for callback in trainer.callbacks}
    missing = [key for key in states if key not in here]
    if missing:
        rank_zero_warn(f"The checkpoint holds the state of callbacks that this trainer does not have: {missing}. Add them, or ignore this.")
    import copy

    from lightning.pytorch import apart

    states = {**states, **apart.found_in(trainer, checkpoint, "callbacks")}
    for callback in trainer.callbacks:
        state = states.get(callback.state_key)
        if state is not None:
            callback.load_state_dict(copy.deepcopy(state))


def restore_training(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Move the loop to where the checkpoint was saved, and give optimizers, schedulers and scaler their state.

    Raises:
        KeyError: if the checkpoint holds weights only.
        MisconfigurationException: if it was saved with other optimizers or schedulers.
    """
    strategy = trainer.strategy
    if "optimizer_states" not in checkpoint or "lr_schedulers" not in checkpoint:
        raise KeyError(
            "The checkpoint holds weights only (it was saved with save_weights_only=True), so training cannot resume from it. "
            "To start anew from its weights, use `Model.load_from_checkpoint(path)`."
        )
    names = checkpoint.get("keraunos", {})
    _compare_code(names)
    optimizers = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    _compare("optimizers", names.get("optimizers"), checkpoint["optimizer_states"], optimizers)
    schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    _compare("learning rate schedulers", names.get("lr_schedulers"), checkpoint["lr_schedulers"], schedulers)
    restore_progress(trainer, checkpoint)
    if strategy.lightning_restore_optimizer:
        _compare_groups(trainer, checkpoint["optimizer_states"], names.get("parameters"))
        _compare_values(trainer, names.get("configured"))
        strategy.load_optimizer_state_dict(checkpoint)
    for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"]):
        config.scheduler.load_state_dict(state)
    state = checkpoint.get(type(strategy.precision).__qualname__)
    if state is not None:
        strategy.precision.load_state_dict(state)
    from lightning.pytorch import apart, window

    own = trainer.fit_loop.resumed
    strategy.load_accumulated_gradients((own and own.get("gradients")) or names.get("gradients", {}))
    apart.give_back(trainer, checkpoint)
    window.go_on(trainer, names.get("window"), bool(names.get("gradients")))


def _compare_code(saved: dict[str, Any]) -> None:
    """Tell where other code than that which saved the checkpoint goes on from it."""
    here = {"keraunos": ("version", KERAUNOS_VERSION), "torch": ("torch", str(torch.__version__))}
    others = [f"{name} {saved[key]} then, {version} now" for name, (key, version) in here.items() if saved.get(key, version) != version]
    if others:
        told = "; ".join(others)
        rank_zero_warn(f"The checkpoint was saved by other code ({told}): the run goes on from it, but perhaps not bit for bit.")


def _compare(what: str, saved: list[str] | None, states: list[Any], here: list[str]) -> None:
    """Refuse to give the states of some optimizers to others."""
    if len(states) != len(here) or (saved is not None and saved != here):
        described = saved if saved is not None else f"{len(states)} of them"
        raise MisconfigurationException(
            f"The checkpoint was saved with the {what} {described}, and `configure_optimizers` returned {here}. "
            "Return the same ones to resume; to start anew from the weights, use `Model.load_from_checkpoint(path)`."
        )


def _parameter_names(trainer: Trainer) -> list[list[list[str]]]:
    """The names of the parameters in each group of each optimizer."""
    module = trainer.strategy.lightning_module
    assert module is not None
    # A compiled part has the same parameters under longer names.
    known = {id(parameter): name.replace("_orig_mod.", "") for name, parameter in module.named_parameters()}
    return [[[known.get(id(each), "") for each in group["params"]] for group in optimizer.param_groups] for optimizer in trainer.optimizers]


def _compare_groups(trainer: Trainer, states: list[Any], saved_names: list[list[list[str]]] | None) -> None:
    """Refuse to give the states of some parameters to others: optimizers know them by their numbers alone."""
    names = _parameter_names(trainer)
    for index, (optimizer, state) in enumerate(zip(trainer.optimizers, states)):
        groups = state.get("param_groups") if isinstance(state, dict) else None
        if not isinstance(optimizer, torch.optim.Optimizer):
            continue  # an engine's own, which flattens what it divides
        if groups is None or not all("params" in group for group in groups):
            continue
        saved, here = [len(group["params"]) for group in groups], [len(group["params"]) for group in optimizer.param_groups]
        found = ""
        if saved != here:
            found = f"groups of {saved} parameters, and `configure_optimizers` gives it {here}"
        elif saved_names is not None:
            pairs = [pair for old, new in zip(saved_names[index], names[index]) for pair in zip(old, new)]
            then, now = next(((a, b) for a, b in pairs if a != b and a and b), ("", ""))
            if then:
                found = f"{then!r} in the place where `configure_optimizers` has {now!r} now"
        if found:
            raise MisconfigurationException(
                f"The checkpoint was saved with other parameters in the optimizer {type(optimizer).__name__} (number {index}): {found}. "
                "Give it the same parameters in the same groups and order to resume; to start anew from the weights, use "
                "`Model.load_from_checkpoint(path)`."
            )


def values_of_groups(optimizers: list[Any]) -> list[list[dict[str, Any]]]:
    """The values in each group of each optimizer, such as learning rate and weight decay."""
    return [[_plain_values(group) for group in getattr(optimizer, "param_groups", ())] for optimizer in optimizers]


def _plain_values(group: dict[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    values = {name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for name, value in group.items()}
    parts = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items() if name != "initial_lr"}
    return {name: values[name] for name, found in parts.items() if all(isinstance(part, plain) for part in found)}


def _compare_values(trainer: Trainer, saved: list[list[dict[str, Any]]] | None) -> None:
    """Tell where `configure_optimizers` gives other values than in the run that goes on: those of the checkpoint stay in force."""
    loop = trainer.fit_loop
    if saved is None:  # in checkpoints of others, whose values may be what schedulers have made of them
        return
    found: list[str] = []
    for optimizer, then, now in zip(trainer.optimizers, saved, loop.configured):
        for number, (old, new) in enumerate(zip(then, now)):
            where = type(optimizer).__name__ + (f", group {number}" if len(now) > 1 else "")
            found += [f"{name}={old[name]!r} then, {new[name]!r} now ({where})" for name in old if name in new and old[name] != new[name]]
    loop.configured = saved
    if found:
        rank_zero_warn(
            f"`configure_optimizers` gives other values than in the run that saved the checkpoint: {'; '.join(found)}. The run goes on "
            "with its own, as they and their schedulers are in the checkpoint. To change them, do so in `on_train_start`."
        )


def restore_progress(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Move the fit loop to where the checkpoint was saved.

    Raises:
        MisconfigurationException: if the run's bounds lie before that point.
    """
    loop = trainer.fit_loop
    state = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = state["progress"] if "progress" in state else progress_of_lightning(checkpoint, trainer.accumulate_grad_batches)
    epoch = progress["epoch"] + (1 if progress["next"] == Next.EPOCH else 0)
    bounded = loop.max_epochs is not None and loop.max_epochs != -1
    if bounded and epoch > loop.max_epochs:
        raise MisconfigurationException(
            f"The checkpoint is from epoch {checkpoint['epoch']}, and max_epochs={loop.max_epochs} ends before it. Set a higher one."
        )
    loop.progress.load_state_dict(progress)
    trainer.validate_loop.seen = list(checkpoint.get("loops", {}).get("validate_loop", {}).get("seen", []))
    loop.restarting = True
    loop.resumed_position = checkpoint.get("keraunos", {}).get("data")
    from lightning.pytorch import resume

    saved = checkpoint.get("keraunos", {}).get("processes")
    loop.resumed = resume.own_part(saved, trainer.global_rank, trainer.world_size)


def progress_of_lightning(checkpoint: Checkpoint, accumulate: int = 1) -> dict[str, Any]:
    """Our cursor, read off the progress trackers that Lightning 2.x saves.

    Its trackers count what was ready, started, processed and completed, in total and in the current epoch; a checkpoint of
    a finished epoch counts that epoch as processed, and one saved between epochs as completed.
    """
    epoch, global_step = checkpoint["epoch"], checkpoint["global_step"]
    state = checkpoint.get("loops", {}).get("fit_loop")
    if not state:
        return {"epoch": epoch, "global_step": global_step, "stepped": global_step, "next": Next.EPOCH}
    epochs = state["epoch_progress"]["current"]
    batches = state["epoch_loop.batch_progress"]
    stepped = state.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", global_step)
    progress = {"epoch": epoch, "global_step": global_step, "total_batches": batches["total"]["processed"], "stepped": stepped}
    if epochs["ready"] == epochs["completed"]:
        return {**progress, "epoch": epochs["completed"], "batch_idx": 0, "next": Next.BATCH}
    if epochs["processed"] == epochs["ready"]:
        return {**progress, "batch_idx": batches["current"]["processed"], "next": Next.EPOCH}
    batch_idx, is_last = batches["current"]["processed"], batches["is_last_batch"]
    ended = is_last and batches["current"]["completed"] == batches["current"]["ready"]
    updated = is_last or batch_idx % accumulate == 0  # and counted only when the validation after the batch is done
    return {
        **progress,
        "batch_idx": batch_idx,
        "stepped": stepped + 1 if updated else stepped,
        "next": Next.EPOCH_END if ended else Next.BATCH,
    }


def announce(path: Any, fitting: bool) -> None:
    """Say what was restored."""
    what = "Restored all states" if fitting else "Loaded model weights"
    rank_zero_info(f"{what} from the checkpoint at {path}")
