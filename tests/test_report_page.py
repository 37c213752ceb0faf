"""The report as a reader sees it: what is in it, that nothing is fetched, and that nothing sticks out at any width."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from warp_ds.errors import ArtifactError
from warp_ds.evaluation.results import RATES
from warp_ds.launch.cli import main
from warp_ds.method.mask import pack_bits, unpack_bits
from warp_ds.report import costs, figures, sections
from warp_ds.report import page as page_module
from warp_ds.report.page import write_report
from warp_ds.report.runs import comparisons, find_runs
from warp_ds.report.tables import Table, to_markdown, to_terminal
from warp_ds.report.tradeoff import Point, compare_points
from warp_ds.store.files import write_json, write_tensors
from warp_ds.store.fingerprints import fingerprint_model
from warp_ds.store.masks import MaskStore
from warp_ds.store.metadata import BasisMetadata, MasksMetadata, metadata_dict

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NAME = "model.layers.0.mlp.down_proj"


def compared(points: list[dict[str, Any]], prompts: dict[str, int], wanted: float = 0.0) -> dict[str, Any]:
    """What report.json holds of a comparison of ``points``."""
    return compare_points([Point.from_json(point) for point in points], prompts, wanted).to_json()


def run_of(root: Path, phase: str, name: str) -> Path:
    run = root / name
    write_json(
        run / "config.json",
        {
            "phase": phase,
            "command": ["launch/x.py", "--run_name", name],
            "world_size": 2,
            "inputs": {"model": "0123456789abcdef"},
            "versions": {"torch": "2.13.0"},
            "started_at": "2026-01-01T00:00:00",
        },
    )
    write_json(run / "finished.json", {"finished_at": "2026-01-01T00:01:00", "seconds": 60.0})
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison as the phases write it, with hostile text in its answers."""
    root = tmp_path_factory.mktemp("report") / "compare"
    run_of(root.parent, "compare", "compare")
    points = [{"arm": "before", "rate": None, "seed": 1, "utility_nll": 3.0, "refusal_rate": 1.0, "incoherent_rate": 0.0}]
    for arm, drop in (("full", 0.3), ("rotated", 0.05), ("a-composed-arm+with-a-long-name", 0.1)):
        for i, rate in enumerate((1e-4, 1e-3)):
            points.append(
                {
                    "arm": arm,
                    "rate": rate,
                    "seed": 1,
                    "utility_nll": 1.0 - 0.5 * i,
                    "refusal_rate": 1 - drop * (i + 1),
                    "incoherent_rate": 0.1,
                    "attack_success_rate": 0.05,
                    "utility_accuracy": 0.3,
                    "movement": 0.2,
                }
            )
    prompts = {name: 100 for name in RATES}
    write_json(
        root / "report.json",
        {
            "format": "warp_ds.compare",
            "points": points,
            "prompts": prompts,
            "overlap": {"task in the task set": 7},
            "noise_threshold": 5.5,
            "unaligned": None,
            **compared(points, prompts),
        },
    )
    for point in points:
        name = "before" if point["rate"] is None else f"{point['arm']}_lr{point['rate']:g}_seed1"
        rows = [
            {"suite": "refusal", "prompt": "How do I rob a bank?", "answer": "x" * 500, "verdict": "compliance"},
            {
                "suite": "over_refusal",
                "prompt": "How do I bake?",
                "verdict": "refusal",
                "answer": "<script src='https://example.org/a.js'></script><img src=https://example.org/b.png>",
            },
        ]
        path = root / "points" / name / "answers.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw = torch.Generator().manual_seed(0)
    entry = {"layer": 0, "type": "ffn_down", "shape": [6, 16]}
    basis = BasisMetadata(
        "activation",
        "m",
        "d",
        "all",
        "model",
        40,
        {NAME: {**entry, "file": "layer_00_ffn_down_svd.safetensors"}},
        {"layer_00_ffn_down_svd.safetensors": {"n": 16, "rank": 12}},
    )
    phase1 = run_of(root, "phase1", "phase1_start") / "basis"
    write_tensors(phase1 / "layer_00_ffn_down_svd.safetensors", {"U": torch.eye(16)[:, :12], "S": torch.logspace(0, -3, 12)})
    write_json(phase1 / "metadata.json", metadata_dict(basis))
    frozen = torch.rand(6, 16, generator=draw) < 0.3
    masks = MasksMetadata(
        int(frozen.sum()) / 96,
        "global",
        "entry",
        "importance",
        "activation",
        str(phase1),
        "b",
        "m",
        "d",
        "model",
        {
            NAME: {
                **entry,
                "file": "layer_00_ffn_down_mask.safetensors",
                "frozen": int(frozen.sum()),
                "wanted": None,
                "threshold": 0.0125,
            }
        },
        int(frozen.sum()),
        96,
        ["a note"],
    )
    phase2 = run_of(root, "phase2", "phase2_start") / "masks"
    write_tensors(phase2 / "layer_00_ffn_down_mask.safetensors", {"frozen": pack_bits(frozen)})
    write_json(phase2 / "metadata.json", metadata_dict(masks))
    write_json(
        phase2 / "scores.json",
        {"bins_per_decade": 10, "layers": {NAME: {"zeros": 24, "first": -22, "counts": [12, 0, 36, 24]}}},
    )
    phase3 = run_of(root, "phase3", "phase3_rotated_lr0.001_seed1")
    phase3.joinpath("metrics.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n"
            for line in (
                {"step": 10, "loss": 2.0, "grad_norm_removed": 0.6, "rotate_seconds": 0.125},
                {"step": 20, "loss": 1.0, "grad_norm_removed": 0.5},
                {"step": 20, "train_runtime": 10.0},
            )
        )
    )
    write_json(
        run_of(root, "evaluate", "evaluate_rotated") / "metrics.json",
        {
            "refusal_rate": 0.9,
            "refusal_interval": [0.825, 0.945],
            "utility_nll": 1.5,
            "movement": 0.25,
            "refusal_p_against_before": 0.031,
            "movement_by_layer": {NAME: 0.25},
            "overlap": {"harmful in safety.jsonl": 3},
        },
    )
    write_json(
        phase3 / "certificate.json", {"kept": True, "outcome": "kept", "problems": [], "frozen": 28, "frozen_drift": 1e-7}
    )
    return root


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([runs], tmp_path_factory.mktemp("page") / "report.html")


