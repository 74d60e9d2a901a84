"""Submits runs as the tasks of one job array, as a user's own script may: worker.Task through submitit's map_array.

python submit_array.py PROFILE.yaml JOB.yaml RUN RUN ...   prints the ids, such as 12_0 12_1
"""

from __future__ import annotations

import operator
import os
import sys
from pathlib import Path

from cifar_hpc.config.io import load_site, load_spec
from cifar_hpc.launch.batch_script import slurm_executor
from cifar_hpc.launch.snapshot import take_snapshot
from cifar_hpc.launch.worker import Task
from cifar_hpc.runs.frozen_spec import freeze, resolve
from cifar_hpc.runs.paths import RunPaths

profile, job, *names = sys.argv[1:]
keys = ("tasks_per_node=1", "cpus_per_task=4", "nodelist=node2", "partition=gpu")  # two tasks fill the node
site, _ = load_site(profile)
root = Path(os.environ["CIFAR_HPC_ROOT"])
for name in names:
    paths = RunPaths(root, name)
    paths.create()
    spec = resolve(paths, load_spec(Path(job), [f"resources.{key}" for key in keys]), 1, 1)
    freeze(paths, spec)
executor = slurm_executor(paths, spec, site)
os.chdir(take_snapshot(paths))
print(*(job.job_id for job in executor.map_array(operator.call, [Task(str(root), name) for name in names])))
