"""Where ours differs from the reference on purpose: the difference, why, and what ours gives.

Keys lead into a scenario's facts: ``(scenario, key, ...)``. A value too long for this page is ``IN_FILE``: it stands under
the same keys in ``ours/<scenario>.json``, which ``record.py --ours NAME`` writes; read the diff before you commit it.
"""

from __future__ import annotations

from typing import Any

IN_FILE = object()

WINDOW = "the last, smaller accumulation window is divided by the batches that are in it"
WINDOW_KEPT = "a validation inside an accumulation window does not throw its gradients away"
EXACT = "a resumed run goes on with the very next batch, as if it had not been interrupted, and with validation that was due"
OWN_KEY = "the checkpoint has a key of ours with what exact resumption needs"
INTERRUPT = "Ctrl-C ends the run, not the interpreter"
REFUSED = "a wrong argument is refused by name when it is given"
TOLD = "a wrong form is refused with a message that says what is accepted"
EMPTY = "a loader without batches is refused instead of training on nothing"
FREQUENCY = "the frequency of a scheduler by steps counts optimizer steps over the whole run"
MISSPELT = "a hook whose name is misspelt is told"

_WRONG_ARGUMENTS = (
    *(f"accumulate_grad_batches {form}" for form in ("-1", "0", "a dict", "a float")),
    *(f"callbacks {form}" for form in ("a class", "not callbacks")),
    *(f"fast_dev_run {form}" for form in ("1.0", "a float")),
    *(f"logger {form}" for form in ("an object", "not a logger")),
    *(f"max_epochs {form}" for form in ("a float", "a string")),
    *(f"num_sanity_val_steps {form}" for form in ("-2", "a float")),
    *(f"val_check_interval {form}" for form in ("0", "0.0")),
    "check_val_every_n_epoch 0",
    "deterministic unknown",
    "gradient_clip_algorithm not a string",
    "limit_train_batches a string",
    "log_every_n_steps -1",
    "max_steps None",
    "max_steps a float",
    "max_time a number",
    "min_epochs negative",
)
_RESUMED = (
    "resume_after_a_validation_in_mid_epoch",
    "resume_at_the_end_of_an_epoch",
    "resume_at_the_last_batch_of_an_epoch",
    "resume_between_two_validations_of_an_epoch",
    "resume_in_mid_epoch",
    "resume_in_the_first_epoch",
    "resume_with_the_sanity_check",
    "rows_after_resuming",
)

INTENDED: dict[tuple[str, ...], tuple[str, Any]] = {
    **{("wrong_trainer_arguments", name): (REFUSED, "MisconfigurationException") for name in _WRONG_ARGUMENTS},
    **{("wrong_trainer_arguments_when_run", name): (REFUSED, "MisconfigurationException") for name in _WRONG_ARGUMENTS},
    **{(name,): (EXACT, IN_FILE) for name in _RESUMED},
    ("accumulation_beyond_the_epoch",): (WINDOW, IN_FILE),
    ("accumulation_of_three_over_seven_batches",): (WINDOW, IN_FILE),
    ("accumulation_on_a_stream",): (WINDOW, IN_FILE),
    ("weights_after_training_in_different_ways", "accumulated, uneven"): (WINDOW, IN_FILE),
    ("validation_with_accumulation_in_mid_window",): (f"{WINDOW}; {WINDOW_KEPT}", IN_FILE),
    ("resume_with_accumulation", "epoch end"): (WINDOW, IN_FILE),
    ("resume_with_accumulation", "window end"): (f"{WINDOW}; {EXACT}", IN_FILE),
    ("a_finished_run_as_a_checkpoint", "keys"): (OWN_KEY, IN_FILE),
    ("callback_states_of_the_model_hooks",): (OWN_KEY, IN_FILE),
    ("saving_by_hand", "keys"): (OWN_KEY, IN_FILE),
    ("weights_only_checkpoints", "keys"): (OWN_KEY, IN_FILE),
    ("exceptions_on_the_way",): (INTERRUPT, IN_FILE),
    ("fit_empty_loaders",): (EMPTY, IN_FILE),
    ("missing_parts", "train loader without batches"): (EMPTY, "MisconfigurationException"),
    ("warnings_in_fit", "empty train loader"): (EMPTY, ["MisconfigurationException"]),
    ("warnings_in_fit", "empty val loader"): (EMPTY, ["MisconfigurationException"]),
    ("warnings_in_fit", "misspelt hook"): (MISSPELT, ["no error", "UserWarning"]),
    ("warnings_of_checkpoints", "resume in mid epoch"): (EXACT, []),
    ("wrong_callback_arguments", "ModelCheckpoint save_last"): (REFUSED, "MisconfigurationException"),
    ("wrong_steps", "dict with a number as loss"): (TOLD, "MisconfigurationException"),
    ("states_that_do_not_fit", "optimizer"): (TOLD, "MisconfigurationException"),
    ("wrong_trainer_arguments",): (REFUSED, IN_FILE),
    ("wrong_trainer_arguments_when_run",): (REFUSED, IN_FILE),
    ("missing_parts", "a dataset as loader"): (TOLD, "TypeError"),
    ("wrong_steps", "no arguments"): (TOLD, "MisconfigurationException"),
    ("wrong_ckpt_paths",): (TOLD, IN_FILE),
    ("wrong_configure_optimizers",): (TOLD, IN_FILE),
    ("log_over_several_validation_loaders",): ("the metrics of each loader are there when its hooks of the end run", IN_FILE),
    ("files_of_the_top_k", "none, last"): ("`last` is kept up to date during the run, where a crash needs it", IN_FILE),
    ("names_of_files", "fixed"): ("save_top_k=-1 keeps all files, under versions if the name is fixed", IN_FILE),
    ("names_made_by_hand", "empty dirpath"): ("an empty dirpath is the current folder, as in a shell", IN_FILE),
    ("evaluation_without_a_model_after_fit", "without a checkpoint callback"): ("the weights at hand are used", "no error"),
    ("training_step_returning_a_tensor_or_extra_keys", "Extra"): ("outputs are detached all through: no graph outlives its step", IN_FILE),
    ("forms_of_configure_optimizers",): (FREQUENCY, IN_FILE),
    ("schedulers_by_steps",): (FREQUENCY, IN_FILE),
    ("resume_with_accumulation", "inside a window"): (f"{WINDOW}; {EXACT}", IN_FILE),
    ("resume_by_max_steps",): (EXACT, IN_FILE),
    ("resume_of_a_finished_run",): (EXACT, IN_FILE),
    ("counters_after_runs", "no training"): ("nothing will be trained, so no step is estimated", IN_FILE),
    ("counters_after_runs", "zero epochs"): ("nothing will be trained, so no step is estimated", IN_FILE),
    ("estimated_stepping_batches_in_different_runs", "stream"): ("a stream without a bound has no end, not -1 steps", IN_FILE),
    ("early_stopping_in_runs",): ("early stopping decides anew after the minimum; its score is the one it decided on", IN_FILE),
}
