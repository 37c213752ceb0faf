"""Where version 0.1 had what is in ``warp_ds.store`` now."""

from warp_ds.moved import names_from

__getattr__ = names_from(
    __name__,
    "warp_ds.store.bases",
    "warp_ds.store.masks",
    "warp_ds.store.metadata",
    "warp_ds.store.layers",
    "warp_ds.store.files",
    "warp_ds.store.fingerprints",
    "warp_ds.store.runs",
    "warp_ds.errors",
)
