"""What users can see of a run, as plain facts: the same functions run on the reference and on ours.

A scenario is a function without arguments, written against the public API alone, that returns data which JSON can hold.
"""

from . import arguments, checkpoints, epochs, evaluation, fitting, logged, misuse, optimization, resuming, rows, state, warned
from .base import SCENARIOS, plain

__all__ = [
    "SCENARIOS",
    "arguments",
    "checkpoints",
    "epochs",
    "evaluation",
    "fitting",
    "logged",
    "misuse",
    "optimization",
    "plain",
    "resuming",
    "rows",
    "state",
    "warned",
]
