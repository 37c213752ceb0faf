"""Pairs of models that a certificate must not call kept, each made from one honest pair by editing its files.

Edits are of files alone (JSON and safetensors), so that any version of the program can be tried on them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

MASKED, OTHER = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
WEIGHT = f"{MASKED}.weight"
STEM = "layer_00_ffn_down"


@dataclass
class Pair:
    """An honest pair, copied for one forgery."""

    root: Path
    allowed: dict[str, float]
    """Layer -> the largest move of a frozen coefficient that the honest pair's certificate allows."""
    plain: Path
    """The same training without masks."""
    plain_slow: Path
    """... in bf16, by steps that rounding hides."""

    @property
    def before(self) -> Path:
        return self.root / "before"

    @property
    def after(self) -> Path:
        return self.root / "after"

    def edit(self, side: str, change: Callable[[dict[str, Tensor]], None], file: str = "model.safetensors") -> None:
        path = self.root / side / file
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata()
        tensors = {name: t.clone() for name, t in load_file(path).items()}
        change(tensors)
        path.unlink()
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)

    def edit_json(self, file: str, change: Callable[[Any], None]) -> None:
        path = self.root / file
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    def frozen(self, name: str, n: int) -> Tensor:
        stem = (
            f"layer_{int(name.split('.')[2]):02d}_"
            + {"down_proj": "ffn_down", "q_proj": "attn_q", "k_proj": "attn_k"}[name.split(".")[-1]]
        )
        packed = load_file(self.root / "masks" / f"{stem}_mask.safetensors")["frozen"]
        bits = packed.unsqueeze(-1).bitwise_and(torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)).ne(0)
        return bits.flatten(1)[:, :n]

    def complete(self, name: str, n: int) -> Tensor:
        """U with its complement, as LAPACK's QR gives it."""
        files = json.loads((self.root / "basis" / "metadata.json").read_text())["layers"]
        u = load_file(self.root / "basis" / files[name]["file"])["U"].double()
        q = torch.linalg.qr(u, mode="complete")[0]
        return torch.cat([u, q[:, u.shape[1] :]], 1)

    def push(self, move: Callable[[Tensor, Tensor, float], Tensor], only: str | None = None) -> None:
        """Moves frozen coefficients: ``move`` takes C [m, n], frozen [m, n] and what rounding allows one, and returns ΔC."""

        def change(tensors: dict[str, Tensor]) -> None:
            for name, allowed in self.allowed.items():
                if only in (None, name):
                    w = tensors[f"{name}.weight"]
                    u, frozen = self.complete(name, w.shape[1]), self.frozen(name, w.shape[1])
                    delta = torch.where(frozen, move(w.double() @ u, frozen, allowed), 0.0)
                    tensors[f"{name}.weight"] = (w.double() + delta @ u.T).to(w.dtype)

        self.edit("after", change)


Forge = Callable[[Pair], None]
FORGERIES: list[tuple[str, str, Forge]] = []
"""What was done; what the certificate must come to: kept, broken, cannot tell or refused; and doing it."""


def forgery(outcome: str, what: str) -> Callable[[Forge], Forge]:
    def register(forge: Forge) -> Forge:
        FORGERIES.append((what, outcome, forge))
        return forge

    return register


def _plain_weights(pair: Pair, names: tuple[str, ...] = (WEIGHT,)) -> dict[str, Tensor]:
    tensors = load_file(pair.plain / "model.safetensors")
    return {name: tensors[name] for name in names}


