"""A launch as a batch script of SLURM: it is read, edited and kept by people, so it explains itself."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.launching.plan import LaunchPlan
from llmtrain.launching.variables import refuse_secrets

_OURS = {
    "nodes": "--nodes and --min-nodes",
    "ntasks": "--nodes and --gpus-per-node",
    "ntasks-per-node": "--gpus-per-node",
    "signal": "--grace",
    "requeue": "nothing: the script counts on it",
    "no-requeue": "--max-requeues 0",
    "open-mode": "nothing: the script counts on it",
    "array": "a run_name each: tasks of an array would share one run",
    "export": "--env for variables: without ALL the script misses those that the ranks need",
}
"""Keys of sbatch that the script depends on, and what to give instead."""

_SCRIPTS = frozenset(
    {
        *("RUN", "RANKS_PER_NODE", "MAX_RESTARTS", "MAX_REQUEUES", "GRACE", "TRAIN"),
        *("REQUEUED", "MARKS", "RANK_SCRIPT"),
    }
)
"""Variables of the script; one that `--env` sets would take their place."""

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


@dataclass(frozen=True)
class SlurmOptions:
    """What SLURM is asked for, beyond the plan.

    Attributes:
        time: limit of one start of the job, as sbatch reads it (24:00:00, 2-12); None for the partition's.
        partition: queue; None for the cluster's default.
        account: who pays.
        qos: quality of service.
        sbatch: further `KEY=VALUE` of sbatch, or `KEY` for a flag; one that the script sets by itself is replaced.
        grace: seconds before the time limit at which the ranks are told to save.
        max_requeues: how often the job goes back to the queue until it gives up.
    """

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: tuple[str, ...] = ()
    grace: int = 300
    max_requeues: int = 100


def script(plan: LaunchPlan, options: SlurmOptions, *, python: str = sys.executable) -> str:
    """The batch script.

    Args:
        plan: of the launch.
        options: for SLURM.
        python: that of the nodes, which see the same files as this machine.

    Raises:
        UserError: an option that sbatch would not understand, or that would break the script.
    """
    refuse_secrets(plan, "Export it in the shell where you submit: sbatch passes the environment on.")
    if taken := sorted(_SCRIPTS & plan.environment.keys()):
        raise UserError(f"--env {taken[0]}: the script has a variable of this name; give yours another one")
    directives = "\n".join(f"#SBATCH --{key}" for key in _directives(plan, options))
    variables = "\n".join(f"export {key}={shlex.quote(value)}" for key, value in plan.environment.items())
    command = shlex.join([python, "-m", "llmtrain.training.command", *plan.arguments])
    settings = "\n".join(
        (
            f"RUN={shlex.quote(f'runs/{plan.run_name}')}",
            f"RANKS_PER_NODE={plan.gpus_per_node}",
            f"MAX_RESTARTS={plan.max_restarts}   # after crashes, in one start of the job",
            f"MAX_REQUEUES={options.max_requeues}   # after time limits and preemptions",
            f"GRACE={options.grace}   # as in --signal above",
            f"TRAIN=({command})",
        )
    )
    return f"#!/bin/bash\n{_HEAD}{directives}\n\nset -u\n\n{settings}\n{variables}{_BODY}"


def submit(text: str, plan: LaunchPlan) -> str:
    """Writes the script beside the run and gives it to sbatch, from the working directory.

    Returns:
        The job's id.

    Raises:
        UserError: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--scheduler slurm: there is no sbatch here. Submit on a login node, or add --print.")
    path = Path("runs") / plan.run_name / "slurm.sh"
    path.parent.mkdir(parents=True, exist_ok=True)  # SLURM fails a job whose output has no folder
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"sbatch refuses {path}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().split(";")[0]  # JOB;CLUSTER where there are several


def _directives(plan: LaunchPlan, options: SlurmOptions) -> list[str]:
    if options.time is not None and not _TIME.fullmatch(options.time):
        raise UserError(f"--time: {options.time!r} is none of SLURM's: minutes, 24:00:00, or 2-12:00:00 for days")
    if options.grace < 1:
        raise UserError("--grace: ranks need seconds to save in; 300 is usual")
    if options.max_requeues < 0:
        raise UserError("--max-requeues: 0 or more")
    wanted: dict[str, str | None] = {
        "job-name": plan.run_name,
        "nodes": f"{plan.min_nodes}-{plan.nodes}" if plan.is_elastic else str(plan.nodes),
        "ntasks-per-node": str(plan.gpus_per_node),
        **({"gpus-per-node": str(plan.gpus_per_node)} if plan.on_gpu else {}),
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "requeue": "",
        "signal": f"B:USR1@{options.grace}",
        "open-mode": "append",
        "output": f"runs/{plan.run_name.replace('%', '%%')}/slurm-%j.out",
    }
    for given in options.sbatch:
        key, equals, value = given.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key) or (equals and not value):
            raise UserError(
                f"--sbatch: {given!r} is not KEY=VALUE, such as cpus-per-task=12, nor a flag such as exclusive"
            )
        if key in _OURS:
            raise UserError(f"--sbatch {given}: use {_OURS[key]}")
        wanted[key] = value
    found = {key: value for key, value in wanted.items() if value is not None}
    if broken := [key for key, value in found.items() if not value.isprintable() or "\\" in value]:
        raise UserError(f"{broken[0]}: {found[broken[0]]!r} cannot stand in a line of the script")
    return [f"{key}={shlex.quote(value)}" if value else key for key, value in found.items()]


