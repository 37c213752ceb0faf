"""Pushing runs to the hub and taking bases and masks from it: huggingface_hub's own client against a small local server.

The server speaks the endpoints that the client asks for (repositories, commits of regular files, revisions, files); it is no
test of the real hub, of large-file storage, or of its permissions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from phase12_jobs import save_model
from ranks import run_ranks
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.launch.cli import main
from warp_ds.phases import publish
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.phases.publish import push
from warp_ds.report.card import new_card, of_merged
from warp_ds.store import hub as hub_client
from warp_ds.store.hub import is_hub_name
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import find_artifact

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF"
PAIRS = [{"prompt": f"question {i}", "response": "no I will not"} for i in range(6)]


class Hub(ThreadingHTTPServer):
    """Repositories in memory: 'models/o/n' or 'datasets/o/n' -> files by path; what was asked for; who may write."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        self.broken = False
        """Whether commits fail."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, value: Any = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.tokens.add(given)
        if given != TOKEN:
            return self.reply(401, {"error": f"Invalid credentials {given}"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type') or 'model'}s/{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.server.repos:
                return self.reply(409, {"error": "You already created this repo", "url": f"{self.server.url}/{name}"})
            self.server.repos[name] = {}
            self.server.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            return self.reply(200, {"url": f"{self.server.url}/{name.removeprefix('models/')}"})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        repo, rest = self.repo()
        if rest.startswith("preupload"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.reply(200, {"files": files})
        if self.server.broken:
            return self.reply(403, {"error": f"no room; token={TOKEN}"})
        for line in filter(None, body.split(b"\n")):
            step = json.loads(line)
            if step["key"] == "file":
                self.server.repos[repo][step["value"]["path"]] = base64.b64decode(step["value"]["content"])
        url = f"{self.server.url}/{repo}/commit/{'a' * 40}"
        self.reply(200, {"success": True, "commitUrl": url, "commitOid": "a" * 40, "hookOutput": ""})

    def repo(self) -> tuple[str, str]:
        match = re.match(r"/(?:api/)?((?:models/|datasets/)?[\w.-]+/[\w.-]+)/?(.*)", self.path)
        assert match is not None, self.path
        name = match[1] if match[1].startswith(("models/", "datasets/")) else f"models/{match[1]}"
        return name, match[2]

    def do_GET(self) -> None:
        repo, rest = self.repo()
        files = self.server.repos.get(repo)
        if files is None:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if rest.startswith("tree"):
            found = [{"type": "file", "path": n, "size": len(f), "oid": hashlib.sha1(f).hexdigest()} for n, f in files.items()]
            return self.reply(200, found)
        if not rest.startswith("resolve"):
            names = [{"rfilename": name} for name in files]
            return self.reply(200, {"id": repo.partition("/")[2], "sha": "a" * 40, "siblings": names, "private": True})
        name = rest.split("/", 2)[2]
        if name not in files:
            return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        digest = hashlib.sha1(files[name]).hexdigest()
        self.reply(200, files[name], ETag=f'"{digest}"', X_Repo_Commit="a" * 40, Accept_Ranges="bytes")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def at_hub(url: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_HOME and HF_TOKEN do to a process that starts with them."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    at_hub(hub.url, tmp_path / "cache", monkeypatch)
    return hub


def job(url: str, model: Path, root: Path) -> list[str]:
    """Phase 1, pushed; phase 2 on the basis from the hub, pushed."""
    patch = pytest.MonkeyPatch()
    at_hub(url, root / f"cache{processes.rank()}", patch)  # as of two nodes
    common: dict[str, Any] = {"model_name": str(model), "dtype": "float32", "device": "cpu", "output_dir": str(root / "runs")}
    common |= {"log_dir": str(root / "logs"), "push_to_hub": "org/safe", "max_length": 64, "layer_type": "ffn_down,attn_q"}
    first = run_basis(BasisArguments(**common), PAIRS)
    second = run_importance(ImportanceArguments(**common, basis_dir="org/safe-basis"), PAIRS)
    return [str(first), str(second)]


@pytest.fixture(scope="module")
def runs(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The directory of all, and the runs of phases 1 and 2."""
    root = tmp_path_factory.mktemp("hub")
    save_model(root / "llama", "llama")
    tiny_tokenizer().save_pretrained(root / "llama")
    return root, [Path(run) for run in run_ranks(2, job, hub.url, root / "llama", root)[0]]


def test_phases_push_what_they_made_and_take_a_basis_from_the_hub(hub: Hub, runs: Any) -> None:
    root, (first, second) = runs
    for repo, directory in (("datasets/org/safe-basis", first / "basis"), ("datasets/org/safe-masks", second / "masks")):
        there = dict(hub.repos[repo])
        card = ModelCard(there.pop("README.md").decode())
        assert there == {p.name: p.read_bytes() for p in directory.iterdir()} and hub.private[repo], "the card is written there"
        assert card.data.to_dict()["tags"] == ["warp_ds", f"warp_ds-{directory.name}"]
    masks = MaskStore(second / "masks").metadata
    assert masks.basis_dir is not None and "datasets--org--safe-basis" in masks.basis_dir
    written = [p for p in root.rglob("*") if p.is_file() and "cache" not in p.parts]
    assert hub.tokens == {TOKEN} and not [p for p in written if TOKEN.encode() in p.read_bytes()]


def test_masks_from_the_hub(here: Hub, runs: Any) -> None:
    _, (_, second) = runs
    found = find_artifact("org/safe-masks@main", "masks", ".")
    assert MaskStore(found).fingerprint() == MaskStore(second / "masks").fingerprint()
    assert not (found / "README.md").exists()
    MaskStore(found).check(MaskStore(found).find_basis("org/safe-basis"), None, "m")
    with pytest.raises(ArtifactError, match="--basis_dir org/none: no such directory here, and no data set of the hub"):
        find_artifact("org/none", "basis", ".")
    here.repos["datasets/org/empty"] = {"README.md": b""}
    with pytest.raises(ArtifactError, match="has no metadata.json, so it is no basis"):
        find_artifact("org/empty", "basis", ".")


