"""Tokens, passwords and keys are refused where they are given, and in nothing that is written."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path
from typing import Any

import pytest

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import BasisArguments, TrainArguments
from warp_ds.flags.jobs import SubmitArguments
from warp_ds.flags.parsing import FlagParser, parse_arguments, parse_training
from warp_ds.launch.chain import find_chain
from warp_ds.phases.failures import record_failure
from warp_ds.phases.run import log_to_terminal, start_run
from warp_ds.secrets import STRUCK, redact
from warp_ds.zero.settings import zero3_config

#: None of them is anybody's. Put together here, so that no search for leaked tokens finds them.
LOOK = [
    "hf_" + "aBcD1234" * 4,
    "sk-" + "proj-" + "aBcD1234" * 4,
    "ghp_" + "aBcD1234" * 4,
    "github_" + "pat_" + "aBcD1234" * 4,
    "glpat-" + "aBcD1234" * 3,
    "AKIA" + "ABCD1234" * 2,
    "xoxb-" + "12345678" * 3,
    "https://me:" + "pass@host/x",
]
NAMED = ["--hub_token", "--token", "--api_key", "--comet.api-key", "--password", "--aws_secret"]
ORDINARY = [
    "hf_checkpoints/llama",
    "sk-learn",
    "meta-llama/Llama-3",
    "pad_token=<pad>",
    "max_new_tokens: 5",
    "token_scope=all",
    "https://host/a@b",
    "a token: 0.5 nats",
    "s3://bucket/key",
    "checkpoints/hf_models_of_2026",
    "--token_scope response",
    "hf-llama2safetytuning",
    "/models/hf_Mistral7BInstructv03",
    "pk-projectallocation2024",
    "/scratch/u/npm_checkpointsafetytuned",
    "sk-resnettransformers",
    "sk-my-long-allocation-name-of-2026",
]


@pytest.mark.parametrize("value", LOOK)
def test_what_looks_like_a_secret_is_refused_and_not_repeated(tmp_path: Path, value: str) -> None:
    secret = value.split("//")[-1].split("@")[0]
    (tmp_path / "c.yaml").write_text(json.dumps({"run_name": value}))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "comet": {"x": value}}))
    ways: list[Any] = [
        lambda: parse_arguments(BasisArguments, ["--model_name", value]),
        lambda: parse_arguments(BasisArguments, [f"--safety_data={value}"]),
        lambda: parse_arguments(BasisArguments, ["--config", str(tmp_path / "c.yaml")]),
        lambda: parse_training(TrainArguments, ["--lr_scheduler_type", value]),
        lambda: BasisArguments(output_dir=value).check(),
        lambda: find_chain(SubmitArguments(setup=[f"export X={value}"], cluster="local"), ["--device", "cpu"]),
        lambda: zero3_config(BasisArguments(deepspeed=str(tmp_path / "ds.json"), device="cpu")),
    ]
    for way in ways:
        with pytest.raises(ConfigError, match="looks like a token") as refused:
            way()
        assert secret not in str(refused.value), refused.value
        assert "HF_TOKEN" in str(refused.value)


@pytest.mark.parametrize("flag", NAMED)
def test_what_is_called_a_secret_is_refused_and_not_repeated(flag: str) -> None:
    for words in ([flag, "swordfish"], [f"{flag}=swordfish"]):
        with pytest.raises(ConfigError) as refused:
            parse_training(TrainArguments, words)
        assert "swordfish" not in str(refused.value)
        arguments, rest = FlagParser(SubmitArguments).parse_known_args(["--cluster", "local"])[0], words
        with pytest.raises(ConfigError) as refused:
            find_chain(SubmitArguments(cluster=arguments.cluster), rest)
        assert "swordfish" not in str(refused.value)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_words_stay(text: str) -> None:
    assert redact(text) == text


def test_redact_walks_through_what_json_holds() -> None:
    found = redact(
        {
            "hub_token": "a",
            "n": 3,
            "command": ["x", "--hub_token", "b", "--seed", "1", "--api_key=c"],
            "deep": [{"password": "d"}, None, 1.5, f"see {LOOK[0]}!"],
            LOOK[1]: "e",
            "token_scope": "all",
        }
    )
    assert found == {
        "hub_token": STRUCK,
        "n": 3,
        "command": ["x", "--hub_token", STRUCK, "--seed", "1", f"--api_key={STRUCK}"],
        "deep": [{"password": STRUCK}, None, 1.5, f"see {STRUCK}!"],
        STRUCK: "e",
        "token_scope": "all",
    }


def test_long_names_take_no_time() -> None:
    """A pattern that tries every split of a name would not end; the suite's own time limit is the bar."""
    for text in (
        "a." * 20_000,
        "model.layers.0.mlp." * 2000 + "token",
        "_" * 20_000,
        "hf_" * 10_000,
        "eyJ" * 10_000,
        "sk-" * 10_000,
    ):
        redact(text)


def test_a_run_writes_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Whoever calls the package past the command line: settings, command, logs, the run's state, a failure's traceback."""
    monkeypatch.setattr("sys.argv", ["phase3.py", "--hub_token", "swordfish", f"--model_name={LOOK[2]}"])
    ours = logging.getLogger("warp_ds")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", False)
    log_to_terminal()
    arguments = BasisArguments(output_dir=str(tmp_path), log_dir=str(tmp_path / "logs"), run_name="r", device="cpu")
    passed = {"hub_token": "swordfish", "report_to": [LOOK[0]]}
    with pytest.raises(RuntimeError), start_run("phase1", arguments, {}, passed) as run:
        logging.getLogger("warp_ds.x").warning("calling %s with hub_token=%s", LOOK[-1], "swordfish")
        run.note("said", error=LOOK[3])
        raise RuntimeError(f"401 for {LOOK[0]}, hub_token=swordfish")
    record_failure(run.directory, RuntimeError(LOOK[0]), tmp_path / "logs")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    text = "".join(path.read_text() for path in written) + "".join(capsys.readouterr())
    for secret in (*LOOK[:-1], "swordfish", "me:pass"):
        assert secret not in text
    assert text.count(STRUCK) > 8
    for name in ("config.json", "state.jsonl"):
        assert stat.S_IMODE((run.directory / name).stat().st_mode) == 0o600
