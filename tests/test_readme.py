"""The README tells the truth: files, line counts, commands."""

import re
from pathlib import Path

import pytest

from nanosd3.config import CONFIGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tree():
    tree = README.split("in reading order\n\n```\n")[1].split("```")[0]
    listed = dict(re.findall(r"^ *(\w+\.py) +(\d+) ", tree, re.MULTILINE))
    modules = {path.name: path for path in (ROOT / "nanosd3").glob("*.py")}
    del modules["__init__.py"]
    assert listed.keys() == modules.keys() | {"train_mnist.py"}
    for name, count in listed.items():
        lines = len(modules.get(name, ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 10, f"{name} has {lines} lines, the README says {count}"


def test_links_and_pictures():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_pictures_are_small():
    pictures = (ROOT / "nanosd3" / "assets" / "pictures").iterdir()
    assert all(path.stat().st_size < 300_000 for path in pictures)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_listed(name):
    assert f"`{name}`" in README or f"`{name.removeprefix('sd3')}`" in README
