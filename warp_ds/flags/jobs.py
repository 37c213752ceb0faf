"""The flags of what looks at, or queues, a job before it runs: submit, plan and doctor."""

from __future__ import annotations

from dataclasses import dataclass

from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.flags.controls import ControlFlags
from warp_ds.flags.flag import again, flag
from warp_ds.flags.groups import (
    AdapterFlags,
    BasisFlags,
    ColumnArguments,
    LayerArguments,
    MaskedTrainingFlags,
    MaskFlags,
    RunArguments,
    SafetyDataArguments,
    ScheduleFlags,
    TrainingFlags,
    UtilityDataArguments,
)
from warp_ds.registry import IN_A_CHAIN

OFFLOADS = ("none", "optimizer", "all")


@dataclass
class NodeFlags:
    """The machines of a job."""

    nodes: int = flag(1, "nodes of each job")
    gpus_per_node: int = flag(0, "GPUs of each node; one rank each")


@dataclass
class PlanArguments(AdapterFlags, MaskedTrainingFlags, LayerArguments, NodeFlags):
    """What changes what a job needs."""

    model_name: str = again(RunArguments, "model_name", "", "hub name, local folder, or a config.json")
    gpus_per_node: int = again(NodeFlags, "gpus_per_node", 8)
    gpu_memory: float = flag(80.0, "GB of one GPU")
    host_memory: float | None = flag(None, "GB of one node; not checked where not given")
    offload: str = flag("none", "what lies in host memory", choices=OFFLOADS)
    dtype: str = again(RunArguments, "dtype", RunArguments.dtype)
    safety_samples: int | None = again(SafetyDataArguments, "safety_samples", None, "of phases 0, 1 and 2; else 100, 100, 50")
    utility_samples: int = again(UtilityDataArguments, "utility_samples", UtilityDataArguments.utility_samples)
    batch_size: int | None = again(RunArguments, "batch_size", None, "micro-batch of every phase; else 4, phase 3: 2")
    global_batch_size: int = again(ScheduleFlags, "global_batch_size", ScheduleFlags.global_batch_size)
    objective: str = again(
        ControlFlags,
        "objective",
        ControlFlags.objective,
        "of phase 3, which keeps start logits: der of --safety_samples samples",
    )
    importance_batch_size: int = again(MaskFlags, "importance_batch_size", MaskFlags.importance_batch_size)
    keep_ratio: float = again(MaskFlags, "keep_ratio", MaskFlags.keep_ratio, "LoRA: share of the columns to freeze")
    mask_unit: str = again(
        ImportanceArguments, "mask_unit", ImportanceArguments.mask_unit, "what phase 2's masks freeze; LoRA: columns"
    )
    epochs: float = again(ScheduleFlags, "epochs", ScheduleFlags.epochs)
    max_length: int = again(RunArguments, "max_length", RunArguments.max_length, "tokens of a sample, at most")
    max_rank: int = again(BasisFlags, "max_rank", BasisFlags.max_rank)
    expert_basis: str = again(BasisFlags, "expert_basis", BasisFlags.expert_basis)
    output_basis: str = again(
        BasisArguments, "output_basis", BasisArguments.output_basis, "basis V of the outputs, as phase 1's"
    )
    gradient_checkpointing: bool = again(RunArguments, "gradient_checkpointing", RunArguments.gradient_checkpointing)


@dataclass
class DoctorArguments(NodeFlags, UtilityDataArguments, SafetyDataArguments, LayerArguments, TrainingFlags):
    """The flags that decide what a job needs of its machines; those of the phases, and the machines themselves."""

    gpus_per_node: int = again(NodeFlags, "gpus_per_node", 0, "GPUs of each node; 0 = as many as there are here")
    expert_basis: str = again(BasisFlags, "expert_basis", BasisFlags.expert_basis)
    mask_unit: str = again(ImportanceArguments, "mask_unit", ImportanceArguments.mask_unit)


@dataclass
class DataArguments(ColumnArguments, RunArguments):
    """What of a phase's flags decides how its samples are read."""

    split: str = flag("train", "split of a hub data set, or of a directory that has several")
    samples: int = flag(0, "how many of them, in order; 0 = all")
    refusal_file: str | None = again(
        SafetyDataArguments, "refusal_file", None, "refusals, one a line, for prompts without responses"
    )


@dataclass
class SubmitArguments(NodeFlags):
    """What is queued, and where; every other flag goes to the phases that have it."""

    phases: str = flag("1,2,3", f"which phases, comma-separated: {IN_A_CHAIN}")
    cluster: str = flag(
        "slurm",
        "slurm, local (ranks of this machine) or debug (one rank, in this process)",
        choices=["slurm", "local", "debug"],
    )
    ranks_per_node: int = flag(0, "ranks of each node where they are not its GPUs (CPU nodes)")
    cpus_per_rank: int = flag(0, "cores of each rank; 0 leaves it to Slurm")
    parallel: int = flag(0, "seeds of a comparison (tasks of its job array) that run at once; 0 = all")
    hours: float = flag(8.0, "time limit of each job; a job that reaches it saves, and goes on in another")
    warning_seconds: int = flag(120, "how long before the time limit the ranks are told to save")
    partition: str | None = flag(None, "Slurm partition")
    account: str | None = flag(None, "Slurm account")
    slurm: list[str] = flag([], "further sbatch options, as NAME=VALUE or NAME")
    setup: list[str] = flag([], "shell lines before the ranks start, such as 'module load cuda'")
    python: str | None = flag(None, "what starts Python in the job: 'apptainer exec --nv image.sif python'; else this one")
    output_dir: str = flag("checkpoints", "where the chain's directory is made")
    run_name: str | None = flag(None, "its name; else by time, or the newest unfinished one of the same command")
    status: str | None = flag(None, "show a chain's state, following it, and do nothing else")
    cancel: str | None = flag(None, "end a chain's jobs, and do nothing else")
