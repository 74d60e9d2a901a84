"""The time between two checkpoints, for `checkpoint.every: auto`: within an epoch, and at the ends of short epochs.

Only an end without warning loses work: SIGKILL, a lost node, a crash, a hang. A stop with a warning saves at its own
step and loses nothing, whatever the interval. The best interval therefore balances the cost of checkpoints against the
work since the last one that each end without warning loses:

    J. W. Young, A first order approximation to the optimum checkpoint interval, Comm. ACM 17(9), 1974, 530-531:
        sqrt(2 C M)
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation
    Computer Systems 22(3), 2006, 303-312:
        sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C,  and M itself where C >= 2M

C is the cost of a checkpoint, M the mean time between losses. Daly's form is used: it stays right where M comes near C
(Young's is then far too long), and elsewhere the two are the same. The cost of a restart does not depend on the
interval, nor does the work done while the last checkpoint was being written: neither changes the optimum.

The time of a checkpoint never changes the bits of a run.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from cifar_hpc.runs.history import Losses
from cifar_hpc.text import counted, duration

# Before the first measurement a checkpoint is assumed to cost a second. This prior fades measurement by measurement,
# since the first one may be far off on a shared machine.
PRIOR_COST_SECONDS = 1.0
# Prior of the losses: one a day, with the weight of an hour of observation, so that a few losses outweigh it.
PRIOR_MEAN_SECONDS = 86_400.0
PRIOR_WEIGHT_SECONDS = 3_600.0
# Bounds of the interval. File systems are shared: writing may take a tenth of the time at most.
LEAST_SECONDS = 10.0
MOST_SECONDS = 30 * 60.0
WRITES_APART = 10.0
# Measurements kept: the last steps and checkpoints, without the first steps of an attempt, which warm up.
STEPS_KEPT = 64
CHECKPOINTS_KEPT = 8
WARM_UP_STEPS = 3
# The log gets another line when the interval has changed by this factor.
NOTICEABLE = 1.5


def mean_time_to_loss(seen: Losses) -> float:
    """M in seconds: (PRIOR_WEIGHT + time) / (PRIOR_WEIGHT / PRIOR_MEAN + losses), the posterior mean under
    a Gamma prior on the rate; at most PRIOR_MEAN, since a longer one would save next to nothing."""
    mean = (PRIOR_WEIGHT_SECONDS + seen.seconds) / (PRIOR_WEIGHT_SECONDS / PRIOR_MEAN_SECONDS + seen.count)
    return min(mean, PRIOR_MEAN_SECONDS)


def daly(cost: float, mean: float) -> float:
    """Return Daly's optimum in seconds of training between two checkpoints, without the cost of a checkpoint."""
    if cost >= 2 * mean:
        return mean
    ratio = cost / (2 * mean)
    return math.sqrt(2 * cost * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


@dataclass(frozen=True)
class Costs:
    """Measured costs of a checkpoint, in seconds.

    stall: training time lost to each: the snapshot, and the slow-down while it is written in the background.
    write: from the snapshot to the durable file.
    """

    stall: float = PRIOR_COST_SECONDS
    write: float = 0.0


def best_interval(costs: Costs, mean: float) -> float:
    """Return the seconds from one checkpoint to the next: Daly's optimum, within the bounds above."""
    interval = min(daly(costs.stall, mean) + costs.stall, MOST_SECONDS)
    return max(interval, LEAST_SECONDS, WRITES_APART * costs.write)


class CheckpointPacer:
    """Chooses the checkpoint interval on rank 0, from the cost of checkpoints measured during training.

    Args:
        past: losses in the run's earlier attempts.
        say: called with a line for the log when the interval is chosen, and when it changes noticeably.
        now: monotonic seconds, as in all its methods.
    """

    def __init__(self, past: Losses, say: Callable[[str], None], now: float) -> None:
        self.past, self.say = past, say
        self._began = now
        self._steps: deque[float] = deque(maxlen=STEPS_KEPT)  # seconds of steps during which nothing was written
        self._to_skip = WARM_UP_STEPS
        self._stalls = deque([PRIOR_COST_SECONDS], CHECKPOINTS_KEPT)  # the prior counts as one measurement
        self._writes: deque[float] = deque(maxlen=CHECKPOINTS_KEPT)
        self._write_began: float | None = None
        self._snapshots = self._slower = 0.0  # seconds since then: of snapshots, and of slower steps
        self._written = 0  # checkpoints begun since then
        self._said: float | None = None

    @property
    def costs(self) -> Costs:
        """Means over the last checkpoints."""
        return Costs(fmean(self._stalls), fmean(self._writes)) if self._writes else Costs()

    def saved(self, snapshot: float, now: float) -> None:
        """Record a snapshot of `snapshot` seconds that ended at `now`, and whose checkpoint is now being written."""
        if self._write_began is None:
            self._write_began, self._snapshots, self._slower, self._written = now - snapshot, 0.0, 0.0, 0
        self._snapshots += snapshot
        self._written += 1

    def step(self, seconds: float, writing: bool, now: float) -> None:
        """Record a step of `seconds`. `writing` is true if a checkpoint is still being written at its end."""
        if self._to_skip:
            self._to_skip -= 1
        elif self._write_began is None:
            self._steps.append(seconds)
        elif self._steps:
            self._slower += seconds - fmean(self._steps)
        if self._write_began is not None and not writing:
            # A slow-down below zero is noise. Taking it as zero errs towards rarer checkpoints, which costs little.
            if now - self._write_began < MOST_SECONDS:  # else the job was suspended meanwhile
                self._stalls.append((self._snapshots + max(0.0, self._slower)) / self._written)
                self._writes.append(now - self._write_began)
            self._write_began = None

    def epoch_interval(self, now: float) -> float:
        """Return the seconds from an epoch's end that saves to the next one that does.

        As `interval`, but by measured costs alone: the first epoch's checkpoint has been measured, or still is.
        """
        measured = list(self._stalls)[-len(self._writes) :] if self._writes else [0.0]
        under_way = 0.0 if self._write_began is None else now - self._write_began
        return best_interval(
            Costs(fmean(measured), max(self.costs.write, under_way)), mean_time_to_loss(self._seen(now))
        )

    def _seen(self, now: float) -> Losses:
        return Losses(self.past.count, self.past.seconds + now - self._began)

    def interval(self, now: float) -> float:
        """Return the seconds from one checkpoint to the next, and log them where they are new."""
        seen = self._seen(now)
        interval = best_interval(self.costs, mean_time_to_loss(seen))
        if self._said is None or not 1 / NOTICEABLE < interval / self._said < NOTICEABLE:
            self._said = interval
            self.say(self._line(interval, seen))
        return interval

    def _line(self, interval: float, seen: Losses) -> str:
        cost = f"one costs {'' if self._writes else '~'}{self.costs.stall:.2g} s"
        lost = f"work was lost {counted(seen.count, 'time')}" if seen.count else "no work was lost"
        return f"checkpoints every {duration(interval)}: {cost}, {lost}"
