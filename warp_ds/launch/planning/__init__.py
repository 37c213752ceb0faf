"""What a job will need: sizes of a model, estimates of each phase, and the machines on which they fit."""
