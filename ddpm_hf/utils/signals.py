"""Signals that ask to stop are recorded, so that a run can save its state and exit with the right status."""

import logging
import os
import signal
import time

# Ctrl-C, `kill`, a terminal that is closed, and the warning of Slurm's `--signal=USR1@60`; Windows lacks the last two
STOPPING = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
LAUNCHED = ("LOCAL_RANK", "ACCELERATE_DYNAMO_BACKEND")  # variables that torchrun's or Accelerate's launcher sets
REPEATS = 2.0  # seconds within which repeated signals count as one
log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """Raised to end work early after a signal. `status` is the exit status of the process."""

    def __init__(self, name: str):
        super().__init__(f"stopped by {name}")
        self.status = exit_status(name)


def exit_status(name: str) -> int:
    """128 + the number of the signal, as in shells: SIGINT 130, SIGTERM 143, SIGHUP 129, SIGUSR1 138."""
    return 128 + signal.Signals[name].value


class StopSignals:
    """A context that records the first of the signals `STOPPING`. A later one has its usual effect.

    Launchers forward signals that a cluster's scheduler also sends to each process, so immediate repeats count as one.
    SIGHUP and SIGUSR1 stay without effect if the process ignores them, as it does under `nohup`. The end of the
    launcher that started this process counts as SIGHUP: nobody else would stop it.

    Attributes:
        name: the signal received, or None.
        may_raise: whether `raise_if_stopped` raises. It must not while other processes wait for this one.
    """

    active: "StopSignals | None" = None  # one per process, as signals are

    def __init__(self):
        self.name, self.may_raise, self.usual = None, True, {}
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    def __enter__(self) -> "StopSignals":
        try:
            for number in STOPPING:
                always = number in (signal.SIGINT, signal.SIGTERM)  # scripts ignore SIGINT for what they start with &
                if always or signal.getsignal(number) != signal.SIG_IGN:
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
    """Whether this process was asked to stop, or its launcher has ended."""
    active = StopSignals.active
    if active is None:
        return False
    if active.name is None and active.launcher not in (None, os.getppid()):
        log.warning(f"the launcher (process {active.launcher}) has ended, and so does this process that it started")
        active.name = signal.Signals.SIGHUP.name
    return active.name is not None


def raise_if_stopped() -> None:
    """Raise `Stopped` if this process was asked to stop. Long work calls this every few seconds."""
    if stop_requested() and StopSignals.active.may_raise:
        raise Stopped(StopSignals.active.name)
