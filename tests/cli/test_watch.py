"""status --watch, as a terminal receives it: a small terminal plays what is sent."""

from __future__ import annotations

import io
import os
import re
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console, ConsoleDimensions

from benchmarks.many_runs import KINDS, make_runs
from cifar_hpc.__main__ import main
from cifar_hpc.cli import status
from cifar_hpc.runs.paths import all_runs

RUNS = len(KINDS)


class Terminal(io.StringIO):
    """Plays cursor positions and clearings; `screen()` is what a person sees."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        shown: dict[int, str] = {}
        row = 1
        for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z])", self.getvalue()):
            if part.startswith("\x1b["):
                place = re.fullmatch(r"\x1b\[([0-9]+);1H", part)
                if place:
                    row = int(place[1])
                elif part.endswith("J"):
                    shown.clear()
                elif part.endswith("K"):
                    shown[row] = ""
            elif part:
                assert "\n" not in part, "a newline would scroll"
                shown[row] = shown.get(row, "") + part
        return [shown.get(n, "") for n in range(1, max(shown, default=0) + 1)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    commands = make_runs(tmp_path, RUNS)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(status, "READ_SECONDS", 0.0)
    monkeypatch.setattr(status, "READ_SHARE", 1e9)
    return tmp_path


def screen_of(root: Path, width: int, height: int) -> tuple[status.Screen, Terminal, Console]:
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=width, height=height, color_system=None)
    screen = status.Screen(console, status.Reader(root, []))
    screen.read()
    return screen, terminal, console


def test_a_screenful_with_what_calls_for_a_look_first(root: Path) -> None:
    screen, terminal, _ = screen_of(root, 80, 10)
    screen.draw()
    shown = terminal.screen()
    assert len(shown) <= 10 and all(len(line) <= 80 for line in shown)
    states = [line.split()[1] for line in shown[1:-1] if line.startswith("improved")]
    assert states == ["running", "failed", "failed", "queued", "requeued"]  # whole rows, of one to three lines
    assert re.match(rf"\d\d:\d\d:\d\d  {RUNS - len(states)} not shown; {RUNS} runs: 1 running, ", shown[-1])


def test_on_a_large_terminal_all_are_shown(root: Path) -> None:
    screen, terminal, _ = screen_of(root, 200, 60)
    screen.draw()
    shown = terminal.screen()
    assert len(shown) == RUNS + 2 and "not shown" not in shown[-1]


def test_only_lines_that_have_changed_are_sent(root: Path) -> None:
    screen, terminal, _ = screen_of(root, 80, 30)
    screen.draw()
    whole = len(terminal.getvalue())
    (running,) = (state for state in screen.states if state.state == "running")
    run = next(paths for paths in all_runs(root) if paths.name == running.run)
    with run.events.open("a") as file:
        file.write('{"event": "finished", "test_accuracy": 99.0}\n')
    (root / "bin" / "answer").write_text("")
    screen.reader.queue.next_poll = 0.0
    terminal.truncate(0)
    terminal.seek(0)
    screen.draw()  # at most the clock has moved on
    assert len(terminal.getvalue()) < 120
    screen.read()
    screen.draw()
    assert len(terminal.getvalue()) < whole


def test_another_size_is_drawn_anew(root: Path) -> None:
    screen, terminal, console = screen_of(root, 80, 30)
    screen.draw()
    console.size = ConsoleDimensions(120, 8)
    screen.draw()
    shown = terminal.screen()
    assert 7 <= len(shown) <= 8 and max(map(len, shown)) > 80


def test_lines_that_are_gone_are_cleared(root: Path) -> None:
    screen, terminal, _ = screen_of(root, 80, 30)
    screen.draw()
    screen.states = screen.states[:2]
    screen.draw()
    shown = terminal.screen()
    assert len([line for line in shown if line]) == 4


def test_a_silent_slurm_is_a_note(root: Path) -> None:
    screen, terminal, _ = screen_of(root, 100, 30)
    (root / "bin" / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    screen.reader.queue.next_poll = 0.0
    screen.read()
    screen.draw()
    shown = terminal.screen()
    assert re.match(r"Slurm does not answer, its answer of \d\d:\d\d:\d\d is shown: Unable to contact", shown[-1])
    assert any(" running " in line for line in shown)
    fresh, terminal, _ = screen_of(root, 100, 30)
    fresh.draw()
    assert terminal.screen()[-1].startswith("Slurm does not answer, only files are read: Unable")


def test_a_change_of_size_ends_the_wait(root: Path) -> None:
    screen, *_ = screen_of(root, 80, 30)
    screen._next_read = time.monotonic() + 3600
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    try:
        signal.raise_signal(signal.SIGWINCH)  # pending, until the wait takes it
        screen.wait()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_ctrl_c_ends_it_and_leaves_the_table(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(status.Screen, "wait", lambda self: signal.raise_signal(signal.SIGINT))
    assert main(["status", "--watch"]) == 0
    before, _, after = capsys.readouterr().out.partition("\x1b[?1049l")
    assert "\x1b[?1049h" in before and f"{RUNS} runs: " in after and "\x1b[?25h" in before + after


def test_a_pipe_gets_plain_blocks(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([None, None])
    monkeypatch.setattr(status.Screen, "wait", lambda self: next(looks, None) or signal.raise_signal(signal.SIGINT))
    assert main(["status", "--watch"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.startswith("RUN ")
