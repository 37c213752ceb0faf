"""The flags of each phase: groups.py's, put together, and what is a phase's own. Parsed by transformers' HfArgumentParser.

Flags come from the command line or a YAML file (``--config``); the command line wins.
"""

from __future__ import annotations

from dataclasses import dataclass

from warp_ds.flags.checks import at_least, check_keep_ratio, check_rank, check_training
from warp_ds.flags.controls import ControlFlags, TrainedGrowingFlags, TrainedMethodFlags
from warp_ds.flags.flag import again, flag, samples
from warp_ds.flags.groups import (
    BasisFlags,
    HeldOutArguments,
    LayerArguments,
    MaskedTrainingFlags,
    MaskFlags,
    PackingFlags,
    ProductFlags,
    PublishFlags,
    RunArguments,
    SafetyDataArguments,
    TrainingFlags,
    UtilityDataArguments,
)
from warp_ds.models.layer_names import parse_layer_types


@dataclass
class SafetyTuningArguments(PublishFlags, SafetyDataArguments, TrainingFlags):
    """Phase 0, safety tuning: trains every parameter (or an adapter) on refusals, where a model has none worth keeping.
    Writes RUN/model. Example: warp-ds phase0 --model_name MODEL --safety_data refusals.jsonl"""

    def check(self) -> None:
        super().check()
        check_training(self)
        at_least(self, "safety_samples", 0)


@dataclass
class BasisArguments(BasisFlags, PublishFlags, SafetyDataArguments, LayerArguments, PackingFlags):
    """Phase 1, basis: the eigenvectors U of what each layer is given on examples of what must stay. Reads a model, writes
    basis files to its run directory. Example: warp-ds phase1 --model_name MODEL --safety_data refusals.jsonl"""

    basis: str = flag(
        "activation",
        "activation, identity, weight (right singular vectors of W) or random",
        choices=("activation", "identity", "weight", "random"),
    )
    output_basis: str = flag(
        "identity",
        "basis V of each layer's outputs too, so that C = Vᵀ W U: identity (none), activation (eigenvectors of the outputs' "
        "covariance W Σ Wᵀ) or gradient (of the outputs' gradients)",
        choices=("identity", "activation", "gradient"),
    )

    def check(self) -> None:
        super().check()
        at_least(self, "safety_samples", 0)
        parse_layer_types(self.layer_type)
        check_rank(self)


@dataclass
class ImportanceArguments(MaskFlags, ProductFlags, PublishFlags, SafetyDataArguments, LayerArguments, PackingFlags):
    """Phase 2, importance: scores each coefficient of C = W U by its gradient on the same examples and marks the share
    --keep_ratio to freeze. Reads phase 1's basis, writes masks to its run directory. Example: warp-ds phase2 --model_name
    MODEL --safety_data refusals.jsonl --basis_dir checkpoints/phase1_latest"""

    safety_samples: int = again(SafetyDataArguments, "safety_samples", 50)
    basis_dir: str | None = flag(
        None, "basis of phase 1; the newest finished one under --output_dir if not given", reads="basis"
    )
    basis: str = flag("auto", "auto (what --basis_dir holds) or identity (needs no basis files)", choices=("auto", "identity"))
    mask_unit: str = flag("entry", "what is frozen together: entry, column or row", choices=("entry", "column", "row"))
    score: str = flag("importance", "importance, singular_value or random", choices=("importance", "singular_value", "random"))

    def check(self) -> None:
        super().check()
        at_least(self, "safety_samples", 0)
        at_least(self, "importance_batch_size", 1)
        parse_layer_types(self.layer_type)
        check_keep_ratio(self.keep_ratio)


@dataclass
class TrainArguments(
    TrainedGrowingFlags,
    MaskedTrainingFlags,
    ProductFlags,
    TrainedMethodFlags,
    ControlFlags,
    PublishFlags,
    UtilityDataArguments,
    LayerArguments,
    TrainingFlags,
):
    """Phase 3, training: trains on a task while the marked coefficients stay constant to the bit. Reads phase 2's masks,
    writes RUN/model. Example: warp-ds phase3 --model_name MODEL --utility_data task.jsonl --masks_dir
    checkpoints/phase2_latest"""

    batch_size: int = again(RunArguments, "batch_size", 2)
    basis_dir: str | None = again(
        ImportanceArguments, "basis_dir", None, "basis of phase 1; the one that the masks were made with if not given"
    )
    masks_dir: str | None = flag(
        None,
        "masks of phase 2; the newest finished ones under --output_dir; none = no mask,"
        " and --target_layers, --layer_type (of an adapter --lora_layers) name what trains",
        reads="masks",
    )

    def check(self) -> None:
        super().check()
        check_training(self)
        self.check_lora_method()
        self.check_growing()
        at_least(self, "utility_samples", 0)


@dataclass
class AuditArguments(UtilityDataArguments, SafetyDataArguments, RunArguments):
    """Audit: which samples of a task set cost safety, ranked by their gradients in the coefficients that masks freeze. Example:
    warp-ds audit --model_name MODEL --utility_data task.jsonl --safety_data refusals.jsonl"""

    utility_samples: int = again(UtilityDataArguments, "utility_samples", 0)
    basis_dir: str | None = again(TrainArguments, "basis_dir", None)
    masks_dir: str | None = again(
        TrainArguments, "masks_dir", None, "masks of phase 2; the newest finished ones under --output_dir if not given"
    )
    show: int = samples(50, "how many of the samples that cost most safety are shown with their texts; 0 = all")

    def check(self) -> None:
        super().check()
        at_least(self, "safety_samples", 0)
        at_least(self, "utility_samples", 0)


@dataclass
class EvaluateArguments(HeldOutArguments, UtilityDataArguments, RunArguments):
    """Evaluation: what a model refuses, over-refuses and gets right, answer by answer. Example: warp-ds evaluate --model_name
    checkpoints/phase3_latest/model --harmful_data prompts.jsonl"""

    suite: str = flag("refusal,over_refusal,gsm8k,loss", "comma-separated list of measurements, and of lm-eval tasks")
    utility_data: str = again(
        UtilityDataArguments, "utility_data", "openai/gsm8k", "task items with answers ending in #### N (gsm8k, loss)"
    )
    utility_split: str = again(UtilityDataArguments, "utility_split", "test")
    utility_samples: int = again(UtilityDataArguments, "utility_samples", 100)
    prompt_file: str | None = flag(
        None, "comma-separated files of your own attack prompts, verdicts as for refusal", reads="files"
    )
    reference_model: str | None = flag(
        None,
        "the model before training: answers that it finds unlikely are noise too, and every prompt is compared with its answer",
        reads="model",
    )
    basis_dir: str | None = again(
        ImportanceArguments, "basis_dir", None, "basis of phase 1 of the reference: how far each layer's outputs moved"
    )
    judge_model: str | None = flag(None, "local classifier or causal LM as second opinion on the verdicts", reads="judge")
    lm_eval_include: str | None = flag(None, "directory of your own lm-eval task files", reads="directory")
    lm_eval_limit: int = samples(0, "items per lm-eval task; 0 = all")

    def check(self) -> None:
        super().check()
        at_least(self, "max_new_tokens", 1)
        at_least(self, "lm_eval_limit", 0)