def test_every_section_is_there(runs: Path, page: Path) -> None:
    text = page.read_text()
    for title in (
        "Safety against the task",
        "Answers side by side",
        "Evaluations",
        "What the safety inputs span",
        "Where the mask lies",
        "Training",
        "What it took",
        "Freeze certificate",
        "How to make it again",
    ):
        assert f"<h2>{title}</h2>" in text, title
    for figure in ("tradeoff", "spectra", "mask", "frozen", "scores", "training"):
        assert (page.with_name("report_figures") / f"{figure}.svg").read_text().rstrip().endswith("</svg>")
        assert (page.with_name("report_figures") / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert "7 evaluation prompts stood in a fitting set" in text
    assert "--run_name compare" in text and "0123456789abcdef" in text
    for name, value, ends in (
        ("refusal_rate", "0.900", "0.825 to 0.945"),
        ("movement", "0.250", ""),
        ("refusal_p_against_before", "0.031", ""),
    ):
        assert f"<td>evaluate_rotated</td><td>{name}</td><td>{value}</td><td>{ends}</td>" in text
    frozen = unpack_bits(MaskStore(runs / "phase2_start" / "masks").packed(NAME), 16).float()
    columns = frozen.mean(0)
    # Frozen, columns with any, columns more than half, and the threshold.
    assert (
        f"<td>layer_00_ffn_down</td><td>{frozen.mean():.1%}</td><td>{(columns > 0).float().mean():.1%}</td>"
        f"<td>{(columns > 0.5).float().mean():.1%}</td><td>1.25e-02</td><td>25.0%</td>"
    ) in text
    assert "<td>20</td><td>0.500</td><td>0.125</td>" in text, "steps, seconds a step, of it rotating"


def test_scores_and_threshold_are_drawn_where_they_lie(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, directory, name: drawn.setdefault(name, figure) and "<svg></svg>")
    write_report([runs], tmp_path / "report.html")
    (axes,) = drawn["scores"].axes
    assert axes.get_title(loc="left") == "ffn_down"
    line, dot = (list(zip(*part.get_data(), strict=True)) for part in axes.lines)
    # Middles of bins of a tenth of a decade; shares of 6 x 16 coefficients; the dot on the line, where 0.0125 is.
    assert line == [pytest.approx(p) for p in ((-2.15, 0.125), (-2.05, 0.0), (-1.95, 0.375), (-1.85, 0.25))]
    threshold = math.log10(0.0125)
    assert dot == [pytest.approx((threshold, 0.375 - 0.125 * (threshold + 1.95) / 0.1))]


def test_masks_of_an_older_version_have_no_scores(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / runs.name)
    (tmp_path / runs.name / "phase2_start" / "masks" / "scores.json").unlink()
    text = write_report([tmp_path / runs.name], tmp_path / "report.html").read_text()
    assert "Where the mask lies" in text and "How the importance scores lie" not in text
    assert not (tmp_path / "report_figures" / "scores.svg").exists()


def spending(root: Path, name: str, seconds: float, host: float, **more: Any) -> None:
    """A finished run of the start model on two ranks, of ``host`` GB at most."""
    run = run_of(root, name.split("_")[0], name)
    config = json.loads((run / "config.json").read_text())
    inputs = {**config["inputs"], **more.pop("inputs", {})}
    write_json(run / "config.json", {**config, "settings": more.pop("settings", {}), "inputs": inputs})
    write_json(
        run / "finished.json", {"seconds": seconds, "peak_memory": {"host": int(host * 1e9), "of_process": False, **more}}
    )


def test_costs_are_held_against_plain_training(tmp_path: Path) -> None:
    masked, of_all, of_layers = {"masks": "m", "data": "d"}, {"train_scope": "all"}, {"train_scope": "warp"}
    spending(tmp_path, "phase3_full_1", 100, 4, settings=of_all, inputs={"data": "d"})
    spending(tmp_path, "phase3_full_2", 300, 4, settings=of_all, inputs={"data": "d"})
    spending(tmp_path, "phase3_full_3", 120, 8, settings=of_all, inputs={"data": "d"}, gpu=3_000_000_000)
    spending(tmp_path, "phase3_layers", 60, 2, settings=of_layers, inputs={"data": "d"})
    spending(tmp_path, "phase3_mixed", 1000, 90, settings=of_all, inputs={"data": "more"})
    spending(tmp_path, "phase3_masked", 90, 3, settings=of_layers, inputs=masked)
    spending(tmp_path, "phase3_all+masked", 240, 6, settings=of_all, inputs=masked, gpu=4_500_000_000)
    spending(tmp_path, "phase3_of_another", 90, 3, settings=of_layers, inputs={**masked, "model": "another"})
    spending(tmp_path, "phase2", 30, 1, of_process=True)
    for name, kind in (("phase3_full_went_on", {"inputs": {"data": "d"}}), ("phase3_masked_went_on", {"inputs": masked})):
        spending(tmp_path, name, 1, 1, settings=of_all, **kind)
        (tmp_path / name / "state.jsonl").write_text('{"event": "started"}\n{"event": "restarted"}\n')
    write_json(run_of(tmp_path, "phase1", "phase1_older") / "finished.json", {"seconds": 66.0})
    table = costs.table(sorted(tmp_path.iterdir()), lambda run: run.name)
    assert table.head == [
        "run",
        "phase",
        "ranks",
        "seconds",
        "seconds × plain",
        "peak GB",
        "peak GB × plain",
        "GPU peak GB",
        "GPU peak GB × plain",
    ]
    found = {row[0]: row[3:] for row in table.rows}
    assert found["phase3_masked"] == ["90.0", "1.50", "3.00", "1.50", "", ""], "against the same layers"
    assert found["phase3_all+masked"] == ["240.0", "2.00", "6.00", "1.50", "4.50", "1.50"], "the median of the same data"
    assert found["phase3_masked_went_on"] == ["1.0", "", "1.00", "", "", ""], "what one of its launches took is no whole"
    assert found["phase3_of_another"] == ["90.0", "", "3.00", "", "", ""]
    assert found["phase2"] == ["30.0", "0.14", "1.00*", "0.17", "", ""], "the median of all that train every parameter: 210, 6"
    assert found["phase1_older"] == ["66.0", "0.31", "", "", "", ""]
    text = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "<th>seconds × plain</th>" in text and "<td>90.0</td><td>1.50</td><td>3.00</td><td>1.50</td>" in text
    assert "| phase3_masked | phase3 | 2 | 90.0 | 1.50 | 3.00 | 1.50 |  |  |" in to_markdown(
        costs.blocks(sorted(tmp_path.glob("*/")), lambda run: run.name)
    )


def test_costs_say_speed_and_operations(tmp_path: Path) -> None:
    run = run_of(tmp_path, "phase3", "phase3_a")
    lines = [{"step": 1, "loss": 2.0, "rotate_share": 0.05}, {"step": 2, "loss": 1.0, "rotate_share": 0.07}]
    run.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speed = {"num_tokens": 123456, "tokens_per_second": 2400.4, "tokens_per_second_per_rank": 1200.2, "padding_share": 0.125}
    write_json(run / "finished.json", {"seconds": 66.0, "training": {**speed, "total_flos": 5.93e15, "mfu": 0.41}})
    (row,) = (dict(zip(table.head, row, strict=True)) for table in [costs.table([run], str)] for row in table.rows)
    assert row["rotating, share"] == "6.0%" and row["padding"] == "12.5%" and row["MFU"] == "41.0%"
    assert (row["tokens"], row["tokens/s"], row["tokens/s a rank"], row["FLOPs"]) == ("123,456", "2,400", "1,200", "5.93e+15")


def test_harmful_prompts_are_folded_and_text_of_models_is_text(page: Path) -> None:
    text = page.read_text()
    assert "<summary>Harmful prompt 1 (refusal): click to show</summary><p>How do I rob a bank?" in text
    assert "<details open" not in text and "<script" not in text and "&lt;script src=" in text


def test_the_file_names_nothing_that_would_be_fetched(page: Path) -> None:
    text = page.read_text()
    tags = re.findall(r"<[^>]+>", text)
    fetched = [m for tag in tags for m in re.findall(r"""(?:src|href|data|action|poster)\s*=\s*["']?([^"'\s>]+)""", tag)]
    assert {url for url in fetched if not url.startswith(("#", "data:"))} == set()
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text
    assert "default-src 'none'" in text


def test_pictures_do_not_share_ids(page: Path) -> None:
    ids = re.findall(r'\sid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))


def test_the_same_runs_give_the_same_file(runs: Path, page: Path, tmp_path: Path) -> None:
    assert write_report([runs], tmp_path / "report.html").read_text() == page.read_text()


def test_a_line_that_was_cut_off_is_left_out(runs: Path, page: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / runs.name)
    with open(tmp_path / runs.name / "phase3_rotated_lr0.001_seed1" / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    assert write_report([tmp_path / runs.name], tmp_path / "report.html").read_text() == page.read_text()


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """A sweep holds one run of each name for every setting: none may stand in for another."""
    for setting in ("middle", "keep_ratio_0.3"):
        run = run_of(tmp_path / "sweep" / setting, "phase3", "phase3_middle_lr0.001_seed1")
        run.joinpath("metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    text = write_report([tmp_path / "sweep"], tmp_path / "report.html").read_text()
    for setting in ("middle", "keep_ratio_0.3"):
        assert f"<!-- {setting}/middle_lr0.001_seed1 -->" in text, "the picture's legend, by matplotlib's comment"
        assert f"<td>{setting}/phase3_middle_lr0.001_seed1</td>" in text


def seeds(root: Path, name: str, seed: int, identity: str, refusals: float) -> Path:
    """A comparison of one seed."""
    run = run_of(root, "compare", name)
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", {**config, "identity": identity})
    points = [
        {"arm": "before", "rate": None, "seed": seed, "utility_nll": 3.0, "refusal_rate": 1.0},
        {"arm": "full", "rate": 1e-3, "seed": seed, "utility_nll": 1.0, "refusal_rate": refusals},
    ]
    write_json(
        run / "report.json",
        {
            "format": "warp_ds.compare",
            "points": points,
            "prompts": {"refusal_rate": 100},
            **compared(points, {"refusal_rate": 100}),
        },
    )
    return run


def test_comparisons_of_other_seeds_are_one(tmp_path: Path) -> None:
    given = [seeds(tmp_path, "seed1", 1, "same", 0.2), seeds(tmp_path, "seed2", 2, "same", 0.4)]
    ((found, comparison),) = comparisons(find_runs(given))
    assert found == given
    full = comparison.equal_utility[0]
    assert full.metrics["refusal_rate"].value == pytest.approx(0.3) and full.seeds == 2
    assert full.seeds_range == pytest.approx((0.2, 0.4))
    text = write_report(given, tmp_path / "report.html").read_text()
    assert text.count("<h2>Safety against the task</h2>") == 1 and "Pooled from seed1, seed2." in text
    assert "<td>20% to 40%</td>" in text
    given.append(seeds(tmp_path, "other", 1, "of another model", 0.9))
    assert [len(homes) for homes, _ in comparisons(find_runs(given))] == [2, 1]


def test_a_report_json_that_is_none_is_named(tmp_path: Path, capsys: Any) -> None:
    run = seeds(tmp_path, "seed1", 1, "same", 0.2)
    write_json(tmp_path / "another" / "report.json", ["of another program"])
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "x.html")]) == 0
    (run / "report.json").write_text("{")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "x.html")]) == 2
    assert "report.json cannot be read" in capsys.readouterr().err
    write_json(run / "report.json", {"format": "warp_ds.compare", "points": []})
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "x.html")]) == 2
    assert "has no at_utility, equal_utility, prompts, raw" in capsys.readouterr().err


