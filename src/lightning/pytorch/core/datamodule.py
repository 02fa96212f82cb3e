"""LightningDataModule: data sets, their preparation and their loaders in one reusable object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Union

from typing_extensions import Self

from lightning.pytorch.core.class_only import class_only
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset

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

    def __init__(self) -> None:
        super().__init__()
        HyperparametersMixin.__init__(self)
        self.trainer: pl.Trainer | None = None

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
            train_dataset: a data set, or a sequence or mapping of them, each of which gets a loader.
            val_dataset: likewise.
            test_dataset: likewise.
            predict_dataset: likewise.
            batch_size: samples in a batch.
            num_workers: processes that load data; 0 loads in the main process.
            **datamodule_kwargs: arguments for the class's ``__init__``.
        """
        from torch.utils.data import DataLoader, IterableDataset

        def loader(dataset: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
            shuffle = shuffle and not isinstance(dataset, IterableDataset)
            return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers, pin_memory=num_workers > 0)

        def loaders(datasets: Any, shuffle: bool) -> Any:
            if isinstance(datasets, Mapping):
                return {key: loader(dataset, shuffle) for key, dataset in datasets.items()}
            if isinstance(datasets, (list, tuple)):
                return [loader(dataset, shuffle) for dataset in datasets]
            return loader(datasets, shuffle)

        datamodule = cls(**datamodule_kwargs)
        for hook, datasets, shuffle in (
            ("train_dataloader", train_dataset, True),
            ("val_dataloader", val_dataset, False),
            ("test_dataloader", test_dataset, False),
            ("predict_dataloader", predict_dataset, False),
        ):
            if datasets is not None:
                setattr(datamodule, hook, lambda datasets=datasets, shuffle=shuffle: loaders(datasets, shuffle))
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
