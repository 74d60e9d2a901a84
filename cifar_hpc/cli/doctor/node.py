"""Checks that import torch, in a process of their own: a task of doctor's job, or one on the login node.

`python -m cifar_hpc.cli.doctor.node FOLDER` is a task of the job: it reads `FOLDER/plan.json` and writes its findings
to `FOLDER/task-<rank>.json`. With `--plan JSON` it prints the findings about this machine.
"""

import fcntl
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from cifar_hpc.config.spec import CORES_BESIDE_GPU, DataSpec
from cifar_hpc.data.sources import source_of
from cifar_hpc.errors import SchedulerError, UserError, explain
from cifar_hpc.files import try_flock, write_atomic
from cifar_hpc.slurm import client
from cifar_hpc.text import counted
from cifar_hpc.training.process import Launch

PLAN, LOCK = "plan.json", "lock"  # files in the folder of doctor's job; the login node holds the lock meanwhile
LEAST_PYTHON = (3, 11)
SLOW_IMPORT_SECONDS = 30.0
CHECK_SECONDS = 180.0  # of a check in the job: a network that is set up wrongly waits for ever
SIGNAL_SECONDS = 30.0
NUMBERS = 4_903_082  # of an all-reduce: the full model's gradients in float32
SLOW_SECONDS = 1.0  # of an all-reduce; gloo over 1 Gbit/s Ethernet takes 0.3 s
INSTALL = "make .venv/.run && . .venv/bin/activate; or name another Python for the nodes in the profile (python:)"
KEPT = "the whole output is kept"
Status = Literal["ok", "warning", "problem"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "problem")  # from good to bad


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    check: its name, which stays the same from version to version; `run_check` sets it.
    status: a warning is what runs can live with, a problem keeps them from working.
    advice: what to do about it; empty where there is nothing to do.
    """

    check: str
    status: Status
    found: str
    advice: str = ""


# Findings without a name yet: ok(found, advice) and so on.
ok, warning, problem = (partial(Finding, "", status) for status in STATUSES)


def run_check(name: str, check: Callable[..., Finding | Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """The findings of `check(*arguments)`, under this name where they have none. Its failure is a finding, too."""
    try:
        found = check(*arguments)
        findings = [found] if isinstance(found, Finding) else list(found)
    except SchedulerError as error:
        findings = [warning(str(error), "so this is not known; sbatch will tell")]
    except Exception as error:
        if isinstance(error, UserError | OSError):
            words = explain(error)[0]
        else:
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}"
        findings = [problem(f"it could not be checked: {words}", "fix that, and try again")]
    return [replace(finding, check=finding.check or name) for finding in findings]


@dataclass(frozen=True)
class Plan:
    """The facts that the checks compare with, as the login node writes them.

    pins: the versions that are needed, by package.
    gpus: as many as were asked for on each node.
    python: the version on the login node.
    data_here: the login node has found the images.
    """

    pins: dict[str, str]
    source: str
    data: str
    gpus: int
    requeue: bool
    python: str
    data_here: bool = False


@dataclass
class TaskReport:
    """The findings of one task of doctor's job; `finished` is false where it was killed."""

    rank: int
    node: str
    finished: bool = False
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.findings = [Finding(**f) if isinstance(f, dict) else f for f in self.findings]  # as JSON has them


def check_python(plan: Plan) -> Finding:
    """The version of this Python."""
    words = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < LEAST_PYTHON:
        return problem(f"{words}; needed: 3.11 or newer", "make PYTHON=python3.12 .venv/.run")
    if platform.python_version() != plan.python:
        advice = "works; but keep to one on the compute nodes, which decides about the bits"
        return ok(f"{words}; on the login node {plan.python}", advice)
    return ok(words)


def check_packages(plan: Plan) -> Finding:
    """The packages that are installed, compared with what requirements.txt pins."""
    pins = plan.pins
    found = {name: next((d.version for d in metadata.distributions(name=name)), None) for name in pins}
    if missing := [name for name in pins if found[name] is None]:
        return problem(f"not installed: {', '.join(missing)}", INSTALL)
    # torch calls itself 2.12.1+cu130, which is 2.12.1 of the index.
    if other := [f"{n} {found[n]} (pinned: {pins[n]})" for n in pins if str(found[n]).partition("+")[0] != pins[n]]:
        advice = "not the versions that were tested; the same bits need the same versions for all starts of a run"
        return warning(", ".join(other), advice)
    return ok(f"{len(pins)} packages as in requirements.txt" if pins else "no requirements.txt here to compare with")


