"""SIGTERM and Ctrl-C are recorded, so that a run can save its state and exit with the right status."""

import os
import signal
import time

REPEATS = 2.0  # seconds within which repeated signals count as one


class Stopped(KeyboardInterrupt):
    """Raised to end work early after a signal. `status` is the exit status of the process."""

    def __init__(self, name: str):
        super().__init__(f"stopped by {name}")
        self.status = exit_status(name)


def exit_status(name: str) -> int:
    """128 + the number of the signal, as in shells: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signal.Signals[name].value


class StopSignals:
    """A context that records the first SIGTERM or SIGINT. A later one has its usual effect.

    Launchers forward signals that a cluster's scheduler also sends to each process, so immediate repeats count as one.

    Attributes:
        name: the signal received, or None.
        may_raise: whether `raise_if_stopped` raises. It must not while other processes wait for this one.
    """

    active: "StopSignals | None" = None  # one per process, as signals are

    def __init__(self):
        self.name, self.may_raise, self.usual = None, True, {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.usual[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread, which alone receives signals
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
    """Raise `Stopped` if this process was asked to stop. Long work calls this every few seconds."""
    if stop_requested() and StopSignals.active.may_raise:
        raise Stopped(StopSignals.active.name)
