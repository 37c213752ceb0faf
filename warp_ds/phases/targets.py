"""Where version 0.1 had what is in ``warp_ds.models`` now."""

from warp_ds.moved import names_from

__getattr__ = names_from(__name__, "warp_ds.models.targets", "warp_ds.models.layer_names")