def test_what_looks_like_a_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert is_hub_name("org/basis") and is_hub_name("org/basis@v1")
    assert not [name for name in ("checkpoints/x", "/org/basis", "./basis", "basis", "a/b/c", "none") if is_hub_name(name)]


def test_a_push_that_fails_loses_no_run(here: Hub, runs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, _ = runs
    here.broken = True
    more: dict[str, Any] = {"output_dir": str(tmp_path / "runs"), "log_dir": str(tmp_path / "logs"), "hub_private_repo": False}
    more |= {
        "model_name": str(root / "llama"),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 64,
        "push_to_hub": "org/late",
    }
    arguments = BasisArguments(**more, layer_type="attn_o", target_layers="last")
    with caplog.at_level(logging.INFO, "warp_ds"):
        run = run_basis(arguments, PAIRS)
    here.broken = False
    assert (run / "finished.json").is_file() and not here.repos["datasets/org/late-basis"]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"try again with warp-ds push {run} org/late-basis" in warning and TOKEN not in warning
    assert main(["push", str(run), "org/late-basis"]) == 0
    assert "metadata.json" in here.repos["datasets/org/late-basis"] and not here.private["datasets/org/late-basis"]


def slow_push(root: Path) -> bool:
    """Whether the ranks met several times while rank 0 sent; the others have nothing to do."""
    met, several = [0], threading.Event()

    def counted(tensor: Any) -> Any:
        met[0] += 1
        if met[0] == 3:
            several.set()
        return processes.all_reduce_sum(tensor)

    def push_slowly(*_: Any) -> str:
        assert several.wait(20), "the others wait for rank 0 in one collective, which ends after --timeout"
        return "there"

    consensus.all_reduce_sum, consensus.BEAT_SECONDS = counted, 0.05
    publish.push, hub_client.make_repository = push_slowly, lambda *_: None
    finished = publish.published(lambda arguments: root)
    finished(BasisArguments(model_name="m", device="cpu", push_to_hub="org/x", output_dir=str(root), log_dir=str(root)))
    processes.barrier()
    return several.is_set()


def test_ranks_meet_while_one_pushes(tmp_path: Path) -> None:
    assert run_ranks(2, slow_push, tmp_path) == [True, True]


def test_somebodys_readme_stays_and_goes(here: Hub, runs: Any, tmp_path: Path) -> None:
    _, (first, _) = runs
    basis = Path(shutil.copytree(first / "basis", tmp_path / "basis"))
    (basis / "README.md").write_text("mine")
    (basis / "merged.json").write_text("{}")
    push(basis, "me/basis")
    assert here.repos["datasets/me/basis"]["README.md"] == b"mine" == (basis / "README.md").read_bytes()
    assert "merged.json" not in here.repos["datasets/me/basis"]


def test_a_push_that_the_disk_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(*_: Any) -> Any:
        raise PermissionError("no reading here")

    monkeypatch.setattr(publish, "push", unreadable)
    publish._push_or_warn(tmp_path, "me/x", True)
    assert "finished, but was not pushed to the hub (no reading here)" in caplog.text


def test_a_model_and_its_card(here: Hub, runs: Any, tmp_path: Path) -> None:
    model = save_model(tmp_path / "run" / "model", "llama")
    (model / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    assert push(model, "me/tuned").endswith("me/tuned")
    assert here.repos["models/me/tuned"] == {p.name: p.read_bytes() for p in model.iterdir()}
    with pytest.raises(ArtifactError, match="is neither a run of warp_ds nor a model"):
        push(tmp_path, "me/tuned")


def test_an_adapter_and_its_card(here: Hub, tmp_path: Path) -> None:
    """Of a run whose adapter was not merged, and the directory itself."""
    run = tmp_path / "phase3_1"
    given = get_peft_model(AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "m", "llama")), LoraConfig(r=2))
    given.save_pretrained(run / "adapter")
    text = new_card("m", "Trained by warp_ds phase 3.", "org/base", "org/data", adapter=True)
    (run / "adapter" / "README.md").write_text(text)
    assert ModelCard(text).data.library_name == "peft"
    assert ModelCard(of_merged(text)).data.library_name == "transformers"
    (run / "config.json").write_text(json.dumps({"phase": "phase3", "identity": "x"}))
    (run / "finished.json").write_text("{}")
    files = {p.name: p.read_bytes() for p in (run / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files
    for name, what in (("me/run", run), ("me/adapter", run / "adapter")):
        assert main(["push", str(what), name]) == 0
        assert here.repos[f"models/{name}"] == files


def test_what_cannot_be_pushed_is_said_before_the_work(
    here: Hub, runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = runs
    given = {"model_name": str(root / "llama"), "device": "cpu", "dtype": "float32", "output_dir": str(tmp_path / "runs")}
    with pytest.raises(ConfigError, match="--push_to_hub nobody-basis: give a repository of the hub as OWNER/NAME"):
        run_basis(BasisArguments(**given, push_to_hub="nobody"), PAIRS)
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "X")
    with pytest.raises(ConfigError, match="the hub did not make that repository.*log in") as refused:
        run_basis(BasisArguments(**given, push_to_hub="org/x"), PAIRS)
    assert TOKEN[:-1] not in str(refused.value) and not (tmp_path / "runs").exists()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="the hub did not make that repository"):
        run_basis(BasisArguments(**given, push_to_hub="org/x"), PAIRS)