def _replace(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    tensors[name] = value


# ---------------------------------------------------------------- which weights are loaded


@forgery("refused", "an index that names another file than the one the tensors lie in")
def _index_elsewhere(pair: Pair) -> None:
    tensors = load_file(pair.after / "model.safetensors")
    (pair.after / "model.safetensors").unlink()
    save_file(tensors | _plain_weights(pair), pair.after / "a.safetensors", metadata={"format": "pt"})
    save_file({WEIGHT: tensors[WEIGHT]}, pair.after / "honest.safetensors", metadata={"format": "pt"})
    weight_map = {name: "a.safetensors" for name in tensors} | {WEIGHT: "honest.safetensors"}
    (pair.after / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@forgery("refused", "an honest index beside a model.safetensors that is loaded first")
def _index_beside(pair: Pair) -> None:
    tensors = load_file(pair.after / "model.safetensors")
    save_file(tensors, pair.after / "honest.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "honest.safetensors")
    (pair.after / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    pair.edit("after", lambda found: found.update(_plain_weights(pair)))


@forgery("refused", "the same tensor in two shards")
def _twice(pair: Pair) -> None:
    tensors = load_file(pair.after / "model.safetensors")
    (pair.after / "model.safetensors").unlink()
    save_file(tensors, pair.after / "a.safetensors", metadata={"format": "pt"})
    save_file(_plain_weights(pair), pair.after / "b.safetensors", metadata={"format": "pt"})
    other = next(name for name in tensors if name != WEIGHT)
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {other: "a.safetensors", "x": "b.safetensors"}
    (pair.after / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@forgery("refused", "names without the prefix beside the right ones")
def _without_prefix(pair: Pair) -> None:
    pair.edit("after", lambda t: t.update({WEIGHT.removeprefix("model."): _plain_weights(pair)[WEIGHT]}))


@forgery("kept", "all names without the prefix: from_pretrained adds it")
def _no_prefix_at_all(pair: Pair) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    pair.edit("after", change)


@forgery("broken", "... and one layer trained without its mask")
def _no_prefix_and_moved(pair: Pair) -> None:
    _one_layer(pair)
    _no_prefix_at_all(pair)


@forgery("refused", "config.transformers_weights names another file")
def _transformers_weights(pair: Pair) -> None:
    tensors = load_file(pair.after / "model.safetensors")
    save_file(tensors | _plain_weights(pair), pair.after / "other.safetensors", metadata={"format": "pt"})
    pair.edit_json("after/config.json", lambda c: c.update(transformers_weights="other.safetensors"))


@forgery("refused", "an adapter in the directory")
def _adapter(pair: Pair) -> None:
    (pair.after / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["down_proj"]}))
    save_file(
        {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(1, 21)},
        pair.after / "adapter_model.safetensors",
    )


@forgery("refused", "pickled weights beside the safetensors")
def _pickled_beside(pair: Pair) -> None:
    torch.save(_plain_weights(pair), pair.after / "pytorch_model.bin")


@forgery("kept", "pickled weights beside the model before, as the hub has them: noted")
def _pickled_before(pair: Pair) -> None:
    torch.save(_plain_weights(pair), pair.before / "pytorch_model.bin")


@forgery("refused", "a variant (model.fp16.safetensors) beside the weights")
def _variant(pair: Pair) -> None:
    save_file(load_file(pair.plain / "model.safetensors"), pair.after / "model.fp16.safetensors")


@forgery("refused", "a GGUF file beside the weights")
def _gguf(pair: Pair) -> None:
    (pair.after / "model-q8.gguf").write_bytes(b"GGUF" + bytes(100))


@forgery("refused", "a truncated file")
def _truncated(pair: Pair) -> None:
    data = (pair.after / "model.safetensors").read_bytes()
    (pair.after / "model.safetensors").write_bytes(data[:-7])


@forgery("kept", "weights behind a symbolic link: the hub's cache is made of them")
def _symlink(pair: Pair) -> None:
    shutil.move(pair.after / "model.safetensors", pair.root / "blob")
    (pair.after / "model.safetensors").symlink_to(pair.root / "blob")


@forgery("refused", "a FIFO in place of the weights")
def _fifo(pair: Pair) -> None:
    (pair.after / "model.safetensors").unlink()
    os.mkfifo(pair.after / "model.safetensors")


@forgery("refused", "masked weights missing")
def _missing(pair: Pair) -> None:
    pair.edit("after", lambda t: t.pop(WEIGHT) is None)


@forgery("refused", "a masked weight transposed")
def _transposed(pair: Pair) -> None:
    pair.edit("after", lambda t: _replace(t, WEIGHT, t[WEIGHT].T))


@forgery("refused", "masked weights as int8")
def _int8(pair: Pair) -> None:
    pair.edit("after", lambda t: _replace(t, WEIGHT, (t[WEIGHT] * 1000).to(torch.int8)))


@forgery("refused", "masked weights as float8")
def _float8(pair: Pair) -> None:
    pair.edit("after", lambda t: _replace(t, WEIGHT, t[WEIGHT].to(torch.float8_e4m3fn)))


@forgery("kept", "masked weights as float64 of the same values")
def _float64(pair: Pair) -> None:
    pair.edit("after", lambda t: _replace(t, WEIGHT, t[WEIGHT].double()))


# ---------------------------------------------------------------- which weights they are


@forgery("refused", "before and after swapped")
def _swapped(pair: Pair) -> None:
    os.rename(pair.before, pair.root / "x")
    os.rename(pair.after, pair.before)
    os.rename(pair.root / "x", pair.after)


@forgery("cannot tell", "the model before, twice")
def _same_twice(pair: Pair) -> None:
    shutil.rmtree(pair.after)
    shutil.copytree(pair.before, pair.after)


@forgery("refused", "a 'before' made to fit: the weights after, with the free coefficients moved back")
def _forged_before(pair: Pair) -> None:
    shutil.copytree(pair.plain, pair.after, dirs_exist_ok=True)
    new = load_file(pair.after / "model.safetensors")

    def change(tensors: dict[str, Tensor]) -> None:
        for name in pair.allowed:
            w, old = new[f"{name}.weight"].double(), tensors[f"{name}.weight"].double()
            u, frozen = pair.complete(name, w.shape[1]), pair.frozen(name, w.shape[1])
            tensors[f"{name}.weight"] = (torch.where(frozen, w @ u, old @ u) @ u.T).to(tensors[f"{name}.weight"].dtype)

    pair.edit("before", change)


@forgery("broken", "the same training without masks")
def _plain(pair: Pair) -> None:
    shutil.copytree(pair.plain, pair.after, dirs_exist_ok=True)


@forgery("broken", "one layer trained without its mask")
def _one_layer(pair: Pair) -> None:
    pair.edit("after", lambda t: t.update(_plain_weights(pair)))


@forgery("cannot tell", "a plain bf16 run at a small rate")
def _slow(pair: Pair) -> None:
    for file in (pair.plain_slow / "after").iterdir():
        shutil.copyfile(file, pair.after / file.name)
    for file in (pair.plain_slow / "before").iterdir():
        shutil.copyfile(file, pair.before / file.name)
    for kind in ("masks", "basis"):
        shutil.copytree(pair.plain_slow / kind, pair.root / kind, dirs_exist_ok=True)


@forgery("broken", "a NaN in a masked row")
def _nan(pair: Pair) -> None:
    pair.edit("after", lambda t: t[WEIGHT].__setitem__((3, 4), float("nan")))


@forgery("broken", "a masked row of NaN")
def _nan_row(pair: Pair) -> None:
    pair.edit("after", lambda t: t[WEIGHT].__setitem__(3, float("nan")))


@forgery("broken", "an infinity in a masked row")
def _infinity(pair: Pair) -> None:
    pair.edit("after", lambda t: t[WEIGHT].__setitem__((3, 4), float("-inf")))


@forgery("broken", "NaN in a layer without a mask")
def _nan_elsewhere(pair: Pair) -> None:
    pair.edit("after", lambda t: t["model.norm.weight"].__setitem__(0, float("nan")))


@forgery("broken", "all frozen coefficients moved by 0.3 of the allowance in one direction")
def _push_ones(pair: Pair) -> None:
    pair.push(lambda c, frozen, allowed: torch.full_like(c, 0.3 * allowed))


@forgery("broken", "... by 0.5 of it along their signs")
def _push_signs(pair: Pair) -> None:
    pair.push(lambda c, frozen, allowed: 0.5 * allowed * torch.sign(c))


@forgery("broken", "... by random signs")
def _push_random(pair: Pair) -> None:
    draw = torch.Generator().manual_seed(3)
    pair.push(lambda c, frozen, allowed: 0.3 * allowed * torch.sign(torch.randn(c.shape, generator=draw, dtype=c.dtype)))


@forgery("broken", "... in proportion to them (shrinkage of 0.3 of the allowance in the mean)")
def _push_shrink(pair: Pair) -> None:
    pair.push(lambda c, frozen, allowed: -0.3 * allowed * c / c[frozen].square().mean().sqrt())


@forgery("broken", "... by a matrix of rank one")
def _push_rank_one(pair: Pair) -> None:
    draw = torch.Generator().manual_seed(4)
    pair.push(
        lambda c, frozen, allowed: (
            0.3
            * allowed
            * torch.outer(
                torch.randn(c.shape[0], generator=draw, dtype=c.dtype), torch.randn(c.shape[1], generator=draw, dtype=c.dtype)
            )
        )
    )


@forgery("broken", "... by 0.5 of it in one layer alone")
def _push_one_layer(pair: Pair) -> None:
    pair.push(lambda c, frozen, allowed: torch.full_like(c, 0.5 * allowed), only=MASKED)


@forgery("broken", "one row moved by 0.9 of the allowance")
def _push_row(pair: Pair) -> None:
    pair.push(lambda c, frozen, allowed: 0.9 * allowed * (torch.arange(len(c)) == 2).double().unsqueeze(1).expand_as(c), MASKED)


@forgery("broken", "one column moved by 0.9 of the allowance")
def _push_column(pair: Pair) -> None:
    pair.push(lambda c, frozen, allowed: 0.9 * allowed * (torch.arange(c.shape[1]) == 1).double().expand_as(c), MASKED)


@forgery("broken", "one frozen coefficient moved by three times the allowance")
def _push_one(pair: Pair) -> None:
    def move(c: Tensor, frozen: Tensor, allowed: float) -> Tensor:
        delta = torch.zeros_like(c)
        row, column = frozen.nonzero()[7].tolist()
        delta[row, column] = 3 * allowed
        return delta

    pair.push(move, MASKED)


# ---------------------------------------------------------------- what is not claimed


@forgery("kept", "norms, embeddings and an unmasked layer changed: no claim, and listed")
def _unmasked(pair: Pair) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
            tensors[name] = tensors[name] + 1

    pair.edit("after", change)


@forgery("kept", "a bias added to a masked layer: no claim, and listed")
def _bias(pair: Pair) -> None:
    pair.edit("after", lambda t: t.update({f"{MASKED}.bias": torch.ones(15)}))


@forgery("kept", "rope_theta, norm's epsilon and tied embeddings changed in config.json: no claim, and listed")
def _config(pair: Pair) -> None:
    pair.edit_json("after/config.json", lambda c: c.update(rope_theta=7.0, rms_norm_eps=0.1, tie_word_embeddings=True))


@forgery("kept", "another tokenizer and chat template: no claim, and listed")
def _tokenizer(pair: Pair) -> None:
    pair.edit_json("after/tokenizer.json", lambda t: t.update(truncation=None, padding=None, model={"type": "other"}))
    (pair.after / "chat_template.jinja").write_text("{{ 'I will help with anything. ' }}")


# ---------------------------------------------------------------- masks and bases


@forgery("refused", "a masks file of zeros")
def _zeroed(pair: Pair) -> None:
    pair.edit("masks", lambda t: t["frozen"].zero_() is None, f"{STEM}_mask.safetensors")


@forgery("refused", "a masks file with one bit cleared, and the same size")
def _cleared(pair: Pair) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        row, column = tensors["frozen"].nonzero()[0].tolist()
        byte = int(tensors["frozen"][row, column])
        tensors["frozen"][row, column] = byte & (byte - 1)

    pair.edit("masks", change, f"{STEM}_mask.safetensors")


@forgery("refused", "all masks zeroed, metadata too: keep_ratio still promises")
def _zeroed_consistently(pair: Pair) -> None:
    def change(metadata: Any) -> None:
        for entry in metadata["layers"].values():
            pair.edit("masks", lambda t: t["frozen"].zero_() is None, entry["file"])
            entry["frozen"] = 0
        metadata["frozen"] = 0

    pair.edit_json("masks/metadata.json", change)


@forgery("cannot tell", "all masks zeroed, and the metadata promise 0: nothing is frozen")
def _nothing_frozen(pair: Pair) -> None:
    _zeroed_consistently(pair)
    pair.edit_json("masks/metadata.json", lambda m: m.update(keep_ratio=0.0))


@forgery("refused", "a bit set beyond the layer's inputs")
def _beyond(pair: Pair) -> None:
    pair.edit("masks", lambda t: t["frozen"].__setitem__((0, -1), int(t["frozen"][0, -1]) | 1), f"{STEM}_mask.safetensors")


@forgery("refused", "keep_ratio edited")
def _keep_ratio(pair: Pair) -> None:
    pair.edit_json("masks/metadata.json", lambda m: m.update(keep_ratio=0.9))


@forgery("refused", "a layer's frozen count edited")
def _count(pair: Pair) -> None:
    pair.edit_json("masks/metadata.json", lambda m: m["layers"][MASKED].update(frozen=1))


@forgery("refused", "two layers' mask files swapped on disk")
def _mask_files(pair: Pair) -> None:
    one, other = (pair.root / "masks" / f"layer_0{i}_ffn_down_mask.safetensors" for i in (0, 1))
    os.rename(one, pair.root / "x")
    os.rename(other, one)
    os.rename(pair.root / "x", other)


@forgery("refused", "two layers' file names swapped in the masks' metadata")
def _mask_names(pair: Pair) -> None:
    def change(metadata: Any) -> None:
        one, other = metadata["layers"][MASKED], metadata["layers"][OTHER]
        one["file"], other["file"] = other["file"], one["file"]

    pair.edit_json("masks/metadata.json", change)


@forgery("refused", "two layers' names swapped in the masks' metadata")
def _layer_names(pair: Pair) -> None:
    def change(metadata: Any) -> None:
        layers = metadata["layers"]
        layers[MASKED], layers[OTHER] = layers[OTHER], layers[MASKED]

    pair.edit_json("masks/metadata.json", change)


@forgery("refused", "a layer taken out of the masks' metadata")
def _layer_out(pair: Pair) -> None:
    pair.edit_json("masks/metadata.json", lambda m: m["layers"].pop(MASKED) is None)


@forgery("refused", "two layers' file names swapped in the basis's metadata")
def _basis_names(pair: Pair) -> None:
    def change(metadata: Any) -> None:
        one, other = metadata["layers"][MASKED], metadata["layers"][OTHER]
        one["file"], other["file"] = other["file"], one["file"]

    pair.edit_json("basis/metadata.json", change)


@forgery("refused", "a basis with permuted rows: still orthonormal, other directions")
def _permuted(pair: Pair) -> None:
    pair.edit("basis", lambda t: _replace(t, "U", t["U"].roll(1, 0)), f"{STEM}_svd.safetensors")


@forgery("refused", "a basis with two columns exchanged")
def _columns(pair: Pair) -> None:
    pair.edit("basis", lambda t: _replace(t, "U", t["U"][:, [1, 0, *range(2, t["U"].shape[1])]]), f"{STEM}_svd.safetensors")


@forgery("refused", "a basis scaled by 1.001")
def _scaled(pair: Pair) -> None:
    pair.edit("basis", lambda t: _replace(t, "U", t["U"] * 1.001), f"{STEM}_svd.safetensors")


@forgery("refused", "a basis with a column twice")
def _column_twice(pair: Pair) -> None:
    pair.edit("basis", lambda t: t["U"].__setitem__((slice(None), 1), t["U"][:, 0]), f"{STEM}_svd.safetensors")


@forgery("refused", "a basis with a column of zeros")
def _rank_deficient(pair: Pair) -> None:
    pair.edit("basis", lambda t: t["U"].__setitem__((slice(None), 1), 0.0), f"{STEM}_svd.safetensors")


@forgery("refused", "negative eigenvalues")
def _negative(pair: Pair) -> None:
    pair.edit("basis", lambda t: _replace(t, "S", -t["S"]), f"{STEM}_svd.safetensors")


@forgery("refused", "NaN in a basis")
def _basis_nan(pair: Pair) -> None:
    pair.edit("basis", lambda t: t["U"].__setitem__((0, 0), float("nan")), f"{STEM}_svd.safetensors")


@forgery("refused", "a basis in bfloat16")
def _basis_dtype(pair: Pair) -> None:
    pair.edit("basis", lambda t: _replace(t, "U", t["U"].bfloat16()), f"{STEM}_svd.safetensors")


@forgery("refused", "a basis file outside its directory")
def _outside(pair: Pair) -> None:
    file = f"{STEM}_svd.safetensors"
    shutil.copyfile(pair.root / "basis" / file, pair.root / file)

    def change(metadata: Any) -> None:
        metadata["bases"][f"../{file}"] = metadata["bases"].pop(file)
        metadata["layers"][MASKED]["file"] = f"../{file}"

    pair.edit_json("basis/metadata.json", change)


@forgery("refused", "masks that claim the identity basis, but for its fingerprint")
def _claims_identity(pair: Pair) -> None:
    pair.edit_json("masks/metadata.json", lambda m: m.update(basis="identity"))


@forgery("broken", "masks rewritten for the identity basis throughout")
def _identity(pair: Pair) -> None:
    pair.edit_json("masks/metadata.json", lambda m: m.update(basis="identity", basis_dir=None, basis_fingerprint=None))


@forgery("refused", "metadata of another format")
def _format(pair: Pair) -> None:
    pair.edit_json("masks/metadata.json", lambda m: m.update(format="other"))


@forgery("refused", "metadata of an unknown version")
def _version(pair: Pair) -> None:
    pair.edit_json("masks/metadata.json", lambda m: m.update(version=99))


@forgery("refused", "a keep_ratio of NaN")
def _nan_ratio(pair: Pair) -> None:
    pair.edit_json("masks/metadata.json", lambda m: m.update(keep_ratio=float("nan")))


@forgery("refused", "a directory in place of a masks file")
def _directory(pair: Pair) -> None:
    (pair.root / "masks" / f"{STEM}_mask.safetensors").unlink()
    (pair.root / "masks" / f"{STEM}_mask.safetensors").mkdir()
