# shellcheck shell=bash
# What pretrain.sbatch and study.sbatch share; sourced by them. How a job starts its ranks, what it does with Slurm's signals, and
# how it goes on when they have ended. Set before: python, signal (what the ranks are asked to leave with).

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # a task's own number may mean the whole array
job=${job:-$SLURM_JOB_ID}
asked='' end='' child='' doing='' interrupted=''

say() { printf '[%s job %s] %s\n' "$(date +'%F %T')" "$job" "$*"; }

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
    decide) kill -s KILL "$child" ;;  # a pause before the next start: over
  esac
}

# Through Slurm and not through srun, which takes some signals for itself. It may be that srun has not made its step yet.
signal_ranks() {
  local try
  for try in {1..30}; do
    scancel --signal="$signal" "$job.0" 2>/dev/null && return
    kill -0 "$child" 2>/dev/null || return
    sleep 1
  done
  say "error: the ranks could not be asked to leave, $try times" >&2
}

# Notes in `end` why Slurm ends this start. Seen from a batch script: what Slurm requeues has one restart more than this start knew
# of; a job at its limit has the reason TimeLimit, and nobody requeues it but itself, now: saving may take longer than is left.
ended_by_slurm() {
  [[ -z $end ]] || return
  local restarts
  restarts=$(of_job Restarts)
  if [[ ${restarts:-0} -gt ${SLURM_RESTART_COUNT:-0} ]]; then
    end=requeued
  elif [[ $(of_job Reason) == TimeLimit ]]; then
    end=limit
    requeue
  else
    end=cancelled
  fi
  say "ended by Slurm: $end"
}

requeue() {
  scontrol requeue "$job" || say "error: Slurm does not requeue this job; submit the run again" >&2
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
  exec {meeting}< <(exec "$python" -m pretrain.slurm_start "$SLURM_JOB_NODELIST")
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
  attend
}

# go_on RUN CODE: what becomes of the run at folder RUN, whose ranks ended with CODE. Does not return.
go_on() {
  local code=$2
  say "the ranks ended with code $code"
  [[ $code -eq 0 || $code -eq 2 ]] || mkdir -p -- "$1"  # it may have ended before it made its folder
  case $end in
    cancelled) decide "$1" 143 --no-wait; exit 143 ;;
    requeued) decide "$1" 75 --no-wait; exit 75 ;;
    limit) decide "$1" 75 --no-wait; code=$?; [[ $code -eq 75 ]] || scancel "$job"; exit "$code" ;;
  esac
  # Behind a request to leave, any end but "done" and "a mistake" leaves the newest complete checkpoint, and time is nearly up.
  if [[ -n $asked && $code -ne 0 && $code -ne 2 ]]; then
    decide "$1" 75 --no-wait
  else
    decide "$1" "$code"
  fi
  code=$?
  if [[ $end == cancelled ]]; then  # while it waited
    exit 143
  elif [[ -n $end || $code -ne 75 ]]; then
    exit "$code"
  fi
  requeue
  exit 75
}

# Asks `restart`, which notes this end in RUN/health/attempts.jsonl and pauses before another start if there were faults: 0, 2, 75 start
# again, 77 do not. A pause that a signal cuts short is over.
decide() {
  local code
  PALIMPSEST_LAUNCH="$SLURM_JOB_ID-0-${SLURM_RESTART_COUNT:-0}" "$python" -m pretrain restart --run "$1" --code "$2" "${@:3}" \
    {meeting}<&- &
  child=$! doing=decide
  attend
  code=$?
  [[ $code -ne 137 ]] || code=75
  return "$code"
}
