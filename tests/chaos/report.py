"""The table at the end of a campaign, as plain text and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.chaos.places import PLACES
from tests.chaos.play import Played
from tests.chaos.show import Struck

OUTCOMES = (
    "struck",
    "stopped",
    "died",
    "went on",
    "refused",
    "failed",
    "not reached",
    "HANGS",
)  # struck: on a cluster, which says no more


def table(played: list[Played]) -> str:
    """Faults by kind and place, with how often each outcome was seen."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for run in played:
        counts.update((_phase(struck), struck.kind, struck.outcome) for struck in run.struck)
    outcomes = [o for o in OUTCOMES if any(outcome == o for _, _, outcome in counts)]
    rows = sorted({(phase, kind) for phase, kind, _ in counts})
    lines = [f"{'place':<24}{'fault':<24}{'count':>7}" + "".join(f"{o:>13}" for o in outcomes)]
    lines.append("-" * len(lines[0]))
    before = ""
    for phase, kind in rows:
        cells = [counts[phase, kind, outcome] for outcome in outcomes]
        lines.append(
            f"{phase if phase != before else '':<24}{kind:<24}{sum(cells):>7}"
            + "".join(f"{cell or '':>13}" for cell in cells)
        )
        before = phase
    return "\n".join(lines)


def totals(played: list[Played], seconds: float) -> dict[str, Any]:
    """The campaign in figures."""
    struck = [s for run in played for s in run.struck]
    hit = [s for s in struck if s.outcome != "not reached"]
    reached = {s.place.removesuffix(" while stopping") for s in hit}
    return {
        "runs": len(played),
        "starts": sum(run.starts for run in played),
        "faults": len(hit),
        "faults_not_reached": len(struck) - len(hit),
        "places_reached": len(reached & PLACES.keys()),
        "places": len(PLACES),
        "places_never_reached": sorted(PLACES.keys() - reached),
        "failed_runs": sum(bool(run.problems) for run in played),
        "slowest_survivors_seconds": round(max((s.survivors_seconds for s in hit), default=0.0), 1),
        "seconds": round(seconds, 1),
        "by_place": dict(sorted(Counter(s.place for s in hit).items())),
        "by_kind": dict(sorted(Counter(s.kind for s in hit).items())),
        "by_outcome": dict(sorted(Counter(s.outcome for s in hit).items())),
    }


def _phase(struck: Struck) -> str:
    place = PLACES.get(struck.place)
    if place is not None:
        return place.phase
    return "while stopping" if struck.place.endswith("while stopping") else struck.place
