"""The jobs: safety tuning, basis, importance, training, evaluation; each readable as the steps of the method."""
