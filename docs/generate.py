"""Pages that follow from the code, made by mkdocs-gen-files: flags, configurations, modules, examples."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import mkdocs_gen_files

from warp_ds.registry import PHASES

ROOT = Path(__file__).parent.parent
ORDER = "method zero store models data flags phases evaluation report cluster launch".split()


def cell(text: object) -> str:
    """``text`` as it can stand in a table."""
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def write(name: str, lines: list[str]) -> None:
    with mkdocs_gen_files.open(name, "w") as page:
        page.write("\n".join(lines) + "\n")


def default(field: dataclasses.Field[Any]) -> str:
    """A flag's default as it would be typed."""
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return "required" if value is dataclasses.MISSING else "" if value is None else f"`{value}`"


def flag_table(fields: list[dataclasses.Field[Any]]) -> list[str]:
    """Two columns, which a phone can show: the flag; what it is, and its default."""
    says = {
        f.name: f"{f.metadata.get('help', '')}. Default: {default(f)}" if default(f) else f.metadata.get("help", "")
        for f in fields
    }
    return ["| flag | |", "|---|---|", *(f"| `--{name}` | {cell(text)} |" for name, text in says.items()), ""]


def flags() -> None:
    """One table of what every command takes in the same way, and one of the rest for each command."""
    of = {phase.name: dataclasses.fields(phase.arguments) for phase in PHASES.values()}
    says = {name: {(f.name, default(f), f.metadata.get("help")) for f in fields} for name, fields in of.items()}
    common = set.intersection(*says.values())
    shared = [f for f in next(iter(of.values())) if (f.name, default(f), f.metadata.get("help")) in common]
    lines = ["# Flags", "", "Made from the code: what `--help` of each command says.", ""]
    lines += ["`--config FILE` reads a YAML file; flags on the command line win.", ""]
    lines += ["## Every command", "", *flag_table(shared)]
    for phase in PHASES.values():
        own = [f for f in of[phase.name] if (f.name, default(f), f.metadata.get("help")) not in common]
        lines += [f"## {phase.name}: {phase.title}", ""]
        if phase.trains:
            lines += ["Takes the flags of transformers' `TrainingArguments` as well, where they work here.", ""]
        lines += flag_table(own)
    write("reference/flags.md", lines)


def configurations() -> None:
    """Every DeepSpeed configuration that comes with the package."""
    lines = ["# Configuration files", "", "`--deepspeed NAME` finds one by its name. [Which to choose](../configurations.md)."]
    found = {path.stem: path for path in (*ROOT.glob("warp_ds/**/zero3*.json"), *ROOT.glob("ds_configs/*.json"))}
    for name, path in sorted(found.items()):
        content = json.loads(path.read_text())
        lines += ["", f"## {name}", "", content.pop("_comment", ""), "", "```json", json.dumps(content, indent=2), "```"]
    write("reference/configurations.md", lines)


def modules() -> None:
    """A page for each room of the package, in nav by literate-nav's SUMMARY.md."""
    summary = ["* [The two lines](index.md)"]
    rooms: dict[str, list[str]] = {}
    for path in sorted((ROOT / "warp_ds").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "__main__" in parts or "templates" in parts or parts == ("warp_ds", "__init__"):
            continue
        rooms.setdefault(parts[1] if len(parts) > 2 else "", []).append(".".join(p for p in parts if p != "__init__"))
    for room, names in sorted(rooms.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)):
        title = f"warp_ds.{room}" if room else "warp_ds"
        lines = [f"# {title}", ""]
        for name in names:
            source = ROOT / (name.replace(".", "/") + ".py")
            if source.exists():
                lines += [f"::: {name}", "    options: {heading_level: 2}", ""]
            elif doc := ast.get_docstring(ast.parse((source.with_suffix("") / "__init__.py").read_text())):
                lines += [doc, ""]
        write(f"reference/python/{room or 'warp_ds'}.md", lines)
        summary.append(f"* [{title}]({room or 'warp_ds'}.md)")
    write("reference/python/SUMMARY.md", summary)
    public = "protection.protect", "protection.protect_optimizer", "protection.WarpCallback", "zero.masked_step.MaskedStep"
    write("reference/python/index.md", ["# The two lines", "", *(f"::: warp_ds.{name}\n" for name in public)])


def examples() -> None:
    """Every example in full, its docstring above it."""
    lines = ["# Examples", "", "Each runs on a CPU in seconds, on a tiny model that it makes, and in the tests."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines += ["", f"## {path.name}", "", doc, "", "```python", path.read_text().split('"""', 2)[2].strip(), "```"]
    write("reference/examples.md", lines)


def project() -> None:
    """Pages whose file lies at the repository's root."""
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = re.sub(r"\]\(docs/", "](", (ROOT / f"{name}.md").read_text())
        write(f"{name.lower()}.md", [text])


for page in (flags, configurations, modules, examples, project):
    page()
