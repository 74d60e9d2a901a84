"""Whether a run that failed is started again, as a pure function of what events.jsonl tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar_hpc.runlog import count_requeues

# The time before another try: Slurm's own after a requeue, doubled with each failure, but no longer than an hour.
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 120, 3600


@dataclass(frozen=True)
class Retry:
    """Whether a failed run is started again, after how many seconds, and the words for the log."""

    again: bool
    delay_seconds: int
    explanation: str


def decide_retry(
    events: Sequence[Mapping[str, Any]], step: int, limit: int, may_requeue: bool, again: bool = True
) -> Retry:
    """Another try, only where it may help and only while the run gets further from one failure to the next.

    Args:
        events: of this run since it was last submitted, without this failure.
        step: how far the run was.
        limit: failures.max.
        may_requeue: resources.requeue, and a scheduler that can.
        again: whether this failure may pass by itself.
    """
    used = count_requeues(events).get("failure", 0)
    earlier = [int(e.get("step") or 0) for e in events if e.get("event") in ("failed", "hang")]
    if not again:
        return Retry(False, 0, "not requeued: the same would happen again")
    if not may_requeue:
        return Retry(False, 0, "not requeued; submit the same again to go on from the newest checkpoint")
    if earlier and step <= earlier[-1]:
        return Retry(
            False,
            0,
            f"not requeued: the run failed at step {earlier[-1]} before and got no further this time "
            f"(step {step}). HINT: mend the cause and submit again",
        )
    if used >= limit:
        return Retry(False, 0, f"not requeued: failures.max ({limit}) is used up; submit again to go on")
    delay = min(FIRST_DELAY_SECONDS << used, LONGEST_DELAY_SECONDS)
    return Retry(True, delay, f"requeueing after failure {used + 1} of at most {limit}")
