"""A look through a pickle before it is read: what would take memory or time without end is refused, for nothing else finds it.

Torch's safe reader, and the one of the metadata of sharded checkpoints, decide what a pickle may call. That leaves small files that
ask for a hundred gigabytes, and tuples that hold a tuple twice which holds a tuple twice ..., whose hash takes years and can't be
interrupted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from struct import error as StructError
from struct import unpack_from
from typing import Any

MOST_PARTS = 1_000_000  # of a tuple, with those of the tuples in it; keys have a few
MOST_VALUES = 1_000_000_000  # of everything in a file, each counted as often as somebody comes by who goes through all of it

# Operations without an argument, or with one that only has to be skipped: (bytes of it, what they take off the stack, whether they put
# something there).
SKIPPED: dict[int, tuple[int, int, bool]] = {
    **dict.fromkeys(b"N\x88\x89]}\x8f", (0, 0, True)),  # None, True, False, and empty containers
    ord("G"): (8, 0, True),  # a float
    ord("\x80"): (1, 0, False),  # the protocol
    ord("\x95"): (8, 0, False),  # a frame
    ord("a"): (0, 1, False),  # append
    ord("s"): (0, 2, False),  # set an item
    ord("b"): (0, 1, False),  # set the state
    ord("0"): (0, 1, False),  # pop
    ord("Q"): (0, 1, True),  # what a persistent id stands for
    ord("\x93"): (0, 2, True),  # a global, named by the stack
}
TEXTS = {ord("X"): "<I", ord("\x8c"): "<B", ord("B"): "<I", ord("C"): "<B", ord("U"): "<B", ord("T"): "<I", ord("\x8d"): "<Q", 0x8E: "<Q"}
NUMBERS = {ord("J"): 4, ord("K"): 1, ord("M"): 2}
PUTS = {ord("q"): "<B", ord("r"): "<I"}
GETS = {ord("h"): "<B", ord("j"): "<I"}
TO_MARK = frozenset(b"eu\x90")  # append, set items, add: to what stands before the mark

# What stands for a value: how many parts it has, and whether there is a number in it.
Value = tuple[int, bool]
THING, NUMBER, ALLOCATING = (1, False), (1, True), (0, False)


class Refused(ValueError):
    """Why a pickle is not read."""


def look_through(data: bytes, start: int = 0) -> int:
    """Follow a pickle without making anything of it.

    Args:
        data: holds it.
        start: where it begins.

    Returns:
        Where it ends; -1 if it has no end, or an operation that torch's safe reader refuses anyway.

    Raises:
        Refused: if it would take memory or time that no checkpoint takes.
    """
    try:
        return _follow(data, start)
    except (IndexError, KeyError, ValueError, StructError) as error:
        if isinstance(error, Refused):
            raise
        return -1


def _follow(data: bytes, at: int) -> int:
    stack: list[Value] = []
    marks: list[int] = []
    memo: dict[int, Value] = {}
    while True:
        operation = data[at]
        at += 1
        if (puts := PUTS.get(operation)) is not None:
            (index,) = unpack_from(puts, data, at)
            if index > len(data):  # C's reader makes a table as long as the index is large
                raise Refused(f"it wants to remember {index} values")
            memo[index] = stack[-1]
            at += 1 if puts == "<B" else 4
        elif (gets := GETS.get(operation)) is not None:
            stack.append(memo[unpack_from(gets, data, at)[0]])
            at += 1 if gets == "<B" else 4
        elif (length := NUMBERS.get(operation)) is not None:
            stack.append(NUMBER)
            at += length
        elif (lengths := TEXTS.get(operation)) is not None:
            at += unpack_from(lengths, data, at)[0] + {"<B": 1, "<I": 4, "<Q": 8}[lengths]
            stack.append(THING)
        elif (skipped := SKIPPED.get(operation)) is not None:
            at += skipped[0]
            if skipped[1]:
                del stack[-skipped[1] :]
            if skipped[2]:
                stack.append(THING)
        elif operation == 0x28:  # "(", a mark
            marks.append(len(stack))
        elif operation in TO_MARK:
            del stack[marks.pop() :]
        elif operation == 0x94:  # remember under the next number
            memo[len(memo)] = stack[-1]
        elif operation == 0x52 or operation == 0x81:  # "R", a call, and a new object
            arguments = stack.pop()
            if stack[-1] is ALLOCATING and arguments[1]:
                raise Refused("it asks for memory of a size that it names")
            stack[-1] = (1, arguments[1])
        elif operation == 0x63:  # "c", a global
            end = data.index(b"\n", data.index(b"\n", at) + 1)
            stack.append(_callable(data[at:end]))
            at = end + 1
        elif operation == 0x2E:  # ".", the end
            return at
        elif operation == 0x8A:  # a long number
            at += data[at] + 1
            stack.append(NUMBER)
        else:
            _make_tuple(operation, stack, marks)


def _make_tuple(operation: int, stack: list[Value], marks: list[int]) -> None:
    """Operations that make tuples; ValueError for all that are unknown here."""
    if operation == 0x74:  # "t", of what stands after the mark
        first = marks.pop()
    elif operation == 0x29:  # ")", the empty one
        first = len(stack)
    elif 0x85 <= operation <= 0x87:  # of one, two, or three
        first = len(stack) - (operation - 0x84)
    else:
        raise ValueError(operation)
    if first < 0:
        raise IndexError(first)
    parts = stack[first:]
    size = 1 + sum([part[0] for part in parts])
    if size > MOST_PARTS:
        raise Refused(f"a tuple in it would have more than {MOST_PARTS} parts")
    stack[first:] = [(size, any(part[1] for part in parts))]


def _callable(name: bytes) -> Value:
    """A class or function by its name; those apart that take a number for a size."""
    module, _, last = name.partition(b"\n")
    allocates = last == b"bytearray" or (module.startswith(b"torch") and last.endswith((b"Tensor", b"Storage")))
    return ALLOCATING if allocates else THING


def refuse_endless(content: Any) -> None:
    """Refuse data that holds the same parts so often that to go through all of it would take for ever.

    Raises:
        Refused: if it does.
        RecursionError: if it is nested too deeply.
    """
    counted: dict[int, int] = {}

    def count(value: Any) -> int:
        parts = value.values() if isinstance(value, dict) else value
        total = len(parts)
        for part in parts:
            if type(part) in CONTAINERS:
                key = id(part)
                if key not in counted:
                    counted[key] = 0  # within itself
                    counted[key] = count(part)
                total += counted[key]
        if total > MOST_VALUES:
            raise Refused(f"to go through all of it would mean more than {MOST_VALUES} values")
        return total

    if type(content) in CONTAINERS:
        count(content)


CONTAINERS = frozenset((list, tuple, dict, OrderedDict, Counter))
