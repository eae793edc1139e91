"""What `llmtrain launch` is going to start: which recipe, on how many hosts, and the command of each. Light."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.errors import UserError
from llmtrain.recipe.batch import batch_plan

if TYPE_CHECKING:
    from llmtrain.recipe.recipe import Recipe

PORT = 29500
"""Port of the rendezvous (torchrun) or of rank 0's store (composer) where several hosts need one and none was given."""

RANK_MODULE = "llmtrain.launching.rank"
"""What torchrun starts as a rank: `llmtrain.training.command`, and what torchrun does not do by itself."""

VERDICT = "LLMTRAIN_VERDICT"
"""Environment variable: the file where a rank writes an exit code after which a restart is pointless."""


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that the commands of a launch are made from.

    Attributes:
        recipe: the training recipe, as the user wrote its path.
        overrides: `key=value`, as on the command line.
        run_name: of the loaded recipe; names jobs, rendezvous and files.
        nodes: hosts.
        min_nodes: hosts with which the run still goes on; `nodes` where it is not elastic.
        gpus_per_node: ranks on each host: one a GPU, or processes on a CPU.
        on_gpu: whether those are GPUs.
        max_restarts: restarts after crashes until the launch gives up.
        rdzv_endpoint: HOST:PORT of the first host, which all hosts reach; None on one host.
        rdzv_conf: more of torchrun's `--rdzv-conf`: "join_timeout=1200".
        trust_code: the recipe may run code that it names.
        environment: variables for the ranks, beyond those that are inherited.
    """

    recipe: Path
    overrides: tuple[str, ...] = ()
    run_name: str = ""
    nodes: int = 1
    min_nodes: int = 1
    gpus_per_node: int = 1
    on_gpu: bool = True
    max_restarts: int = 3
    rdzv_endpoint: str | None = None
    rdzv_conf: str | None = None
    trust_code: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Processes on all hosts."""
        return self.nodes * self.gpus_per_node

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on with fewer hosts."""
        return self.min_nodes < self.nodes

    @property
    def arguments(self) -> list[str]:
        """What stands behind `train.py`, `llmtrain train` or the module: the recipe and its overrides."""
        return [*(["--trust-code"] if self.trust_code else []), str(self.recipe), *self.overrides]

    def endpoint(self) -> tuple[str, int]:
        """Host and port of `rdzv_endpoint`.

        Raises:
            UserError: there is none, or its port is no number.
        """
        if self.rdzv_endpoint is None:
            raise UserError("--rdzv-endpoint: several hosts need HOST:PORT of one of them, which all of them reach")
        host, colon, port = self.rdzv_endpoint.rpartition(":")
        if not colon or "]" in port:  # no port, or an IPv6 address without one
            host, port = self.rdzv_endpoint, str(PORT)
        lowest = 0 if self.nodes == 1 else 1  # on one host any port that is free will do
        if not host or not port.isdigit() or not lowest <= int(port) < 65536:
            raise UserError(f"--rdzv-endpoint: {self.rdzv_endpoint!r} is not HOST:PORT, such as node1:{PORT}")
        return host, int(port)

    def composer(self, node_rank: int | None = None, *, port: int | None = None) -> list[str]:
        """Composer's launcher for one host (`node_rank` is None), or for one of several that do not change.

        Args:
            node_rank: of this host, 0 where the endpoint is.
            port: of rank 0's store; the endpoint's on several hosts, and left to Composer on one.
        """
        launcher = ["composer", "-n", str(self.gpus_per_node)]
        if node_rank is not None:
            host, endpoint_port = self.endpoint()
            port = port or endpoint_port
            launcher += ["--world_size", str(self.ranks), "--node_rank", str(node_rank), "--master_addr", host]
        if port is not None:
            launcher += ["--master_port", str(port)]
        return [*launcher, "-m", "llmtrain.training.command", *self.arguments]

    def torchrun(self) -> list[str]:
        """Torchrun for each of the hosts: they find each other at the endpoint, and any of them may come back."""
        host, port = self.endpoint()
        nodes = f"{self.min_nodes}:{self.nodes}" if self.is_elastic else str(self.nodes)
        return [
            *("torchrun", "--nnodes", nodes, "--nproc-per-node", str(self.gpus_per_node)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", self.run_name),
            *(("--rdzv-conf", self.rdzv_conf) if self.rdzv_conf else ()),
            *("--max-restarts", str(self.max_restarts)),
            *("-m", RANK_MODULE, *self.arguments),
        ]


def check_ranks(recipe: "Recipe", plan: LaunchPlan) -> list[str]:
    """Whether the recipe's global batch divides over the ranks of the plan; notes about what it means.

    Raises:
        UserError: it does not, with all hosts or with the fewest; the message names sizes that work.
    """
    notes = list(batch_plan(recipe, plan.ranks).notes)
    if plan.is_elastic:
        batch_plan(recipe, plan.min_nodes * plan.gpus_per_node)
        if odd := [n for n in range(plan.min_nodes + 1, plan.nodes) if not _divides(recipe, n * plan.gpus_per_node)]:
            numbers = ", ".join(map(str, odd))
            notes.append(
                f"with {numbers} hosts, global_train_batch_size {recipe.global_train_batch_size} cannot be split: "
                "the run waits then until there are more."
            )
    return notes


def _divides(recipe: "Recipe", ranks: int) -> bool:
    try:
        batch_plan(recipe, ranks)
    except UserError:
        return False
    return True


def shell(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """A command as one types it, quoted, with the variables that it needs in front."""
    variables = [f"{key}={shlex.quote(value)}" for key, value in (environment or {}).items()]
    return " ".join([*variables, shlex.join(command)])
