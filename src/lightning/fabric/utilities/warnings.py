"""Warning categories."""

import warnings


class PossibleUserWarning(UserWarning):
    """Something that is often, though not always, a mistake."""


def disable_possible_user_warnings(module: str = "") -> None:
    """Silence every :class:`PossibleUserWarning`, or only those raised from modules whose name matches ``module``.

    Args:
        module: a regular expression matched against the name of the module that warns; empty matches all.
    """
    warnings.filterwarnings("ignore", category=PossibleUserWarning, module=module)
