"""The table at any width: what is shown, what goes first, and that lines never wrap."""

from __future__ import annotations

import dataclasses
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cifar_hpc.cli import terminal
from cifar_hpc.cli.status import COLUMNS, URGENCY, by_urgency, cells, reasons, summary, table
from cifar_hpc.runs.state import AT_WORK, ENDED, UNKNOWN, WAITING, RunState

RUN = RunState("improved_resnet-1a2b3c4d", "running", "on node1", 12, 400, 81.5, 82.25, 9000.5, 18000.0, 3)
WIDTHS = (20, 40, 60, 80, 100, 120, 160, 300)


def status_lines(states: list[RunState], width: int | None = None) -> list[str]:
    return table(states, width)[0]


def run(**changed: Any) -> RunState:
    return dataclasses.replace(RUN, **changed)


RUNS = [
    run(restart_causes={"preemption": 2, "submitted": 1}, world_size=4, job_id="1234", log_age_seconds=7.0),
    run(run="x" * 90 + "-lr0.05", state="failed", detail="NaN at step 3. HINT: lower " + "y" * 300, eta_seconds=None),
    run(run="a", state="queued", reason="Priority", detail="Priority: other jobs go first, starts in ~7d00h",
        start_time=f"{datetime.now(UTC) + timedelta(days=7, minutes=30):%Y-%m-%dT%H:%M:%SZ}", restarts=0, epoch=0,
        test_accuracy=None, best_accuracy=None, images_per_second=None, eta_seconds=None),
    run(run="b", state="requeued", detail="until 12:00:00, preempted"),
    run(run="c", state="hung", detail="日本語" * 40, epoch_progress=0.999),
]  # fmt: skip


def header(width: int | None) -> list[str]:
    return status_lines(RUNS, width)[0].replace("LOG AGE", "LOG_AGE").split()


def test_everything_is_there_in_full_where_nothing_limits_it() -> None:
    lines = status_lines(RUNS)
    assert lines[0].split() == "RUN STATE EPOCH ACC BEST IMG/S ETA RESTARTS RANKS LOG AGE JOB DETAIL".split()
    assert RUNS[1].run in lines[2] and lines[2].endswith("y" * 300) and "HINT" in lines[2] and "…" not in "".join(lines)
    row = (
        "improved_resnet-1a2b3c4d running 12/400 81.50 82.25 9,000 5h00m 3 (2 preemption, 1 submitted again) 4 7s 1234"
    )
    assert lines[1].split() == f"{row} on node1".split()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    for line in status_lines(RUNS, width):
        wide = sum(character in "日本語" for character in line)
        assert len(line) + wide <= max(width, 40)


def test_the_most_important_columns_stay() -> None:
    assert header(80)[:4] == ["RUN", "STATE", "EPOCH", "ACC"] and header(80)[-1] == "DETAIL"
    brief = status_lines([dataclasses.replace(state, detail=state.detail[:20]) for state in RUNS], 160)[0]
    assert brief.replace("LOG AGE", "LOG_AGE").split() == [column.replace(" ", "_") for column in COLUMNS]
    kept = [set(header(width)) for width in WIDTHS[1:]]
    assert all(narrow <= wide for narrow, wide in itertools.pairwise(kept))


def test_what_has_lost_its_column_stands_in_detail() -> None:
    lines = status_lines(RUNS, 80)
    assert lines[1].endswith("5h00m  3 restarts, on node1")
    narrow = status_lines(RUNS, 62)
    assert narrow[1].endswith("12/400  ETA 5h00m, 3") and narrow[2].split() == ["restarts,", "on", "node1"]
    assert lines[2].endswith("NaN at step 3.")  # without its hint
    assert lines[3].endswith("Priority, in ~7d00h")  # the explanation goes before the time does
    assert status_lines(RUNS[2:3], 160)[1].endswith("starts in ~7d00h")


