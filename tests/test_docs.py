"""What README and docs say is there."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

import runner
from pipeline.config import Config
from tests.conftest import ROOT


def keys(cls: type, prefix: str = "") -> list[str]:
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found += keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return found


@pytest.mark.parametrize("key", keys(Config))
def test_every_key_of_the_config_is_documented(key):
    assert f"| {key} |" in (ROOT / "docs" / "config.md").read_text()


def test_no_key_is_documented_that_is_not_there():
    rows = re.findall(r"^\| ([a-z_.]+) \|", (ROOT / "docs" / "config.md").read_text(), re.M)
    assert sorted(set(rows) - {"key"}) == sorted(keys(Config))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_every_file_that_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (here / link).exists(), link
    for path in re.findall(r"\b((?:store|predictor|pipeline|configs|tests|assets)/[\w/.-]+\.(?:py|yaml|safetensors|md))\b", text):
        assert (ROOT / path).exists(), path


def test_readme_shows_commands_that_the_launcher_knows(capsys):
    for command in set(re.findall(r"python runner\.py (\w+)", (ROOT / "README.md").read_text())):
        with pytest.raises(SystemExit) as done:
            runner.main([command, "--help"])
        assert done.value.code == 0
        assert len(capsys.readouterr().out) > 200