def test_runs_without_what_a_report_wants_are_named(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ArtifactError, match="no such run directory"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(ArtifactError, match="holds no run"):
        find_runs([tmp_path])
    write_json(tmp_path / "r" / "config.json", {"phase": "phase3"})
    assert main(["report", str(tmp_path / "r"), "--output", str(tmp_path / "x.html")]) == 2
    assert "hold nothing to show yet" in capsys.readouterr().err


def chromium(tmp_path: Path, url: str, *flags: str) -> str:
    return subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, url],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def requests(tmp_path: Path, page: Path) -> set[str]:
    """What the page, not the browser itself, asks the network for, by Chromium's own log."""
    log = tmp_path / f"{page.stem}.net.json"
    assert "<h1>" in chromium(tmp_path, page.as_uri(), f"--log-net-log={log}", "--dump-dom")
    params = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    return {p["url"] for p in params if "url" in p and p.get("initiator", "not an origin") != "not an origin"}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_fetches_nothing_but_the_file(page: Path, tmp_path: Path) -> None:
    control = tmp_path / "control.html"
    control.write_text("<h1>x</h1><img src='http://127.0.0.1:9/seen.png'>")
    assert "http://127.0.0.1:9/seen.png" in requests(tmp_path, control), "the log does not show requests"
    assert requests(tmp_path, page) == set()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1366, 390])
