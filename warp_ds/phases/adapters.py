"""Phases 0 and 3 with ``--adapter lora``: a PEFT adapter on a ZeRO-3 model, and its export as PEFT saves it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ConfigError
from warp_ds.flags.groups import AdapterFlags
from warp_ds.models.adapter_directory import BASE, WEIGHTS
from warp_ds.models.flops import routing
from warp_ds.models.layer_names import LAYER_TYPES, ROUTER
from warp_ds.models.targets import find_targets, targets_of
from warp_ds.phases.lora_methods import folded
from warp_ds.phases.merge import merge_adapter
from warp_ds.report.card import of_merged
from warp_ds.store.files import write_json, write_text
from warp_ds.store.layers import TargetLayer
from warp_ds.zero import saved_directory
from warp_ds.zero.fetch import gathered

logger = logging.getLogger(__name__)
NAME = "default"


def check_peft(arguments: AdapterFlags) -> None:
    """ConfigError where an adapter is asked for and PEFT is not installed."""
    if arguments.adapter != "none" and find_spec("peft") is None:
        raise ConfigError("--adapter lora needs PEFT: pip install 'warp_ds[peft]' (or peft)")


def is_mixture(config: Any) -> bool:
    return routing(config)[1] > 1


def check_adaptable(layers: Sequence[TargetLayer], config: Any) -> None:
    """ConfigError for layers that PEFT has no LoRA of their own for: rows of stacked experts, routers, and a mixture's dense
    and shared feed-forward layers, in whose place PEFT takes the experts' parameters of all blocks, by the names' ends."""
    for layer in layers:
        moved = layer.type.startswith("ffn_") and is_mixture(config)
        if layer.expert is not None or layer.type == ROUTER or moved:
            what = "a router, which returns more than W x" if layer.expert is None else "one of a mixture's stacked experts"
            what = "beside a mixture's experts, which PEFT puts its adapter on" if moved else what
            raise ConfigError(
                f"{layer.name} is {what}: an adapter is of linear layers that every token passes. Name such with --lora_layers "
                "(--layer_type where masks are made or arms compared), attn_q,attn_v say, or train the weights (--adapter none)"
            )


def check_layers(model_dir: Path, masked: Sequence[TargetLayer], arguments: AdapterFlags) -> None:
    """``check_adaptable`` of the layers that are to get an adapter, before any weight is read."""
    if arguments.adapter != "none":
        chosen = getattr(arguments, "target_layers", "all")
        layers = masked if not arguments.lora_layers else targets_of(model_dir, chosen, arguments.lora_layers)
        check_adaptable(layers, AutoConfig.from_pretrained(model_dir, trust_remote_code=False) if layers else None)


def adapted_layers(model: PreTrainedModel, masked: Sequence[TargetLayer], arguments: AdapterFlags) -> list[TargetLayer]:
    """The layers that get an adapter: those of --lora_layers, else the ``masked`` ones, else every linear layer that
    --layer_type can name. ConfigError where one of them cannot have any."""
    if masked and not arguments.lora_layers:
        check_adaptable(masked, model.config)
        return list(masked)
    layers = find_targets(model, getattr(arguments, "target_layers", "all"), arguments.lora_layers or ",".join(LAYER_TYPES))
    if not arguments.lora_layers and is_mixture(model.config):
        layers = [layer for layer in layers if not layer.type.startswith(("ffn_", "experts_"))]
        if processes.rank() == 0:
            logger.info(
                "the adapter is on attention alone, since PEFT puts one of a mixture's feed-forward layers on its experts"
            )
    check_adaptable(layers, model.config)
    own = {layer.name for layer in masked}
    free = [layer.name for layer in layers if layer.name not in own]
    if free and own and processes.rank() == 0:
        logger.warning(
            "%d of %d layers with an adapter have no mask (the first is %s): nothing protects what they change",
            *(len(free), len(layers), free[0]),
        )
    return layers


def add_lora(model: PreTrainedModel, layers: Sequence[TargetLayer], arguments: AdapterFlags, seed: int) -> Any:
    """The PEFT model around ``model`` (ZeRO-3 partitioned, whose weights stop training): A and B on ``layers``. The same on
    every rank.

    A is drawn from ``seed`` (Kaiming, as PEFT does), B is 0, both in the model's dtype.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_rslora=arguments.lora_rslora,
        target_modules=list(dict.fromkeys(layer.module for layer in layers)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=NAME, autocast_adapter_dtype=False)
    if moved := sorted(getattr(adapted.peft_config[NAME], "target_parameters", None) or ()):
        raise ConfigError(
            f"PEFT puts an adapter of these layers on {', '.join(moved)}, which are experts: name others with --lora_layers"
        )
    if processes.rank() == 0:
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        logger.info("LoRA of rank %d on %d layers: %.2f M parameters train", arguments.lora_r, len(layers), trained / 1e6)
    return adapted


def export_adapter(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, directory: Path, model_card: str, base_model: str, fingerprint: str
) -> None:
    """Writes A and B as PEFT does (adapter_config.json, adapter_model.safetensors), with our card and the base model's
    ``fingerprint``. Collective; ``adapted`` is the PEFT model, one parameter of which is whole at a time. What is there is
    replaced when the new one is whole."""
    state: dict[str, Any] = {}
    for name, param in adapted.named_parameters():
        if param.requires_grad:
            with gathered([param]):
                if processes.rank() == 0:
                    state[name] = param.detach().to("cpu", copy=True)
    with saved_directory.replaced(directory) as aside:
        with consensus.on_every_rank_or_none(f"saving to {directory}"):
            if processes.rank() == 0:
                state, changed = folded(adapted, state, adapted.peft_config[NAME])
                config = adapted.peft_config[NAME] = replace(adapted.peft_config[NAME], **changed)
                config.base_model_name_or_path = str(Path(base_model).resolve()) if Path(base_model).is_dir() else base_model
                adapted.save_pretrained(aside, state_dict=state, save_embedding_layers=False)
                tokenizer.save_pretrained(aside)
                write_text(aside / "README.md", model_card)
                write_json(aside / BASE, {"model_fingerprint": fingerprint})
                assert (aside / WEIGHTS).is_file()


def write_merged(base: Path, adapter: Path, output: Path) -> None:
    """The adapter merged into its base, as an ordinary model directory, with the adapter's card and tokenizer. Collective; what
    a run that was stopped has left of it is made anew."""
    with saved_directory.replaced(output) as aside:
        merge_adapter(base, adapter, aside)

        def rest() -> None:
            for path in adapter.iterdir():
                if path.name == "README.md":
                    write_text(aside / path.name, of_merged(path.read_text(encoding="utf-8")))
                elif path.is_file() and not path.name.startswith("adapter_"):
                    shutil.copyfile(path, aside / path.name)

        consensus.on_rank_0(rest, "writing the merged model's card")
