"""LightningDataModule: data sets, their preparation and their loaders in one reusable object."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Union

from typing_extensions import Self

from lightning.pytorch.core.class_only import class_only
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    import lightning.pytorch as pl


class LightningDataModule(DataHooks, HyperparametersMixin):
    """Subclass it, and define ``prepare_data``, ``setup`` and the ``*_dataloader`` methods that you need.

    Example::

        class Digits(LightningDataModule):
            def setup(self, stage):
                self.train, self.val = random_split(load(), [0.8, 0.2])

            def train_dataloader(self):
                return DataLoader(self.train, batch_size=32, shuffle=True)

            def val_dataloader(self):
                return DataLoader(self.val, batch_size=64)
    """

    name: str | None = None
    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Subclasses written for Lightning may pass on what they were given; there is nothing here that would take it.
        super().__init__()
        HyperparametersMixin.__init__(self)
        self.trainer: pl.Trainer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}

    def __str__(self) -> str:
        """The sizes of the data sets, as far as there are loaders already."""
        lines = []
        for title, stage in (("Train", "train"), ("Validation", "val"), ("Test", "test"), ("Predict", "predict")):
            try:
                loaders = getattr(self, f"{stage}_dataloader")()
            except Exception:  # not defined, or `setup` has not run: printing must not fail for that
                loaders = None
            lines.append(f"{{{title} dataloader: {_sizes(loaders)}}}")
        return "\n".join(lines)

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Union[Dataset[Any], Iterable[Dataset[Any]]] | None = None,
        val_dataset: Union[Dataset[Any], Iterable[Dataset[Any]]] | None = None,
        test_dataset: Union[Dataset[Any], Iterable[Dataset[Any]]] | None = None,
        predict_dataset: Union[Dataset[Any], Iterable[Dataset[Any]]] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> LightningDataModule:
        """Make a datamodule from data sets: training data is shuffled, the rest is not.

        Args:
            train_dataset: a data set, or a list, tuple or mapping of them, each of which gets a loader.
            val_dataset: likewise.
            test_dataset: likewise.
            predict_dataset: likewise.
            batch_size: samples in a batch; passed on to ``__init__`` too where that takes it.
            num_workers: processes that load data; 0 loads in the main process. Passed on likewise.
            **datamodule_kwargs: arguments for the class's ``__init__``.

        Raises:
            TypeError: if there are such arguments, and the class's ``__init__`` takes none.

        Example::

            >>> datamodule = LightningDataModule.from_datasets(range(10), val_dataset=[range(4), range(6)], batch_size=5)
            >>> len(datamodule.train_dataloader()), len(datamodule.val_dataloader())
            (2, 2)
        """
        if cls.__init__ is LightningDataModule.__init__:
            if datamodule_kwargs:
                raise TypeError(
                    f"`{cls.__name__}.from_datasets` got {sorted(datamodule_kwargs)}, and {cls.__name__} has no `__init__` for them."
                )
            datamodule = cls()
        else:
            parameters = inspect.signature(cls.__init__).parameters
            takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
            common = {"batch_size": batch_size, "num_workers": num_workers}
            datamodule = cls(**datamodule_kwargs, **{name: value for name, value in common.items() if takes_all or name in parameters})
        for stage, datasets in (("train", train_dataset), ("val", val_dataset), ("test", test_dataset), ("predict", predict_dataset)):
            if datasets is not None:
                # A partial, unlike a function defined here, can be sent to another process.
                setattr(datamodule, f"{stage}_dataloader", partial(_loaders, datasets, stage == "train", batch_size, num_workers))
        return datamodule

    def state_dict(self) -> dict[str, Any]:
        """What this datamodule needs to continue after a restart; stored in each checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned when the checkpoint was saved."""

    def on_exception(self, exception: BaseException) -> None:
        """When an exception ends the run."""

    @class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: Union[str, Path, IO[bytes]],
        map_location: Any = None,
        hparams_file: Union[str, Path] | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the datamodule from the hyperparameters in a checkpoint.

        Args:
            checkpoint_path: a path, a URL, or an open file.
            map_location: the device to load tensors to, as for :func:`torch.load`.
            hparams_file: a YAML or CSV file of hyperparameters, for checkpoints that hold none.
            weights_only: False unpickles anything in the file: only for sources you trust. None means True.
            **kwargs: arguments for ``__init__`` that replace, or add to, the stored ones.
        """
        from lightning.pytorch.core.saving import _load_from_checkpoint

        return _load_from_checkpoint(  # type: ignore[no-any-return]
            cls, checkpoint_path, map_location=map_location, hparams_file=hparams_file, strict=None, weights_only=weights_only, **kwargs
        )


def _loaders(datasets: Any, shuffle: bool, batch_size: int, num_workers: int) -> Any:
    """A loader for a data set; for a collection of data sets, the same collection of loaders."""
    from torch.utils.data import DataLoader, IterableDataset

    from lightning.fabric.accelerators.cuda import is_cuda_available

    if isinstance(datasets, Mapping):
        return {key: _loaders(dataset, shuffle, batch_size, num_workers) for key, dataset in datasets.items()}
    if isinstance(datasets, (list, tuple)):
        loaders = [_loaders(dataset, shuffle, batch_size, num_workers) for dataset in datasets]
        return loaders if isinstance(datasets, list) else tuple(loaders)
    shuffle = shuffle and not isinstance(datasets, IterableDataset)
    return DataLoader(datasets, batch_size, shuffle=shuffle, num_workers=num_workers, pin_memory=is_cuda_available())


def _sizes(loaders: Any) -> str:
    """The number of samples of a loader, or of each in a collection; ``NA`` where there is no telling."""
    if loaders is None:
        return "None"
    if isinstance(loaders, Mapping):
        return " ; ".join(f"{key}. {_sizes(loader)}" for key, loader in loaders.items())
    if isinstance(loaders, (list, tuple)):
        return " ; ".join(f"{index}. {_sizes(loader)}" for index, loader in enumerate(loaders, 1))
    try:
        return f"size={len(getattr(loaders, 'dataset', loaders))}"
    except (TypeError, NotImplementedError):
        return "size=NA"
