"""Several behaviours kept at once: each has scores of its own and its share of the coefficients; their union is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warp_ds.cluster.processes import all_reduce_sum, collective_device
from warp_ds.data.datasets import load_samples
from warp_ds.data.sample import Sample
from warp_ds.data.sources import sources_of
from warp_ds.errors import ConfigError
from warp_ds.evaluation.kept import formats_of
from warp_ds.flags.checks import check_keep_ratio
from warp_ds.method.mask import frozen_count
from warp_ds.method.overlap import chance_common, iou
from warp_ds.store.layers import TargetLayer, scope_groups
from warp_ds.zero.select import choose

FILE = "behaviours.json"
"""Beside the masks of several behaviours: what each froze, and what two froze both."""


def named_apart(arguments: Any) -> list[str]:
    """The sets of --keep_data that each have a share of the mask; one, or --keep_shares mixed: that flag as it is."""
    sources = [source for source, _ in sources_of(arguments.safety_data)]
    return sources if len(sources) > 1 and arguments.keep_shares != "mixed" else [arguments.safety_data]


def shares_of(arguments: Any, count: int) -> list[float]:
    """The share of the coefficients that each of ``count`` behaviours freezes. ConfigError where --keep_shares says no such."""
    given = arguments.keep_shares
    if given in ("even", "mixed") or count == 1:
        return [arguments.keep_ratio / count] * count
    try:
        shares = [float(share) for share in given.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--keep_shares {given!r}: even, mixed, or a share of the coefficients for each set, by commas"
        ) from error
    if len(shares) != count:
        raise ConfigError(
            f"--keep_shares {given!r} has {len(shares)} shares, and --keep_data names {count} sets: give one for each"
        )
    for share in shares:
        check_keep_ratio(share)
    check_keep_ratio(sum(shares))
    return shares


def units_of(layers: Sequence[TargetLayer], unit: str) -> dict[str, int]:
    """How many units (entry, row or column) each layer has."""
    return {layer.name: {"entry": layer.m * layer.n, "row": layer.m, "column": layer.n}[unit] for layer in layers}


def groups_of(layers: Sequence[TargetLayer], arguments: Any) -> list[list[TargetLayer]]:
    """The layers that have one threshold."""
    return [[layers[i] for i in group] for group in scope_groups(layers, arguments.mask_scope)]


class Union:
    """The union of what several behaviours freeze, as scores of which the frozen units alone are above 0."""

    def __init__(self, groups: Sequence[Sequence[str]], units: Mapping[str, int], shares: Sequence[float]):
        """``groups``: the layers that have one threshold, by name; ``units``: what a layer has to freeze."""
        self.groups, self.units, self.shares = groups, units, shares
        self.scores: dict[str, Tensor] = {}
        self.taken: list[dict[str, Tensor]] = []
        """Of each behaviour, bool as its scores."""

    def add(self, scores: dict[str, Tensor]) -> None:
        """Takes the next behaviour's highest ``scores`` (``of_units`` of each layer, this rank's). Collective.

        Two behaviours' scores are of different sizes: each is divided by its sum. The counts of all together are exact.
        """
        ends = [0.0, *accumulate(self.shares)][len(self.taken) :][:2]
        wanted = []
        for group in self.groups:
            first, end = (frozen_count(min(share, 1.0), sum(self.units[name] for name in group)) for share in ends)
            wanted.append(end - first)
        chosen = choose([[scores[name] for name in group] for group in self.groups], wanted)
        whole = torch.stack([values.sum(dtype=torch.float64).to(collective_device()) for values in scores.values()]).sum()
        total = float(all_reduce_sum(whole.view(1))) or 1.0
        taken: dict[str, Tensor] = {}
        for group, choices in zip(self.groups, chosen, strict=True):
            for name, choice in zip(group, choices, strict=True):
                taken[name] = choice.mask(scores[name])
                part = (scores[name] / total).clamp_(min=torch.finfo(torch.float32).tiny).masked_fill_(~taken[name], 0.0)
                self.scores[name] = part if name not in self.scores else self.scores[name] + part
        self.taken.append(taken)

    def overlap(self, names: Sequence[str], unit: str) -> dict[str, Any]:
        """What each behaviour froze, and what each two froze both, of all layers together and by layer. Collective."""
        layers = list(self.units)
        pairs = [(a, b) for b in range(len(self.taken)) for a in range(b + 1)]
        counts = torch.tensor(
            [[int((self.taken[a][name] & self.taken[b][name]).sum()) for name in layers] for a, b in pairs],
            device=collective_device(),
        )
        common = dict(zip(pairs, all_reduce_sum(counts).tolist(), strict=True))
        frozen = [sum(common[a, a]) for a in range(len(self.taken))]
        entries = sum(self.units.values())
        return {
            "unit": unit,
            "behaviours": [
                {"data": name, "share": share, "frozen": k} for name, share, k in zip(names, self.shares, frozen, strict=True)
            ],
            "both": [
                {
                    "of": [a, b],
                    "frozen": sum(both),
                    "iou": iou(sum(both), frozen[a], frozen[b]),
                    "by_chance": chance_common(frozen[a], frozen[b], entries),
                    "layers": dict(zip(layers, both, strict=True)),
                }
                for (a, b), both in common.items()
                if a != b
            ],
        }


def overlap_note(report: dict[str, Any], pair: dict[str, Any]) -> str:
    """In words, what two behaviours froze both."""
    first, second = (report["behaviours"][number]["data"] for number in pair["of"])
    return (
        f"{first} and {second} both freeze {pair['frozen']} {report['unit']} units (IoU {pair['iou']:.3g}; "
        f"{pair['by_chance']:.0f} by chance)"
    )


def sets_apart(arguments: Any) -> list[tuple[str, int]]:
    """Each set of --keep_data that has a share of the mask, and how many samples of it; --safety_samples is of all together.
    ConfigError where --keep_shares does not go with them."""
    names = named_apart(arguments)
    shares_of(arguments, len(names))
    return list(zip(names, spread_evenly(arguments.safety_samples, len(names)), strict=True))


def held_out(arguments: Any) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """Of --kept_data, by the files' names, the examples; and the formats. ConfigError, DataError."""
    files = [file for file in (arguments.kept_data or "").split(",") if file]
    names = [Path(file).stem for file in files]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"--kept_data has two files named {', '.join(repeated)}: behaviours are told apart by their files' names"
        )
    columns: dict[str, Any] = {"prompt_column": arguments.prompt_column, "response_column": arguments.response_column}
    formats = formats_of(arguments.kept_format, names)
    return {name: load_samples(file, samples=0, **columns) for name, file in zip(names, files, strict=True)}, formats


def spread_evenly(total: int, count: int) -> list[int]:
    """``total`` samples over ``count`` sets, the first ones one more; at least one each; all zeros (all samples) for 0."""
    cuts = [round(total * k / count) for k in range(count + 1)]
    return [max(1, end - first) if total else 0 for first, end in pairwise(cuts)]
