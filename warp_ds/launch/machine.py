"""What one machine has for a job, each a line with its cure: packages, GPUs, directories, network, Slurm, model, data."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from warp_ds import errors
from warp_ds.cluster import slurm
from warp_ds.data.datasets import load_samples
from warp_ds.errors import ArtifactError, DataError
from warp_ds.flags.arguments import RunArguments
from warp_ds.phases.versions import shown_versions
from warp_ds.store.fingerprints import model_contents


@dataclass
class Finding:
    """One line: what was looked at, what was found, and what to do where that will not do."""

    name: str
    found: str
    cure: str = ""
    """Empty where all is well."""
    fatal: bool = True
    """False: the job can run, but worse than it might."""


def packages() -> Finding:
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
    return Finding(
        "versions",
        "; ".join(wrong) or shown_versions("python", "torch", "transformers", "deepspeed"),
        "pip install -c constraints.txt -e . (the versions that are known to work together)" if wrong else "",
    )


def devices(arguments: RunArguments) -> Finding:
    """GPUs as torch sees them, and whether they have the dtype."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cards = f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
        if arguments.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("GPUs", f"{cards}, without bfloat16", "--dtype float16 --deepspeed ds_configs/zero3_fp16.json")
        return Finding("GPUs", cards)
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
    """What builds DeepSpeed's own operators."""
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
    """Whether a file can be made in the directory, which is made where it is not there."""
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
    return any(interface.startswith(name) for name in names for interface in _interfaces())


def queue() -> Finding:
    """Whether Slurm answers, where there is one."""
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


def data(name: str, given: str, refusals: str | None = None) -> Finding:
    """Whether a data set is a file here that can be read, or one that would have to be fetched."""
    if Path(given).expanduser().exists():
        try:
            return Finding(f"--{name}", f"{given}: {len(load_samples(given, refusal_file=refusals))} samples")
        except DataError as error:
            return Finding(f"--{name}", str(error), "warp-ds data FILE --model_name MODEL shows what it reads")
    if given.rsplit(".", 1)[-1] in ("json", "jsonl", "csv", "parquet"):
        return Finding(f"--{name}", f"no file {given}", "a path that the compute nodes see too")
    return Finding(
        f"--{name}",
        f"{given}: a hub data set",
        "fetch it where there is internet (with the same HF_HOME), or give a local file",
        fatal=False,
    )
