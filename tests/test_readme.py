"""What the README says is what the committed run found, and what it names is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pipeline.cli import COLUMNS, PROGRAMS, parser


def test_the_table_is_that_of_the_committed_run(root: Path) -> None:
    figures = json.loads((root / "artifacts/report/metrics.json").read_text())
    rows = {}
    for line in (root / "README.md").read_text().split("results:begin")[1].split("results:end")[0].splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in figures:
            rows[name] = cells
    assert list(rows) == [name for name, row in figures.items() if "skill" in row]
    for name, cells in rows.items():
        assert cells == [f"{figures[name][key]:.{digits}f}" for key, _, digits in COLUMNS], name


def test_linked_files_and_commands_exist(root: Path) -> None:
    text = (root / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (root / target).exists(), target
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"make (\w+) ", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in re.findall(r"^clevrcast ([\w-]+(?: [a-z]+)?)", text, re.MULTILINE):
        _, rest = parser().parse_known_args(command.split())
        assert not rest or command.split()[0] in PROGRAMS, command  # programs have parsers of their own


def test_no_package_host_is_named(root: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        assert "://" not in (root / name).read_text(), name
