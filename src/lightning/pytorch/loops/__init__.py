"""The loops: fit, evaluate, predict."""

from lightning.pytorch.loops.evaluate import EvaluationLoop
from lightning.pytorch.loops.fit import FitLoop
from lightning.pytorch.loops.predict import PredictionLoop

__all__ = ["EvaluationLoop", "FitLoop", "PredictionLoop"]
