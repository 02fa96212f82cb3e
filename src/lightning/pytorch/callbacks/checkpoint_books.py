"""The books of a ModelCheckpoint: which checkpoints there are, and which of them are best."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BOOKS = ("best_k_models", "best_model_path", "best_model_score", "current_score", "kth_best_model_path", "kth_value", "last_model_path")


class Books:
    """The part of :class:`~lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint` that knows paths and scores."""

    mode: str
    save_top_k: int

    def _open_books(self) -> None:
        self.best_k_models: dict[str, Tensor] = {}
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.current_score: Tensor | None = None
        self.kth_best_model_path = ""
        self.kth_value = self._worst
        self.last_model_path = ""

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Set the books before a save, for the file holds them, and set them back if it fails."""
        before = {name: getattr(self, name) for name in BOOKS}
        try:
            yield
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    @property
    def _worst(self) -> Tensor:
        return torch.tensor(torch.inf if self.mode == "min" else -torch.inf)

    def _rank(self, books: dict[str, Tensor]) -> None:
        best, worst = (min, max) if self.mode == "min" else (max, min)
        self.best_k_models = books
        self.best_model_path = best(books, key=lambda path: books[path].item())
        self.best_model_score = books[self.best_model_path]
        full = self.save_top_k == -1 or len(books) >= self.save_top_k
        self.kth_best_model_path = worst(books, key=lambda path: books[path].item()) if full else ""
        self.kth_value = books[self.kth_best_model_path] if full else self._worst

    def _forget(self, gone: Collection[str]) -> None:
        """Take paths out of the books."""
        if any(path in self.best_k_models for path in gone):
            books = {path: score for path, score in self.best_k_models.items() if path not in gone}
            if books:
                self._rank(books)
            else:
                self.best_k_models, self.best_model_path, self.best_model_score = {}, "", None
                self.kth_best_model_path, self.kth_value = "", self._worst
        if self.last_model_path in gone:
            self.last_model_path = ""


def in_one_storage(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same scores, of which a file then holds one record, not as many as there are checkpoints."""
    if len({(type(score), getattr(score, "dtype", None), getattr(score, "shape", None)) for score in scores.values()}) != 1:
        return scores
    return dict(zip(scores, torch.stack(list(scores.values())).unbind()))


def on_cpu(score: Any) -> Any:
    """A copy on the host: the device's tensor goes on changing, and a checkpoint's scores must load anywhere."""
    return score.detach().cpu().clone() if isinstance(score, Tensor) else score
