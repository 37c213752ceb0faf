"""DeepSpeed configurations and Slurm scripts that come along with the package, for ``warp-ds init`` and by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from warp_ds.errors import ConfigError
from warp_ds.registry import PHASES, Phase

_HERE = Path(str(files("warp_ds.cluster")))
CONFIGS = {path.stem: path for path in sorted((_HERE / "ds_configs").glob("*.json"))}
"""Name ('zero3_70b') -> DeepSpeed configuration."""


def config_path(given: str) -> Path:
    """The file of --deepspeed: the path, or one that comes along by its name; ConfigError where it is neither."""
    path = Path(given)
    existing = path if path.is_file() else CONFIGS.get(given)
    if existing is None:
        raise ConfigError(f"--deepspeed {given}: no such file, and none that comes along: {', '.join(CONFIGS)}")
    return existing


def batch_script(phase: Phase) -> str:
    """The sbatch file of one phase, for whole nodes of eight GPUs."""
    text = (_HERE / "phase.sbatch").read_text(encoding="utf-8")
    for mark, value in {"TITLE": phase.title, "PHASE": phase.name, "HOURS": f"{phase.hours:02}"}.items():
        text = text.replace(f"@{mark}@", value)
    return text


def write_templates(directory: Path) -> tuple[list[Path], list[Path]]:
    """Writes ds_configs/ and slurm/ into ``directory``; (what was written, what was there already and stays)."""
    wanted = {Path("ds_configs", path.name): path.read_text(encoding="utf-8") for path in CONFIGS.values()}
    wanted |= {Path("slurm", f"{p.name}.sbatch"): batch_script(p) for p in PHASES.values() if p.hours}
    written, kept = [], []
    for place, text in wanted.items():
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
            written.append(path)
        except FileExistsError:
            kept.append(path)
    return written, kept
