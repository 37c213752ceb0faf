"""Masks that grow during training, against one dense process: what is frozen then stays to the bit from there on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from masked_artefacts import Artefacts, dense_adamw, loss_of, odd_model, read_artefacts, token_batches, write_artefacts
from ranks import run_ranks
from test_masked_step import LOSS, WEIGHT, Case, frozen_moved, gathered, make_engine, masters, protect, train_step, weight_error

import warp_ds
from warp_ds.cluster import processes
from warp_ds.errors import ArtifactError, OtherRankError, UnsupportedSetting
from warp_ds.phases.growing import frozen_first
from warp_ds.store.masks import MaskStore
from warp_ds.zero.growing import freeze_more
from warp_ds.zero.scores import of_units

BEFORE, AFTER = 3, 3
CASES = [
    Case("sub-groups, offloaded", zero={"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100}),
    Case("bases at owners", placement="owner", zero={"stage3_param_persistence_threshold": 10**9}),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("growing")
    for name, share in (("few", 0.2), ("many", 0.5)):  # of one seed: the same bases, and masks of which one holds the other
        write_artefacts(path / name, odd_model(), share=share)
    return path


def dense(root: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of one dense process whose masks grow, and whose moments of what is frozen then are 0."""
    model = odd_model()
    few, many = read_artefacts(root / "few"), read_artefacts(root / "many")
    optimizer = dense_adamw(model, few, clip=0.4, decay=0.1)
    params, losses = dict(model.named_parameters()), []
    for step, batch in enumerate(token_batches(BEFORE + AFTER)):
        if step == BEFORE:
            optimizer.frozen = many.frozen
            for name, mask in many.frozen.items():
                optimizer.m[name][mask] = optimizer.v[name][mask] = 0.0
        with torch.no_grad():
            for name, w in optimizer.weights().items():
                params[name].copy_(w)
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step({name: p.grad for name, p in params.items()})
    return losses, optimizer.weights()


def grown(root: Path, folder: Path, losses: list[float], weights: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """Of each case what differs from the dense process, and how many frozen bits moved."""
    few, many = (Artefacts(root / name, {}, {}) for name in ("few", "many"))
    found = []
    for case in CASES:
        engine = make_engine(case)
        step = protect(engine, few, case.placement)
        start = masters(step)
        batches = token_batches(BEFORE + AFTER)
        said = [train_step(engine, batch) for batch in batches[:BEFORE]]
        moved = frozen_moved(step, start)
        share, then = step.masked_fraction, masters(step)
        freeze_more(step, MaskStore(many.masks))
        assert all(torch.equal(a, b) for a, b in zip(then, masters(step), strict=True))
        said += [train_step(engine, batch) for batch in batches[BEFORE:-1]]
        engine.save_checkpoint(folder / case.name, "here")
        said.append(train_step(engine, batches[-1]))
        again = make_engine(case)
        protect(again, many, case.placement)
        again.load_checkpoint(folder / case.name, "here")
        found.append(
            {
                "loss": max(abs(a - b) for a, b in zip(said, losses, strict=True)),
                "weights": weight_error(engine, weights),
                "moved": moved + frozen_moved(step, then),
                "grew": step.masked_fraction - share,
                "resumed": abs(train_step(again, batches[-1]) - said[-1]) + weight_error(again, gathered(engine)),
            }
        )
        for one in (engine, again):
            one.destroy()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_frozen_later_stays_where_it_is_then(root: Path, tmp_path: Path, world: int) -> None:
    for case, found in zip(CASES, run_ranks(world, grown, root, tmp_path, *dense(root))[0], strict=True):
        assert found["loss"] < LOSS and found["weights"] < WEIGHT, (case.name, found)
        assert found["moved"] == 0 and found["grew"] > 0.1 and found["resumed"] == 0, (case.name, found)


def refused(root: Path) -> list[str]:
    engine = make_engine(CASES[0])
    step = protect(engine, Artefacts(root / "many", {}, {}))
    model = odd_model()
    plain = warp_ds.freeze_optimizer(model, torch.optim.AdamW(model.parameters()), {"model.norm.weight": True})
    said = []
    for protection in (step, plain):
        try:
            freeze_more(protection, MaskStore(root / "few" / "masks"))
        except (ArtifactError, OtherRankError, UnsupportedSetting) as error:
            said.append(str(error))
    engine.destroy()
    processes.barrier()
    return said


def test_nothing_thaws(root: Path) -> None:
    for thawing, unsupported in run_ranks(2, refused, root):
        assert "stays frozen" in thawing and "ZeRO stage 3" in unsupported


@pytest.mark.parametrize("unit", ["entry", "row", "column"])
def test_what_is_frozen_comes_before_any_score(tmp_path: Path, unit: str) -> None:
    """Also where today's scores would choose others, as they do on a model that has moved far."""
    known = write_artefacts(tmp_path, odd_model(), unit=unit, share=0.6)
    masks = MaskStore(tmp_path / "masks")
    for layer in masks.layers:
        frozen = known.frozen[layer.parameter]
        highest_where_free = torch.where(frozen, 0.0, 1.0)[:, : layer.n - 1]  # a basis that is short by one column
        values = of_units(highest_where_free, unit)
        found = frozen_first(values, masks, layer)
        units = {"entry": frozen, "row": frozen.all(dim=1, keepdim=True), "column": frozen.all(dim=0, keepdim=True)}[unit]
        assert found.shape == units.shape and 0 < int(units.sum()) < units.numel(), (layer.name, int(units.sum()))
        assert found[units].min() > found[~units].max(), layer.name