# At 80 columns each of these was cut, and with it what a user needs.
LONG = {
    "running": ("on node[001-004,017]: starting on this machine", None),
    "requeued": ("until 12:00:00, requeued by Slurm or a person", None),
    "stopped": ("killed? it ended without a word; submit again to go on", None),
    "hung": ("no log line for 12m, on node1", None),
    "queued": (
        "Dependency: job 12, of the same name in /scratch/me/a/long/way/to/the/project, must end first",
        "Dependency",
    ),
    "unreadable": ("its files make no sense (SpecError: /scratch/me/a/long/way/to/the/project/logs/a/spec.yaml)", None),
}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("state", LONG)
def test_no_word_of_a_detail_is_lost(state: str, width: int) -> None:
    detail, reason = LONG[state]
    states = [run(state=state, detail=detail, reason=reason), *RUNS[:2]]
    lines, cut = table(states, width)
    place = lines[0].index("DETAIL")
    ends = [i for i in range(2, len(lines)) if lines[i][:place].strip()]  # where the next run begins
    shown = " ".join(line[place:].strip() for line in lines[1 : ends[0]])
    below = " ".join(" ".join(reasons(cut, width)).split())
    assert detail in shown or f"{states[0].run}: {detail}" in below
    assert max(map(len, [*lines, *reasons(cut, width)])) <= width
    assert detail in shown or width < 120 or state == "unreadable"


def test_the_whole_reason_of_a_failure_stands_below_the_table() -> None:
    failed = run(
        run="a", state="failed", detail="no GPU. HINT: look at nvidia-smi " + "there " * 20, log_age_seconds=5.0
    )
    below = reasons(table([failed], 80)[1], 80)
    assert " ".join(" ".join(below).split()) == f"a: {failed.detail.strip()}" and max(map(len, below)) <= 80
    assert table([failed])[1] == []  # it is in the table
    assert reasons(table([dataclasses.replace(failed, log_age_seconds=1e6)], 80)[1], 80) == []
    assert len(reasons(table([failed] * 20, 80)[1], 300)) == 5
    cut = table([run(state="stopped", detail="why " * 30)] * 9 + [failed], 80)[1]
    assert reasons(cut, 300)[0].startswith("a: no GPU")  # failures come first


def test_old_failures_sink() -> None:
    states = [run(run=name, state="failed", log_age_seconds=age) for name, age in (("old", 1e6), ("new", 60.0))]
    assert [s.run for s in by_urgency([*states, run(run="done", state="finished")])] == ["new", "done", "old"]


def test_the_points_of_a_sweep_are_told_apart() -> None:
    points = [
        run(run=f"s-{number}", sweep="s", changed={"train.epochs": 9, **changed})
        for number, changed in enumerate([{"model.dropout": 0.5}, {"model.dropout": 0.1}, {}])
    ]
    assert by_urgency([*points, run(run="t")]) == [*points, run(run="t")]
    lines = status_lines(points, 120)
    assert lines[0].split()[:2] == ["RUN", "CHANGED"]
    assert ["dropout 0.5" in lines[1], "dropout 0.1" in lines[2], "dropout 0.2" in lines[3]] == [True] * 3
    assert "CHANGED" not in status_lines([RUN])[0]


def test_points_that_differ_in_long_keys_are_told_apart_on_any_terminal() -> None:
    values = [(lr, dropout, decay) for lr in (0.05, 0.1) for dropout in (0.1, 0.3) for decay in (0.0001, 0.0005)]
    points = [
        run(
            run=f"grid-{number:08x}",
            sweep="grid",
            changed={"optimizer.lr": lr, "model.dropout": dropout, "optimizer.weight_decay": decay},
            state="stopped",
            detail="killed? it ended without a word; submit again to go on",
        )
        for number, (lr, dropout, decay) in enumerate(values)
    ]
    for width in (80, 120):
        lines = status_lines(points, width)
        assert "dropout, lr, weight_decay" in lines[0] and max(map(len, lines)) <= width
        first, last = (next(line for line in lines if line.startswith(point.run)) for point in (points[0], points[7]))
        assert "0.1, 0.05, 0.0001" in first and "0.3, 0.1, 0.0005" in last
    assert "dropout 0.1, lr 0.05, weight_decay 0.0001" in status_lines(points, 170)[1]