_HEAD = """\
# Written by `llmtrain launch --scheduler slurm`. Edit it freely; sbatch it from the folder that holds runs/.
#
# srun starts one task a rank, with no launcher between: a rank's signals come from SLURM and its exit code goes there.
# - A rank crashes: SLURM ends the others, and all start again from the newest checkpoint, MAX_RESTARTS times.
# - The time limit comes near, or the job is preempted: the ranks get SIGTERM, save and leave, and the job goes back to
#   the queue. The same job then continues, with the same id, and appends to the same output.
# - Exit codes 2 (a mistake in the recipe) and 3 (stopped by bad_steps) end the job: it would end the same way again.
# - scancel JOB ends it for good, after a checkpoint if that takes less than the cluster's KillWait (30 s is usual).
# - A node fails: SLURM itself puts the job back (--requeue).
"""

_BODY = r"""
# Node names that the others cannot resolve, or another network: set LLMTRAIN_MASTER_ADDR before sbatch.
MASTER_ADDR=${LLMTRAIN_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_ADDR RANKS_PER_NODE
export PYTHONUNBUFFERED=1
# Since SLURM 22.05 srun does not take this over by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

REQUEUED=${SLURM_RESTART_COUNT:-0}
export MARKS=$RUN/.slurm-$SLURM_JOB_ID   # how ranks ended, where srun's exit code does not say it
stopping=''

say() { printf 'slurm       %s\n' "$*" >&2; }

# On large clusters a request to SLURM fails now and then ("Socket timed out"); here nobody would repeat it.
ask() {
    "$@" || { sleep 3; "$@"; } || { sleep 9; "$@"; }
}

# The state of this job. One that is cancelled, or requeued by SLURM itself, is RUNNING no longer.
state() { ask squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T; }

finish() {   # exit code, words
    rm -rf "$MARKS"
    say "$2"
    exit "$1"
}

requeue() {   # why
    local now
    now=$(state)
    [ "$now" = RUNNING ] || finish 143 "$1; SLURM has decided what follows: the job is ${now:-gone}"
    [ "$REQUEUED" -lt "$MAX_REQUEUES" ] || finish 143 "$1; requeued $REQUEUED times, which is the limit (MAX_REQUEUES)"
    say "$1; back to the queue (time $((REQUEUED + 1)) of at most $MAX_REQUEUES)"
    rm -rf "$MARKS"
    ask scontrol requeue "$SLURM_JOB_ID" || finish 143 'SLURM does not requeue; sbatch the same script to continue'
    exit 143
}

# SLURM sends USR1 to this script alone, GRACE before the time limit. The ranks are told through SLURM: srun would
# kill them at once if it got SIGTERM itself. Whatever they do, the job is requeued before the limit ends it for good.
at_time_limit() {
    stopping='the time limit is near'
    ask scancel --signal=TERM "$SLURM_JOB_ID"
    (
        trap - TERM
        sleep $((GRACE > 60 ? GRACE - 40 : GRACE / 3))
        # SLURM may leave this one behind when the script has ended: then the job's next start is running by now.
        kill -0 $$ 2>/dev/null && requeue "$stopping, and ranks are still busy"
    ) &
}
trap at_time_limit USR1
# Preempted without a grace period, or cancelled: SLURM sends SIGTERM to the ranks as well. With one, only to the ranks.
trap 'stopping="SLURM has sent SIGTERM"' TERM

# What a task does. SLURM signals this shell, in some set-ups its children as well; a second SIGTERM does no harm.
# shellcheck disable=SC2016  # the variables are those of the task
RANK_SCRIPT='
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
    trap "kill -TERM \$rank 2>/dev/null" TERM
    "$@" &
    rank=$!
    while wait $rank; code=$?; kill -0 $rank 2>/dev/null; do :; done
    case $code in
        143) : >"$MARKS/stopped"; exit 0 ;;   # a bad exit would have the others killed, who may be saving
        2 | 3) echo $code >"$MARKS/pointless" ;;
    esac
    exit $code
'

[ "$REQUEUED" -eq 0 ] || say "start $((REQUEUED + 1)) of this job; the run continues from its newest checkpoint"
restarts=0
while :; do
    rm -rf "$MARKS"
    mkdir -p "$MARKS" || finish 2 "$RUN cannot be written"
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID + restarts * 37) % 10000))
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE)) \
        --ntasks-per-node="$RANKS_PER_NODE" --kill-on-bad-exit=1 bash -c "$RANK_SCRIPT" rank "${TRAIN[@]}" &
    step=$!
    # A signal interrupts `wait`.
    while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done

    if [ -e "$MARKS/pointless" ]; then
        code=$(cat "$MARKS/pointless")
        finish "$code" "exit code $code: the same would happen again, so the job ends here"
    fi
    if [ "$code" -eq 0 ]; then
        [ ! -e "$MARKS/stopped" ] || requeue "${stopping:-SIGTERM}; the ranks have stopped"
        finish 0 'finished'
    fi
    [ -z "$stopping" ] || requeue "$stopping; srun ended with exit code $code"
    [ "$restarts" -lt "$MAX_RESTARTS" ] || finish "$code" "exit code $code from srun; given up after $restarts restarts"
    restarts=$((restarts + 1))
    say "srun ended with exit code $code; restart $restarts of $MAX_RESTARTS from the newest checkpoint"
    sleep 5 & wait $!
    [ -z "$stopping" ] || requeue "$stopping"
done
"""
