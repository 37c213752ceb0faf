"""Where version 0.1 had what is in ``warp_ds.launch`` now: jobs that were queued before look for it here."""

from warp_ds.moved import names_from

__getattr__ = names_from(__name__, "warp_ds.launch.submission", "warp_ds.launch.chain", "warp_ds.launch.chain_flags")