def test_the_keys_of_a_sweep_keep_their_order_as_its_points_go_on() -> None:
    points = [
        run(run=f"s-{number}", sweep="s", changed=changed)
        for number, changed in enumerate([{"train.seed": 1}, {"model.activation": "relu", "train.seed": 2}])
    ]
    assert "activation leaky_relu, seed 1" in status_lines(points, 170)[1]
    assert "activation leaky_relu, seed 1" in status_lines(points[::-1], 170)[2]


def test_accuracy_has_room_beside_the_keys_of_a_sweep() -> None:
    points = [
        run(
            run=f"s-{number:08x}", sweep="s", changed={"model.activation": name, "train.seed": number}, state="finished"
        )
        for number, name in enumerate(["relu", "leaky_relu"])
    ]
    done = [dataclasses.replace(point, detail="5m43s ago", eta_seconds=None) for point in points]
    lines = status_lines(done, 72)
    assert "ACC" in lines[0].split() and lines[1].endswith("5m43s ago") and len(lines) == 3
    long = dataclasses.replace(done[0], state="stopped", detail="killed? it ended without a word")
    lines = status_lines([*done, long], 72)
    assert "ACC" in lines[0].split() and lines[3].endswith("killed? it ended") and len(lines) == 5


def test_a_run_that_starts_again_has_no_speed_yet() -> None:
    assert cells(run(world_size=2))["IMG/S"] == "9,000"
    assert cells(run(world_size=None))["IMG/S"] == "-"


def test_columns_without_values_go_before_a_reason_is_cut() -> None:
    states = [
        run(state="stopped", detail="killed? it ended without a word", eta_seconds=None, images_per_second=None),
        run(run="other", state="not started", detail="never submitted", eta_seconds=None, images_per_second=None),
    ]
    lines = status_lines(states, 80)
    assert lines[1].endswith("killed? it ended without a") and lines[2].split() == ["word"]
    assert {"ETA", "IMG/S"}.isdisjoint(lines[0].split()) and "ACC" in lines[0].split()


def test_a_long_name_loses_its_middle() -> None:
    name = status_lines(RUNS, 80)[2].split()[0]
    assert name.startswith("xxx") and "…" in name and name.endswith("xx-lr0.05")


def test_order_and_summary() -> None:
    first = by_urgency(RUNS)
    assert [r.state for r in first] == ["hung", "running", "failed", "queued", "requeued"]
    assert [r.state for r in by_urgency(RUNS, last=True)] == [r.state for r in first][::-1]
    two = [run(run=name) for name in "ba"]
    assert by_urgency(two) == by_urgency(two, last=True) == two
    assert summary(RUNS) == "5 runs: 1 hung, 1 running, 1 failed, 1 queued, 1 requeued"
    assert summary(two[:1]) == "1 run: 1 running"


def test_every_state_has_its_place_and_its_colour() -> None:
    assert set(URGENCY) == {*WAITING, *AT_WORK, *ENDED, UNKNOWN}
    assert by_urgency([run(state=state) for state in URGENCY[::-1]])[0].state == URGENCY[0]


def test_a_table_of_nothing_is_its_head() -> None:
    (head,) = status_lines([], 80)
    assert head.startswith("RUN")
    assert len(status_lines([], 10)) == 1


def test_cells() -> None:
    assert cells(RUNS[4])["EPOCH"] == "12.9/400"  # never the next one
    assert cells(run(restart_causes={"killed": 3}))["RESTARTS"] == "3 (killed)"
    assert cells(run(detail="two\nlines \x1b[31m"))["DETAIL"] == "two lines \\x1b[31m"


def test_the_work_for_a_column_does_not_grow_with_the_number_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def columns_measured(count: int) -> int:
        calls: list[str] = []
        monkeypatch.setattr(terminal.Column, "__post_init__", lambda self: calls.append(self.heading) or measure(self))
        status_lines(RUNS[:1] * count, 80)
        return len(calls)

    measure = terminal.Column.__post_init__
    assert columns_measured(2) == columns_measured(50)
