"""Where version 0.1 had what is in ``warp_ds.cluster`` now."""

from warp_ds.moved import names_from

__getattr__ = names_from(
    __name__,
    "warp_ds.cluster.processes",
    "warp_ds.cluster.consensus",
    "warp_ds.cluster.peaks",
    "warp_ds.zero.settings",
    "warp_ds.errors",
)
