"""warp_ds: fine-tune a language model on ZeRO-3 shards without moving what its safety rests on."""

__version__ = "0.1.0"
