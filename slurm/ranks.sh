# Sourced by the templates: starts one rank a task. Rank and local rank are read in the task itself (in this batch
# shell SLURM_PROCID is 0), so nothing here may be expanded too early.

run_ranks() {
    local phase=$1
    shift
    local root=${WARP_DS_ROOT:-$SLURM_SUBMIT_DIR}
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The node's address: its name need not resolve.
    MASTER_ADDR=$(scontrol -o show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    # Below the ephemeral range, and another one for every job.
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
    export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
    local python=python
    [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python && export PATH="$root/.venv/bin:$PATH"
    # One rank's failure ends all of them at once.
    srun --kill-on-bad-exit=1 "$python" "$root/launch/$phase.py" "$@"
}
