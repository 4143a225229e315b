"""The README and the pages tell the truth: the map, links, pictures, commands, paths, counts."""

import re
import tomllib
from pathlib import Path

import pytest
from support import tree

import nanosd3
from nanosd3.components import on_meta
from nanosd3.config import CONFIGS
from nanosd3.exercises import EXERCISES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanosd3"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *PACKAGE.rglob("*.md"), *ROOT.glob("notebooks/*.md"))
}
README = PAGES["README.md"]
CURRENT = [name for name in PAGES if name != "CHANGELOG.md"]  # which names what is gone


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page)


def slugs(page: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_map_is_up_to_date():
    assert tree.updated(README) == README, "run python tests/support/tree.py"


def test_map_names_every_module():
    page = tree.tree()
    for path in PACKAGE.rglob("[a-z]*.py"):
        assert re.search(rf"\b{path.stem}\b", page), path


def test_map_takes_first_sentences(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('"""Tokens (v1.1) to\nimages. And back.\n\nMore.\n"""\n')
    assert tree.first_sentence(path) == "Tokens (v1.1) to images."


def test_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_lines_of_the_systems():
    rows = re.findall(r"\]\((nanosd3/related/\w+\.py)\), (\d+) lines", README)
    assert len(rows) == 8
    for path, count in rows:
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == int(count), path


def test_pages_beside_the_code_are_found():
    folders = ("assets", "claims", "exercises", "measure", "official", "related", "training")
    for folder in folders:
        assert f"nanosd3/{folder}/README.md" in PAGES
        assert f"](nanosd3/{folder}/README.md" in README, folder


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures(name):
    for target in links(PAGES[name]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists(), target
        if anchor:
            assert anchor in slugs(PAGES[str(path.relative_to(ROOT))]), target


@pytest.mark.parametrize("name", CURRENT)
def test_commands_exist(name):
    for module in re.findall(r"-m (nanosd3[\w.]*\w)", PAGES[name]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for script in re.findall(r"python ([\w/]+\.py)\b", PAGES[name]):
        assert (ROOT / script).exists(), script


def test_commands_that_install_bring_the_package():
    """So that `python -m nanosd3.exercises` works in notebooks/, too, and without a network."""
    for page in PAGES.values():
        lines = [line for line in page.splitlines() if "install" in line]
        for line in lines:
            assert "-r requirements.txt" not in line or " -e ." in line, line
    offline = PAGES["notebooks/README.md"].split("pip download ")[1].split("```")[0]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert (
        all(f'"{name}"' in offline for name in build)
        and offline.count(" jupyterlab ipywidgets ") == 2
    )
    assert offline.endswith(
        "--no-index --find-links wheels -r requirements.txt jupyterlab ipywidgets -e .\n  "
    )


@pytest.mark.parametrize("name", CURRENT)
def test_paths_exist(name):
    for path in re.findall(r"(?<![\w/])((?:tests|nanosd3|notebooks)/[\w/.]*\w)", PAGES[name]):
        assert (ROOT / path).exists() or path in ("notebooks/cache", "notebooks/NAME.ipynb"), path


def test_moved_modules_are_where_the_changelog_says():
    rows = re.findall(r"^\| (`.+?) \| (`.+?) \|$", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert len(rows) > 30
    for _, new in rows:
        folder = ""
        for name in re.findall(r"`([\w/]+)`", new):
            folder = name.rpartition("/")[0] or folder
            short = PACKAGE / folder / f"{name.rpartition('/')[2]}.py"
            assert short.exists() or (PACKAGE / f"{name}.py").exists(), name


def test_pictures_are_small():
    pictures = (PACKAGE / "assets" / "pictures").iterdir()
    assert all(path.stat().st_size < 300_000 for path in pictures)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_listed(name):
    assert f"`{name}`" in README or f"`{name.removeprefix('sd3')}`" in README


STATED = [  # names, and the count in their row of the table of configs
    (re.findall(r"`([\w.-]+)`", names), count)
    for names, count in re.findall(r"^\| (`.+?) \|.*\| ([\d,]{7,}) \|$", README, re.MULTILINE)
]


@pytest.mark.parametrize(("names", "count"), STATED)
def test_parameter_counts(names, count):
    """The table of configs states the transformer's exact number of parameters."""
    for name in names:
        built = on_meta(CONFIGS[name], "mmdit")
        assert f"{sum(p.numel() for p in built.parameters()):,}" == count


def test_every_config_but_the_study_states_its_count():
    stated = [name for names, _ in STATED for name in names]
    assert sorted(stated) == sorted(name for name in CONFIGS if not name.startswith("sd3-d"))


def test_counts():
    assert f"{len(EXERCISES)} exercises" in README
    assert PAGES["nanosd3/exercises/README.md"].count(f"\n{len(EXERCISES)} exercises") == 1
    notebooks = len(list((ROOT / "notebooks").glob("*.ipynb")))
    assert f"{notebooks} notebooks" in README
    assert f"\n{notebooks} notebooks" in PAGES["notebooks/README.md"]


def test_version():
    assert f"\nversion: {nanosd3.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {nanosd3.__version__}\n" in PAGES["CHANGELOG.md"]
