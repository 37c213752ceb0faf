"""What masks share: the mathematics on cases with known answers, artefacts against dense projectors, the command, the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense_training import complete_basis
from masked_artefacts import Artefacts, odd_model, write_artefacts
from torch import Tensor

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.evaluation.overlap import overlap
from warp_ds.launch.cli import main
from warp_ds.method import overlap as mathematics
from warp_ds.report.page import write_report
from warp_ds.store.files import read_json


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def random_mask(m: int, n: int, share: float, seed: int) -> Tensor:
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < share


def projector(u: Tensor, frozen: Tensor) -> Tensor:
    """The projector onto what a mask freezes of vec(W), row after row [m n, m n]."""
    return torch.block_diag(*((u * row) @ u.T for row in frozen.double()))


def test_known_sets_and_subspaces() -> None:
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]]).bool()
    b = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0]]).bool()
    assert mathematics.common_entries(a, b) == 2 and mathematics.iou(2, 3, 3) == 0.5
    assert mathematics.chance_common(3, 3, 8) == pytest.approx(9 / 8)
    eye = torch.eye(4)
    assert mathematics.trace_overlap(a, b, eye) == 2, "in one basis the subspaces share what the sets share"
    assert mathematics.trace_overlap(a, a, eye) == 3 and mathematics.trace_overlap(a, ~a, eye) == 0
    # Column counts (1, 1, 1, 0) and (1, 0, 2, 0) of two rows: (1 + 2) / 2.
    assert mathematics.trace_by_columns(a, b, eye) == 1.5


def test_known_angles() -> None:
    """Two planes in R^3 that share one line and meet at 30 degrees."""
    turn = torch.deg2rad(torch.tensor(30.0, dtype=torch.float64))
    first = torch.eye(3, dtype=torch.float64)[:, :2]
    second = torch.stack([first[:, 0], first[:, 1] * turn.cos() + torch.tensor([0, 0, 1.0]) * turn.sin()], dim=1)
    assert mathematics.principal_angles(first.T @ second).tolist() == pytest.approx([0.0, 30.0], abs=1e-5)


def test_traces_are_those_of_dense_projectors() -> None:
    u, v = rotation(6, 1), rotation(6, 2)
    a, b = random_mask(4, 6, 0.4, 3), random_mask(4, 6, 0.3, 4)
    expected = float(torch.trace(projector(u, a) @ projector(v, b)))
    assert mathematics.trace_overlap(a, b, (u.T @ v).square()) == pytest.approx(expected)
    # A mask of whole columns does not know which of the columns' bases it is written in.
    whole = torch.zeros(4, 6).bool()
    whole[:, :3] = True
    turned = torch.cat([u[:, :3] @ rotation(3, 5), u[:, 3:]], dim=1)
    assert mathematics.trace_overlap(whole, whole, (u.T @ turned).square()) == pytest.approx(12.0)


def test_chance_is_the_mean_over_random_masks() -> None:
    u, v = rotation(5, 1), rotation(5, 2)
    squares, draw = (u.T @ v).square(), torch.Generator().manual_seed(0)

    def drawn(k: int) -> Tensor:
        mask = torch.zeros(30).bool()
        mask[torch.randperm(30, generator=draw)[:k]] = True
        return mask.view(6, 5)

    traces = [mathematics.trace_overlap(drawn(6), drawn(9), squares) for _ in range(3000)]
    # The deviation of one trace is about 0.4, of the mean of 3,000 under 0.01.
    assert sum(traces) / len(traces) == pytest.approx(mathematics.chance_common(6, 9, 30), abs=0.03)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artefacts, Artefacts, Artefacts]:
    root = tmp_path_factory.mktemp("overlap")
    made = [write_artefacts(root / f"run{seed}", odd_model(), seed=seed) for seed in (1, 2)]
    return made[0], made[1], write_artefacts(root / "original", odd_model(), seed=3, basis="identity")


def test_artefacts_against_dense_projectors(three: tuple[Artefacts, Artefacts, Artefacts]) -> None:
    found = overlap([made.masks for made in three])
    assert [(pair["first"], pair["second"], pair["same_basis"]) for pair in found["pairs"]] == [
        (0, 1, False),
        (0, 2, False),
        (1, 2, False),
    ]
    for pair in found["pairs"]:
        one, other = three[pair["first"]], three[pair["second"]]
        traces, least = 0.0, [0, 0]
        for part, name in zip(pair["layers"], one.frozen, strict=True):
            n = one.frozen[name].shape[1]
            full = [torch.eye(n).double() if (u := a.bases[name]) is None else complete_basis(u) for a in (one, other)]
            trace = float(torch.trace(projector(full[0], one.frozen[name]) @ projector(full[1], other.frozen[name])))
            k = [int(a.frozen[name].sum()) for a in (one, other)]
            assert part["frozen"] == tuple(k) and part["iou"] is None and part["angles"] is None
            assert part["subspace"] == pytest.approx(trace / min(k), rel=1e-4)
            assert part["subspace_by_chance"] == pytest.approx(max(k) / one.frozen[name].numel())
            traces, least = traces + trace, [x + y for x, y in zip(least, k, strict=True)]
        assert pair["over_all"]["subspace"] == pytest.approx(traces / min(least), rel=1e-4)


def test_a_mask_beside_itself_is_the_same(three: tuple[Artefacts, Artefacts, Artefacts]) -> None:
    (pair,) = overlap([three[0].masks, three[0].root])["pairs"]
    assert pair["same_basis"] and pair["over_all"]["iou"] == pair["over_all"]["subspace"] == 1.0
    k, entries = pair["over_all"]["frozen"][0], sum(mask.numel() for mask in three[0].frozen.values())
    assert 0 < pair["over_all"]["subspace_by_chance"] < 1 and k < entries


def test_the_command_and_the_page(
    three: tuple[Artefacts, Artefacts, Artefacts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "overlap.json"
    assert main(["overlap", *(str(made.masks) for made in three), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert f"{found['pairs'][0]['over_all']['subspace']:.3f}" in printed and "1 and 2" in printed
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "What the masks share" in page and "layer_00_ffn_down" in page
    output.write_text('{"masks": 3}')
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report.html")]) == 0
    assert "is not as this program writes it" in (tmp_path / "report.html").read_text()


def test_masks_that_freeze_nothing_share_no_number(tmp_path: Path) -> None:
    made = [write_artefacts(tmp_path / f"run{share:g}", odd_model(), share=share) for share in (0.0, 0.3)]
    output = tmp_path / "overlap.json"
    assert main(["overlap", *(str(made[i].masks) for i in (0, 0, 1)), "--output", str(output)]) == 0
    json.dumps(overlap([made[0].masks] * 2), allow_nan=False)
    first = read_json(output, finite=True)["pairs"][0]["over_all"]
    assert {first[name] for name in ("iou", "iou_by_chance", "subspace", "subspace_by_chance", "subspace_by_columns")} == {None}
    assert "is not as this program writes it" not in write_report([tmp_path], tmp_path / "report.html").read_text()


def test_an_output_that_cannot_be_is_one_line(
    three: tuple[Artefacts, Artefacts, Artefacts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for command, words in {
        "overlap": [str(made.masks) for made in three],
        "verify": ["--before", "m", "--after", "m", "--masks_dir", "m"],
        "report": [str(three[0].root)],
    }.items():
        for output, said in ((tmp_path, "is a directory: name a file"), (tmp_path / "file" / "x", "is no directory that")):
            assert main([command, *words, "--output", str(output)]) == 2
            assert said in (error := capsys.readouterr().err) and error.count("\n") == 1, error
    for command, words in {
        "merge": ["--model_name", "m", "--adapter", "a"],
        "shrink": ["--masks_dir", "m"],
        "convert-basis": ["--basis_dir", "b", "--model_name", "m"],
    }.items():
        for output, said in (("file", "is a file: name a new directory"), ("file/x", "is no directory that")):
            assert main([command, *words, "--output", str(tmp_path / output)]) == 2
            assert said in (error := capsys.readouterr().err) and error.count("\n") == 1, error


def test_what_cannot_be_compared_is_refused(three: tuple[Artefacts, Artefacts, Artefacts], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two or more masks"):
        overlap([three[0].masks])
    other = write_artefacts(tmp_path / "fewer", odd_model(), ranks={"ffn_down": 5})
    with pytest.raises(ArtifactError, match=r"are of different layers \(model.layers.0.self_attn.k_proj"):
        overlap([three[0].masks, other.masks])
    with pytest.raises(ArtifactError, match="no masks in"):
        overlap([three[0].masks, tmp_path])
