"""
Signals that ask a process to stop: Ctrl-C, a scheduler, a terminal that is closed.

By default most of them end a process on the spot, and what it was writing stays behind half-made.
Here they become exceptions, so that everything is cleaned up. A training loop goes further: it
finishes the step at hand and saves it before it stops.
"""
import contextlib
import os
import signal
import sys
import threading
import time

from data.files import Stopped

SAME_REQUEST_SECONDS = 1
# Slurm sends SIGUSR1 some time before a job's end, if it is told to, and SIGTERM at the end.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def raise_stopped(signal_number, frame=None):
    """The handler that stops at once, with KeyboardInterrupt for Ctrl-C and Stopped otherwise."""
    if signal_number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(signal_number)


@contextlib.contextmanager
def handled_by(handler):
    """Lets handler(signal_number, frame) answer the signals of STOPPING within a with statement."""
    earlier = {}
    try:
        # Python handles signals in the main thread only, and refuses other threads.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                # What is ignored stays ignored: nohup does that with SIGHUP.
                if signal.getsignal(number) != signal.SIG_IGN:
                    earlier[number] = signal.signal(number, handler)
        yield
    finally:
        for number, its_handler in earlier.items():
            signal.signal(number, its_handler)


def become_exceptions():
    """A context in which the signals raise KeyboardInterrupt or Stopped."""
    return handled_by(raise_stopped)


class Noted:
    """
    A context in which a first signal is only noted.

        with Noted() as stop:
            while not stop.is_asked:
                ...

    A signal more than SAME_REQUEST_SECONDS after the first raises KeyboardInterrupt or Stopped.
    Before, it is the same request: a scheduler signals a process and its parent, which passes the
    signal on. The announcement, if there is one, is printed at the first.
    """

    def __init__(self, announcement=""):
        self.announcement = announcement

    def __enter__(self):
        self.received = None
        self.received_at = 0
        self.context = handled_by(self.note)
        self.context.__enter__()
        return self

    def __exit__(self, *exception):
        return self.context.__exit__(*exception)

    @property
    def is_asked(self):
        return self.received is not None

    def note(self, signal_number, frame=None):
        if self.received is not None:
            if time.monotonic() - self.received_at > SAME_REQUEST_SECONDS:
                raise_stopped(signal_number)
            return
        self.received = signal_number
        self.received_at = time.monotonic()
        if not self.announcement or sys.stderr is None:
            return
        name = signal.Signals(signal_number).name
        # The signal may have come in the middle of a print, which cannot be entered twice. Where
        # the terminal has been closed, nobody reads this.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: {self.announcement}\n".encode())

    def raise_if_asked(self):
        if self.is_asked:
            raise_stopped(self.received)


class BetweenSteps(Noted):
    """
    A context of a training loop, which finishes its step and saves it before it stops.

        with BetweenSteps() as stop:
            for step in range(steps):
                ...
                if stop.is_asked:
                    ... save ...
                stop.raise_if_asked()

    is_announced    whether it says that it will stop; of several processes only one should
    is_alone        whether this process decides by itself. Of several, one may have the signal a
                    moment before the others, and all have to stop after the same step: they are
                    asked once all of them have called agree_on()
    """

    def __init__(self, is_announced=True, is_alone=True):
        words = ("stopping after this step and a checkpoint; a signal more than "
                 f"{SAME_REQUEST_SECONDS} s from now stops at once")
        super().__init__(words if is_announced else "")
        self.is_agreed = is_alone

    @property
    def is_asked(self):
        return self.is_agreed and self.received is not None

    def agree_on(self, signal_number):
        """Ask this process to stop for a signal that it or another one has received."""
        if self.received is None:
            self.note(signal_number)
        self.received = signal_number
        self.is_agreed = True
