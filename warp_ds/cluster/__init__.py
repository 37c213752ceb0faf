"""Slurm and submitit: ranks and addresses, requeueing, the queue's view of a run, and checks of the machines."""
