"""Where version 0.1 had what is in ``warp_ds.flags`` now."""

from warp_ds.moved import names_from

__getattr__ = names_from(
    __name__,
    "warp_ds.flags.arguments",
    "warp_ds.flags.comparison",
    "warp_ds.flags.groups",
    "warp_ds.flags.parsing",
    "warp_ds.flags.identity",
    "warp_ds.flags.checks",
    "warp_ds.models.layer_names",
    "warp_ds.errors",
)
