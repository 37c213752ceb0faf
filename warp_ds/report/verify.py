"""Where version 0.1 had what is in ``warp_ds.evaluation`` now."""

from warp_ds.moved import names_from

__getattr__ = names_from(
    __name__, "warp_ds.evaluation.certificate", "warp_ds.evaluation.certificate_output", "warp_ds.evaluation.drift"
)
