"""What stands outside the code: the README's size and links, and that the pages name files and flags that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
TOPS = (ROOT, ROOT / "warp_ds")
MADE = ("reference/", "contributing.md", "changelog.md")  # by docs/generate.py, looked at by `make docs`


def text(path: str) -> str:
    return next((top / path).read_text() for top in TOPS if (top / path).exists())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in t]
    missing = [t for t in targets if t and not t.startswith(MADE) and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_files_that_exist(page: Path) -> None:
    """Paths in backticks, from the repository's root or the package's."""
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|json|sbatch|yaml))\b", page.read_text())
    made = ("checkpoints/", "masks/", "basis/", "submitit/", "trainer/")  # by runs
    assert not [path for path in named if not path.startswith(made) and not any((top / path).exists() for top in TOPS)]


def test_pages_name_functions_that_exist() -> None:
    """`method/rotation.py: Rotation`, as docs/method.md names what implements each equation."""
    named = {found for page in PAGES for found in re.findall(r"`(\w+/\w+\.py): (\w+)`", page.read_text())}
    assert len(named) > 10
    assert not [
        f"{path}: {name}" for path, name in named if not re.search(rf"^(def|class) {name}\b|^{name} =", text(path), re.M)
    ]
