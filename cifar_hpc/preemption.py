"""Being told to stop: the flag that signals set, and what to do once the state is on disk."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import FrameType

from cifar_hpc.slurm import parse_instant

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# What `scontrol show job` calls a job that holds its nodes. While a SIGCONT is on its way, which Slurm sends along with
# its warnings, the job is SIGNALING (seen with a checkpoint written in 20 ms); STOPPED until a SIGSTOP is taken back.
ALIVE = ("RUNNING", "SIGNALING", "STOPPED", "RESIZING")
# Slurm delivers --signal=USR2@S up to a minute early (sbatch(1)).
EARLY_SECONDS = 60


class Interrupted(Exception):  # noqa: N818 - not an error
    """What was under way was left because the run is to stop."""


class StopFlag:
    """Set by a signal, read between steps. The handlers do nothing else: whatever else they did could happen in the
    middle of anything."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._told: float | None = None

    @property
    def requested(self) -> bool:
        """Whether this process has been told to stop."""
        return self.signal is not None

    @property
    def seconds(self) -> float | None:
        """How long ago this process was told to stop; None if it was not."""
        return None if self._told is None else time.monotonic() - self._told

    def install(self, interactive: bool = False) -> StopFlag:
        """Take over SIGTERM, SIGUSR1 and SIGUSR2, and ignore SIGCONT, which Slurm sends along.

        Args:
            interactive: take over the first Ctrl-C as well; a second one interrupts as usual.
        """
        for number in (*STOP_SIGNALS, signal.SIGINT) if interactive else STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        return self

    def ignore(self) -> None:
        """Ignore these signals from here on: an interpreter that ends puts their default back, and would die of one."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def raise_flag(self) -> None:
        """As if SIGTERM had come: for one that came before `install`."""
        if self.signal is None:
            self.signal, self._told = signal.SIGTERM, time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The first one tells why; later ones, such as SIGTERM after our own requeue, do not change that.
        if self.signal is None:
            self.signal, self._told = signal.Signals(number), time.monotonic()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def told_before(fields: Mapping[str, str]) -> bool:
    """Whether Slurm has told this start of a job to end already, by what `scontrol show job` says."""
    return fields.get("JobState") not in ALIVE or _preempted(fields)


def _preempted(fields: Mapping[str, str]) -> bool:
    """Whether this start of the job is being preempted: a PreemptTime before StartTime is an earlier start's."""
    preempted, started = parse_instant(fields.get("PreemptTime")), parse_instant(fields.get("StartTime"))
    return preempted is not None and (started is None or preempted >= started)


@dataclass(frozen=True)
class Decision:
    """What rank 0 does after the checkpoint is on disk.

    action: "requeue" (ask Slurm for it), "leave" (exit; Slurm or a person has decided), or "hold" (stay until Slurm
        ends the process, since leaving by oneself would end the job for good).
    reason: preemption | timeout | cancelled | node or job ended | ... for logs and counts.
    """

    action: str
    reason: str
    explanation: str


def decide(
    received: signal.Signals | None,
    fields: Mapping[str, str] | None,
    *,
    now: datetime,
    own_restarts: int,
    warning_seconds: int,
    timeouts_left: int,
    may_requeue: bool,
) -> Decision:
    """The table of signals and job states.

    Args:
        received: the signal that stopped this rank; None where another rank was told.
        fields: `scontrol show job`, or None where scontrol does not answer.
        now: local time, as Slurm's own times are.
        own_restarts: SLURM_RESTART_COUNT of this attempt.
        timeouts_left: how many more timeouts may be requeued.
        may_requeue: resources.requeue.
    """
    if fields is None:
        return Decision("hold", "unknown", "scontrol does not answer, so requeueing is left to Slurm; waiting for it")
    state = fields.get("JobState", "")
    if state != "RUNNING" and int(fields.get("Restarts") or 0) > own_restarts:
        return Decision("leave", "preemption", f"JobState={state}: Slurm has requeued the job itself")
    if state not in ALIVE:
        # scontrol requeue would succeed here and bring back a job that somebody has cancelled.
        return Decision("leave", "ended", f"JobState={state}: cancelled, or its node is going; not requeueing")
    preempted = _preempted(fields)
    end = parse_instant(fields.get("EndTime"))
    near_end = end is not None and (end - now).total_seconds() <= warning_seconds + EARLY_SECONDS
    timeout = not preempted and near_end and received is not signal.SIGTERM
    reason = "timeout" if timeout else "preemption"
    if not may_requeue or fields.get("Requeue") == "0":
        return Decision("leave", reason, f"{reason}; the job may not be requeued (--no-requeue): submit again to go on")
    if timeout and timeouts_left <= 0:
        return Decision("leave", reason, "timeout; timeouts.max is used up: submit again to go on")
    return Decision("requeue", reason, f"JobState={state}: {reason}; requeueing")
