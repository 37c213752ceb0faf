"""Trains warp_ds/evaluation/refusal_model.safetensors from labelled answers; docs/verdicts.md says from which.

    python benchmarks/train_refusal_model.py ROWS.jsonl [--out FILE] [--held_out FILE.jsonl ...]

A row is {"source": ..., "answer": ..., "label": "refusal", "partial" or "compliance", "weight": 1, "prompt": ...}. Prints
agreement where each source is left out in turn and on the held-out files, then writes the model of all rows. Needs
scikit-learn, which the package does not. The labelled answers are others' and are not in this repository.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression  # type: ignore[import-not-found]

from warp_ds.evaluation import refusal_model as rm
from warp_ds.evaluation.metrics import wilson

Row = dict[str, Any]


def general_words(rows: Sequence[Row], count: int) -> frozenset[str]:
    """The words that begin answers of all sources and labels, whatever the subject: the mean root of their frequency."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["label"]), []).append(rm.plain(row["answer"])[:600])
    groups = {key: texts for key, texts in groups.items() if len(texts) >= 100}
    score: Counter[str] = Counter()
    for texts in groups.values():
        seen = Counter(word for text in texts for word in set(rm.words(text)))
        score.update({word: math.sqrt(n / len(texts)) for word, n in seen.items()})  # type: ignore[arg-type]
    return frozenset(sorted(score, key=lambda word: (-score[word], word))[:count])


def matrix(rows: Sequence[Row], known: frozenset[str]) -> csr_matrix:
    """[rows, rm.BUCKETS]"""
    ends, buckets, values = [0], list[int](), list[float]()
    for row in rows:
        if "features" not in row:
            row["features"] = rm.features(rm.plain(row["answer"]), known)
        found = row["features"]
        buckets += found.keys()
        values += found.values()
        ends.append(len(buckets))
    return csr_matrix((values, buckets, ends), shape=(len(rows), rm.BUCKETS))


def fit(rows: Sequence[Row], known: frozenset[str], strength: float) -> rm.RefusalModel:
    """Logistic regression; weights rounded to int8."""
    model = LogisticRegression(C=strength, max_iter=500)
    weights = np.array([row.get("weight", 1.0) for row in rows])
    model.fit(matrix(rows, known), [rm.CLASSES.index(row["label"]) for row in rows], sample_weight=weights / weights.mean())
    full, bias = np.zeros((3, rm.BUCKETS)), np.full(3, -1e9)
    for row, bias_of, label in zip(model.coef_, model.intercept_, model.classes_, strict=True):
        full[label], bias[label] = row, bias_of
    scale = np.maximum(np.abs(full).max(axis=1), 1e-12) / 127
    return rm.RefusalModel(np.rint(full / scale[:, None]).astype(np.int8), scale, bias, known)


def report(name: str, rows: Sequence[Row], model: rm.RefusalModel) -> None:
    """Agreement on full refusals and full compliance, missed and false refusals with Wilson's 95 % interval; partial apart."""
    found = [(row["label"], rm.refusal_kind(row["answer"], row.get("prompt"), model)) for row in rows]
    full = [(wanted, got) for wanted, got in found if wanted != "partial"]
    pieces = []
    for what, of, wrong in (("agree", full, lambda w, g: w == g),
                            ("missed", [p for p in full if p[0] == "refusal"], lambda w, g: g != "refusal"),
                            ("false", [p for p in full if p[0] == "compliance"], lambda w, g: g == "refusal")):
        if of:
            k = sum(wrong(*pair) for pair in of)
            low, high = wilson(k, len(of))
            pieces.append(f"{what} {k / len(of):.1%} [{low:.1%}, {high:.1%}] of {len(of)}")
    print(f"{name}: {'; '.join(pieces)}; partial as {dict(Counter(g for w, g in found if w == 'partial'))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--held_out", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=rm.WEIGHTS)
    parser.add_argument("--words", type=int, default=700)
    parser.add_argument("--strength", type=float, default=3.0, help="scikit-learn's C")
    parser.add_argument("--leave_out", nargs="*", default=None, help="the sources to leave out in turn; without: all")
    arguments = parser.parse_args()
    rows: list[Row] = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    known = general_words(rows, arguments.words)
    sources = sorted({row["source"] for row in rows}) if arguments.leave_out is None else arguments.leave_out
    for source in sources:
        others = fit([row for row in rows if row["source"] != source], known, arguments.strength)
        report(f"without {source}", [row for row in rows if row["source"] == source], others)
    model = fit(rows, known, arguments.strength)
    for path in arguments.held_out:
        report(f"held out, {path.stem}", [json.loads(line) for line in path.read_text().splitlines()], model)
    save_file({"weights": model.weights, "scale": model.scale, "bias": model.bias}, arguments.out,
              metadata={"known": json.dumps(sorted(model.known))})


if __name__ == "__main__":
    main()