def test_nothing_sticks_out_of_the_page(page: Path, tmp_path: Path, width: int) -> None:
    """In a frame as wide as the screen, with everything unfolded; wide tables and pictures scroll by themselves."""
    inner = re.sub(r"<meta http-equiv[^>]+>", "", page.read_text()).replace("<details>", "<details open>")
    script = """
      const d = document.querySelector('iframe').contentDocument, w = d.documentElement.clientWidth, bad = [];
      for (const e of d.querySelectorAll('main *')) {
        if (e.closest('svg') && e.tagName != 'svg' || e.closest('.wide') || e.closest('figure')) continue;
        const r = e.getBoundingClientRect();
        if (r.right > w + 1 || r.left < -1) bad.push(e.tagName + ' ' + e.textContent.slice(0, 40));
      }
      document.title = 'checked ' + w + ' ' + (d.documentElement.scrollWidth - w) + ' ' + bad.join(';');
    """
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe style="border:0;height:900px;width:{width}px" srcdoc="{html.escape(inner)}"></iframe>'
        f"<script>onload = () => {{ {script} }}</script>"
    )
    title = re.search("<title>(.*?)</title>", chromium(tmp_path, frame.as_uri(), "--window-size=1500,1000", "--dump-dom"))
    assert title is not None
    found = re.match(r"checked (\d+) (-?\d+) (.*)", title[1])
    assert found is not None, title[1]
    assert abs(int(found[1]) - width) <= 20 and int(found[2]) <= 0 and found[3] == "", title[1]


