"""A throw-away Slurm on one machine: slurmctld and two slurmd (nodes n1 and n2) in a temporary folder, as any user.

    with ThrowAwaySlurm(folder) as slurm:
        job = slurm.sbatch("--nodes=2", "slurm/phase1.sbatch", "--model_name", ...)
        state = slurm.wait(job)

What is started is ended again whatever happens: daemons die with this process too (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")
# Without a compiler ranks use plain gloo, as ranks of different hosts do, and no job compiles an operator. For jobs alone:
# in this process's own environment it would reach the ranks of every later test.
PLAIN_GLOO = {"CXX": "no-compiler"}
# Debian's daemons lie in /usr/sbin, which is not on every user's PATH.
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing_programs() -> list[str]:
    """Which of the programs are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


class ThrowAwaySlurm:
    """``folder`` takes configuration, state and logs. Timings are short, so that a lost node is seen within a minute."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "RANK", "WORLD_SIZE"))},
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **PLAIN_GLOO,
        }

    def __enter__(self) -> ThrowAwaySlurm:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in ("state", "spool_n1", "spool_n2"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(self._configuration())
        # GPUs that are a number alone: enough for --gpus-per-node to be asked for and answered.
        (self.folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero\n")
        try:
            key, socket_path = self.folder / "munge.key", self.folder / "munge.socket"
            self.run("mungekey", "--create", f"--keyfile={key}")
            self._start(
                "munged",
                "munged",
                "--foreground",
                f"--key-file={key}",
                f"--socket={socket_path}",
                f"--pid-file={self.folder / 'munged.pid'}",
                f"--log-file={self.folder / 'munged.log'}",
                f"--seed-file={self.folder / 'munged.seed'}",
                "--num-threads=2",
                "--force",
            )
            _until(socket_path.exists, "munged's socket")
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for node in NODES:
                self.start_node(node)
            _until(lambda: all(self.node_state(node).startswith("IDLE") for node in NODES), "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        # With jobs running or nodes in use, slurmd and its step daemons would hang at their end.
        self._try("scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and self._try("squeue", "--noheader").strip():
            time.sleep(0.2)
        for name in ("slurmctld", *NODES, "munged"):
            daemon = self.daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(3)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        # Step daemons outlive a killed slurmd, and so do their tasks.
        for pid in self._orphans():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    # ------------------------------------------------------------ jobs

    def run(self, *command: str, **more: Any) -> str:
        """Standard output of a command against this cluster; CalledProcessError where it fails."""
        more = {"env": self.environment, "text": True, "check": True, "capture_output": True, **more}
        return str(subprocess.run(command, **more).stdout)

    def sbatch(self, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
        """The job id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env={**self.environment, **environment}).strip()

    def job(self, job: str) -> dict[str, str]:
        """``scontrol show job`` as a mapping."""
        text = self.run("scontrol", "-o", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 600) -> str:
        """The job's state, once it is among ``states`` (default: ended). A requeued job does not wait its time out."""
        wanted, deadline, state = states or ENDED, time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            found = self.job(job)
            state = found["JobState"]
            if state in wanted and not (state in ENDED and found.get("EndTime") == "Unknown"):
                return state
            if state == "PENDING" and found["Reason"] == "BeginTime":
                self._try("scontrol", "update", f"jobid={job}", "StartTime=now")
            time.sleep(0.3)
        raise TimeoutError(f"job {job} is {state}, not {wanted}, after {seconds} s")

    def restarts(self, job: str) -> int:
        return int(self.job(job)["Restarts"])

    # ------------------------------------------------------------ nodes

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def kill_node(self, node: str) -> None:
        """kill -9 of the node's slurmd alone."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def node_state(self, node: str) -> str:
        try:
            text = self.run("scontrol", "-o", "show", "node", node)
        except subprocess.CalledProcessError:
            return ""
        return text.split("State=", 1)[1].split()[0]

    # ------------------------------------------------------------ inside

    def _start(self, name: str, *command: str) -> None:
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115
        self.daemons[name] = subprocess.Popen(
            command,
            env=self.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
            cwd=self.folder,
        )
        log.close()

    def _try(self, *command: str) -> str:
        try:
            return self.run(*command, timeout=10)
        except (subprocess.SubprocessError, OSError):
            return ""

    def _orphans(self) -> list[int]:
        """Processes whose environment or command line names this folder."""
        mark, found = str(self.folder / "slurm.conf").encode(), []
        spool = str(self.folder / "spool_").encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            except OSError:
                continue
            if int(process.name) != os.getpid() and (mark in text or spool in text):
                found.append(int(process.name))
        return found

    def _configuration(self) -> str:
        """slurm.conf. Job ids start where no other cluster's on this machine do: ports follow them."""
        user, host, ports = getpass.getuser(), socket.gethostname().split(".")[0], _free_ports(3)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory={memory} Gres=gpu:2"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        return f"""
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={self.folder / "munge.socket"},cred_expire=10
StateSaveLocation={self.folder / "state"}
SlurmdSpoolDir={self.folder}/spool_%n
SlurmctldPidFile={self.folder / "slurmctld.pid"}
SlurmdPidFile={self.folder}/slurmd_%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
GresTypes=gpu
MaxArraySize=100
FirstJobId={1 + os.getpid() % 50_000}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _die_with_parent() -> None:
    ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _until(true: Any, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {seconds} s")
        time.sleep(0.05)
