"""What the trials of a comparison need, made once each: start models, bases, masks, trained and merged models."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from warp_ds.cluster import consensus
from warp_ds.data.sample import Sample, as_rows
from warp_ds.evaluation.movement import frozen_drift
from warp_ds.evaluation.sets import SUITES
from warp_ds.flags.arguments import (
    BasisArguments,
    EvaluateArguments,
    ImportanceArguments,
    SafetyTuningArguments,
    TrainArguments,
)
from warp_ds.flags.comparison import CompareArguments
from warp_ds.flags.controls import FIXED, REPLAYS
from warp_ds.method.baselines import safety_share
from warp_ds.phases.arms import ARMS, Arm
from warp_ds.phases.basis import run_basis
from warp_ds.phases.comparison_data import ComparisonData, overlaps
from warp_ds.phases.evaluate import load_engine, movement_metrics, write_card
from warp_ds.phases.importance import run_importance
from warp_ds.phases.measuring import Measuring
from warp_ds.phases.merge import merge, resta_formula, safe_delta_formula, safe_lora_formula, wsr_formula
from warp_ds.phases.neurons import LAYERS, safety_neuron_masks
from warp_ds.phases.run import link_latest
from warp_ds.phases.texts import check_lengths
from warp_ds.phases.training import run_safety_tuning, run_training
from warp_ds.phases.trials import Trial, made_from
from warp_ds.report import card
from warp_ds.report.tradeoff import Point
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import write_text
from warp_ds.store.masks import MaskStore
from warp_ds.zero.deepspeed_internals import end_engine
from warp_ds.zero.model import resolve_model_dir
from warp_ds.zero.shared_reading import model_fingerprint

PACKING = ("packing", "tokens_per_batch")
PUBLISHED = "attn_q,attn_v"
"""The layers of SaLoRA's published setting; alpha is r there, and nothing is dropped out."""
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_rslora")


