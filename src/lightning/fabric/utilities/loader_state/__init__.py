"""Where a loader is in its data, and what it draws at random: kept, and continued exactly in another process."""

from __future__ import annotations

from lightning.fabric.utilities.loader_state.loader import ResumableLoader, has_indices

__all__ = ["ResumableLoader", "has_indices"]
