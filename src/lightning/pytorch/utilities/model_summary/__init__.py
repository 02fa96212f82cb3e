"""What a model consists of: its layers, their sizes and the work that they do."""

from lightning.pytorch.utilities.model_summary.model_summary import (
    LayerSummary,
    ModelSummary,
    get_formatted_model_size,
    get_human_readable_count,
    parse_batch_shape,
    summarize,
)
from lightning.pytorch.utilities.model_summary.model_summary_deepspeed import DeepSpeedSummary

__all__ = [
    "DeepSpeedSummary",
    "LayerSummary",
    "ModelSummary",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]
