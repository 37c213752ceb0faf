"""Whether a machine can do a job, with a cure for each line that fails: ``warp-ds doctor``, and the start of every job."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from warp_ds import __version__, errors
from warp_ds.cluster import consensus, memory, processes, slurm
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.groups import RunArguments
from warp_ds.flags.jobs import DoctorArguments
from warp_ds.store.fingerprints import model_contents
from warp_ds.zero import settings

logger = logging.getLogger(__name__)


@dataclass
class Finding:
    """One line: what was looked at, what was found, and what to do where that will not do."""

    name: str
    found: str
    cure: str = ""
    """Empty where all is well."""
    fatal: bool = True
    """False: the job can run, but worse than it might."""


def show(argv: list[str], arguments: DoctorArguments, ignored: list[str]) -> int:
    """Prints what was found; exit status 1 where something would keep the job from running."""
    findings = list(examine(arguments, {word.split("=")[0] for word in argv}))
    table = Table(title=f"{socket.gethostname()}", title_justify="left")
    for name in ("", "checked", "found", "cure"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        mark = "ok" if not finding.cure else "FAILS" if finding.fatal else "note"
        table.add_row(mark, finding.name, finding.found, finding.cure)
    Console(markup=False).print(table)
    if ignored:
        print(f"not looked at: {' '.join(ignored)}")
    return int(any(finding.cure and finding.fatal for finding in findings))


def examine(arguments: DoctorArguments, given: set[str]) -> Iterator[Finding]:
    """What one machine can tell, without ranks. ``given``: the flags on the command line."""
    yield from versions()
    yield devices(arguments)
    yield compiler()
    for name in ("output_dir", "log_dir"):
        yield writable(name, getattr(arguments, name))
    yield network()
    yield queue()
    found, local = model(arguments.model_name)
    yield found
    for name in ("safety_data", "utility_data"):
        if f"--{name}" in given:
            yield data(name, getattr(arguments, name))
    if local is not None:
        yield from needs(arguments, local, arguments.nodes, arguments.gpus_per_node or max(1, torch.cuda.device_count()))


# ---------------------------------------------------------------- one machine


def versions() -> Iterator[Finding]:
    """Every package that this one names, in its range."""
    wrong = []
    try:
        named = importlib.metadata.requires("warp_ds") or []
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        named, wrong = [], ["warp_ds is not installed, so what it needs is not known"]
    for text in named:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(wanted.name)
            if not wanted.specifier.contains(have, prereleases=True):
                wrong.append(f"{wanted.name} {have}, wanted {wanted.specifier}")
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"no {wanted.name}")
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed"))
    yield Finding(
        "versions",
        "; ".join(wrong) or f"Python {sys.version.split()[0]}, {shown}",
        "pip install -c constraints.txt -e . (the versions that are known to work together)" if wrong else "",
    )


def devices(arguments: RunArguments) -> Finding:
    """GPUs as torch sees them, and whether they have the dtype."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found = f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
        if arguments.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("GPUs", f"{found}, without bfloat16", "--dtype float16 --deepspeed ds_configs/zero3_fp16.json")
        return Finding("GPUs", found)
    if shutil.which("nvidia-smi"):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA (a CPU build)"
        return Finding(
            "GPUs",
            f"nvidia-smi is here, but torch sees none; torch is built for {built}",
            "a torch build that the driver supports (nvidia-smi names its newest CUDA); in a job, --gpus-per-node",
        )
    cure = "a node with GPUs, or --device cpu" if arguments.device == "cuda" else ""
    return Finding("GPUs", "none: everything runs on the CPU", cure)


def compiler() -> Finding:
    missing = [name for name in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(name) is None]
    return Finding(
        "compiler",
        f"no {' and no '.join(missing)}" if missing else "C++ compiler and ninja",
        (
            "apt-get install g++ ninja-build, or the cluster's module: DeepSpeed's CPU collective and offloaded Adam want them"
            if missing
            else ""
        ),
        fatal=False,
    )


def writable(name: str, directory: str) -> Finding:
    probe = Path(directory) / f".probe.{uuid.uuid4().hex[:8]}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        return Finding(f"--{name}", f"{directory}: {error.strerror}", f"another --{name}, or write access to this one")
    return Finding(f"--{name}", f"{Path(directory).resolve()} can be written")


