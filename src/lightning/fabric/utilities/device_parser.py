"""What the argument ``devices`` may be, and which devices it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException

# How `devices` may be written where devices have indices; the errors quote it.
INDEX_FORMS = 'a count (2 or "2"), indices ([0, 2] or "0,2", "2," for one), or all there are (-1 or "auto")'


def parse_devices(devices: Any, available: Sequence[int], kind: str) -> list[int]:
    """Return the indices of the devices that ``devices`` asks for.

    Args:
        devices: a count (``2``, ``"2"``), indices (``[0, 2]``, ``"0,2"``, ``"2,"``), or all (``-1``, ``"-1"``, ``"auto"``).
        available: the indices of the devices that this machine offers.
        kind: what the devices are called in errors, such as ``"cuda"``.

    Raises:
        TypeError: if ``devices`` is neither an int, nor a string, nor a sequence of ints.
        ValueError: if a string holds something other than integers.
        MisconfigurationException: if the request is empty, names a device twice, or asks for more than there is.

    Example::

        >>> parse_devices("0,2", available=[0, 1, 2], kind="cuda")
        [0, 2]
        >>> parse_devices(2, available=[0, 1, 2], kind="cuda")
        [0, 1]
        >>> parse_devices(-1, available=[0, 1, 2], kind="cuda")
        [0, 1, 2]
    """
    request = read_devices(devices, kind)
    if request == -1:
        if not available:
            raise MisconfigurationException(
                f"devices={devices!r} asks for every {kind} device, and this machine offers none. "
                'Use accelerator="cpu", or run where such a device is visible.'
            )
        return list(available)
    if isinstance(request, int):
        if request < 0:
            raise MisconfigurationException(f"devices={devices!r} is negative. Accepted for {kind}: {INDEX_FORMS}.")
        indices = list(range(request))
    else:
        indices = request
    if not indices:
        refuse_none(devices, kind)
    if len(set(indices)) < len(indices):
        raise MisconfigurationException(f"devices={devices!r} names a {kind} device more than once; each process needs one of its own.")
    absent = [index for index in indices if index not in available]
    if absent:
        there = f"offers {list(available)}" if available else "offers none"
        raise MisconfigurationException(
            f"devices={devices!r} asks for the {kind} devices {indices}, and this machine {there}. "
            + ("Ask for those, or for all of them with devices=-1." if available else 'Use accelerator="cpu".')
        )
    return indices


def parse_device_count(devices: Any, kind: str = "cpu") -> int:
    """Return how many processes ``devices`` asks for, on an accelerator whose devices have no indices.

    Args:
        devices: an int above 0, such an int as a string, or ``"auto"``, which means 1.
        kind: the accelerator's name in errors.

    Raises:
        MisconfigurationException: if no device is asked for (``0``, ``"0"``, ``[]``).
        TypeError: if ``devices`` is anything else.

    Example::

        >>> parse_device_count("2"), parse_device_count("auto")
        (2, 1)
    """
    if devices == "auto":
        return 1
    if devices in (0, "0", [], ()) and devices is not False:
        refuse_none(devices, kind)
    count = devices
    if isinstance(devices, str):
        try:
            count = int(devices)
        except ValueError:
            count = None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise TypeError(
            f"devices={devices!r} was given for the {kind} accelerator, which takes the number of processes: "
            'an int above 0, such as devices=1, or "auto".'
        )
    return count


def read_devices(devices: Any, kind: str) -> int | list[int]:
    """Read a count (-1: all) or a list of indices; whether they exist is not checked here."""
    if isinstance(devices, str):
        text = devices.strip()
        if text == "auto":
            return -1
        try:
            if "," in text:
                return [int(part) for part in text.split(",") if part.strip()]
            return int(text)
        except ValueError:
            raise ValueError(f"devices={devices!r} can't be read. Accepted for {kind}: {INDEX_FORMS}.") from None
    if isinstance(devices, int) and not isinstance(devices, bool):
        return devices
    if isinstance(devices, (list, tuple)) and all(isinstance(index, int) and not isinstance(index, bool) for index in devices):
        return list(devices)
    raise TypeError(f"devices={devices!r} is of type {type(devices).__name__}. Accepted for {kind}: {INDEX_FORMS}.")


def refuse_none(devices: Any, kind: str) -> NoReturn:
    raise MisconfigurationException(
        f"devices={devices!r} asks for no {kind} device at all, and a run needs at least one. "
        'Use devices=1, devices="auto", or another accelerator.'
    )
