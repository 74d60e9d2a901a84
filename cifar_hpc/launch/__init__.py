"""From a spec to a job: checks, code snapshot, batch script, submission; the task's entry and the script's epilog."""
