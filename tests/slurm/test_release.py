"""Slurm of another Debian release: its tree is made once, whatever interrupts that, and its jobs run in our files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import until
from test_minicluster import TOOL, processes_naming, run_tool

pytestmark = pytest.mark.slurm

# Leaves what a tree needs, but for the real programs. Its first call lasts until it is killed, if the test wants that.
DEBOOTSTRAP = """#!/bin/sh
for root; do case "$root" in */root) break;; esac; done
echo "$*" >> "$CALLS"
[ -e "$CALLS.fails" ] && { echo "E: Failed getting release file"; exit 1; }
lib=$root/usr/lib/any-linux-gnu; mkdir -p "$lib/slurm-wlm" "$root/usr/bin" "$root/usr/sbin"
touch "$lib/ld-linux-any.so.2"
for name in PROGRAMS; do touch "$root/usr/bin/$name"; done
if [ -e "$CALLS.lasts" ]; then rm "$CALLS.lasts"; sleep 600; fi
"""
UNSHARE = '#!/bin/sh\nwhile [ "$1" != debootstrap ]; do shift; done\nexec "$@"\n'


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with stubs of what it starts; as root."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import mc_release

    for name, text in (
        ("debootstrap", DEBOOTSTRAP.replace("PROGRAMS", " ".join(mc_release.PROGRAMS))),
        ("unshare", UNSHARE),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(mc_release, "PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return mc_release


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def waits_for_a_lock(pid: int) -> bool:
    return re.search(rf"-> FLOCK +ADVISORY +WRITE {pid} ", Path("/proc/locks").read_text()) is not None


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache" / "cifar_hpc").iterdir())


def test_the_tree_is_made_once(release: Any, tmp_path: Path) -> None:
    for _ in range(2):
        assert release.programs("trixie") == tmp_path / "cache" / "cifar_hpc" / "trixie" / "bin"
    assert calls(tmp_path) == 1
    script = (tmp_path / "cache" / "cifar_hpc" / "trixie" / "bin" / "slurmd").read_text()
    assert script.endswith(f'-d {tmp_path}/cache/cifar_hpc/trixie/bin/slurmstepd "$@"\n')
    assert files(tmp_path) == ["trixie", "trixie.lock"]


def test_calls_at_once_and_after_a_kill_make_one_tree(release: Any, tmp_path: Path) -> None:
    (tmp_path / "calls.lasts").touch()
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); os.getuid = lambda: 0; import mc_release; "
        "print(mc_release.programs('trixie'))"
    )
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(TOOL.parent)]
        return subprocess.Popen(command, env=os.environ | path, stdout=subprocess.PIPE, text=True)

    killed = start()
    part = tmp_path / "cache" / "cifar_hpc" / "trixie.part"
    try:
        until("the first call is at work", lambda: part.exists() and not (tmp_path / "calls.lasts").exists())
        others = [start() for _ in range(3)]
        killed.kill()
        killed.communicate()
        until("the others wait", lambda: all(waits_for_a_lock(other.pid) for other in others))
        assert calls(tmp_path) == 1  # what the killed one has started still works on the tree
    finally:
        for pid in processes_naming(f"CALLS={tmp_path}/calls\0"):
            if "sleep 600" in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                os.kill(pid, 9)
    for other in others:
        assert other.communicate(timeout=60)[0].endswith("/trixie/bin\n") and other.returncode == 0
    assert calls(tmp_path) == 2 and not part.exists()


def test_what_is_missing_is_said_and_nothing_stays(
    release: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calls.fails").touch()
    with pytest.raises(release.MissingPackagesError, match=r"release file\nHINT: it needs Debian's archive, and "):
        release.programs("trixie")
    assert files(tmp_path) == ["trixie.lock", "trixie.log"]
    (tmp_path / "debootstrap").unlink()
    monkeypatch.setattr(release, "PATH", str(tmp_path))
    with pytest.raises(release.MissingPackagesError, match="apt-get install -y debootstrap"):
        release.programs("trixie")
    monkeypatch.setattr(os, "getuid", lambda: 1)
    with pytest.raises(release.MissingPackagesError, match="only root can make its tree"):
        release.programs("trixie")


def test_the_mirror_is_that_of_apt(release: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apt" / "sources.list.d").mkdir(parents=True)
    monkeypatch.setattr(release, "APT", tmp_path / "apt")
    assert release.mirror() == []
    (tmp_path / "apt" / "sources.list.d" / "ubuntu.sources").write_text("URIs: http://archive.ubuntu.com/ubuntu/\n")
    assert release.mirror() == []
    (tmp_path / "apt" / "sources.list.d" / "x.sources").write_text(
        "Types: deb\n# http://a.example/debian\nURIs: http://b.example/debian-security\n\nURIs: http://c.example/debian/\n"
    )
    assert release.mirror() == ["http://c.example/debian"]
    (tmp_path / "apt" / "sources.list").write_text("deb [arch=amd64] https://d.example/pub/debian bookworm main\n")
    assert release.mirror() == ["https://d.example/pub/debian"]


def test_up_on_another_slurm(start_minicluster: Callable[..., Any], other_slurm: str) -> None:
    """Its jobs run in this machine's files, and see nothing of the tree but PATH."""
    cluster = start_minicluster("--no-accounting", "--release", Path(other_slurm).parent.name)
    (line,) = cluster.tool("env").stdout.splitlines()
    assert line == f"export SLURM_CONF={cluster.dir}/slurm.conf PATH={other_slurm}:$PATH"
    assert cluster.tool("status").returncode == 0
    shell = ["/bin/sh", "-c", f'{line}\nscontrol -V; srun -N2 sh -c "cat /etc/os-release; env | grep -c ^LD_"']
    done = cluster.run(shell)
    version, *rest = done.stdout.splitlines()
    own = cluster.env["PATH"].replace(f"{other_slurm}:", "")
    assert version != cluster.run(["/bin/sh", "-c", f"PATH={own} scontrol -V"]).stdout.strip()
    assert re.fullmatch(r"slurm-wlm 2\d\.\d\d\.\d+", version)
    assert rest.count("0") == 2 and set(rest) - {"0"} == set(Path("/etc/os-release").read_text().splitlines())
    mounts = Path("/proc/mounts").read_text()
    assert str(Path(other_slurm).parent) not in mounts
    assert cluster.tool("down").returncode == 0 and not processes_naming(str(cluster.dir))


def test_an_unknown_release_is_an_argument_error() -> None:
    for words in (("tree", "potato"), ("up", "--release", "potato")):
        done = run_tool(*words)
        assert done.returncode == 2 and "'bookworm', 'trixie'" in done.stderr
