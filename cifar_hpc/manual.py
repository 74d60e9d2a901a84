"""What --help says of each command below its first sentence. Lines of at most 79 characters, as terminals have."""

from __future__ import annotations

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
that says how to load them in five lines.""",
    "plot": """\
Draws architecture, accuracy, loss, learning rate and timeline (waiting,
training, preemptions), each as PNG and SVG. Several runs share the axes; runs
that differ in nothing but the seed become one curve, their mean, with a band;
restarts are marked.""",
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
