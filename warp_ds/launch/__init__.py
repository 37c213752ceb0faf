"""How a phase is started: by a launcher on ranks, by Slurm as a chain of jobs, or by ``warp-ds`` on the terminal."""