class Bench:
    """Makes what the points need, once each: start models, bases, masks, trained and merged models, measurements."""

    def __init__(
        self,
        arguments: CompareArguments,
        model_dir: Path,
        root: Path,
        data: ComparisonData,
        passed: dict[str, Any],
        seconds: dict[str, float] | None = None,
    ):
        self.arguments, self.model_dir, self.root, self.data, self.passed = arguments, model_dir, root, data, passed
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self.measuring = Measuring(root, model_dir, data.sets, self._evaluation, self.timed)
        self._made: dict[str, Path] = {}

    @cached_property
    def overlap(self) -> dict[str, int]:
        """'harmful in the safety set' -> how many prompts of the evaluation stand there."""
        return {f"{kind} in {where}": count for (where, kind), count in overlaps(self.data).items()}

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        began = time.time()
        result = run()
        self.seconds[name] = round(time.time() - began, 1)
        return result

    def common(self, model: Path, **more: Any) -> dict[str, Any]:
        """Flags of every phase."""
        a = self.arguments
        # Two comparisons have phases of the same names: their logs lie apart, as their runs do.
        here = self.root.relative_to(a.output_dir) if self.root.is_relative_to(a.output_dir) else self.root.name
        places = {"model_name": str(model), "output_dir": str(self.root), "log_dir": str(Path(a.log_dir) / here)}
        machine = self._same("dtype", "device", "deepspeed", "batch_size", "gradient_checkpointing", "timeout", "num_proc")
        return {**places, **machine, **self._same("seed", "max_length", "template_date", "train_on", "long_samples"), **more}

    def _evaluation(self, model: Path) -> EvaluateArguments:
        a = self.arguments
        return EvaluateArguments(**self.common(model, batch_size=a.eval_batch_size), max_new_tokens=a.max_new_tokens)

    def _same(self, *names: str) -> dict[str, Any]:
        """Flags that a phase has by the same name."""
        return {name: getattr(self.arguments, name) for name in names}

    @property
    def _other_steps(self) -> dict[str, Any]:
        """The further TrainingArguments of a training on other data: how many steps the arms take is not meant for it."""
        return {name: value for name, value in self.passed.items() if name not in ("max_steps", "warmup_steps")}

    # ---------------------------------------------------------------- data

    def check_lengths(self) -> None:
        """DataError, before any phase, for texts that are too long for one of them. Collective."""
        data = self.data
        check_lengths(
            self._evaluation(self.model_dir),
            data.sets.generated(SUITES),
            {
                "safety": data.safety,
                "task": data.task,
                "--mix_file": data.mix,
                "--unaligned_data": data.unaligned,
                "--harmful_mix": data.harmful_mix,
                "--patch_data": data.patch,
                "loss": data.sets.utility,
            },
            self.arguments.max_new_tokens,
        )

    def write_data(self) -> None:
        """The texts as files, for the phases to read."""

        def write() -> None:
            for name, rows in {name: getattr(self.data, name) for name in ("safety", "unaligned", "patch")}.items():
                self._write_rows(name, rows)
            for number, rows in enumerate(self.data.behaviours):
                self._write_rows(f"keep_{number}", rows)

        consensus.on_rank_0(write, "writing the texts")

    def _texts(self, name: str) -> str:
        return str(self.root / "data" / f"{name}.jsonl")

    def _write_rows(self, name: str, rows: Sequence[Sample]) -> Path:
        path = Path(self._texts(name))
        if rows:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in as_rows(rows)))
        return path

    def task(self, arm: Arm) -> Path:
        """The task with what is mixed into it: the user's --mix_file in every arm, safety samples in SafeInstr's, and the
        first of --harmful_mix, as many in each of a ratio's arms."""
        rows, name = [*self.data.task, *self.data.mix], "task"
        wanted = safety_share(len(self.data.task), arm.safety_share)
        if wanted:
            draw = random.Random(self.arguments.seed)
            picked = [
                draw.sample(range(len(self.data.safety)), len(self.data.safety))
                for _ in range(-(-wanted // len(self.data.safety)))
            ]
            rows += [self.data.safety[i] for i in [i for order in picked for i in order][:wanted]]
            name += f"_safety{arm.safety_share:g}"
        harmful = safety_share(len(self.data.task), arm.harmful_share)
        if harmful:
            rows += self.data.harmful_mix[:harmful]
            name += f"_harmful{arm.harmful_share:g}"
        return consensus.on_rank_0(lambda: self._write_rows(name, rows), "writing the task")

    # ---------------------------------------------------------------- start models, bases, masks

    def once(self, name: str, make: Callable[[], Path]) -> Path:
        if name not in self._made:
            self._made[name] = self.timed(name, make)
        return self._made[name]

    def start(self, kind: str | None) -> Path:
        """The model that an arm starts from."""
        return self.model_dir if kind is None else self.once(kind, partial(self._neuron_tuned, kind))

    def _neuron_tuned(self, kind: str) -> Path:
        """SN-Tune, RSN-Tune: the start model after its safety neurons alone have trained on the safety set."""
        a, masks = self.arguments, self.root / f"neurons_{kind}" / "masks"
        if not consensus.on_rank_0(lambda: (masks / "metadata.json").is_file(), "looking for the neurons"):
            engine, tokenizer = load_engine(EvaluateArguments(**self.common(self.model_dir)))
            prompts = [sample.asked() for sample in self.data.safety]
            foundation = list(self.data.foundation) if kind == "rsn-tune" else None
            model = (str(self.model_dir), model_fingerprint(self.model_dir))
            safety_neuron_masks(engine, tokenizer, prompts, foundation, a.neuron_share, masks, *model)
            end_engine(engine)
        settings = TrainArguments(
            **self.common(self.model_dir),
            masks_dir=str(masks),
            utility_data=self._texts("safety"),
            utility_samples=0,
            run_name=f"phase3_{kind}",
            epochs=1,
            learning_rate=a.neuron_rate,
            **self._same("global_batch_size", "basis_placement", "save_minutes", *PACKING),
        )
        return run_training(settings, self._other_steps) / "model"

    def basis(
        self, start: str | None, kind: str, layer_type: str, seed: int, output: str = "identity", task: Path | None = None
    ) -> Path:
        """Of the safety set, or of the samples of ``task``."""
        name = self.basis_name(start, kind, layer_type, seed, output) + ("" if task is None else f"_{task.stem}")
        settings = BasisArguments(
            **self.common(self.start(start), seed=seed if kind == "random" else self.arguments.seed),
            layer_type=layer_type,
            safety_data=self._texts("safety") if task is None else str(task),
            safety_samples=0,
            basis=kind,
            output_basis=output,
            run_name=name,
            **self._same("target_layers", "token_scope", "energy", "max_rank", "expert_basis"),
            **self._same("collect", "svd_placement", *PACKING),
        )
        return self.once(name, lambda: run_basis(settings)) / "basis"

    def link_latest(self, trial: Trial) -> None:
        """Lets the links to the newest runs end at this arm's, whatever arm came last. Rank 0 alone calls it."""
        arm = trial.arm
        names = {
            "phase1": self.basis_name(arm.start, str(arm.basis), self.arguments.layer_type, trial.seed, arm.output),
            "phase2": self.masks_name(arm, trial.seed),
            "phase3": f"phase3_{trial.name}",
        }
        for phase, name in names.items():
            if (self.root / name / "finished.json").is_file():
                link_latest(phase, self.root / name)

    @staticmethod
    def basis_name(start: str | None, kind: str, layer_type: str, seed: int, output: str = "identity") -> str:
        kind += "" if output == "identity" else f"_{output}-outputs"
        suffix = (f"_seed{seed}" if kind.startswith("random") else "") + {LAYERS: "_all", PUBLISHED: "_qv"}.get(layer_type, "")
        return f"phase1_{start or 'start'}_{kind}{suffix}"

    @staticmethod
    def masks_name(arm: Arm, seed: int) -> str:
        suffix = f"_seed{seed}" if "random" in (arm.basis, arm.score) else ""
        basis = f"{arm.basis}" if arm.output == "identity" else f"{arm.basis}_{arm.output}-outputs"
        return f"phase2_{arm.start or 'start'}_{basis}_{arm.unit}_{arm.score}{suffix}"

    def masks(self, arm: Arm, seed: int) -> Path:
        """The masks of an arm; its basis is the one that they name."""
        a, name = self.arguments, self.masks_name(arm, seed)
        seed = seed if "random" in (arm.basis, arm.score) else a.seed
        identity = arm.basis == "identity"
        apart = ",".join(self._texts(f"keep_{number}") for number in range(len(self.data.behaviours)))
        settings = ImportanceArguments(
            **self.common(self.start(arm.start), seed=seed),
            safety_data=apart or self._texts("safety"),
            keep_shares=a.keep_shares if apart else "mixed",
            safety_samples=a.importance_samples,
            run_name=name,
            basis_dir=None if identity else str(self.basis(arm.start, str(arm.basis), a.layer_type, seed, arm.output)),
            basis="identity" if identity else "auto",
            mask_unit=arm.unit,
            score=arm.score,
            **self._same(
                "layer_type", "target_layers", "keep_ratio", "mask_scope", "importance_batch_size", "products", *PACKING
            ),
        )
        return self.once(name, lambda: run_importance(settings)) / "masks"

    def unaligned(self) -> Path:
        """The start model with its alignment undone: given, or trained on the examples given."""
        a = self.arguments
        if a.unaligned_model is not None:
            return resolve_model_dir(a.unaligned_model, "--unaligned_model")
        settings = SafetyTuningArguments(
            **self.common(self.model_dir),
            safety_data=self._texts("unaligned"),
            safety_samples=0,
            run_name="phase0_unaligned",
            learning_rate=a.unaligned_rate or max(a.rate_list),
            **self._same("epochs", "global_batch_size", "save_minutes", *PACKING),
        )
        return self.once("phase0_unaligned", lambda: run_safety_tuning(settings, self._other_steps)) / "model"

    # ---------------------------------------------------------------- points

    def model(self, trial: Trial) -> Path:
        """The model directory of a point, trained or merged where it is not there yet."""
        arm = trial.arm
        if arm.trains is None:
            return self.start(arm.start)
        if arm.patch:
            return self._patched(trial)
        if arm.merge:
            return self._merged(trial)
        a = self.arguments
        adapter = self._adapter(arm) if arm.adapter else {}
        scope = "warp" if arm.adapter else "all" if arm.trains == "all" or (arm.basis and a.train_scope == "all") else "warp"
        settings = TrainArguments(
            **self.common(self.start(arm.start), seed=trial.seed),
            train_scope=scope,
            masks_dir=str(self.masks(arm, trial.seed)) if arm.basis else "none",
            utility_data=str(self.task(arm)),
            utility_samples=0,
            run_name=trial.run,
            learning_rate=trial.rate,
            left_projection=arm.left,
            **adapter,
            **self._objective(arm),
            **self._growth(arm),
            ema_decay=arm.strength("ema", a.ema_decay) if arm.average else 0.0,
            **self._same("layer_type", "target_layers", "epochs", "products"),
            **self._same("global_batch_size", "basis_placement", "save_minutes", *PACKING),
        )
        consensus.on_rank_0(partial(self._remember, self.root / trial.run), "looking for a removed model")
        return self.timed(trial.run, lambda: run_training(settings, self.passed)) / "model"

    def _adapter(self, arm: Arm) -> dict[str, Any]:
        """What adapter trains in an arm, and what keeps it safe."""
        a = self.arguments
        adapter = {"adapter": "lora", "merge_adapter": True, **self._same(*LORA)}
        layers = PUBLISHED if arm.method == "salora" else a.layer_type  # the others': those that the arms of weights train
        if not arm.basis:
            adapter["lora_layers"] = layers
        if arm.method == "salora":
            adapter |= {"lora_alpha": a.lora_r, "lora_rslora": False, "lora_dropout": 0.0}
            adapter |= self._same("safety_rank", "task_rank")
            adapter["task_basis_dir"] = str(self.basis(arm.start, "activation", layers, a.seed, task=self.task(arm)))
        elif arm.method == "guardspace":
            adapter |= self._same("null_energy")
        elif arm.method == "asft":
            adapter |= {"unaligned_model": str(self.unaligned()), "asft_lambda": arm.strength("asft", a.asft_lambda)}
        if arm.method in FIXED:
            adapter["basis_dir"] = str(self.basis(arm.start, "activation", layers, a.seed))
        return {**adapter, "lora_method": arm.method or "plain"}

    def _objective(self, arm: Arm) -> dict[str, Any]:
        """What an arm's training minimises."""
        if arm.objective not in REPLAYS:
            return {"objective": arm.objective or "task"}
        replay = {"objective": arm.objective, "replay_data": self._texts("safety"), **self._same("replay_batch_size")}
        if arm.objective != "der":
            return replay
        return {**replay, "der_alpha": arm.strength("der", self.arguments.der_alpha), **self._same("der_beta")}

    def _growth(self, arm: Arm) -> dict[str, Any]:
        """How an arm's masks grow, by the safety samples that they were found on."""
        if arm.grows is None:
            return {}
        scores = {"refresh_data": self._texts("safety"), "refresh_samples": self.arguments.importance_samples}
        if arm.grows == "schedule":
            return {**scores, **self._same("keep_ratio_schedule", "importance_batch_size")}
        steps = int(arm.strength("refresh", self.arguments.refresh_steps))
        return {**scores, "refresh_steps": steps, **self._same("importance_batch_size")}

    @staticmethod
    def _remember(run: Path) -> None:
        """Lets a finished run whose model was removed (``forget``) begin anew, for a merge that came later."""
        if (run / "finished.json").is_file() and not (run / "model").is_dir():
            (run / "metrics.jsonl").unlink(missing_ok=True)
            (run / "finished.json").unlink()

    def _patched(self, trial: Trial) -> Path:
        """Safety at One Shot: the model of the arm without its patch, after plain training of all of it on a few refusals."""
        a, trained = self.arguments, made_from(trial)
        assert trained is not None
        settings = SafetyTuningArguments(
            **self.common(self.model(trained), seed=trial.seed),
            safety_data=self._texts("patch"),
            safety_samples=0,
            run_name=trial.run,
            epochs=a.patch_epochs,
            learning_rate=trial.arm.strength("patch", a.patch_rate),
            **self._same("global_batch_size", "save_minutes", *PACKING),
        )
        consensus.on_rank_0(partial(self._remember, self.root / trial.run), "looking for a removed model")
        return self.timed(trial.run, lambda: run_safety_tuning(settings, self._other_steps)) / "model"

    def _merged(self, trial: Trial) -> Path:
        arm, a = trial.arm, self.arguments
        trained = made_from(trial)
        assert trained is not None
        aligned, layers = self.start(arm.start), []
        # Before training: what cannot be merged is refused here.
        if arm.merge == "resta":
            formula = resta_formula(self.unaligned(), arm.strength("resta", a.resta_alpha))
            self.measuring.measured("unaligned", self.unaligned)  # so that the report shows how unaligned that model is
        elif arm.merge == "safelora":
            formula = safe_lora_formula(self.unaligned(), arm.strength("safelora", a.safelora_threshold))
        elif arm.merge == "wsr":
            masks = self.masks(replace(ARMS["rotated"], start=arm.start), trial.seed)
            formula, layers = wsr_formula(masks, self.root / trained.run / "adapter"), MaskStore(masks).layers
        else:
            basis = self.basis(arm.start, "activation", LAYERS, a.seed)
            formula, layers = safe_delta_formula(basis, arm.strength("safedelta", a.safedelta_s)), BasisStore(basis).layers
        fine_tuned, output = self.model(trained), self.root / trial.run / "model"
        self.timed(trial.run, lambda: merge(fine_tuned, aligned, output, formula, layers=layers))
        merger = f"This model is the trained one, {card.code(fine_tuned)}, merged by the arm {card.code(arm.name)}."
        text = f"## Merged after training\n\n{merger}\n\n"
        consensus.on_rank_0(lambda: card.write_section(output, "merged", text + card.made(fine_tuned)), "writing the card")
        return output

    def point(self, trial: Trial, rotated: Arm | None) -> Point:
        """The point of a trial, measured once. Collective."""
        arm = trial.arm
        # How far a model is from another start model says nothing.
        weights = partial(self._weights, rotated) if arm.start is None else None
        metrics = self.measuring.measured(trial.name, lambda: self.model(trial), weights)
        if arm.trains is not None:
            model = self.root / trial.run / "model"
            before = self.measuring.known("before")
            where = f"By a comparison, {card.code(self.root.name)}, arm {card.code(arm.name)}."
            a = self.arguments
            data = {"harmful": a.harmful_data, "harmless": a.harmless_data, "task": a.utility_heldout or a.utility_data}
            consensus.on_rank_0(
                lambda: write_card(model, "compare", where, metrics | {"overlap": self.overlap}, before, data),
                "writing the model's card",
            )
        from_start = arm.merge is None and arm.start is None and not arm.patch
        return Point(arm.name, trial.rate if arm.trains else None, trial.seed, metrics, from_start)

    def _weights(self, rotated: Arm | None, model: Path) -> dict[str, Any]:
        """Movement, and drift of what the rotated arm freezes, from the weights. Collective."""
        basis = self.basis(None, "activation", self.arguments.layer_type, self.arguments.seed)
        masks = None if rotated is None else self.masks(rotated, self.arguments.seed)
        if model == self.model_dir:
            return {"movement": 0.0, **({} if masks is None else {"frozen_drift": 0.0})}
        drift = {} if masks is None else {"frozen_drift": frozen_drift(self.model_dir, model, masks, basis)}
        return movement_metrics(self.model_dir, model, basis) | drift

    def forget(self, trial: Trial) -> None:
        """Removes the model of a measured point (--keep_models false); its measurements stay."""

        def remove() -> None:
            for path in ("model", "trainer"):
                # Renamed first: a model is there as a whole or not at all.
                directory = self.root / trial.run / path
                aside = directory.with_name(f"{path}.removed")
                if directory.is_dir():
                    directory.replace(aside)
                shutil.rmtree(aside, ignore_errors=True)

        if trial.arm.trains is not None:
            consensus.on_rank_0(remove, "removing a measured model")
