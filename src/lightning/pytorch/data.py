"""The loaders of a run: asked for, checked, and limited."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, SequentialSampler

from lightning.fabric.utilities.data import (
    has_iterable_dataset,
    is_shuffled,
    replace_sampler,
    seed_workers,
    set_sampler_epoch,
    sized_len,
    suggested_max_num_workers,
)  # fmt: skip
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.dispatch import override_of, spanned
from lightning.pytorch.position import Continued, Position, rest_of
from lightning.pytorch.utilities.combined_loader import CombinedLoader

if TYPE_CHECKING:
    from lightning.fabric.uneven import Lockstep
    from lightning.fabric.utilities.loader_state import ResumableLoader
    from lightning.pytorch.trainer.trainer import Trainer

UNBOUNDED = float("inf")
STREAM_IS_OPEN = (
    "This trainer runs `predict_stream`, which is not at its end: iterate to the end, or `close()` the iterator, before another run."
)
HOOKS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}


class TrainLoader:
    """The training data of a run.

    Args:
        combined: one loader, or several under a CombinedLoader's mode.
        num_batches: batches in an epoch, infinity if unknown.
        length_is_exact: whether the loader surely gives as many as it says.

    Attributes:
        lockstep: what makes the processes take the same number of batches, where their loaders give different numbers; else None.
    """

    def __init__(self, combined: CombinedLoader, num_batches: float, length_is_exact: bool) -> None:
        self.combined = combined
        from lightning.fabric.utilities.loader_state import ResumableLoader

        self.num_batches = num_batches
        self.length_is_exact = length_is_exact
        self.length_is_known = combined.batch_count() != UNBOUNDED and not any(map(has_iterable_dataset, combined.flattened))
        self.lockstep: Lockstep | None = None
        self.rest_from: Position | None = None  # where another number of processes left the epoch of which this is the rest
        self.done = 0  # batches of the epoch before that rest
        self.parts = [ResumableLoader(loader, looks_ahead=not length_is_exact) for loader in combined.flattened]
        self.side_by_side: CombinedLoader | None = None
        if len(self.parts) == 1 and combined.iterables is combined.flattened[0]:
            self.iterable: Iterable[Any] = self.parts[0]
        else:  # of (batch, batch_idx, dataloader_idx) the batch is wanted
            self.side_by_side = copy.copy(combined)
            self.side_by_side.flattened = self.parts
            self.iterable = _Batches(self.side_by_side)

    @classmethod
    def continued(cls, loader: Any, done: int, position: Position) -> TrainLoader:
        """The rest of an epoch, ``done`` batches of which are done."""
        rest = cls(CombinedLoader(loader, "max_size_cycle"), done + len(loader), True)
        rest.iterable, rest.rest_from, rest.done = Continued(loader, done), position, done
        return rest

    # ---- where it is ------------------------------------------------------------------------------------------------

    @property
    def passes_over(self) -> int:
        """The number of batches with which the next pass does not begin, since a resumed run was given them before."""
        if self.lockstep is not None:
            return self.lockstep.start
        if self.side_by_side is None:
            return self.parts[0].passes_over
        return self.side_by_side.passes_over

    def state_dict(self, batches: int | None) -> dict[str, Any] | None:
        """Where this process is in its data; None if that can't be said exactly.

        Args:
            batches: how many of this pass are used; None between two passes.
        """
        if self.rest_from is not None:  # whoever goes on from it shares out the samples that are left
            return None
        if batches is None:
            # Side by side, loaders that are at their end together are not all asked for more.
            reads_on = self.side_by_side is None
            return {"between": [part.state_dict(over=True, reads_on=reads_on) for part in self.parts]}
        own = batches if self.lockstep is None else self.lockstep.own(batches)
        if self.side_by_side is None:
            return {"within": self.parts[0].state_dict(own), "batches": batches}
        return {"side_by_side": self.side_by_side.state_after(own), "batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass begin where :meth:`state_dict` was called; warns of what is not as it was then."""
        if len(state.get("between", ())) == len(self.parts):
            for part, saved in zip(self.parts, state["between"]):
                part.load_state_dict(saved)
        elif "within" in state and self.side_by_side is None:
            self.parts[0].load_state_dict(state["within"])
            self._goes_on_with(state["batches"], self.parts[0].passes_over)
        elif "side_by_side" in state and self.side_by_side is not None:
            self.side_by_side.load_state_dict(state["side_by_side"])
            self._goes_on_with(state["batches"], self.side_by_side.passes_over)
        else:
            rank_zero_warn("The checkpoint was saved with another number of training loaders: the data do not go on where they were.")

    def _goes_on_with(self, batches: int, own: int) -> None:
        if self.lockstep is not None:
            self.lockstep.start, self.lockstep.own_start = batches, own

    # ---- several processes ------------------------------------------------------------------------------------------

    def agree(self, policy: str) -> None:
        """Agree with the other processes, of which there are some, on the number of batches; all of them must call it.

        Raises:
            MisconfigurationException: in every process, if their loaders have different lengths and ``policy`` is ``"error"``.
        """
        from lightning.fabric.uneven import Lockstep

        lockstep = Lockstep(self.iterable, policy)
        length = lockstep.agree(self.num_batches if self.length_is_known else UNBOUNDED)
        self.num_batches = length if lockstep.lengths else self.num_batches  # which is then a limit, or infinity
        if not lockstep.is_even:
            self.iterable, self.lockstep, self.length_is_exact = lockstep, lockstep, False
            for part in self.parts:
                part.look_ahead()

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers that shuffle by epoch which one it is."""
        set_epoch(self.combined.flattened, epoch)


def end_workers(loaders: Iterable[Any]) -> None:
    """End the worker processes that loaders keep between passes."""
    from lightning.fabric.utilities.loader_state import ResumableLoader

    for loader in loaders:
        if isinstance(loader, _Batches):
            loader.combined.reset()
        elif isinstance(loader, ResumableLoader):
            loader.close()
        elif isinstance(loader, DataLoader):
            loader._iterator = None


def set_epoch(loaders: Iterable[Any], epoch: int) -> None:
    """Tell samplers that shuffle by epoch which one it is."""
    for loader in loaders:
        set_sampler_epoch(loader, epoch)


class _Batches:
    """The batches of a CombinedLoader without their indices; can be iterated again for the next epoch."""

    def __init__(self, combined: CombinedLoader) -> None:
        self.combined = combined

    def __iter__(self) -> Iterator[Any]:
        return self.combined.batches()


class EvalLoaders:
    """The loaders of an evaluation or prediction, one after another.

    Args:
        given: what the user gave, for ``trainer.val_dataloaders`` and its like.
        loaders: the flat list.
        num_batches: batches to take from each, infinity if unknown.
        of_all: the same of every process by rank, or of one, where they don't differ.
    """

    def __init__(self, given: Any, loaders: list[Any], num_batches: list[float], of_all: list[list[float]]) -> None:
        self.given = given
        self.loaders = loaders
        self.num_batches = num_batches
        self.of_all = of_all
        self.sources = loaders  # what is iterated
        self.keepers: list[ResumableLoader | None] = []

    def keep_places(self) -> None:
        """Keep what the next pass over the loaders depends on: the state of their own generators, and of workers that stay."""
        from lightning.fabric.utilities.loader_state import ResumableLoader, has_indices

        self.keepers = [ResumableLoader(loader) if has_indices(loader) else None for loader in self.loaders]
        pairs = zip(self.keepers, self.loaders)
        self.sources = [keeper if keeper is not None and keeper.stays else loader for keeper, loader in pairs]


class RunData:
    """Where the loaders of the current run come from, and those that are there already.

    Args:
        trainer: whose run it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.given: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}  # batches of each stage's loaders, those of earlier runs too
        self.told_of_workers: set[str] = set()  # the stages that were
        self.train_epoch: int | None = None  # the epoch in which a loader was asked for last
        self.val_epoch: int | None = None
        self.asked_in: dict[str, int] = {}  # of loaders that a resumed run is still to ask for: in which epoch the interrupted one has
        self.rest_epoch: int | None = None  # the epoch that another number of processes began
        self.seed: int | None = None  # from which loaders that are shared out draw, also those that a resumed run asks for

    def reset(self, **given: Any) -> None:
        """Start a run with the loaders that were passed to it; None means that a hook gives them.

        Raises:
            MisconfigurationException: while ``trainer.predict_stream`` is being iterated over.
        """
        if self.trainer.predict_loop.streams:
            raise MisconfigurationException(STREAM_IS_OPEN)
        self.given = given
        self.loaded = {}
        self.train_epoch = self.val_epoch = self.rest_epoch = self.seed = None
        self.asked_in = {}

    # ---- training ---------------------------------------------------------------------------------------------------

    def train(self) -> TrainLoader:
        """The training data, asked for once."""
        if "train" not in self.loaded:
            with self._in_epoch("train") as self.train_epoch:
                self.loaded["train"] = self._load_train()
            self.counts["train"] = self.loaded["train"].num_batches
        return self.loaded["train"]  # type: ignore[no-any-return]

    def reload_train_if_due(self, epoch: int) -> None:
        """Ask for the training loader anew where ``reload_dataloaders_every_n_epochs`` says so."""
        loop = self.trainer.fit_loop
        if self._is_due(epoch, self.train_epoch):
            del self.loaded["train"]
            loop.set_loader(self.train(), loop.validates)
        elif self.rest_epoch is not None and epoch != self.rest_epoch:
            self.rest_epoch = None
            loop.set_loader(self.loaded["train"], loop.validates)  # the rest of a resumed epoch is through

    def rest_of_epoch(self, saved: Position) -> None:
        """Go on in an epoch that was begun by another number of processes, where the data are now shared out differently."""
        loop = self.trainer.fit_loop
        count, rank = self.replicas
        if saved["replicas"] == count and not saved.get("rest"):
            return
        rest = rest_of(self.train(), saved, loop.progress.epoch, count, rank)
        if rest is None:
            loop.progress.batch_idx = 0
            return
        loader, loop.progress.batch_idx = rest
        self.rest_epoch = loop.progress.epoch
        loop.set_loader(loader, loop.validates)

    @property
    def replicas(self) -> tuple[int, int]:
        """How many processes share the training data, and which of them this one is."""
        known = self.trainer.strategy.distributed_sampler_kwargs
        return (known["num_replicas"], known["rank"]) if known else (1, 0)

    def validation_state(self) -> list[Any]:
        """What the next validation depends on in its loaders."""
        keepers = self.loaded["val"].keepers if "val" in self.loaded else []
        return [None if keeper is None else keeper.state_dict(over=True) for keeper in keepers]

    def load_validation_state(self, states: list[Any]) -> None:
        """Take over what :meth:`validation_state` returned; nothing if there are other loaders now."""
        keepers = self.loaded["val"].keepers if "val" in self.loaded else []
        if len(keepers) == len(states):
            for keeper, state in zip(keepers, states):
                if state is not None and keeper is not None:
                    keeper.load_state_dict(state)

    def reload_val_if_due(self, epoch: int) -> None:
        """The same for validation inside fit."""
        if self._is_due(epoch, self.val_epoch):
            self.loaded.pop("val", None)

    def _is_due(self, epoch: int, loaded_in: int | None) -> bool:
        every = self.trainer._config.reload_dataloaders_every_n_epochs
        return bool(every) and loaded_in is not None and epoch - loaded_in >= every

    @contextmanager
    def _in_epoch(self, stage: str) -> Iterator[int]:
        """A context that asks for loaders: in the current epoch, or first in that in which the run that is resumed has asked."""
        progress = self.trainer.fit_loop.progress
        now = progress.epoch
        progress.epoch = self.asked_in.pop(stage, now)
        try:
            yield progress.epoch
        finally:
            progress.epoch = now

    def goes_on_with(self, train_epoch: int | None, val_epoch: int | None) -> None:
        """Learn in which epochs the interrupted run has asked for its loaders; those that were asked for in others are so anew."""
        for stage, here, then in (("train", self.train_epoch, train_epoch), ("val", self.val_epoch, val_epoch)):
            if here != then:
                self.loaded.pop(stage, None)
                if then is not None and not (stage == "train" and self._is_due(self.trainer.current_epoch, then)):
                    self.asked_in[stage] = then
        self.train_epoch, self.val_epoch = train_epoch, val_epoch

    def _load_train(self) -> TrainLoader:
        config, strategy = self.trainer._config, self.trainer.strategy
        asked = self._ask("train")
        if isinstance(asked, CombinedLoader):
            combined = asked
            if combined.mode == "sequential":
                raise ValueError(
                    f"{self._asked_what('train')} gave CombinedLoader(mode='sequential'), which is for evaluation. "
                    "Training takes 'min_size', 'max_size' and 'max_size_cycle'."
                )
        else:
            combined = CombinedLoader(asked, "max_size_cycle")
        if config.overfit_batches > 0:
            combined.flattened = [_unshuffled(loader, "train") for loader in combined.flattened]
        combined.flattened = [self._shared_out(loader, "train") for loader in combined.flattened]
        combined.flattened = [strategy.process_dataloader(loader) for loader in combined.flattened]
        for loader in combined.flattened:
            _check_iterable(loader, self._asked_what("train"))
            self._warn_of_few_workers(loader, "train")
            seed_workers(loader, strategy.global_rank)
        lengths = self._everywhere(combined.batch_count())
        if config.limit_train_batches != 0 and not any(lengths):
            raise MisconfigurationException(f"{self._asked_what('train')} gave a loader of length 0: there is nothing to train on.")
        num_batches = limited_everywhere(lengths, config.limit_train_batches, "limit_train_batches")[self._rank_among(lengths)]
        self._warn_of_interval(num_batches)
        loader = TrainLoader(combined, num_batches, all(_length_is_exact(each) for each in combined.flattened))
        if strategy.world_size > 1:
            loader.agree(config.uneven_inputs)
        return loader

    def _shared_out(self, loader: Any, stage: str) -> Any:
        """The loader with this process's part of the data, unless the user shares them out."""
        config, strategy = self.trainer._config, self.trainer.strategy
        if not (strategy.distributed_sampler_kwargs and config.use_distributed_sampler):
            return loader
        from lightning.fabric.utilities.samplers import distribute, shared_seed

        if self.seed is None:
            self.seed = shared_seed()
        shuffle = False if config.overfit_batches > 0 else None
        shares = strategy.distributed_sampler_kwargs
        return distribute(loader, **shares, training=stage == "train", shuffle=shuffle, seed=self.seed)

    def _everywhere(self, lengths: Any) -> list[Any]:
        """The same of all processes, by rank; of one of them where they don't differ. All have to come here."""
        return self.trainer.strategy.compare({"lengths": repr(lengths)}, lengths) or [lengths]

    def _rank_among(self, values: list[Any]) -> int:
        return self.trainer.strategy.global_rank if len(values) > 1 else 0

    def _warn_of_interval(self, num_batches: float) -> None:
        every = self.trainer._config.log_every_n_steps
        if self.trainer.loggers and num_batches < every and not self.trainer.fast_dev_run:
            rank_zero_warn(
                f"An epoch has {num_batches} training batches, fewer than log_every_n_steps={every}: step values reach the loggers less "
                "than once in an epoch. For more of them, set a lower value in the Trainer.",
                category=PossibleUserWarning,
            )

    def _warn_of_few_workers(self, loader: Any, stage: str) -> None:
        """Tell, once for each stage, where other cores could prepare the data while this one computes."""
        if stage in self.told_of_workers or not isinstance(loader, DataLoader) or loader.num_workers > 1:
            return
        advised = suggested_max_num_workers(self.trainer.num_devices)
        if advised > 1:
            self.told_of_workers.add(stage)
            # `does not have many workers` is what filters of warnings written for Lightning look for.
            rank_zero_warn(
                f"The '{stage}_dataloader' does not have many workers ({loader.num_workers}): computing may wait for data. "
                f"This machine has the cores for `DataLoader(..., num_workers={advised})`.",
                category=PossibleUserWarning,
            )

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluation(self, stage: str) -> EvalLoaders:
        """The loaders of ``"val"``, ``"test"`` or ``"predict"``, asked for once."""
        if stage not in self.loaded:
            with self._in_epoch(stage) as epoch:
                self.loaded[stage] = self._load_evaluation(stage)
            if stage == "val":
                self.val_epoch = epoch
            if self.trainer.state.fn == "fit":
                self.loaded[stage].keep_places()
            self.counts[stage] = self.loaded[stage].num_batches
        return self.loaded[stage]  # type: ignore[no-any-return]

    def has(self, stage: str) -> bool:
        """Whether somebody gives loaders for the stage."""
        return self.given.get(stage) is not None or self._hook(stage) is not None

    def _load_evaluation(self, stage: str) -> EvalLoaders:
        config = self.trainer._config
        asked = self._ask(stage)
        loaders: list[Any] = []
        if not (isinstance(asked, (list, tuple, dict)) and len(asked) == 0):  # which says that there are none
            combined = copy.copy(asked) if isinstance(asked, CombinedLoader) else CombinedLoader(asked, "sequential")
            combined.flattened = [self._prepared(loader, stage) for loader in combined.flattened]
            # Loaders side by side count as one loader, whose batches are combinations.
            loaders = combined.flattened if combined.mode == "sequential" else [_Sized(combined)]
        limit = getattr(config, f"limit_{stage}_batches")
        lengths = self._everywhere([UNBOUNDED if length is None else length for length in map(sized_len, loaders)])
        if len({len(each) for each in lengths}) > 1:
            raise MisconfigurationException(
                f"{self._asked_what(stage)} gave different numbers of loaders: "
                f"{', '.join(f'{len(each)} on rank {rank}' for rank, each in enumerate(lengths))}. Give each process as many."
            )
        of_all: list[list[float]] = [[] for _ in lengths]
        for those in zip(*lengths):
            if limit != 0 and not any(those):
                raise MisconfigurationException(f"{self._asked_what(stage)} gave a loader of length 0: there is nothing to run on.")
            for counts, count in zip(of_all, limited_everywhere(those, limit, f"limit_{stage}_batches")):
                counts.append(count)
        return EvalLoaders(asked, loaders, of_all[self._rank_among(of_all)], of_all)

    def _prepared(self, loader: Any, stage: str) -> Any:
        """A loader for evaluation as this process needs it."""
        config, strategy = self.trainer._config, self.trainer.strategy
        _check_iterable(loader, self._asked_what(stage))
        self._warn_of_few_workers(loader, stage)
        if stage == "val" and config.overfit_batches > 0:
            loader = _unshuffled(loader, stage)
        elif is_shuffled(loader):
            rank_zero_warn(
                f"The {stage} loader shuffles its data. In evaluation the order should stay the same: set shuffle=False.",
                category=PossibleUserWarning,
            )
        loader = strategy.process_dataloader(self._shared_out(loader, stage))
        seed_workers(loader, strategy.global_rank)
        return loader

    # ---- asking -----------------------------------------------------------------------------------------------------

    def _hook(self, stage: str) -> Callable[[], Any] | None:
        """The hook that gives the stage's loader: the datamodule's where there is one, else the module's."""
        name, trainer = HOOKS[stage], self.trainer
        for owner, base in ((trainer.datamodule, LightningDataModule), (trainer.lightning_module, LightningModule)):
            if owner is not None:
                found = override_of(owner, name, base)
                if found is not None:
                    if trainer._profiler is not None:
                        return spanned(found, trainer._profiler, f"[{base.__name__}]{type(owner).__name__}.{name}")
                    return found
        return None

    def _asked_what(self, stage: str) -> str:
        """How errors call the source of the stage's loader."""
        if self.given.get(stage) is not None:
            return f"The {stage} loader that was passed to the trainer"
        trainer = self.trainer
        for owner, base in ((trainer.datamodule, LightningDataModule), (trainer.lightning_module, LightningModule)):
            if owner is not None and override_of(owner, HOOKS[stage], base) is not None:
                return f"`{type(owner).__name__}.{HOOKS[stage]}`"
        return f"`{HOOKS[stage]}`"

    def _ask(self, stage: str) -> Any:
        given = self.given.get(stage)
        if given is not None:
            return given
        hook = self._hook(stage)
        if hook is None:
            getattr(DataHooks, HOOKS[stage])(self.trainer.lightning_module)  # raises, saying what to do
        assert hook is not None
        metrics = self.trainer._metrics
        outer, metrics.scope = metrics.scope, HOOKS[stage]
        outer_entries, metrics.entries = metrics.entries, None  # no loop collects what this hook would log
        try:
            asked = hook()
        finally:
            metrics.scope, metrics.entries = outer, outer_entries
        if asked is None:
            raise TypeError(f"{self._asked_what(stage)} returned None; return a loader: any iterable, or a collection of them.")
        return asked


