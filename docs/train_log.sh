#!/bin/bash
# Makes docs/train.log: a run of a minute on this machine that is preempted in its second epoch and goes on by itself.
# Of the log, only the host's name and the job's number are replaced by others.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
CIFAR_HPC_ROOT=$(mktemp -d)
export CIFAR_HPC_ROOT
trap 'rm -rf "$CIFAR_HPC_ROOT"' EXIT

"$python" submit.py jobs/demo.yaml --cluster local --name demo --set train.epochs=4 train.log_seconds=6 \
    data.train_size=20000 checkpoint.every_steps=null
log=$CIFAR_HPC_ROOT/logs/demo/train.log
until grep -q "epoch 2/4 step" "$log"; do sleep 0.2; done
pid=$(grep -o '"pid": [0-9]*' "$CIFAR_HPC_ROOT/logs/demo/run.lock" | grep -o '[0-9]*$')
kill -USR2 "$pid" # as a scheduler does it that needs the machine
"$python" -m cifar_hpc tail demo > /dev/null
sed -E "s/host [^ ]+/host node01/; s/job [0-9]+/job 4711/" "$log" > docs/train.log