def network() -> Finding:
    """Gloo binds to what the host's name resolves to: a loopback address is of no use to other nodes."""
    chosen = {name: os.environ[name] for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if name in os.environ}
    if chosen:
        missing = [f"{k}={v}" for k, v in chosen.items() if not _interface(v)]
        return Finding(
            "network",
            ", ".join(missing or [f"{k}={v}" for k, v in chosen.items()]),
            f"no such interface here: choose from {', '.join(sorted(_interfaces()))}" if missing else "",
        )
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "nothing"
    bad = address == "nothing" or address.startswith("127.")
    return Finding(
        "network",
        f"{socket.gethostname()} resolves to {address}",
        (
            "for CPU ranks on several nodes: GLOO_SOCKET_IFNAME=<interface> of " + ", ".join(sorted(_interfaces() - {"lo"}))
            if bad
            else ""
        ),
        fatal=False,
    )


def _interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def _interface(pattern: str) -> bool:
    """NCCL takes lists of prefixes, '=' before exact names and '^' before those to leave out."""
    if pattern.startswith("^"):
        return True
    names = pattern.removeprefix("=").split(",")
    return any(found.startswith(name) for name in names for found in _interfaces())


def queue() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("Slurm", "no sbatch here (launch/submit.py --cluster local needs none)")
    try:
        slurm.run("squeue", "--me", "--noheader")
        return Finding("Slurm", "squeue answers")
    except errors.SlurmError as error:
        return Finding("Slurm", str(error), "wait until it answers, or ask the cluster's administrators", fatal=False)


def model(name: str) -> tuple[Finding, Path | None]:
    """Whether a compute node without internet would find the model; its directory."""
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith(("/", "./", "../", "~")):
            return Finding("model", f"no directory {name}", "a path that the compute nodes see too"), None
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.json", "*.safetensors"]))
        except (LocalEntryNotFoundError, OSError, ValueError):
            return Finding(
                "model",
                f"{name}: no directory, and not in the hub's cache here",
                (f"hf download {name} where there is internet (with the same HF_HOME), or give a local directory"),
            ), None
    try:
        parts = len(model_contents(path).parts)
    except ArtifactError as error:
        return Finding("model", str(error), "a directory written by save_pretrained"), None
    return Finding("model", f"{path} ({parts} tensors)"), path


def data(name: str, given: str) -> Finding:
    if Path(given).expanduser().exists():
        return Finding(f"--{name}", f"{given} is here")
    if given.rsplit(".", 1)[-1] in ("json", "jsonl", "csv", "parquet"):
        return Finding(f"--{name}", f"no file {given}", "a path that the compute nodes see too")
    return Finding(
        f"--{name}",
        f"{given}: a hub data set",
        "fetch it where there is internet (with the same HF_HOME), or give a local file",
        fatal=False,
    )


def needs(arguments: Any, directory: Path, nodes: int, ranks_per_node: int, phase: str | None = None) -> Iterator[Finding]:
    """Free disk and memory against what ``warp-ds plan`` counts; of one phase ('phase3'), or of the greediest."""
    from warp_ds.launch import plan as planning

    gpu = torch.cuda.is_available() and arguments.resolved_device == "cuda"
    try:
        zero = settings.zero3_config(arguments)["zero_optimization"]
        offloaded = [
            part for part in ("offload_param", "offload_optimizer") if zero.get(part, {}).get("device", "none") != "none"
        ]
        job = planning.Job(
            nodes=nodes,
            gpus_per_node=ranks_per_node,
            dtype=arguments.dtype,
            tokens=arguments.max_length,
            on_gpu=gpu,
            gradient_checkpointing=arguments.gradient_checkpointing,
            offload=("none", "optimizer", "all")[len(offloaded)],
            **{
                name: getattr(arguments, name)
                for name in ("layer_type", "target_layers", "train_scope")
                if hasattr(arguments, name)
            },
        )
        shape = planning.read_shape(str(directory), job.layer_type, job.target_layers)
        counted = planning.needs(shape, job, planning._sharding(shape, job))
    except (ConfigError, ValueError, OSError, KeyError, AttributeError) as error:
        yield Finding("needs", f"not counted: {error}", "see warp-ds plan", fatal=False)
        return
    counted = [c for c in counted if phase is None or c.phase.replace(" ", "") == phase]
    if phase is None:
        counted = counted[1:]  # phase 0 is optional
    if not counted:
        return
    disk = max(counted, key=lambda c: c.disk)
    free = shutil.disk_usage(Path(arguments.output_dir)).free
    yield Finding(
        "disk",
        f"{free / 1e9:.1f} GB free in {arguments.output_dir}, {disk.disk / 1e9:.1f} GB needed by {disk.phase}",
        "free some, or another --output_dir" if free < disk.disk else "",
    )
    host = max(counted, key=lambda c: c.host_total if gpu else c.host_total + c.gpu_total)
    wanted = ranks_per_node * (host.host_total if gpu else host.host_total + host.gpu_total)
    left = memory.available()
    yield Finding(
        "memory",
        f"{left / 1e9:.1f} GB available to this job here, {wanted / 1e9:.1f} GB needed by {host.phase}",
        "more nodes, fewer ranks a node, or a smaller --batch_size: see warp-ds plan" if left < wanted else "",
        fatal=False,
    )
    if gpu:
        most = max(counted, key=lambda c: c.gpu_total)
        have = torch.cuda.get_device_properties(0).total_memory
        yield Finding(
            "GPU memory",
            f"{have / 1e9:.1f} GB a GPU, {most.gpu_total / 1e9:.1f} GB needed by {most.phase}",
            (
                "more nodes, --gradient_checkpointing or an offloading ds_config: see warp-ds plan"
                if have < most.gpu_total
                else ""
            ),
            fatal=False,
        )


