"""A SLURM cluster of one's own on this machine: munged, slurmctld and two slurmd, for tests of batch scripts."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_SYSTEM = ":/usr/sbin:/sbin"  # where daemons are, which the PATH of a user may lack


def missing() -> str | None:
    """Why there can be no cluster here; None where there can be one."""
    path = os.environ.get("PATH", "") + _SYSTEM
    if absent := [program for program in _PROGRAMS if shutil.which(program, path=path) is None]:
        return f"SLURM is not installed: no {', '.join(absent)} (scripts/ci/install-services.sh installs it)"
    if os.geteuid() != 0:
        return "slurmd has to be started by root"
    return None


@dataclass(frozen=True)
class Job:
    """A job, as `scontrol show job` tells it.

    Attributes:
        state: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ...
        restarts: how often it was requeued.
        exit_code: of the batch script.
    """

    state: str
    restarts: int
    exit_code: int


class Cluster:
    """Two nodes on this machine, without systemd, cgroups or accounting; a context manager.

    The first node has this machine's name, which resolves; the other has a name that does not. Partitions: `low`, whose
    jobs are requeued at once when `high` wants their nodes; `grace`, the same after `grace_seconds`; `high`.

    Args:
        cpus: of each node, whatever this machine has.
        grace_seconds: GraceTime of the partition `grace`.
        kill_wait: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, *, cpus: int = 2, grace_seconds: int = 60, kill_wait: int = 30) -> None:
        self.cpus, self.grace_seconds, self.kill_wait = cpus, grace_seconds, kill_wait
        # Short: the path of munge's socket must fit into 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        self.nodes = (host, f"{host}-second")
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """For SLURM's commands."""
        path = os.environ.get("PATH", "") + _SYSTEM
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        return {**inherited, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """The output of one of SLURM's commands.

        Raises:
            RuntimeError: it failed.
        """
        variables = {**self.environment, **(env or {})}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd, check=False, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def job(self, job_id: str) -> Job:
        """What became of a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id)
        told = dict(field.split("=", 1) for field in text.split() if "=" in field)
        return Job(told["JobState"], int(told["Restarts"]), int(told["ExitCode"].split(":")[0]))

    def wait_until(self, happened: Callable[[], bool], what: str, timeout: float, told: Callable[[], str]) -> None:
        """Waits for something to happen.

        Raises:
            TimeoutError: it did not; the message ends with what `told` says, and the daemons' logs.
        """
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not happen in {timeout} s\n{told()}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def stop(self) -> None:
        """Ends jobs and daemons, and removes everything."""
        if (self.folder / "slurm.conf").exists() and self._daemons:
            for how in (["--signal=KILL", "--full"], []):
                command = ["scancel", "--user=root", *how]
                subprocess.run(command, env=self.environment, capture_output=True, check=False, timeout=60)
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        self._kill_what_is_left()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill_what_is_left(self) -> None:
        """Steps whose end nobody has waited for; they are known by the configuration in their environment."""
        ours = str(self.folder / "slurm.conf")
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == ours:
                    process.kill()
            except psutil.Error:
                continue

    def _start(self) -> None:
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        socket_path = self.folder / "munge" / "socket"
        (self.folder / "slurm.conf").write_text(self._configuration(socket_path))
        munge = self.folder / "munge"
        self._daemon(
            *("munged", "--foreground", "--force", f"--socket={socket_path}", f"--key-file={key}"),
            *(
                f"--pid-file={munge / 'pid'}",
                f"--seed-file={munge / 'seed'}",
                f"--log-file={self.folder / 'log/munged'}",
            ),
        )
        self.wait_until(socket_path.exists, "the start of munged", 15, lambda: "")
        self._daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))
        self.wait_until(self._is_idle, "the start of SLURM", 30, lambda: "")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / "log" / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        with log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _is_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--partition=low", "--Node", "--format=%T")
        except RuntimeError:
            return False
        return states.split() == ["idle"] * len(self.nodes)

    def _configuration(self, munge: Path) -> str:
        ports = _free_ports(1 + len(self.nodes))
        host, names = socket.gethostname().split(".")[0], ",".join(self.nodes)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        )
        low = f"Nodes={names} PriorityTier=1 PreemptMode=REQUEUE"
        return f"""\
ClusterName=llmtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld
SlurmdLogFile={self.folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait={self.kill_wait}
MailProg=/bin/true
{nodes}
PartitionName=low {low} Default=YES GraceTime=0
PartitionName=grace {low} GraceTime={self.grace_seconds}
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF
"""


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()
