"""Thirty chains of phases 1, 2 and 3 on two ranks, each killed (-9) at a random moment and started again.

    python tests/slurm/thirty_kills.py [--kills 30] [--seed 0]

A kill takes one rank (the others then end as srun's --kill-on-bad-exit would end them) or both at once. Prints every kill,
and how many chains ended in the artefacts and losses of an undisturbed one.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pytest  # noqa: E402
from chain import TOLERANCES, differences, make_inputs, undisturbed  # noqa: E402
from ranks import run_ranks, start_ranks  # noqa: E402
from throwaway import PLAIN_GLOO  # noqa: E402

STEPS = 9
NAMED = {phase: ["--run_name", phase] for phase in ("phase1", "phase2", "phase3")}
NAMED["phase3"] += ["--save_strategy", "steps", "--save_steps", "2"]


def run_kills(root: Path, kills: int, seed: int = 0) -> int:
    """How many of the killed chains ended in the right result."""
    make_inputs(root, depth=2)
    run_ranks(2, undisturbed, root, root / "warm", STEPS, NAMED)  # imports what a first run does
    begun = time.monotonic()
    reference = run_ranks(2, undisturbed, root, root / "undisturbed", STEPS, NAMED)[0]
    whole = time.monotonic() - begun
    print(f"an undisturbed chain takes {whole:.1f} s", flush=True)
    draw, right = random.Random(seed), 0
    for number in range(kills):
        output, moment, both = root / f"killed_{number:02d}", draw.uniform(0.0, whole), draw.random() < 0.5
        processes, _ = start_ranks(2, undisturbed, root, output, STEPS, NAMED)
        time.sleep(moment)
        at = _where(output)
        for process in processes if both else processes[draw.randrange(2) :][:1]:
            process.kill()
        time.sleep(0.0 if both else 0.5)
        for process in processes:
            process.kill()
            process.join()
        try:
            again = run_ranks(2, undisturbed, root, output, STEPS, NAMED)[0]
            found = {k: v for phase in reference for k, v in differences(Path(again[phase]), Path(reference[phase])).items()}
            fine = all(value <= TOLERANCES[kind] for kind, value in found.items())
            text = ", ".join(f"{kind} {value:.1g}" for kind, value in found.items())
        except (Exception, pytest.fail.Exception) as error:  # the next chain is started all the same
            fine, text = False, f"{type(error).__name__}: {str(error)[-600:]}"
        right += fine
        print(
            f"{number + 1:2d}: {'both ranks' if both else 'one rank'} at {moment:.1f} s ({at}): "
            f"{'right' if fine else 'WRONG'} ({text})",
            flush=True,
        )
    print(f"{right} of {kills} killed chains ended in the right result", flush=True)
    return right


def _where(output: Path) -> str:
    """What the chain was at, from its files."""
    for phase in ("phase3", "phase2", "phase1"):
        if (output / phase / "finished.json").is_file():
            return f"after {phase}"
        if (output / phase / "config.json").is_file():
            checkpoints = sorted(p.name for p in (output / phase / "trainer").glob("checkpoint-*"))
            return f"in {phase}" + (f", {checkpoints[-1]}" if checkpoints else "")
    return "before phase1"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.update(PLAIN_GLOO)
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        sys.exit(run_kills(Path(folder), given.kills, given.seed) != given.kills)