# ---------------------------------------------------------------- all ranks, at a job's start


def start_checks(arguments: RunArguments, phase: str) -> None:
    """The same on every rank, before any work: ConfigError on all of them where one cannot do its part. Collective.

    What only may go wrong (memory, disk for what is not written yet) is logged as a warning with its cure.
    """
    token = processes.broadcast_object(uuid.uuid4().hex[:8])
    mark = Path(arguments.output_dir) / f".reach.{token}"
    consensus.on_rank_0(mark.touch, "writing to --output_dir")
    try:
        with consensus.on_every_rank_or_none("checking this rank's machine"):
            _of_this_rank(arguments, mark)
    finally:
        consensus.on_rank_0(lambda: mark.unlink(missing_ok=True), "cleaning up")
    _check_model_path(arguments.model_name)
    ranks = processes.all_gather_object((socket.gethostname(), _versions_of_results()))
    different = [f"rank {r}: {v}" for r, (_, v) in enumerate(ranks) if v != ranks[0][1]]
    if different:
        raise ConfigError(
            f"other versions than rank 0's ({ranks[0][1]}): {'; '.join(different[:3])}: one environment for all "
            "nodes, on a shared file system or in a container"
        )
    begun = time.monotonic()
    processes.all_reduce_sum(torch.ones(1 << 20, device=processes.collective_device()))
    hosts = len({host for host, _ in ranks})
    if processes.rank() == 0:
        logger.info(
            "%d ranks on %d host%s meet: 4 MB all-reduced in %.0f ms",
            len(ranks),
            hosts,
            "s" * (hosts > 1),
            1000 * (time.monotonic() - begun),
        )
    path = Path(arguments.model_name).expanduser()
    if path.is_dir():
        consensus.on_rank_0(lambda: _warn(needs(arguments, path, hosts, -(-len(ranks) // hosts), phase)), "counting the needs")


def _of_this_rank(arguments: RunArguments, mark: Path) -> None:
    if arguments.resolved_device == "cuda" and processes.local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {processes.rank()} on {socket.gethostname()} has no GPU of its own: local rank "
            f"{processes.local_rank()}, but torch sees {torch.cuda.device_count()}: as many ranks a node as GPUs"
        )
    for name in ("output_dir", "log_dir"):
        found = writable(name, getattr(arguments, name))
        if found.cure:
            raise ConfigError(f"{found.name} {found.found} on {socket.gethostname()}: {found.cure}")
    deadline = time.monotonic() + 30  # network file systems remember for a while that a file was not there
    while not mark.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--output_dir {arguments.output_dir} on {socket.gethostname()} is not rank 0's: give a "
                "directory on a file system that all nodes share"
            )
        os.listdir(mark.parent)
        time.sleep(0.2)


def _check_model_path(name: str) -> None:
    """ConfigError on every rank where a path is no directory on some host. Collective."""
    if not name.startswith(("/", "./", "../", "~")):
        return
    found = processes.all_gather_object((socket.gethostname(), Path(name).expanduser().is_dir()))
    without = sorted({host for host, there in found if not there})
    if not without:
        return
    shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
    somewhere = next((host for host, there in found if there), None)
    raise ConfigError(
        f"--model_name {name}: no such directory on {shown}"
        + (f", though there is on {somewhere}: give a directory on a file system that all nodes share" if somewhere else "")
    )


def _versions_of_results() -> str:
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed")}
    return ", ".join(f"{name} {version}" for name, version in {"warp_ds": __version__, **found}.items())


def _warn(findings: Iterator[Finding] | Sequence[Finding]) -> None:
    for finding in findings:
        if finding.cure:
            logger.warning("%s: %s; %s", finding.name, finding.found, finding.cure)
