"""The arguments of python -m cifar_hpc COMMAND, and the text of each --help."""

from __future__ import annotations

import argparse

MANUAL = {
    "train": """\
Trains in this very process, without Slurm and submitit; several processes
under torchrun train together. The same command again goes on from the newest
good checkpoint, with the same bits. SIGTERM, SIGUSR1, SIGUSR2 and the first
Ctrl-C save a checkpoint and stop.

Writes logs/RUN/ (spec.yaml, train.log, metrics.jsonl, events.jsonl) and
checkpoints/RUN/. Exit status: 0 finished, 1 failed, 2 bad spec or arguments, 4
the run is being trained already, 128 + N stopped by signal N.""",
    "status": """\
States: queued (with Slurm's reason), running, requeued, hung (no log line for
longer than expected), suspended (by Slurm), stopping (Slurm ends the job),
finished, failed (with the reason), cancelled, stopped (ended without a word:
submit again), not started (never submitted), unreadable (damaged files),
unknown (Slurm does not answer).

One call of squeue serves all runs, and none is needed where there is no Slurm.
In a pipe each run is one plain line, --json is for programs. Exit status: 0, 2
bad arguments, 3 Slurm does not answer, and only the files tell.""",
    "tail": """\
Prints what train.log holds and then what comes, until the run ends. A run that
has not started yet is waited for. Ctrl-C ends the following, not the run.
`tail -F logs/RUN/train.log` shows the same lines.""",
    "inspect": """\
The sums are those of the fast weights, the slow weights, momentum and
BatchNorm buffers: two runs computed the same if and only if they agree. Exit
status 1 where the file is damaged; the message says what is wrong with it.""",
    "requeue": """\
A running job saves a checkpoint and goes back into the queue; a local run
saves and starts again. A job that Slurm has requeued waits about two minutes
(BeginTime), and a held one for ever: both may start at once after this.""",
    "cancel": """\
The job gets SIGTERM, saves, and stays away; a waiting one is taken out of the
queue, also out of a sweep's job array. Submitting again goes on from there.""",
    "evaluate": """\
Runs the test set through a checkpoint. Prints accuracy and loss, the accuracy
of each class, and which classes are taken for which; --out draws the confusion
matrix.""",
    "predict": """\
Writes a CSV with the columns ID and Labels, one row an image in the order of
the input. A CIFAR pickle is read without executing anything in it.""",
    "export": """\
Writes the weights as safetensors, which hold tensors and text and no code,
with spec, accuracy and versions in the metadata, and a model card beside it
that says how to load them with cifar_hpc.load.""",
    "plot": """\
Draws architecture, accuracy, loss, learning rate and timeline (waiting,
training, preemptions), each as PNG and SVG. Several runs share the axes; runs
that differ in nothing but the seed become one curve, their mean, with a band;
restarts are marked.""",
    "track": """\
Reads metrics.jsonl here, on the login node, where the internet is: the job
knows nothing of it. Follows runs until they end, and shows finished ones. Each
call shows all epochs from the first on, in place of what an earlier one has
shown, so each epoch is there once. Ctrl-C ends the tracking, not the run.

Needs the packages of requirements-trackers.txt. Offline W&B runs are written
to logs/RUN/tracking/wandb.""",
    "compare": """\
A row for each setting, with only the keys in which the runs differ; runs that
differ in nothing but the seed are one row, mean and standard deviation. --each
gives every run a row of its own.""",
    "doctor": """\
Each line is ok, a warning or a problem, with what was found and what to do.
Without --job nothing is submitted: Python, packages, the profile, Slurm, the
partition and what preempts there, account, file system, images, torch.

--job submits one small job the way runs are submitted, and reports from every
task: the same Python and packages, GPUs usable, file system shared and
lockable, images there, all-reduce between the tasks (NCCL or gloo), requeue
permitted, signals heard. It leaves nothing behind, unless there is a problem:
then what the job printed is kept. Ctrl-C cancels it.

Exit status: 0 no problem (warnings are none), 1 a problem, 2 bad arguments.
--json prints a list of {check, status, found, advice}.""",
    "completion": """\
bash, in ~/.bashrc:   source <(python -m cifar_hpc completion bash)
zsh, in ~/.zshrc,
after compinit:       eval "$(python -m cifar_hpc completion zsh)"

(with the path of this Python in place of `python`, where it is not on PATH.)
Tab then completes commands, options, job files, profiles, partitions, runs and
the keys of --set, after `python -m cifar_hpc`, `python submit.py`,
`./submit.py` and `cifar_hpc`. The last one is a shell function that this
defines: the same commands from any folder.""",
}

