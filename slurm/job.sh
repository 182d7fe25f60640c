# shellcheck shell=bash
# What pretrain.sbatch and study.sbatch share; sourced by them. How a job starts its ranks, what it does with Slurm's signals, and
# how it goes on when they have ended. Set before: python, signal (what the ranks are asked to leave with).

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # a task's own number may mean the whole array
job=${job:-$SLURM_JOB_ID}
asked='' end='' child='' doing='' passed='' interrupted=''
insist_tries=10 insist_pause=20  # a controller that restarts is back within minutes

say() { printf '[%s job %s] %s\n' "$(date -u +'%F %TZ')" "$job" "$*"; }

# Slurm sends USR1 to this shell alone, --signal seconds (or up to a minute more) before the time limit: it is passed on to the
# ranks, once. TERM comes to everything at once: at the limit, when the job is cancelled, preempted, requeued, or loses a node;
# KillWait seconds later (slurm.conf; usually 30) all is killed.
listen() {
  trap 'interrupted=yes; leave_in_time' USR1
  trap 'interrupted=yes; ended_by_slurm' TERM
}

leave_in_time() {
  [[ -z $asked ]] || return
  asked=yes
  say "the time limit is near: asking the ranks to save and leave"
  case $doing in
    train) signal_ranks ;;
    decide) cut_pause ;;
  esac
}

# Through Slurm and not through srun, which takes some signals for itself. It may be that srun has not made its step yet.
signal_ranks() {
  local try
  passed=yes
  for try in {1..30}; do
    scancel --signal="$signal" "$job.0" 2>/dev/null && return
    kill -0 "$child" 2>/dev/null || return
    sleep 1
  done
  say "error: the ranks could not be asked to leave, $try times" >&2
}

# Ends the pause before the next start. `restart` has no ear until it has noted the end, so it is told until it is gone.
cut_pause() {
  local try
  for try in {1..60}; do
    kill -s USR1 "$child" 2>/dev/null || break
    sleep 1
  done &
}

# Notes in `end` why Slurm ends this start. Seen from a batch script: what Slurm requeues has one restart more than this start knew
# of; a job at its limit has the reason TimeLimit, and nobody requeues it but itself, now: saving may take longer than is left.
ended_by_slurm() {
  [[ -z $end ]] || return
  local restarts
  restarts=$(of_job Restarts)
  if [[ ${restarts:-0} -gt ${SLURM_RESTART_COUNT:-0} ]]; then
    end=requeued
    [[ -z $(sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --states=down --format=%N 2>/dev/null) ]] || end='node down'
  elif [[ $(of_job Reason) == TimeLimit ]]; then
    end=limit
    requeue
  else
    end=cancelled
  fi
  say "ended by Slurm: $end"
  [[ $doing != decide ]] || cut_pause
}

requeue() {
  insist scontrol requeue "$job" || say "error: Slurm does not requeue this job; submit the run again" >&2
}

# Ends a job that Slurm has in its queue again.
unqueue() {
  say "not to be started again: taken out of the queue"
  insist scancel "$job" || say "error: Slurm does not take this job out of its queue: scancel $job" >&2
}

# Runs a command of Slurm's, again and again for some minutes while the controller does not answer. What Slurm refuses it refuses.
insist() {
  local try said
  for ((try = 1; ; try++)); do
    said=$("$@" 2>&1) && return
    printf '%s\n' "$said" >&2
    [[ $said != *disabled* && $said != *[Ii]"nvalid job"* && $said != *"ermission denied"* ]] || return 1
    [[ $try -lt $insist_tries && $end != cancelled ]] || return 1
    sleep "$insist_pause"
  done
}

# Waits for the child and returns its exit code. A trap interrupts `wait`, which then says nothing of the child: it is asked again.
attend() {
  local code=1 now
  while true; do
    interrupted=''
    wait "$child"
    now=$?
    [[ $now -eq 127 ]] || code=$now
    [[ -n $interrupted && $now -ne 127 ]] || break
  done
  child='' doing=''
  return "$code"
}

# One field of what Slurm says of this job.
of_job() { scontrol --oneliner show job "$job" 2>/dev/null | grep -o " $1=[^ ]*" | head -n 1 | cut -d= -f2; }

# At a start of a requeued job: was the end of its last start noted? Not if the node of that script went down.
look_back() {
  [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -d $1 ]] || return 0
  decide lost "$1" 76 --no-wait
  local code=$?
  [[ $code -ne 77 ]] || exit 77
}

