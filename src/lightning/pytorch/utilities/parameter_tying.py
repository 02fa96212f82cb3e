"""Find parameters that a module uses in several places, and tie them again after they were replaced."""

from __future__ import annotations

from torch import nn

__all__ = ["find_shared_parameters", "set_shared_parameters"]


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """The names under which ``module`` holds a parameter more than once: a list of names for each such parameter.

    Example::

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> find_shared_parameters(model)
        [['0.weight', '1.weight']]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


def set_shared_parameters(module: nn.Module, shared_params: list[list[str]]) -> nn.Module:
    """Tie parameters of ``module``: each name of a list gets the parameter of the list's first name.

    Moving a module to some devices makes new parameters, which unties them; this ties them again.

    Args:
        module: is changed.
        shared_params: what :func:`find_shared_parameters` returned before.

    Returns:
        ``module``.

    Raises:
        AttributeError: if ``module`` has no parameter of one of the names.

    Example::

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = set_shared_parameters(model, [["0.weight", "1.weight"]])
        >>> model[1].weight is model[0].weight
        True
    """
    for first, *others in shared_params:
        parameter = module.get_parameter(first)
        for name in others:
            path, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(path), attribute, parameter)
    return module
