"""The mathematics of weight-space rotation on plain tensors: no process groups, no DeepSpeed."""
