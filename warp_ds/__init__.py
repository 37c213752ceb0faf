"""warp_ds: fine-tune a language model on ZeRO-3 shards without moving what its safety rests on."""

__version__ = "0.1.0"
__all__ = ["WarpCallback", "protect", "protect_optimizer"]


def __getattr__(name: str) -> object:
    # Importing DeepSpeed takes seconds, which `warp-ds --help` need not wait for.
    if name in __all__:
        from warp_ds import protection as module

        return getattr(module, name)
    raise AttributeError(f"module 'warp_ds' has no attribute {name!r}")