EXAMPLES = """examples:
  python -m cifar_hpc train jobs/demo.yaml --set train.epochs=2
  torchrun --nproc-per-node 4 -m cifar_hpc train jobs/improved_resnet.yaml
  python -m cifar_hpc status --watch
  python -m cifar_hpc tail improved_resnet-1a2b3c4d
  python -m cifar_hpc plot 'improved_resnet-*' --out figures
  python -m cifar_hpc compare 'dropout-*' --markdown
  python -m cifar_hpc evaluate improved_resnet-1a2b3c4d
  python -m cifar_hpc doctor --partition gpu --job
"""
WEIGHTS_HELP = "slow: those that the run evaluates, Lookahead's slow or ema's averaged ones (default); or the fast ones"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, which shell completion reads as well."""
    top = argparse.ArgumentParser(
        prog="python -m cifar_hpc",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train, watch, steer and use runs. To submit one: python submit.py --help",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _train(commands)
    _watch(commands)
    _steer(commands)
    _use(commands)
    _figures(commands)
    _track(commands)
    _site(commands)
    return top


def _command(commands: argparse._SubParsersAction, name: str, text: str, *examples: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    lines = "".join(f"\n  python -m cifar_hpc {name} {example}".rstrip() for example in examples)
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.\n\n{MANUAL[name]}",
        epilog=f"examples:{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return added


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="machine-readable")


def _train(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    train = _command(
        commands,
        "train",
        "train here: one process, or each process of torchrun",
        "jobs/demo.yaml --set train.epochs=2",
        "jobs/improved_resnet.yaml --set data.source=synthetic train.device=cpu --name try",
    )
    train.add_argument("job", metavar="JOB.yaml", help="what to train")
    train.add_argument(
        "--set",
        metavar="KEY.PATH=VALUE",
        nargs="+",
        action="extend",
        default=[],
        dest="overrides",
        help="override a key of the job",
    )
    train.add_argument("--name", metavar="RUN", help="the run's name (default: from what differs from the defaults)")


def _watch(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    status = _command(
        commands,
        "status",
        "one line a run: state, epoch, accuracy, speed, time left, restarts",
        "",
        "'dropout-*' --watch",
        "improved_resnet-1a2b3c4d --json",
    )
    status.add_argument("runs", metavar="RUN", nargs="*", help="only these runs; names or patterns such as 'dropout-*'")
    status.add_argument("--watch", action="store_true", help="redraw every few seconds until Ctrl-C")
    _json(status)

    tail = _command(
        commands,
        "tail",
        "follow a run's train.log, from its beginning until the run ends",
        "improved_resnet-1a2b3c4d",
        "improved_resnet-1a2b3c4d --epochs",
    )
    tail.add_argument("run", metavar="RUN")
    tail.add_argument("--epochs", action="store_true", help="only the rows of finished epochs")

    inspect = _command(
        commands,
        "inspect",
        "verify a checkpoint; show what it holds and its sha256 sums",
        "improved_resnet-1a2b3c4d",
        "improved_resnet-1a2b3c4d --step 3910 --json",
    )
    inspect.add_argument("run", metavar="RUN", help="a run, or a checkpoint file")
    inspect.add_argument("--step", type=int, metavar="S", help="the checkpoint of this step (default: the newest good)")
    _json(inspect)


def _steer(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    requeue = _command(
        commands, "requeue", "requeue a running job, or let a requeued one start now", "improved_resnet-1a2b3c4d"
    )
    requeue.add_argument("run", metavar="RUN")
    cancel = _command(commands, "cancel", "cancel a run's job; it saves a checkpoint first", "improved_resnet-1a2b3c4d")
    cancel.add_argument("run", metavar="RUN")


def _use(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    evaluate = _command(
        commands,
        "evaluate",
        "accuracy on the test set: all, by class, and who is taken for whom",
        "improved_resnet-1a2b3c4d",
        "checkpoints/improved_resnet-1a2b3c4d/best.pt --data ~/cifar-10 --weights fast --json",
    )
    evaluate.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    evaluate.add_argument("--data", metavar="DIR", help="other test images: CIFAR-10 or test/<class>/*")
    evaluate.add_argument("--weights", choices=("slow", "fast"), default="slow", help=WEIGHTS_HELP)
    evaluate.add_argument("--out", metavar="DIR", help="draw the confusion matrix there, as PNG and SVG")
    _json(evaluate)

    predict = _command(
        commands,
        "predict",
        "the class of each image of a folder, an array file or a CIFAR pickle, as a CSV (ID,Labels)",
        "improved_resnet-1a2b3c4d images/ --out labels.csv",
        "improved_resnet-1a2b3c4d cifar_test_nolabels.pkl --out labels.csv --weights fast",
    )
    predict.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    predict.add_argument("input", metavar="INPUT", help="a folder of images, a .npy or .npz file, or a CIFAR pickle")
    predict.add_argument("--out", metavar="FILE.csv", required=True, help="the CSV to write")
    predict.add_argument("--weights", choices=("slow", "fast"), default="slow", help=WEIGHTS_HELP)

    export = _command(
        commands,
        "export",
        "the model as safetensors, with a card that says what it is and how to load it",
        "improved_resnet-1a2b3c4d --out model.safetensors",
    )
    export.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    export.add_argument("--out", metavar="FILE.safetensors", required=True, help="the file; the card lies beside it")
    export.add_argument("--weights", choices=("slow", "fast"), default="slow", help=WEIGHTS_HELP)


def _figures(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    plot = _command(
        commands,
        "plot",
        "figures of runs: accuracy, loss, learning rate, architecture, timeline",
        "improved_resnet-1a2b3c4d",
        "'dropout-*' --out figures",
        "improved_resnet-1a2b3c4d --terminal",
    )
    plot.add_argument("runs", metavar="RUN", nargs="+", help="names or patterns such as 'dropout-*'")
    plot.add_argument("--out", metavar="DIR", default="figures", help="where the files go (default: figures)")
    plot.add_argument("--terminal", action="store_true", help="draw curves in the terminal instead")

    compare = _command(
        commands,
        "compare",
        "a table of runs: what differs, accuracy (mean and std over seeds), time, restarts",
        "'dropout-*'",
        "'dropout-*' 'activation-*' --sort=-test_accuracy --markdown",
    )
    compare.add_argument("runs", metavar="PATTERN", nargs="+", help="names or patterns such as 'dropout-*'")
    compare.add_argument("--sort", metavar="COLUMN", help="a column, ascending; descending: --sort=-COLUMN")
    compare.add_argument("--each", action="store_true", help="a row for each run, seeds apart")
    form = compare.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", help="machine-readable")
    form.add_argument("--csv", action="store_const", const="csv", dest="form", help="for a spreadsheet")
    form.add_argument("--markdown", action="store_const", const="markdown", dest="form", help="for a README")


def _track(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    track = _command(
        commands,
        "track",
        "show runs in TensorBoard or Weights & Biases, while they go on or afterwards",
        "improved_resnet-1a2b3c4d --tensorboard ~/tensorboard",
        "'dropout-*' --wandb online --project lab",
    )
    track.add_argument("runs", metavar="RUN", nargs="+", help="names or patterns such as 'dropout-*'")
    track.add_argument("--tensorboard", metavar="DIR", help="write event files to DIR/RUN")
    track.add_argument("--wandb", choices=("offline", "online"), help="write a W&B run, for later upload or at once")
    track.add_argument("--project", metavar="P", default="cifar_hpc", help="the W&B project (default: cifar_hpc)")


def _site(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    doctor = _command(
        commands,
        "doctor",
        "what would go wrong here: Slurm, partition, GPUs, file system, data, torch",
        "",
        "--profile mycluster --account lab --job",
        "--partition gpu --job --nodes 2 --gpus-per-node 4 --wait 60",
    )
    doctor.add_argument("--profile", metavar="NAME", default="default", help="the site in slurm/clusters")
    doctor.add_argument("--partition", metavar="P", help="the partition that runs would go to")
    doctor.add_argument("--account", metavar="A", help="the account that runs would be charged to")
    doctor.add_argument("--nodes", type=int, default=1, metavar="N", help="on so many nodes (default: 1)")
    doctor.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="with so many GPUs on each (default: the site's, else 1)"
    )
    doctor.add_argument("--job", action="store_true", help="look on the compute nodes as well, in a job of a minute")
    doctor.add_argument(
        "--wait",
        type=float,
        default=10,
        metavar="MINUTES",
        help="how long the job may wait for its start (default: 10)",
    )
    _json(doctor)

    completion = _command(
        commands,
        "completion",
        "print what makes a shell complete commands, options and runs",
        "bash",
        "zsh",
    )
    completion.add_argument("shell", choices=("bash", "zsh"))