# Code that is kept with the run, in a folder with its hashes beside it. Paths in a config mean what they meant where the job was
# submitted: that stays the working directory, and Python looks for no modules in it.
use_code() {
  if ! (cd -- "$1/code" && sha256sum --quiet --check ../code.sha256); then
    say "error: $1/code is not what was submitted: submit the run again" >&2
    exit 2
  fi
  export PYTHONPATH="$1/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
}

# Where the ranks meet: this node, where rank 0 will be, and a port that the helper holds until this script ends.
meet() {
  exec {meeting}< <(exec "$python" -m pretrain.submission.slurm_start "$SLURM_JOB_NODELIST")
  interrupted=''
  until read -r -t 150 MASTER_ADDR MASTER_PORT <&"$meeting"; do
    if [[ -z $interrupted ]]; then
      say "error: no address and port to meet at, see above" >&2
      exit 1
    fi
    interrupted=''  # by a signal: the answer is still to come
  done
  export MASTER_ADDR MASTER_PORT
}

# Runs `watch train ARGUMENTS` as one task a rank, and returns how that ended; 75 if there is no time for it any more.
#
# Rank r is task r, neighbours first on one node: tensor-parallel ranks must share NVLink. srun does not take over sbatch's
# --cpus-per-task (since Slurm 22.05). When one rank has failed the watches end the others, and say which one it was; srun would
# kill them before they can, so it only steps in after two minutes.
run_ranks() {
  export PYTHONUNBUFFERED=1  # and not srun --unbuffered: it gives each task a terminal, and logs are full of its codes
  unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE  # of a launcher around `sbatch`: the ranks are srun's tasks
  [[ -z $asked && -z $end ]] || return 75
  srun --ntasks="$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))" --distribution=block --kill-on-bad-exit=0 --wait=120 \
    --input=none ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    "$python" -m pretrain watch train "$@" {meeting}<&- &
  child=$! doing=train
  [[ -z $asked$end || -n $passed ]] || signal_ranks  # asked between the last look and here
  attend
}

# go_on RUN CODE: what becomes of the run at folder RUN, whose ranks ended with CODE. Does not return.
go_on() {
  local code=$2
  say "the ranks ended with code $code"
  [[ $code -eq 0 || $code -eq 2 ]] || mkdir -p -- "$1"  # it may have ended before it made its folder
  local over=$code  # what `restart` is told if Slurm or the limit ended the ranks: a run that is done is done
  [[ $code -eq 0 || $code -eq 2 ]] || over=75
  case $end in
    cancelled) [[ $over -ne 75 ]] || over=143; decide '' "$1" "$over" --no-wait; exit 143 ;;
    requeued | 'node down' | limit) decide "$end" "$1" "$over" --no-wait; leave $? ;;
  esac
  # Behind a request to leave, any end but "done" and "a mistake" leaves the newest complete checkpoint, and time is nearly up.
  if [[ -n $asked ]]; then
    decide limit "$1" "$over" --no-wait
  else
    decide ranks "$1" "$code"
  fi
  code=$?
  case $end in  # while it waited
    cancelled) exit 143 ;;
    '') [[ $code -eq 75 ]] || exit "$code" ;;
    *) leave "$code" ;;
  esac
  requeue
  exit 75
}

# Ends this start of a job that is in Slurm's queue again, with what `restart` said. Nothing but 75 is to be started again.
leave() {
  [[ $1 -eq 75 ]] || unqueue
  exit "$1"
}

# decide WHY RUN CODE [OPTION]: asks `restart`, which notes this end in RUN/health/attempts.jsonl and pauses before another start if
# there were faults: 0, 2 done, 75 start again, 77 do not. WHY: what ended it, as this script knows. Signals are kept from it until it
# has noted the end; then they end the pause, and the answer stands.
decide() {
  local code
  (trap '' TERM USR1
   [[ -z ${meeting-} ]] || exec {meeting}<&-
   PALIMPSEST_ENDED_BY=$1 exec "$python" -m pretrain restart --run "$2" --code "$3" "${@:4}") &
  child=$! doing=decide
  [[ $4 == --no-wait || -z $asked$end ]] || cut_pause  # asked between the last look and here
  attend
  code=$?
  [[ $code -ne 137 && $code -ne 138 && $code -ne 143 ]] || code=75
  return "$code"
}