def check_torch(plan: Plan) -> Finding:
    """The import of torch, and how long it takes; CUDA is not needed where one submits."""
    begin = time.monotonic()
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        return problem(f"import torch: {type(error).__name__}: {error}", INSTALL)
    seconds = time.monotonic() - begin
    versions = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    built = next((f"{name} {version}" for name, version in versions.items() if version), "the CPU only")
    words = f"torch {torch.__version__}, built for {built}, imported in {seconds:.1f} s"
    advice = "every start waits for it: use a faster file system, or a container image (docs/clusters.md)"
    return warning(words, advice) if seconds > SLOW_IMPORT_SECONDS else ok(words)


def check_data(plan: Plan) -> Finding:
    """The images of the default job. submit.py downloads missing ones, doctor does not."""
    name: Any = plan.source
    data = DataSpec(name, plan.data)
    source = source_of(data)
    try:
        source.check(data, Path())
    except (UserError, ImportError, OSError) as error:
        words = str(error).partition(" HINT: ")[0]  # there is better advice than the hint
        if plan.data_here:
            return problem(words, "the folder of the images must be shared with the compute nodes: another data.root")
        advice = "submit.py downloads it on a machine with internet; --set data.source=synthetic needs nothing"
        return (warning if source.downloads else problem)(words, advice)
    return ok(source.words(data, Path()))


def check_gpus(plan: Plan) -> Finding:
    """The GPUs that a task sees, and how many Slurm gave."""
    import torch

    if plan.gpus == 0:
        return ok("none were asked for")
    given = number(os.environ.get("SLURM_GPUS_ON_NODE"))
    words = f"Slurm gave {counted(given, 'GPU')} but CUDA is not usable" if given else "Slurm gave no GPU"
    if not torch.cuda.is_available():
        why = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}"
        why = why if torch.version.cuda or torch.version.hip else "this PyTorch is built for the CPU only"
        advice = "does this PyTorch fit the driver (nvidia-smi on the node)? In a container see --nv and --rocm"
        return problem(f"{words} ({why})", advice)
    if 0 < given < plan.gpus:
        return problem(f"{plan.gpus} were asked for, Slurm gave {given}", "see gpus: in the site profile")
    cores, seen = len(os.sched_getaffinity(0)), range(torch.cuda.device_count())
    names = sorted({torch.cuda.get_device_name(index) for index in seen})
    words = f"{plan.gpus} on each node, usable by all tasks: {', '.join(names)}; {counted(cores, 'CPU core')} a task"
    if len(seen) < plan.gpus:
        advice = "srun: [--gpu-bind=none] in the profile: NCCL uses NVLink only between GPUs that each task sees"
        return warning(f"{words}, but it sees only {counted(len(seen), 'GPU')}", advice)
    if len(seen) > 1:
        apart = sum(not torch.cuda.can_device_access_peer(a, b) for a in seen for b in seen if a != b)
        words += f"; direct access (P2P) between {'some' if apart else 'all'} of them"
    advice = f"resources.cpus_per_task: {CORES_BESIDE_GPU} or more; with fewer a GPU waits for its rank"
    return warning(words, advice) if cores < CORES_BESIDE_GPU else ok(words)


