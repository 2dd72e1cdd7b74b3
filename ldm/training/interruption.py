"""SIGTERM and SIGINT: a run told to stop ends after its step, with a checkpoint, and says so by its exit code."""

import signal

import torch
from accelerate import Accelerator

from ldm.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Notes the signals from now on; a second one of a kind acts at once, as without this."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received = accelerator, 0
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _frame: object) -> None:
        self.received = number
        signal.signal(number, self.before[number])

    def requested(self) -> int:
        """The number of the signal that any process has received, or 0: the same answer on every process."""
        if self.accelerator.num_processes == 1:
            return self.received
        received = torch.tensor([self.received], device=self.accelerator.device)
        return int(self.accelerator.gather(received).max())

    def stop(self, number: int, step: int) -> None:
        """Ends the run, whose checkpoint of `step` is written. Raises Stopped."""
        self.accelerator.wait_for_everyone()
        raise Stopped(f"{signal.Signals(number).name} after step {step}, which is saved; go on with --resume", number)

    def close(self) -> None:
        """The signals do again what they did before."""
        for number, action in self.before.items():
            signal.signal(number, action)
