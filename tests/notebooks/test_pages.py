"""The site: pages that load without a network, with links that lead somewhere and pictures that
are described; readable on a telephone and in a real browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import build
import pages
from markdown_html import to_html

FIRST = r"""# 01 · One & two

**Does a page
survive?** See [the next](02_two.ipynb), [flow](../nanosd3/flow.py), [the
code](../nanosd3/samplers.py), [a paper](https://arxiv.org/abs/2403.03206#section-2) and
[its glossary](glossary.md#velocity).

## A formula & a drawing of adaLN-Zero

Above, a long line ends before
$N$ and with ($z_t = (1-t)\,x_0 + t\,\epsilon$), where $t$ is a time, and

$$\mathcal{L} = \mathbb{E}\left[\lVert v_\theta(z_t, t) - v \rVert^2\right]$$

| a | b |
| --- | --- |
| 1 | <em>2</em> |

![The whole model](../nanosd3/assets/pictures/model.svg)
"""


def picture(width: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 60), "white").save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def output(width: int, **words: str) -> nbformat.NotebookNode:
    return new_output("display_data", {"image/png": picture(width)}, metadata={"image/png": words})


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    code = new_code_cell('print("a" * 300)  # ' + "long " * 30)
    code.outputs = [
        new_output("stream", text="a" * 300 + " <b> \n"),
        output(900, alt="Nine digits & a caption."),
        output(640),
        new_output(
            "display_data", {"image/gif": picture(9)}, metadata={"image/gif": {"alt": "Moves"}}
        ),
    ]
    answer = new_code_cell("1", metadata={"jupyter": {"outputs_hidden": True}})
    answer.outputs = [new_output("stream", text="the answer")]
    one = new_notebook(cells=[new_markdown_cell(FIRST), code, answer])
    two = new_notebook(cells=[new_markdown_cell("# 02 · Two\n\n**And then?**\n\n## Exercises")])
    for name, notebook in (("01_one", one), ("02_two", two)):
        build.write(notebook, folder / f"{name}.ipynb")
    pages.make(folder, folder / "site")
    return folder / "site"


def soups(site: Path) -> dict[str, BeautifulSoup]:
    return {path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
            for path in sorted(site.glob("*.html"))}  # fmt: skip


def test_pages(site):
    found = soups(site)
    others = ["claims.html", "glossary.html", "index.html", "related.html", "teachers.html"]
    assert [*found] == ["01_one.html", "02_two.html", *others]
    assert found["01_one.html"].title.get_text() == f"01 · One & two · {pages.TITLE}"
    listed = found["index.html"].select_one("ol.contents").get_text()
    assert "01 · One & two" in listed and "Does a page survive?" in listed
    nav = [link.get("href") for link in found["02_two.html"].select("footer a")]
    assert nav == ["01_one.html", "glossary.html"]
    assert found["claims.html"].select("img") and found["teachers.html"].select("table")


def test_nothing_is_fetched(site):
    """No script, no font, and no address of another machine but in links to click."""
    for name, soup in soups(site).items():
        assert not soup.find_all(["script", "iframe", "object", "embed"]), name
        for tag in soup.find_all(["img", "link", "source"]):
            address = tag.get("src") or tag.get("href")
            assert re.match(r"data:|pictures/|pages\.css$", address), address
        assert "url(" not in str(soup) and "@import" not in str(soup)
    css = (site / "pages.css").read_text()
    assert "url(" not in css and "@import" not in css and "http" not in css


def test_links_lead_somewhere(site):
    found = soups(site)
    for name, soup in found.items():
        for link in soup.find_all("a"):
            target, _, anchor = link["href"].partition("#")
            if target.startswith("https://"):
                continue
            assert (site / target).exists(), link
            if anchor:
                assert found[target or name].find(id=anchor), link
    one = found["01_one.html"].main
    assert [a["href"] for a in one.select("p > a")] == [
        "02_two.html", "https://arxiv.org/abs/2403.03206#section-2", "glossary.html#velocity",
    ]  # fmt: skip
    assert "flow, the\ncode (samplers.py)," in one.get_text()  # of which there are no pages: text


def test_pictures_are_there_and_described(site):
    found = soups(site)
    for name, soup in found.items():
        for image in soup.find_all("img"):
            assert image.get("alt", "").strip(), name
            assert image["src"].startswith("data:") or (site / image["src"]).is_file()
    words = [image["alt"] for image in found["01_one.html"].find_all("img")]
    section = "Picture in the section: A formula & a drawing of adaLN-Zero"
    assert words == ["The whole model", "Nine digits & a caption.", section, "Moves"]


def test_an_answer_is_folded(site):
    one = soups(site)["01_one.html"].main
    (folded,) = one.select(".cell details")
    assert folded.summary and "the answer" in folded.get_text() and "open" not in folded.attrs
    assert one.get_text().count(build.COVER) == 1


def test_a_missing_picture_is_an_error(tmp_path):
    cell = new_markdown_cell("# 01 · One\n\n![A digit](nowhere.png)")
    build.write(new_notebook(cells=[cell]), tmp_path / "01_one.ipynb")
    with pytest.raises(FileNotFoundError, match=r"01_one.ipynb: no picture nowhere.png"):
        pages.make(tmp_path, tmp_path / "site")


def test_what_would_be_fetched_is_an_error(tmp_path):
    cell = new_markdown_cell('# 01 · One\n\n<script src="https://host/x.js"></script>')
    build.write(new_notebook(cells=[cell]), tmp_path / "01_one.ipynb")
    with pytest.raises(ValueError, match=r"01_one.ipynb: loads https://host/x.js"):
        pages.make(tmp_path, tmp_path / "site")


def test_formulas_are_mathml(site):
    one = soups(site)["01_one.html"].main
    assert len(one.find_all("math")) == 4 and one.select_one(".formula math")["display"] == "block"
    assert "$" not in one.get_text() and "\\" not in one.get_text()


def test_wide_pictures_stay_legible(tmp_path):
    """On a telephone they are scrolled further; narrow ones are seen as a whole."""
    cell = new_code_cell("1")
    cell.outputs = [output(400), output(1100)]
    path = tmp_path / "01_one.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 01 · One"), cell]), path)
    pages.make(tmp_path, tmp_path / "site")
    pictures = soups(tmp_path / "site")["01_one.html"].select(".output_subarea img")
    assert [picture["style"] for picture in pictures] == ["--least: 300px", "--least: 825px"]
    assert ".output_subarea img {" in (css := pages.style())
    assert (
        "max-width: max(100%, var(--least));" in css.split(".output_subarea img {")[1].split("}")[0]
    )


def test_functions_have_room():
    assert '<mi>ln</mi><mspace width="0.17em"/><mfrac>' in to_html(r"$\ln \frac{a}{b}$")
    assert "mspace" not in to_html(r"$\ln(x) + \cos^2 x$")
    assert '</msub><mspace width="0.17em"/><mfrac>' in to_html(r"$\log_{10} \frac{a}{b}$")


CHILDREN = {
    "msub": 2,
    "msup": 2,
    "mfrac": 2,
    "munder": 2,
    "mover": 2,
    "msubsup": 3,
    "munderover": 3,
}


def test_formulas_are_well_formed():
    """Those of the notebooks and of the glossary: what is raised or lowered has its two parts."""
    files = [*sorted((pages.HERE / "src").glob("*.py")), pages.HERE / "glossary.md"]
    for file in files:
        text = re.sub(r"^# ?", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for found in re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text, re.DOTALL):
            for tag in BeautifulSoup(to_html(found), "html.parser").find_all(list(CHILDREN)):
                assert len(tag.find_all(True, recursive=False)) == CHILDREN[tag.name], found


def test_no_new_line_after_a_formula_or_in_a_word_of_a_heading(site):
    one = soups(site)["01_one.html"].main
    word, first = one.select(".whole")
    assert first.get_text().startswith("(z") and first.get_text().endswith("),")
    assert word.get_text() == "adaLN-Zero" and word.parent["id"].endswith("-of-adaln-zero")


def test_a_word_stands_whole_before_a_formula_of_the_next_line(site):
    """The new line is the space between them: no letter is taken for it."""
    assert "ends before\nN and with" in soups(site)["01_one.html"].main.get_text()


def test_tables_of_the_teachers_show_asterisks(site):
    page = soups(site)["teachers.html"]
    assert "(B, N, p*p*C)" in page.get_text() and not page.select("td em")


def test_wide_things_are_scrolled_by_keyboard_too(site):
    for soup in soups(site).values():
        assert all(pre["tabindex"] == "0" for pre in soup.find_all("pre"))
        assert all(table.parent["class"] == ["scroll"] for table in soup.find_all("table"))
        assert soup.body.a["href"] == "#text" and soup.main["id"] == "text"


def test_glossary():
    """In order, a sentence or two each, with the place that explains it."""
    text = (pages.HERE / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(r"^\*\*(.+?)\.\*\* (.+?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    terms = [term for term, _ in entries]
    assert len(terms) >= 25 and terms == sorted(terms, key=str.lower)
    assert text.count("\n**") == len(terms)
    for term, meaning in entries:
        assert re.search(r"\]\([\w./]+\)$", meaning.strip()), term
        assert len(meaning.split()) < 60, term
    wanted = {"latent", "velocity", "guidance", "pooled", "logit-normal", "classifier", "floor"}
    assert wanted <= set(terms)


# --- in a browser -------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
HARNESS = """<!DOCTYPE html><body><script>
const pages = %s, seen = {};
async function measure(name, width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px;border:0`;
  frame.src = name;
  await new Promise(done => { frame.onload = done; document.body.append(frame); });
  const page = frame.contentDocument, root = page.documentElement;
  const broken = [...page.images].filter(i => !i.complete || !i.naturalWidth).length;
  seen[`${name} ${width}`] = [root.scrollWidth, broken];
  frame.remove();
}
(async () => {
  for (const name of pages) for (const width of [1280, 400]) await measure(name, width);
  document.body.innerHTML = `<pre id="seen">${JSON.stringify(seen)}</pre>`;
})();
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium, to open the pages in a real browser")
def test_pages_in_a_browser(site, tmp_path):
    """Every page loads from the disk, without a network and without complaints on the console;
    nothing is wider than the window, of a telephone either."""
    names = sorted(path.name for path in site.glob("*.html"))
    copy = shutil.copytree(site, tmp_path / "site")
    (copy / "harness.html").write_text(HARNESS % json.dumps(names))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", "--virtual-time-budget=60000",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--dump-dom",
        (copy / "harness.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(BeautifulSoup(done.stdout, "html.parser").find(id="seen").get_text())
    assert len(seen) == 2 * len(names)
    for place, (width, broken) in seen.items():
        assert width <= int(place.split()[1]), place
        assert broken == 0, place