class Task:
    """One task of doctor's job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = Plan(**json.loads((folder / PLAN).read_text()))
        self.rank, tasks, local = (number(os.environ.get(f"SLURM_{name}")) for name in ("PROCID", "NTASKS", "LOCALID"))
        self.world_size, self.job_id = max(1, tasks), str(client.own_job_id())
        meeting = folder / "meeting" / "rendezvous.json"
        self.launch = Launch(self.rank, self.world_size, local, "slurm", self.job_id, meeting)
        self.report = TaskReport(self.rank, os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        self.store: Any = None  # what the tasks share, where there are several
        self.signalled = threading.Event()

    def run(self) -> None:
        """Run all checks one after the other; a check that fails or hangs is a finding."""
        signal.signal(signal.SIGUSR2, lambda *_: self.signalled.set())
        alone = (self.check_locks, check_python, check_packages, self.check_requeue, check_torch, check_gpus)
        for check in (*alone, check_data, self.check_all_reduce, self.check_signals):
            name = check.__name__.removeprefix("check_").replace("_", "-")
            limit = threading.Timer(CHECK_SECONDS, self._give_up, [name])
            limit.daemon = True
            limit.start()
            (finding,) = run_check(name, check, self.plan)
            limit.cancel()
            self.report.findings.append(finding)
            if finding.status == "problem" and name in ("torch", "all-reduce"):
                break  # the next checks need it
            self.write()
        self.write(finished=True)

    def write(self, finished: bool = False) -> None:
        """Replace this task's file, with fsync and rename as a checkpoint's."""
        self.report.finished = finished
        write_atomic(self.folder / f"task-{self.rank}.json", json.dumps(asdict(self.report)).encode())

    def _give_up(self, name: str) -> None:
        self.report.findings.append(Finding(name, "problem", f"not finished within {CHECK_SECONDS:g} s", KEPT))
        self.write(finished=True)
        os._exit(1)

    def check_locks(self, plan: Plan) -> Finding:
        """A lock that the login node holds."""
        words = "a lock held on the login node is not seen there"
        try:
            if is_locked(self.folder / LOCK):
                return ok("a lock held on the login node is seen on the compute nodes")
        except OSError as error:
            words = str(error.strerror)
        advice = "Slurm alone keeps a run to one writer (singleton): do not start a queued run by hand as well"
        return warning(words, advice)

    def check_requeue(self, plan: Plan) -> Finding:
        """The answer of scontrol within the job, and whether the site has taken --requeue away."""
        try:
            value = client.job_fields(self.job_id).get("Requeue")
        except SchedulerError as error:
            advice = "Slurm requeues only some preempted runs itself. In a container bind scontrol (docs/clusters.md)"
            return warning(str(error), advice)
        if value != "1" and plan.requeue:
            advice = "the site has taken --requeue away: after a preemption submit the run again by hand"
            return problem(f"scontrol says Requeue={value}", advice)
        return ok(f"scontrol answers in the job: Requeue={value}")

    def check_all_reduce(self, plan: Plan) -> Finding:
        """A sum over all tasks: by NCCL where every task has a GPU, else by gloo."""
        import torch
        import torch.distributed as dist

        from cifar_hpc.training.distributed.group import meet
        from cifar_hpc.training.process import StopFlag

        self.store = meet(self.launch, StopFlag())  # as runs do
        if self.store is None:
            return ok("one task: there is nothing to reduce; try --nodes 2 or --gpus-per-node 2")
        backend, device = "gloo", None
        if all(answer == "True" for answer in self._exchange("usable", str(torch.cuda.is_available()))):
            backend, device = "nccl", torch.device("cuda", self.launch.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        group = dist.PrefixStore("doctor", self.store)
        dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.world_size, device_id=device)
        seconds = []
        for _ in range(4):  # the first one sets up connections
            numbers = torch.full((NUMBERS,), float(self.rank + 1), device=device)
            begin = time.perf_counter()
            dist.all_reduce(numbers)
            total = numbers[-1].item()
            seconds.append(time.perf_counter() - begin)
        if total != self.world_size * (self.world_size + 1) / 2:
            return problem("it did not add up", KEPT)
        words = f"{backend} over {self.world_size} tasks: the full model's gradients (19.6 MB)"
        words += f" in {1e3 * min(seconds):,.0f} ms"
        return warning(words, KEPT) if min(seconds) > SLOW_SECONDS else ok(words)

    def check_signals(self, plan: Plan) -> Finding:
        """A signal of rank 0 to the job's steps: every task must hear it, through any wrapper or container."""
        refusal = ""
        if self.rank == 0:
            try:
                client.command(["scancel", "--signal=USR2", self.job_id])
            except SchedulerError as error:
                refusal = str(error)
        if refusal := self._exchange("refusal", refusal)[0]:
            return warning(f"not tried: scancel is not usable in the job: {refusal}")
        if self.signalled.wait(SIGNAL_SECONDS):
            return ok("a signal of scancel reached every task")
        advice = "preempted runs would lose work: a container or wrapper around Python must pass signals on (exec)"
        return problem("a signal of scancel did not arrive", advice)

    def _exchange(self, key: str, answer: str) -> list[str]:
        """The answers of all tasks, by rank."""
        if self.store is None:
            return [answer]
        self.store.set(f"{key}/{self.rank}", answer)
        answers = [self.store.get(f"{key}/{rank}").decode() for rank in range(self.world_size)]
        self.store.set(f"{key} read/{self.rank}", "")
        if self.rank == 0:  # which holds the store, and so leaves last
            self.store.wait([f"{key} read/{rank}" for rank in range(self.world_size)])
        return answers


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive flock(2) on a new file, where its file system has locks."""
    with path.open("xb") as file:
        try_flock(file.fileno())
        yield


def is_locked(path: Path) -> bool:
    """Try a file's lock; true where another process holds it."""
    with path.open("r+b") as file:  # NFS locks only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def number(text: str | None) -> int:
    """A whole number; 0 where the text is none."""
    return int(text) if text and text.isdigit() else 0


if __name__ == "__main__":
    if sys.argv[1] == "--plan":
        checks = {"packages": check_packages, "torch": check_torch, "data": check_data}
        plan = Plan(**json.loads(sys.argv[2]))
        print(json.dumps([asdict(found) for name in checks for found in run_check(name, checks[name], plan)]))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the batch script has had ignored
        Task(Path(sys.argv[1])).run()
        os._exit(0)  # without the teardown of process groups, which may wait for tasks that are gone