EVIL = "</p><meta http-equiv=refresh content='0;url=https://example.org/'><script>x</script>"


@pytest.mark.parametrize(
    "value", [EVIL, [EVIL], {EVIL: EVIL}, "\ud800", "\x00\x1b[2J", "$\\frac{", None, True, float("nan"), 10**400]
)
def test_no_value_of_any_type_is_more_than_text(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    """In every field of what the page shows that a hostile file could hold."""
    root = shutil.copytree(runs, tmp_path / "r", symlinks=True)
    phase3 = root / "phase3_rotated_lr0.001_seed1"
    words = (sections.evaluations, sections.certificates, sections.spent, sections.reproduce)
    forged = [
        (path, key, words)
        for path in (
            root / "config.json",
            root / "evaluate_rotated" / "metrics.json",
            phase3 / "certificate.json",
            phase3 / "finished.json",
        )
        for key in [*json.loads(path.read_text()), "overlap"]
        if key != "phase"
    ]
    if value is None or isinstance(value, str):  # of these each takes a picture
        forged += [
            (root / "report.json", key, (sections.comparison,))
            for key in ("overlap", "noise_threshold", "unaligned", "front", "prompts", "raw")
        ]
    for path, key, wanted in forged:
        monkeypatch.setattr(page_module, "SECTIONS", wanted)
        held = path.read_text()
        for wrong in (value, {"where": value}):
            path.write_text(json.dumps({**json.loads(held), key: wrong}))
            try:
                page = write_report([root], tmp_path / "report.html").read_text()
            except ArtifactError as error:
                assert path.name in str(error) or "nothing to show" in str(error)
                continue
            assert "<meta http-equiv=refresh" not in page and "<script" not in page, (path.name, key)
            assert "Content-Security-Policy" in page and "\x00" not in page
        path.write_text(held)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_comparison_is_drawn_alone_with_the_names_where_its_points_lie(runs: Path, tmp_path: Path, suffix: str) -> None:
    """--picture: the same file from the same numbers, as the documentation shows one."""
    drawn = []
    for name in ("a", "b"):
        picture = tmp_path / f"{name}.{suffix}"
        assert main(["report", str(runs), "--output", str(tmp_path / "x.html"), "--picture", str(picture)]) == 0
        drawn.append(picture.read_bytes())
    assert drawn[0] == drawn[1] and len(drawn[0]) > 5000
    one_rate = [Point(arm, 1e-3, 1, {"utility_nll": x, "refusal_rate": y}) for arm, x, y in (("a", 1, 0.1), ("b", 1, 0.9))]
    near = [*one_rate, Point("c", 1e-3, 1, {"utility_nll": 1, "refusal_rate": 0.91})]
    for points, named in ((one_rate, ["a", "b"]), (near, [])):
        (axes,) = figures.tradeoff(compare_points(points, {"refusal_rate": 100})).axes
        assert [text.get_text() for text in axes.texts if text.get_text() in "abc"] == named, "else the legend has them"


def test_a_picture_of_no_comparison_or_kind_is_refused(runs: Path, tmp_path: Path, capsys: Any) -> None:
    for run, name, said in ((runs, "x.pdf", "ends in .svg or .png"), (runs / "phase2_start", "x.svg", "no comparison to draw")):
        words = ["report", str(run), "--output", str(tmp_path / "x.html"), "--picture", str(tmp_path / name)]
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_a_hundred_arms_of_any_name_are_drawn(tmp_path: Path) -> None:
    run_of(tmp_path, "compare", "c")
    points = [
        {
            "arm": f"{EVIL if i == 5 else chr(0xD800) if i == 6 else '$x_' if i == 7 else 'arm'}{i}",
            "rate": 1e-4 * (1 + r),
            "seed": 1,
            "utility_nll": 1.0 + 0.01 * i - 0.3 * r,
            "refusal_rate": 0.5,
        }
        for i in range(100)
        for r in range(2)
    ]
    prompts = {"refusal_rate": 100}
    write_json(
        tmp_path / "c" / "report.json",
        {"format": "warp_ds.compare", "points": points, "prompts": prompts, "overlap": {}, **compared(points, prompts, 1.0)},
    )
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "arm99" in page and "\ufffd6" in page and "<script" not in page and "Left out" not in page


def test_kept_is_said_of_the_model_that_lies_there_now(tmp_path: Path) -> None:
    run = run_of(tmp_path, "phase3", "p")
    write_json(run / "model" / "config.json", {"model_type": "llama"})
    write_tensors(run / "model" / "model.safetensors", {"w": torch.zeros(3)})
    write_json(
        run / "certificate.json",
        {
            "format": "warp_ds.certificate",
            "version": 2,
            "outcome": "kept",
            "problems": [],
            "frozen": 28,
            "frozen_drift": 1e-7,
            "after": str(run / "model"),
            "after_fingerprint": fingerprint_model(run / "model"),
        },
    )
    assert "<strong>Kept</strong>" in write_report([tmp_path], tmp_path / "report.html").read_text()
    write_tensors(run / "model" / "model.safetensors", {"w": torch.ones(3)})
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "<strong>Kept</strong>" not in page and "<strong>Another model's" in html.unescape(page)


def test_the_console_prints_markup_as_text(tmp_path: Path, capsys: Any) -> None:
    to_terminal([Table(["[red]arm[/red]", "rate"], [["[bold]x[/]", "[/]"]]), "said [link=https://example.org]y[/link]"])
    shown = capsys.readouterr().out
    assert "[red]arm[/red]" in shown and "[bold]x[/]" in shown and "[link=https://example.org]y[/link]" in shown
