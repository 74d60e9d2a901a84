hpc_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
hpc_ends='"event": "(failed|hang|requeued|left|finished)"'
hpc_job=${hpc_job:-$SLURM_JOB_ID} hpc_restarts=${SLURM_RESTART_COUNT:-0} hpc_nodes=$SLURM_JOB_NODELIST
hpc_append() { # FILE LINE; a line before it that was cut short is ended first
  local file=$hpc_logs/$hpc_run/$1 cut=
  [ -n "$hpc_run" ] && { [ -f "$file" ] || [ ! -e "$file" ]; } || return
  [ -z "$(tail -c 1 "$file")" ] || cut=$'\n'
  printf '%s%s\n' "$cut" "$2" >> "$file"
} 2> /dev/null
hpc_event() { # NAME FIELDS
  local head="\"time\": \"$(date -u +%FT%T.%3NZ)\", \"event\": \"$1\", \"host\": \"$HOSTNAME\""
  hpc_append events.jsonl "{$head, \"job_id\": \"$hpc_job\", \"restart\": null, \"world_size\": null, $2}"
}
hpc_end() { # STATUS of the tasks
  trap '' TERM USR1 USR2 # Slurm also signals a scontrol that has just requeued the job
  local last= events=$hpc_logs/$hpc_run/events.jsonl
  [ ! -f "$events" ] || last=$(tail -n 1 "$events")
  # A site's srun may hide the status of its tasks: only an attempt that has said how it ended needs no epilog.
  if [ "$1" -ne 0 ] || [[ $last && ! $last =~ $hpc_ends ]]; then
    (cd "$SLURM_SUBMIT_DIR" && hpc_epilog "$1") || hpc_no_python "$1"
  fi
  kill -WINCH "$$"
  # Sites list exit statuses in RequeueExit, as 1 or 1-5, after which Slurm requeues a job whatever its run has decided.
  [ "$1" -eq 0 ] || exit "$(scontrol show config 2> /dev/null | awk -F '[ =,]+' -v s="$1" '/^RequeueExit / {
    for (found = n = 1; found && n < 126; n++) { found = 0
      for (i = 2; i <= NF; i++) if (split($i, r, "-") && s >= r[1] + 0 && s <= r[split($i, r, "-")] + 0) found = 1
      if (found) s = s % 125 + 1 } } END { print s }')"
  exit 0
}
hpc_no_python() { # STATUS; the run must neither be lost nor start for ever
  local again=false action="not requeued" output=$hpc_slurm/${hpc_job}_0_log.out
  local words="the start ended with status $1, and Python could not be started to say why"
  [[ $last =~ $hpc_ends ]] && return # a rank has said it
  [ "$(squeue --noheader --jobs="$hpc_job" --format=%T)" = RUNNING ] || return
  local tries=$(grep -c "\"job_id\": \"$hpc_job\".*Python could not be started" "$events")
  tries=${tries:-$hpc_restarts} # where the log cannot be read
  if [ "$tries" -lt "$hpc_limit" ] && scontrol requeue "$hpc_job"; then
    scontrol update "jobid=$hpc_job" "StartTime=now+$((tries < 5 ? 120 << tries : 3600))"
    again=true action=requeueing
  elif scontrol requeuehold "$hpc_job"; then
    action="held: the command requeue releases it"
  fi
  hpc_event failed "\"step\": 0, \"error\": \"$words\", \"cause\": \"start\", \"again\": $again"
  [ $again = false ] || hpc_event requeued '"reason": "failure"'
  words="$words; $action. Last words: $(tac "$output" | sed '/^MARK/q' | head -n 3 | tac)"
  hpc_append train.log "$(date '+%F %T') FAILED: $words"
}
umask o-w
trap : HUP INT TERM USR1 USR2
trap hpc_said=1 WINCH
trap 'n=$?; [ -n "$hpc_said" ] || { (hpc_end "$n"); n=$?; }; exit "$n"' EXIT
FIND_CODE
hpc_run=RUN
hpc_event attempt "\"restart_count\": $hpc_restarts, \"nodes\": \"$hpc_nodes\""
echo "MARK$hpc_job, restart $hpc_restarts, on $hpc_nodes =="
(
trap : HUP INT TERM USR1 USR2
cd "$SLURM_SUBMIT_DIR" || exit
