"""warp_ds: fine-tune a language model on ZeRO-3 shards without moving what its safety rests on."""

from importlib import import_module

__version__ = "0.1.0"
#: Public name -> the module that has it.
_MODULES = {
    "AllBut": "method.entries",
    "WarpCallback": "protection",
    "freeze": "protection",
    "freeze_optimizer": "protection",
    "load_sharded": "zero.load",
    "protect": "protection",
    "protect_optimizer": "protection",
    "resume_any_world": "resuming",
    "save_sharded": "zero.save",
}
__all__ = [
    "AllBut",
    "WarpCallback",
    "freeze",
    "freeze_optimizer",
    "load_sharded",
    "protect",
    "protect_optimizer",
    "resume_any_world",
    "save_sharded",
]


def __getattr__(name: str) -> object:
    # Importing DeepSpeed takes seconds, which `warp-ds --help` need not wait for.
    if name in _MODULES:
        return getattr(import_module(f"warp_ds.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'warp_ds' has no attribute {name!r}")