class _Sized(_Batches):
    """The same with a length, where all of them have one."""

    def __len__(self) -> int:
        if self.combined.batch_count() == UNBOUNDED:
            raise TypeError("one of the combined loaders has no length")
        return int(self.combined.batch_count())


def _length_is_exact(loader: Any) -> bool:
    """Whether ``len`` cannot be wrong: of a sequence, or where samplers of torch draw from a dataset with indices."""
    if not isinstance(loader, DataLoader):
        return isinstance(loader, Sequence)
    if has_iterable_dataset(loader):
        return False
    if type(loader).__iter__ is not DataLoader.__iter__ and not type(loader).__module__.startswith("torchdata."):
        return False
    return all(
        each is None or isinstance(each, Sequence) or type(each).__module__.startswith("torch.")
        for each in (loader.batch_sampler, loader.sampler)
    )


def _check_iterable(loader: Any, source: str) -> None:
    if isinstance(loader, (str, bytes)) or not hasattr(loader, "__iter__"):
        hint = " Wrap the data set into a DataLoader." if hasattr(loader, "__getitem__") and hasattr(loader, "__len__") else ""
        raise TypeError(f"{source} gave {loader!r}, a {type(loader).__name__}, which cannot be iterated.{hint}")


def _unshuffled(loader: Any, stage: str) -> Any:
    """The loader in a fixed order, for overfitting on the same batches again and again."""
    if not isinstance(loader, DataLoader) or not is_shuffled(loader):
        return loader
    rank_zero_warn(f"`overfit_batches` was set, so the shuffling of the {stage} loader is turned off.")
    return replace_sampler(loader, SequentialSampler(loader.dataset))  # type: ignore[arg-type]


