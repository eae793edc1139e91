"""The command `launch`: checks the recipe, says what it runs, and runs it."""

import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmtrain import trust
from llmtrain.errors import UserError
from llmtrain.launching.devices import count_gpus
from llmtrain.launching.kubernetes import KubernetesOptions, manifest
from llmtrain.launching.network import address_for_others, interface_of, is_own
from llmtrain.launching.plan import VERDICT, LaunchPlan, check_ranks, shell
from llmtrain.launching.rank import ELASTIC
from llmtrain.launching.slurm import SlurmOptions, script, submit
from llmtrain.launching.supervisor import Job, inherited, of_a_launch, say, supervise
from llmtrain.launching.variables import parse_variables
from llmtrain.recipe.check import summary
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.recipe import Recipe
from llmtrain.redaction import redact_arguments, redact_variables

SCHEDULERS = ("local", "torchrun", "slurm", "kubernetes")
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""With it ranks meet in a store that is new after each restart. Else they do in torchrun's own, under the number of
restarts that their host has seen: after a partition, or where a host came back, hosts have seen different numbers, and
ranks wait for each other at addresses of processes that are gone (torch 2.15; found with two network namespaces)."""


@dataclass(frozen=True)
class Options:
    """How `llmtrain launch` starts a recipe.

    Attributes:
        scheduler: of SCHEDULERS; None takes `local` for one host and `torchrun` for several.
        nodes: hosts.
        min_nodes: hosts with which the run still goes on; None: all of them.
        gpus_per_node: ranks on each host; None counts this machine's GPUs, and takes one rank where there is none.
        max_restarts: restarts after crashes.
        rdzv_endpoint: HOST:PORT of the first host.
        rdzv_conf: more of torchrun's `--rdzv-conf`.
        local_addr: address of this host that the others reach; None finds it.
        node_rank: with it, several hosts are started by Composer's launcher, which needs a number for each.
        grace: seconds that ranks have to save and end after SIGTERM.
        restart_preempted: start again, too, when somebody else sent the ranks SIGTERM.
        only_print: print the commands and run nothing.
        on_cpu: ranks are processes on CPUs, so a scheduler is asked for no GPUs.
        variables: `KEY=VALUE` for the ranks.
        slurm: what SLURM is asked for.
        kubernetes: what Kubernetes is asked for.
    """

    scheduler: str | None = None
    nodes: int = 1
    min_nodes: int | None = None
    gpus_per_node: int | None = None
    max_restarts: int = 3
    rdzv_endpoint: str | None = None
    rdzv_conf: str | None = None
    local_addr: str | None = None
    node_rank: int | None = None
    grace: float = 300.0
    restart_preempted: bool = False
    only_print: bool = False
    on_cpu: bool = False
    variables: Sequence[str] = ()
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    kubernetes: KubernetesOptions = field(default_factory=KubernetesOptions)


def launch_command(path: Path, overrides: Sequence[str], options: Options) -> int:
    """Checks the recipe, prints the command, and runs it until the run is finished or beyond help.

    Returns:
        An exit code of `llmtrain.training.exit_codes`, or 128 + a signal's number.

    Raises:
        UserError: the recipe or the options are wrong; nothing was started.
    """
    for key in [key for key in os.environ if of_a_launch(key)]:
        del os.environ[key]  # of an outer launch: this one is about other ranks
    scheduler = _check_options(options)
    recipe = load_recipe(path, overrides)
    plan = _plan(path, overrides, options, recipe)
    _check_trust(recipe)
    _check_restarts(recipe, scheduler, options)
    notes = check_ranks(recipe, plan)
    if not options.only_print:
        for line in (*summary(recipe), *notes):
            say(line)
    if scheduler == "local":
        return _local(plan, recipe, options)
    if scheduler == "torchrun":
        return _several_hosts(plan, recipe, options)
    if scheduler == "slurm":
        return _slurm(plan, options)
    asked = replace(options.kubernetes, grace=int(options.grace))
    print(manifest(plan, asked, save_folder=recipe.save_folder), end="")
    return 0


def _check_options(options: Options) -> str:
    """The scheduler.

    Raises:
        UserError: options that do not go together.
    """
    scheduler = options.scheduler or ("local" if options.nodes == 1 else "torchrun")
    if scheduler not in SCHEDULERS:
        raise UserError(f"--scheduler: {scheduler!r} is none of {', '.join(SCHEDULERS)}")
    if options.min_nodes is not None and options.min_nodes > options.nodes:
        raise UserError(f"--min-nodes: {options.min_nodes} is more than --nodes {options.nodes}")
    if scheduler in ("slurm", "kubernetes") and options.gpus_per_node is None:
        raise UserError(f"--gpus-per-node: {scheduler}'s nodes are others than this machine; say how many they have")
    if scheduler == "local" and options.nodes > 1:
        raise UserError(f"--scheduler: local is for one host, and --nodes is {options.nodes}: use torchrun")
    if scheduler == "torchrun" and options.rdzv_endpoint is None and options.nodes > 1:
        raise UserError(
            "--rdzv-endpoint: several hosts need HOST:PORT of one of them, which all of them reach, such as "
            f"{socket.gethostname()}:29500"
        )
    if options.node_rank is not None:
        if scheduler != "torchrun":
            raise UserError("--node-rank: it is for several hosts under --scheduler torchrun")
        if not 0 <= options.node_rank < options.nodes:
            raise UserError(f"--node-rank: {options.node_rank} is not between 0 and --nodes {options.nodes} - 1")
        if options.min_nodes not in (None, options.nodes):
            raise UserError(
                "--node-rank: numbered hosts are started by Composer's launcher, and it needs all of them: leave out "
                "--node-rank, or --min-nodes"
            )
    return scheduler


def _plan(path: Path, overrides: Sequence[str], options: Options, recipe: Recipe) -> LaunchPlan:
    gpus = options.gpus_per_node
    counted = count_gpus() if gpus is None else 0
    variables = parse_variables(options.variables)
    if taken := [key for key in variables if of_a_launch(key)]:
        raise UserError(f"--env: {taken[0]} is the launcher's to set, for each rank")
    environment = {**variables, **({trust.VARIABLE: "1"} if trust.trusted() else {})}
    return LaunchPlan(
        recipe=path,
        overrides=tuple(overrides),
        run_name=recipe.run_name,
        nodes=options.nodes,
        min_nodes=options.min_nodes or options.nodes,
        gpus_per_node=gpus if gpus is not None else max(1, counted),
        on_gpu=not options.on_cpu and (gpus is not None or counted > 0),
        max_restarts=options.max_restarts,
        rdzv_endpoint=options.rdzv_endpoint,
        rdzv_conf=options.rdzv_conf,
        trust_code=trust.trusted(),
        environment=environment,
    )


def _check_trust(recipe: Recipe) -> None:
    needed = trust.needed(recipe.model_dump(mode="json"))
    if needed and not trust.trusted():
        named = "\n  ".join(needed)
        raise UserError(f"the recipe would run code:\n  {named}\nRead it, and if you trust it, give {trust.FLAG}.")


def _check_restarts(recipe: Recipe, scheduler: str, options: Options) -> None:
    if recipe.save_overwrite and (options.max_restarts > 0 or scheduler in ("slurm", "kubernetes")):
        once = "" if scheduler in ("slurm", "kubernetes") else ", or give --max-restarts 0"
        raise UserError(
            "save_overwrite: true begins the run anew at each restart, and deletes what it had saved before. Leave it "
            f"out and take another run_name (or remove the checkpoints of the run before){once}."
        )


def _local(plan: LaunchPlan, recipe: Recipe, options: Options) -> int:
    command, extra = plan.composer(), dict(plan.environment)
    if options.only_print:
        print(_shown(command, extra))
        return 0
    say(_shown(command, extra))
    return supervise(_job(plan, recipe, options, program(command), inherited(extra)))


def _several_hosts(plan: LaunchPlan, recipe: Recipe, options: Options) -> int:
    """This host's part; the others run the same command, or what is printed."""
    if options.rdzv_endpoint is None:  # one host, and torchrun all the same
        plan = replace(plan, rdzv_endpoint="127.0.0.1:0")
    composer = options.node_rank is not None
    command = plan.composer(options.node_rank) if composer else plan.torchrun()
    shared = dict(plan.environment)
    if not composer:
        shared |= {VERDICT: str(_verdict(plan)), OWN_STORE: "1"} | ({ELASTIC: "1"} if plan.is_elastic else {})
    if options.only_print:
        _print_for_all(plan, shared)
        return 0
    host, port = plan.endpoint()
    address = options.local_addr or address_for_others(host, port)
    extra = {**shared, **_interface(address)}
    if not composer:
        extra.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(options.grace)))
        command = _with_local_address(plan, command, address)
    say(f"on this host: {_shown(command, extra)}")
    if options.nodes > 1:
        say(f"{options.nodes - 1} other host(s): the same llmtrain launch" + (", numbered" if composer else ""))
    job = replace(_job(plan, recipe, options, program(command), inherited(extra)), port=port or None)
    if composer:
        return supervise(job)
    return supervise(replace(job, elastic=True, verdict=_verdict(plan)))


