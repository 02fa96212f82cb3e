"""Rows on their way to the loggers: each logger is called by a thread of its own, so that one which is slow, hangs or raises
costs training nothing, and gets its rows when it takes them again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from contextvars import copy_context
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info

GATHER = 0.05  # seconds in which rows may come together before they are delivered and saved
SAVE_EVERY = 100  # rows after which they are saved, though more are there
MOST_VALUES = 200_000  # numbers that wait for one logger; the oldest rows beyond them are dropped
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds until a logger that raised is called again
TRIES = 3  # for one row, before it is looked whether the logger takes others
LOOK_AHEAD = 100  # how many others
LAST_TRIES, LAST_DELAY = 4, 0.25  # at the end of the run: how often, and how many seconds after the first of them
HANG = 30.0  # seconds that one call may take when everything else is over
UPLOAD = 600.0  # the same for a call that may upload a checkpoint
PATIENCE, SHARE = 1.0, 0.005  # seconds, and part of the run's time, in which training may wait for a logger at ends of epochs
ORDER = 5.0  # seconds that a direct call of one of our loggers waits for the rows before it
TELL = 3.0  # seconds of waiting at the end after which the user hears what for

# Errors, or their causes, by the names of their classes: of sockets, urllib3, requests, httpx, wandb.
OUTAGES = {"ConnectionError", "TimeoutError", "Timeout", "gaierror", "ConnectError", "MaxRetryError", "CommError"}

ONCE = ("after_save_checkpoint",)  # methods whose calls are not repeated: the files may be gone by then

Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # the name of a logger's method, and what it gets


class Outbox:
    """The calls of one logger: in order, bounded in number, made by a thread that starts with the first of them.

    A call that raises is repeated, after longer and longer times; those behind it wait. A row that is refused while the logger
    takes others is dropped. What is dropped is counted, and told at the end.

    Args:
        logger: whose methods are called. One whose ``called_in_background`` is False is called where the rows come from, and so is
            one whose error says that it has to do with threads.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.delivered = 0
        self.dropped = 0  # since too many were waiting
        self.refused = 0
        self.hangs = False  # the thread is left alone in a call that does not return
        self._here = not getattr(logger, "called_in_background", True)
        self._moves = not self._here  # whether it may turn out that it is bound to a thread
        self._owner = os.getpid()
        self._waiting: deque[Call] = deque()
        self._values = 0  # in the calls that wait
        self._in_hand: Call | None = None
        self._aside: list[Call] = []  # refused, while others are tried
        self._unsaved = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._urgent = False
        self._closing = False
        self._closed = False
        self._attempts = 0  # that have failed since the last success
        self._next_try = 0.0
        self._error: BaseException | None = None  # the newest
        self._told = False
        self._warning: Warning | None = None  # to be raised where it can be caught: warnings are errors
        self._pace = 0.0  # seconds for a call, lately
        self._calls = 0
        self._called_at = 0.0  # 0 if no call is being made
        self._opened = time.monotonic()
        self._waited = 0.0

    # ---- for the thread that trains ---------------------------------------------------------------------------------

    def put(self, call: Call) -> None:
        """Have a call made, after those that were put before."""
        self._raise_warning()
        self.add(call)
        if self._here:
            self._work_here()

    def add(self, call: Call) -> None:
        """The same from another thread; a logger that is called where its rows come from is called with the next of them."""
        with self._changed:
            self._waiting.append(call)
            self._values += _size(call)
            while self._values > MOST_VALUES and len(self._waiting) > 1:
                self._values -= _size(self._waiting.popleft())
                self.dropped += 1
            if self._thread is None and not self._here:
                name = f"logger-{type(self.logger).__name__}"
                self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name=name, daemon=True)
                self._thread.start()
            elif len(self._waiting) == 1:
                self._changed.notify_all()

    def settle(self) -> None:
        """Wait for a logger that answers promptly; for another one, not longer than a small share of the run's time."""
        self._raise_warning()
        if not self._is_busy or threading.current_thread() is self._thread:
            return
        if self._here:
            self._work_here()
            return
        began = time.monotonic()
        left = PATIENCE + SHARE * (began - self._opened) - self._waited
        with self._changed:
            self._hurry()
            while self._is_busy and not self._attempts:
                allowed = left - (time.monotonic() - began)
                if self._expected() > allowed:
                    break
                self._changed.wait(min(allowed, 0.05))
        self._waited += time.monotonic() - began
        if self._here:
            self._work_here()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is delivered, unless the logger raises, or makes no progress for so many seconds.

        Returns:
            whether everything is delivered.
        """
        if threading.current_thread() is self._thread or os.getpid() != self._owner:
            return True
        if self._here:
            self._work_here()
            return not self._is_busy
        with self._changed:
            self._hurry()
            self._wait_for_progress(seconds, lambda: self._is_busy and not self._attempts)
            return not self._is_busy

    def catch_up(self) -> None:
        """Called by a logger of ours that is called directly: the rows that were sent before go first."""
        if self._is_busy:
            self.flush(ORDER)

    def begin_closing(self) -> None:
        """No more calls come; the last ones are made."""
        with self._changed:
            self._closing, self._attempts, self._next_try = True, 0, 0.0
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until everything is delivered or given up, and tell what is lost. A thread in a call that hangs is left alone."""
        thread = self._thread
        if thread is not None:
            with self._changed:
                self._wait_for_progress(HANG, thread.is_alive, tell=True)
            if thread.is_alive():
                self.hangs = True
            else:
                thread.join()
        while self._here and self._is_busy and not self._work() and self._attempts < LAST_TRIES:
            time.sleep(self._delay())
        self.abandon()
        self._raise_warning()

    def abandon(self) -> None:
        """Wait no longer, and tell what is lost, if that was not done yet."""
        if not self._closed:
            self._closed = True
            self._tell_losses()

    def _wait_for_progress(self, seconds: float, wanted: Any, tell: bool = False) -> None:
        began = since = time.monotonic()
        calls = self._calls
        while wanted() and time.monotonic() - since < (UPLOAD if tell and self._in_hand and self._in_hand[0] in ONCE else seconds):
            self._changed.wait(0.05)
            if self._calls != calls:
                calls, since = self._calls, time.monotonic()
            if tell and time.monotonic() - began > TELL:
                tell, rows = False, len(self._waiting) + 1
                rank_zero_info(f"Waiting for {self._name} to take the last {rows} rows, for about {max(1.0, self._expected()):.0f} s.")

    def _hurry(self) -> None:
        if self._is_busy:
            self._urgent = True
            self._changed.notify_all()

    @property
    def _is_busy(self) -> bool:
        return bool(self._waiting or self._in_hand or self._unsaved)

    def _expected(self) -> float:
        """Seconds until everything is delivered, as far as can be seen."""
        began = self._called_at
        pace = max(self._pace, time.monotonic() - began) if began else self._pace
        return (len(self._waiting) + (self._in_hand is not None)) * pace

    def _work_here(self) -> None:
        if self._is_busy and time.monotonic() >= self._next_try:
            if self._thread is not None:
                self._thread.join()  # it is on its way out
            self._work()

    def _raise_warning(self) -> None:
        if self._warning is not None and threading.current_thread() is not self._thread:
            warning, self._warning = self._warning, None
            raise warning

    # ---- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            if self._work():
                continue
            with self._changed:
                if self._here or (self._closing and self._attempts >= LAST_TRIES):
                    break
                self._changed.wait_for(lambda: self._attempts == 0, self._delay())  # begin_closing sets it to 0
        with self._changed:
            self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_busy or self._closing)
            if not self._attempts:
                self._changed.wait_for(lambda: self._urgent or self._closing, GATHER)
            return self._is_busy

    def _work(self) -> bool:
        """Make the calls that wait, and have the logger save; returns whether all went well."""
        saved = time.monotonic()
        while (call := self._take()) is not None:
            error = self._try(call)
            if error is not None and call[0] in ONCE:
                self.note(error)
                with self._changed:
                    self._in_hand = None
            elif error is not None and not self._passes_over(call, error):
                return self._failed(error)
            if self._unsaved >= SAVE_EVERY or time.monotonic() - saved > 1:
                if not self._save():
                    return False
                saved = time.monotonic()
        return self._save()

    def _save(self) -> bool:
        if self._unsaved:
            error = self._try(("save", (), {}))
            if error is not None:
                return self._failed(error)
        with self._changed:
            self._unsaved = 0
            if not self._waiting:
                self._urgent = False
                self._changed.notify_all()
        return True

    def _take(self) -> Call | None:
        with self._changed:
            self._in_hand = self._waiting.popleft() if self._waiting else None
            if self._in_hand is not None:
                self._values -= _size(self._in_hand)
            return self._in_hand

    def _put_back(self, *calls: Call) -> None:
        with self._changed:
            calls = (*self._aside, *calls)
            self._in_hand, self._aside = None, []
            self._waiting.extendleft(reversed(calls))
            self._values += sum(map(_size, calls))

    def _try(self, call: Call) -> BaseException | None:
        name, args, kwargs = call
        kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}  # it may change them
        self._called_at = began = time.monotonic()
        error: BaseException | None = None
        try:
            getattr(self.logger, name)(*args, **kwargs)
        except BaseException as raised:
            if threading.current_thread() is not self._thread and not isinstance(raised, Exception):
                self._put_back(call)
                raise  # the user's Ctrl-C
            error = raised
        took = time.monotonic() - began
        with self._changed:
            self._called_at = 0.0
            self._calls += 1
            self._pace = took if not self._pace else 0.5 * (self._pace + took)
            if error is None:
                self._attempts = 0
                self._in_hand = None
                self.delivered += name != "save"
                self._unsaved += name != "save"
        return error

    def _passes_over(self, call: Call, error: BaseException) -> bool:
        """Whether the logger takes one of the calls behind one that it has refused several times; those before it are then dropped."""
        self._aside = [call]
        most = 0 if self._attempts < TRIES - 1 else 1 if is_outage(error) else LOOK_AHEAD
        while len(self._aside) <= most and (following := self._take()) is not None:
            if self._try(following) is None:
                break
            self._aside.append(following)
        else:
            self._put_back()
            return False
        self.note(error)
        while self._aside:
            again = self._try(self._aside[0])  # or did the logger just come back?
            if is_outage(again):
                self._put_back()
                return False
            self._aside.pop(0)
            self.refused += again is not None
        return True

    def _failed(self, error: BaseException) -> bool:
        with self._changed:
            self._in_hand = None
            self._attempts += 1
            self._next_try = time.monotonic() + self._delay()
            self._changed.notify_all()
        if self._moves and "thread" in str(error).lower() and not is_outage(error):
            self._moves, self._here, self._next_try = False, True, 0.0  # it is bound to the thread in which it was made
        else:
            self.note(error)
        return False

    def _delay(self) -> float:
        first = LAST_DELAY if self._closing else FIRST_DELAY
        return min(LONGEST_DELAY, first * 2.0 ** min(self._attempts - 1, 16))

    # ---- what is told ---------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"the logger {type(self.logger).__name__}"

    def note(self, error: BaseException) -> None:
        """Remember an error of the logger, and warn of the first."""
        self._error = error
        if not self._told:
            self._told = True
            self._warn(
                f"{self._name} raised {describe(error)}\nTraining goes on. What is logged is kept, and given to it again until it "
                "takes it; this is not repeated. What it has not taken in the end is counted then."
            )

    def _tell_losses(self) -> None:
        left = len(self._waiting) + len(self._aside) + (self._in_hand is not None and self._in_hand not in self._aside)
        lost = left + self.dropped + self.refused
        if not lost and not self.hangs:
            if self._unsaved:
                self._warn(f"{self._name} could not save the last rows that it was given: {_line(self._error)}")
            return
        reasons = [f"{left} could not be delivered"] if left else []
        reasons += [f"{self.refused} it refused while it took others"] if self.refused else []
        reasons += [f"{self.dropped} were dropped, since more than {MOST_VALUES} values were waiting"] if self.dropped else []
        message = f"{self._name} did not get {lost} of {lost + self.delivered} rows: {', '.join(reasons)}." if lost else ""
        if self.hangs:
            message += f" It is in a call that did not return within {HANG:g} s{self._place()}, and is left there."
        elif self._error is not None:
            message += f" Its last error: {_line(self._error)}"
        self._warn(message.strip())

    def _place(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0) if self._thread is not None else None
        if frame is None:
            return ""
        last = traceback.extract_stack(frame)[-1]
        return f" ({last.filename}:{last.lineno} in {last.name})"

    def _warn(self, message: str) -> None:
        message = message[:1].upper() + message[1:]
        try:
            warnings.warn(message, stacklevel=2)
        except Warning as warning:
            self._warning = self._warning or warning


