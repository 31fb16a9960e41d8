"""SIGTERM and Ctrl-C: noted, so that a run can save what it has and end with the status that tells of it."""

import os
import signal
import time

REPEATS = 2.0  # seconds within which a signal is taken for the same


class Stopped(KeyboardInterrupt):
    """Raised where work may be left undone when a stop was asked for. `status` is the process's exit status."""

    def __init__(self, name: str):
        super().__init__(f"stopped by {name}")
        self.status = exit_status(name)


def exit_status(name: str) -> int:
    """128 + the number of the signal, as shells have it: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signal.Signals[name].value


class StopSignals:
    """While it is entered, notes SIGTERM and SIGINT instead of dying of them. A later one has its usual effect.

    Launchers pass a signal on that the scheduler has sent to every process anyway, so repeats at once count as one.

    Attributes:
        name: of the signal that came, or None.
        may_raise: whether `raise_if_stopped` raises. It must not where the other processes wait for this one.
    """

    active: "StopSignals | None" = None  # signals belong to the process, and so does this

    def __init__(self):
        self.name, self.may_raise, self.usual = None, True, {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.usual[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread, where signals do not arrive either
            self.usual = {}
        self.before, StopSignals.active = StopSignals.active, self
        return self

    def __exit__(self, *_) -> None:
        StopSignals.active = self.before
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self.noted = signal.Signals(number).name, now
        elif now - self.noted > REPEATS:
            signal.signal(number, self.usual[number])
            os.kill(os.getpid(), number)


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return StopSignals.active is not None and StopSignals.active.name is not None


def raise_if_stopped() -> None:
    """Raise `Stopped` if this process was asked to stop: called between the parts of anything that takes seconds."""
    if stop_requested() and StopSignals.active.may_raise:
        raise Stopped(StopSignals.active.name)