def limited(length: float, limit: float, name: str) -> float:
    """The number of batches to take.

    Args:
        length: batches that there are, infinity if unknown.
        limit: a number of batches, or a fraction as float.
        name: the argument, for errors.

    Raises:
        MisconfigurationException: for a fraction of an unknown length, or one that comes to no batch.
    """
    if isinstance(limit, int) or limit == 0 or length == 0:
        return min(length, int(limit))
    if limit == 1.0:
        return length
    if length == UNBOUNDED:
        raise MisconfigurationException(f"{name}={limit} is a fraction, and the loader has no length. Give 1.0, 0, or a number of batches.")
    batches = int(length * limit)
    if batches == 0:
        raise MisconfigurationException(f"{name}={limit} of {length} batches is less than one batch: give at least {1 / length}.")
    return batches


def limited_everywhere(lengths: Sequence[float], limit: float, name: str) -> list[float]:
    """:func:`limited` for each of several processes, by rank.

    Raises:
        MisconfigurationException: if it raises for one of them, which is named: all processes fail, and none waits for another.
    """
    counts = []
    for rank, length in enumerate(lengths):
        try:
            counts.append(limited(length, limit, name))
        except MisconfigurationException as error:
            raise MisconfigurationException(f"{error} It is so on rank {rank}." if len(lengths) > 1 else str(error)) from None
    return counts


def check_given(stage: str, loaders: Any, datamodule: Any) -> None:
    """Refuse loaders and a datamodule at the same time, and things that are no datamodule.

    Raises:
        MisconfigurationException: if both are given.
        TypeError: if ``datamodule`` is none.
    """
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        raise TypeError(f"datamodule={datamodule!r} is a {type(datamodule).__name__}; a LightningDataModule is needed.")
    if loaders is not None and datamodule is not None:
        raise MisconfigurationException(
            f"`trainer.{stage}` got both loaders and a datamodule, and would not know which of them to use: pass one of them."
        )
