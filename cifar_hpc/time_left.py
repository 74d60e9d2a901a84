"""How long a run will still take, from what its epochs have taken so far."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from datetime import datetime

from cifar_hpc.errors import UserError
from cifar_hpc.freeze import read_frozen
from cifar_hpc.image_sizes import epochs_left, training_size
from cifar_hpc.jsonfile import open_regular
from cifar_hpc.log_lines import Progress
from cifar_hpc.paths import RunPaths
from cifar_hpc.run_facts import Facts
from cifar_hpc.spec import Spec

# An hour without a restart is believed before anything has been seen.
PRIOR_UP_SECONDS = 3600.0
_RESIZED = re.compile(rb"^resizing:\n  initial: [0-9]", re.MULTILINE)
HEAD_BYTES = 64 * 1024


def seconds_left(
    paths: RunPaths,
    epoch: int,
    epochs: int,
    facts: Facts,
    progress: Progress | None,
    start: datetime | None,
    now: datetime,
) -> float | None:
    """Seconds until the run's end:

        wait + epochs left x seconds an epoch x (1 + lost / (up + PRIOR_UP_SECONDS))

    wait: until the job is expected to start, where it is queued and Slurm has said so.
    epochs left: with the part of the one under way that is still to be done.
    seconds an epoch: the median of the last few (`Facts.epoch_seconds`), evaluation included; where the images grow, of
        the last one, for as many pixels; before the first has been measured, what the log's own line of progress says.
    lost, up: seconds that restarts have cost so far, and that the run was up (`Facts`): it is taken to be preempted
        from here as often as up to here, and each time at the same cost.
    """
    seconds = [float(s) for s in facts.epoch_seconds]
    if seconds:
        done, resized = progress.epochs_done if progress else float(epoch), _resized(paths)
        if resized is None:
            work = max(0.0, epochs - done) * statistics.median(seconds)
        else:
            growth = training_size(resized, epoch) / training_size(resized, epoch - 1)
            work = epochs_left(resized, done) * seconds[-1] * growth**2
    elif progress is not None:
        work = progress.eta_seconds
    else:
        return None
    wait = max(0.0, (start - now).total_seconds()) if start is not None else 0.0
    return wait + work * (1 + facts.lost_seconds / (facts.up_seconds + PRIOR_UP_SECONDS))


def _resized(paths: RunPaths) -> Spec | None:
    """The spec where images grow during the run; it is parsed only then."""
    with contextlib.suppress(UserError, OSError):
        with os.fdopen(open_regular(paths.spec), "rb") as file:
            resized = _RESIZED.search(file.read(HEAD_BYTES)) is not None
        spec = read_frozen(paths) if resized else None
        return spec if spec is not None and spec.resizing.on else None
    return None