class Delivery:
    """The outboxes of a run's loggers.

    Between runs, and in processes that were forked in the middle of one, loggers are called directly.
    """

    def __init__(self) -> None:
        self._boxes: dict[int, Outbox] = {}
        self._finalized: set[int] = set()
        self._owner = 0  # the process of the run; 0 between runs

    def __reduce__(self) -> Any:
        return Delivery, ()  # threads stay with the original

    def open(self) -> None:
        """A run begins."""
        if self._owner == os.getpid():
            self._close_all(self._boxes.values())  # of a run that did not come to its end
        self._boxes, self._owner = {}, os.getpid()
        self._finalized.clear()

    def send(self, loggers: Iterable[Any], values: dict[str, Any], step: int) -> None:
        """Give a row to each logger."""
        for logger in loggers:
            if self._owner == os.getpid():
                self._box(logger).put(("log_metrics", (), {"metrics": dict(values), "step": step}))
            else:
                logger.log_metrics(metrics=dict(values), step=step)
                logger.save()

    def begin(self, logger: Any, method: str | None = None, *args: Any) -> None:
        """Call a method of a logger before training starts, or make its experiment; if its server can't be reached, do so later.

        Raises:
            Exception: any other, since a mistake is to be seen before training takes its time.
        """
        try:
            if method is None:
                getattr(logger, "experiment", None)
            else:
                getattr(logger, method)(*args)
        except Exception as error:
            if self._owner != os.getpid() or not is_outage(error):
                raise
            box = self._box(logger)
            box.note(error)
            if method is not None:
                box.put((method, args, {}))

    def tell(self, logger: Any, method: str, *args: Any) -> None:
        """Have a method of a logger called once, after the rows that were sent before; its error is a warning. From any thread."""
        trains = threading.current_thread() is threading.main_thread()
        if self._owner == os.getpid():
            box = self._box(logger)
            (box.put if trains else box.add)((method, args, {}))
        elif trains:  # else it is a save of a run that has failed, and whose loggers are closed
            getattr(logger, method)(*args)

    def settle(self) -> None:
        """Wait for those that answer promptly."""
        for box in self._mine():
            box.settle()

    def flush(self, seconds: float) -> bool:
        """Wait until all have everything, and tell whether that is so; see :meth:`Outbox.flush`."""
        done = [box.flush(seconds) for box in self._mine()]
        return all(done)

    def close(self) -> None:
        """Deliver everything that can be delivered; the run ends."""
        try:
            self._close_all(self._mine())
        except Exception:
            self._owner = 0
            raise
        self._owner = 0

    def abandon(self) -> None:
        """Wait no longer: the user has interrupted :meth:`close`."""
        boxes, self._owner = self._mine(), 0
        for box in boxes:
            box.abandon()

    def finalize(self, logger: Any, status: str) -> None:
        """Finalize a logger, once in a run."""
        if id(logger) in self._finalized:
            return
        self._finalized.add(id(logger))
        box = self._boxes.get(id(logger))
        if box is None or not box.hangs:
            logger.finalize(status)
            return
        # It may hold a lock for ever: whoever waits for it must be somebody else.
        thread = threading.Thread(target=copy_context().run, args=(_quietly, logger.finalize, status), name="logger-finalize", daemon=True)
        thread.start()
        thread.join(ORDER)

    def _mine(self) -> Sequence[Outbox]:
        return list(self._boxes.values()) if self._owner == os.getpid() else []

    def _box(self, logger: Any) -> Outbox:
        box = self._boxes.get(id(logger))
        if box is None:
            box = self._boxes[id(logger)] = Outbox(logger)
            _introduce(logger, box)
        return box

    def _close_all(self, boxes: Iterable[Outbox]) -> None:
        boxes = list(boxes)
        for box in boxes:
            box.begin_closing()
        problem: BaseException | None = None
        for box in boxes:
            try:
                box.close()
            except Warning as warning:
                problem = problem or warning
            finally:
                _introduce(box.logger, None)
        if problem is not None:
            raise problem


def _introduce(logger: Any, box: Outbox | None) -> None:
    """Loggers of ours let rows go first that were sent before a direct call."""
    from lightning.fabric.loggers.logger import FolderLogger

    if isinstance(logger, FolderLogger):
        logger._outbox = box


def is_outage(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that somebody can't be reached.

    Example::

        >>> is_outage(ConnectionRefusedError()), is_outage(TypeError())
        (True, False)
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if any(cls.__name__ in OUTAGES for cls in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: BaseException) -> str:
    """An error, where it was raised outside of this file, and what it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    text = _line(error)
    if frames:
        text += "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames[-4:])
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return text if cause is None else f"{text}\n  which came from {_line(cause)}"


def _line(error: BaseException | None) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip()


def _size(call: Call) -> int:
    return max(1, len(call[2].get("metrics", ())))


def _quietly(function: Any, *args: Any) -> None:
    try:
        function(*args)
    except Exception as error:
        warnings.warn(f"{function.__qualname__} raised {describe(error)}", stacklevel=2)
