"""Signals and launchers that go: a run told to stop ends after its step, with a checkpoint, and says so by its exit
code."""

import os
import signal
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import distributed

from ldm.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAUNCHED = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"))
"""Whether torchrun or `accelerate launch` started this process; either leaves its mark in the environment."""
PARENT = os.getppid()  # read when this is imported, as a launcher may end before the run begins


class Interruption:
    """Notes the signals from now on; a second one of a kind acts at once, as without this.

    A launcher that is gone counts as SIGTERM: `accelerate launch` of one process does not pass the signal on.
    """

    def __init__(self, accelerator: Accelerator, timeout_seconds: float):
        """`timeout_seconds`: how long a process waits for the others in `requested`."""
        self.accelerator, self.received = accelerator, 0
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self.group = None
        if accelerator.num_processes > 1:  # over CPUs: asking must not make a device wait
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def _note(self, number: int, _frame: object) -> None:
        self.received = number
        signal.signal(number, self.before[number])

    def requested(self) -> int:
        """The number of the signal that any process has received, or 0: the same answer on every process.

        Raises:
            RuntimeError: another process has ended, or not come here in time.
        """
        if not self.received and LAUNCHED and os.getppid() != PARENT:
            self.received = int(signal.SIGTERM)
        if self.group is None:
            return self.received
        received = torch.tensor(self.received)
        distributed.all_reduce(received, distributed.ReduceOp.MAX, group=self.group)
        return int(received)

    def stop(self, number: int, step: int) -> None:
        """Ends the run, whose checkpoint of `step` is written. Raises Stopped."""
        self.accelerator.wait_for_everyone()
        raise Stopped(f"{signal.Signals(number).name} after step {step}, which is saved; go on with --resume", number)

    def close(self) -> None:
        """The signals do again what they did before."""
        for number, action in self.before.items():
            signal.signal(number, action)