def _print_for_all(plan: LaunchPlan, shared: Mapping[str, str]) -> None:
    host, _ = plan.endpoint()
    elastic = f", {plan.min_nodes} of them at least" if plan.is_elastic else ""
    print(f"# on each of {plan.nodes} hosts{elastic}; {host} must be one of them:")
    print(_shown(plan.torchrun(), shared))
    if plan.nodes > 1 and not plan.is_elastic:
        print(f"# or by Composer's launcher, which restarts nothing; {host} is the first:")
        for rank in range(plan.nodes):
            print(_shown(plan.composer(rank), plan.environment))


def _shown(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """A command as one types it, but without secrets: what is printed ends up in logs."""
    return shell(redact_arguments(command), redact_variables(variables))


def _with_local_address(plan: LaunchPlan, command: list[str], address: str | None) -> list[str]:
    """The command with what torchrun cannot always find out: this host's address, and whether it is the endpoint's."""
    host, _ = plan.endpoint()
    options = [] if address is None else ["--local-addr", address]
    if is_own(host) and not (plan.rdzv_conf and "is_host" in plan.rdzv_conf):
        plan = replace(plan, rdzv_conf=",".join(filter(None, [plan.rdzv_conf, "is_host=1"])))
        command = plan.torchrun()
    return [command[0], *options, *command[1:]]


def _interface(address: str | None) -> dict[str, str]:
    """Gloo takes the interface that has this machine's name, which is not always the one that leads to the others."""
    if address is None or GLOO_INTERFACE in os.environ or (interface := interface_of(address)) is None:
        return {}
    return {GLOO_INTERFACE: interface}


def _slurm(plan: LaunchPlan, options: Options) -> int:
    text = script(plan, replace(options.slurm, grace=int(options.grace)))
    if options.only_print:
        print(text, end="")
        return 0
    job = submit(text, plan)
    say(f"job {job}: runs/{plan.run_name}/slurm.sh; its output: runs/{plan.run_name}/slurm-{job}.out")
    print(job)
    return 0


def _job(
    plan: LaunchPlan, recipe: Recipe, options: Options, command: Sequence[str], environment: Mapping[str, str]
) -> Job:
    folder = recipe.save_folder.replace("{run_name}", recipe.run_name) if recipe.save_folder else None
    return Job(
        command=lambda: command,
        environment=environment,
        run=Path("runs") / recipe.run_name,
        save_folder=Path(folder) if folder and "://" not in folder else None,
        max_restarts=plan.max_restarts,
        restart_preempted=options.restart_preempted,
        grace=options.grace,
    )


def _verdict(plan: LaunchPlan) -> Path:
    """Beside the run's folder: a rank may end before there is one. All hosts see it where they share the disk.

    Each launch has its own: one by mistake, of a run that is going on, must not end that one's next restart.
    """
    launch = plan.endpoint()[1] or f"pid{os.getpid()}"
    return Path("runs").absolute() / f".{plan.run_name}.{launch}.verdict"


def program(command: Sequence[str]) -> list[str]:
    """A command with the launcher of this Python, whatever PATH says."""
    beside = Path(sys.executable).with_name(command[0])
    found = str(beside) if beside.is_file() else shutil.which(command[0])
    if found is None:
        raise UserError(f"{command[0]}: not found beside {sys.executable}, nor in PATH")
    return [found, *command[1:]]
