"""The phases, each said once: what its launcher runs, what it reads and writes, and who knows it.

Functions and classes are dotted names, so that who only asks for a name imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One thing that all ranks do together, under one name."""

    name: str
    """The command's, the run directories' and that of config.json: 'phase1'."""
    title: str
    """What it is, in a few words: 'Phase 1, basis'."""
    arguments_at: str
    function_at: str
    reads: str = ""
    """The artefact that it cannot do without: 'basis' or 'masks'."""
    writes: str = ""
    """What lies in its run directory in the end: 'basis', 'masks' or 'model'."""
    trains: bool = False
    """Flags of transformers' TrainingArguments are taken, and passed to the function as a second argument."""
    stoppable: bool = True
    """Leaves by itself when it is asked to, having saved."""
    chained: bool = True
    """A chain of launch/submit.py may have it."""
    hours: int = 0
    """The time limit of its Slurm template; 0: there is none."""

    @property
    def arguments(self) -> type[Any]:
        """The dataclass of its flags."""
        kind: type[Any] = _named(self.arguments_at)
        return kind

    @property
    def function(self) -> Any:
        """What every rank calls with the arguments."""
        return _named(self.function_at)


_ALL = (
    Phase(
        "phase0",
        "Phase 0, safety tuning (optional)",
        "warp_ds.flags.arguments:SafetyTuningArguments",
        "warp_ds.phases.training:run_safety_tuning",
        writes="model",
        trains=True,
        hours=4,
    ),
    Phase(
        "phase1",
        "Phase 1, basis",
        "warp_ds.flags.arguments:BasisArguments",
        "warp_ds.phases.basis:run_basis",
        writes="basis",
        hours=2,
    ),
    Phase(
        "phase2",
        "Phase 2, importance",
        "warp_ds.flags.arguments:ImportanceArguments",
        "warp_ds.phases.importance:run_importance",
        reads="basis",
        writes="masks",
        hours=2,
    ),
    Phase(
        "phase3",
        "Phase 3, training",
        "warp_ds.flags.arguments:TrainArguments",
        "warp_ds.phases.training:run_training",
        reads="masks",
        writes="model",
        trains=True,
        hours=8,
    ),
    Phase(
        "evaluate", "Evaluation", "warp_ds.flags.arguments:EvaluateArguments", "warp_ds.phases.evaluate:run_evaluation", hours=2
    ),
    Phase(
        "audit",
        "Audit: which task samples cost safety",
        "warp_ds.flags.arguments:AuditArguments",
        "warp_ds.phases.audit:run_audit",
        reads="masks",
        chained=False,
    ),
    Phase(
        "compare",
        "Arms side by side",
        "warp_ds.flags.comparison:CompareArguments",
        "warp_ds.phases.compare:run_compare",
        trains=True,
    ),
    Phase(
        "sweep",
        "Ablations",
        "warp_ds.flags.comparison:SweepArguments",
        "warp_ds.phases.sweep:run_sweep",
        trains=True,
        chained=False,
    ),
    Phase(
        "demo",
        "The whole job on a small model made on the spot",
        "warp_ds.launch.demo:DemoArguments",
        "warp_ds.launch.demo:run_demo",
        stoppable=False,
        chained=False,
    ),
)
PHASES = {phase.name: phase for phase in _ALL}
CHAINED = {phase.name: phase for phase in _ALL if phase.chained}
IN_A_CHAIN = ", ".join(name.removeprefix("phase") for name in CHAINED)
"""As --phases of a chain names them."""
#: A chain's entries: a comparison's are compare_seed1, compare_seed2 ….
CHAIN_ENTRY = re.compile(rf"({'|'.join(CHAINED)})|compare_seed\d{{1,12}}")


def phase_of(arguments: Any) -> Phase | None:
    """The phase whose flags these are."""
    return next((phase for phase in _ALL if phase.arguments_at.endswith(f":{type(arguments).__name__}")), None)


def maker_of(artefact: str) -> Phase:
    """The phase that writes 'basis' or 'masks'."""
    return next(phase for phase in _ALL if phase.writes == artefact)


def _named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
