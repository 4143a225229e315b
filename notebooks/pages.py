"""Static pages of the notebooks: `python notebooks/build.py --site FOLDER`.

nbconvert turns the committed .ipynb files, outputs included, into HTML; markdown_html.py turns
their formulas into MathML, which browsers draw themselves. So the pages need no script, font or
network, and open from a disk as well as from a server. This module adds a frame with contents,
previous and next; the glossary, the claims, the related systems and the teachers' page; and what
finishing.py does to all of them.
"""

import base64
import html
import io
import re
from pathlib import Path

import build
import nbformat
from finishing import ROOT, Finisher, Page
from markdown_html import to_html
from nbconvert import HTMLExporter
from PIL import Image, ImageOps
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).parent.resolve()
TITLE = "Stable Diffusion 3 from scratch"
FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="pages.css">
</head>
<body>
<a class="skip" href="#text">Skip to the text</a>
<header><nav aria-label="Site">{menu}</nav></header>
<main id="text">
{body}
</main>
<footer><nav aria-label="Neighbours">{neighbours}</nav></footer>
</body>
</html>
"""
MARGIN = 12  # pixels below a still
STOP = '<label><input type="checkbox"> stop the film</label>'
EXTRA = {  # pages made of Markdown: their file, and their name in the menu
    "glossary.html": (HERE / "glossary.md", "Glossary"),
    "claims.html": (ROOT / "nanosd3" / "claims" / "README.md", "Claims"),
    "related.html": (ROOT / "nanosd3" / "related" / "README.md", "Related systems"),
    "teachers.html": (HERE / "README.md", "For teachers"),
}


# --- from Markdown ------------------------------------------------------------------------------


def notebook_page(path: Path) -> Page:
    """The page of one notebook. Its title and question are in the first cell."""
    notebook = build.uncovered(nbformat.read(path, as_version=4))
    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
    )
    exporter.register_filter("markdown2html", to_html)
    show_animations(notebook)
    for cell in notebook.cells:
        if cell.metadata.pop("jupyter", {}).get("outputs_hidden"):  # nbconvert would drop them
            cell.metadata["tags"] = ["answer"]  # a class of the cell's element
    first = notebook.cells[0].source
    question = re.search(r"\*\*(.+?)\*\*", first, re.DOTALL)
    body, _ = exporter.from_notebook_node(notebook)
    title = first.split("\n")[0].lstrip("# ")
    asked = " ".join(question[1].split()) if question else ""
    return Page(f"{path.stem}.html", HERE / path.name, title, asked, body)


def show_animations(notebook: nbformat.NotebookNode) -> None:
    """Write GIFs as HTML, which nbconvert does not know, and animated PNGs with their stills."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in ("image/gif", "image/png"):
                data = "".join(output.get("data", {}).get(kind, "").split())
                words = html.escape(output.get("metadata", {}).get(kind, {}).get("alt", ""))
                if kind == "image/gif" and data:
                    output.data = {"text/html": image_of(kind, data, words)}
                elif data and (still := still_of(base64.b64decode(data))):
                    frozen = base64.b64encode(still).decode()
                    both = image_of(kind, data, words)
                    both += image_of(kind, frozen, f"Still: {words}", "still")
                    output.data = {"text/html": f'<div class="film">{STOP}{both}</div>'}


def image_of(kind: str, data: str, words: str, look: str = "moving") -> str:
    return f'<img class="{look}" src="data:{kind};base64,{data}" alt="{words}">'


def still_of(content: bytes) -> bytes | None:
    """The default image of an animated PNG, without the empty rows that make it as tall as the
    frames; None if the PNG is not animated."""
    with Image.open(io.BytesIO(content)) as picture:
        if not getattr(picture, "is_animated", False):
            return None
        drawn = ImageOps.invert(picture.convert("L")).getbbox()
        height = min(picture.height, drawn[3] + MARGIN) if drawn else picture.height
        still, buffer = picture.crop((0, 0, picture.width, height)), io.BytesIO()
        still.save(buffer, "png", optimize=True)
        return buffer.getvalue()


def contents(pages: list[Page], others: list[Page]) -> Page:
    """The first page: every notebook with its question."""
    rows = "\n".join(
        f'<li><a href="{page.name}">{html.escape(page.title)}</a>'
        f"<br>{html.escape(page.question)}</li>"
        for page in pages
    )
    rest = "\n".join(f'<li><a href="{page.name}">{page.title}</a></li>' for page in others)
    body = f"""<h1>{TITLE}</h1>
<p>Notebooks with one question each, in teaching order. Every idea is first a loop that can be read,
then checked against the code of nanosd3, then tried on a model that draws digits on a laptop. These
pages show the notebooks as they ran; to run them yourself, open the files of the same names in the
folder <code>notebooks</code>.</p>
<ol class="contents">\n{rows}\n</ol>
<h2 id="more">Beside them</h2>
<ul>\n{rest}\n</ul>"""
    return Page("index.html", HERE / "README.md", TITLE, "", body)


# --- the site -----------------------------------------------------------------------------------


def on_this_page(body: str) -> str:
    """The sections of a page, folded, if there are more than two."""
    found = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', body, re.DOTALL)
    rows = "".join(f'<li><a href="#{anchor}">{heading}</a></li>' for anchor, heading in found)
    folded = f"<details><summary>On this page</summary><ul>{rows}</ul></details>"
    return folded if len(found) > 2 else ""


def neighbours(page: Page, pages: list[Page]) -> str:
    """Links to the pages before and after, in the order of the contents."""
    i = pages.index(page)
    links = []
    if i > 0:
        before = pages[i - 1]
        links.append(f'<a rel="prev" href="{before.name}">←\u00a0{html.escape(before.title)}</a>')
    if i + 1 < len(pages):
        after = pages[i + 1]
        links.append(f'<a rel="next" href="{after.name}">{html.escape(after.title)}\u00a0→</a>')
    return "\n".join(links)


def menu(page: Page, shown: list[Page]) -> str:
    """The links at the head of each page."""
    here = ' aria-current="page"'
    return "\n".join(
        f'<a href="{other.name}"{here if other is page else ""}>'
        f"{'Contents' if other.name == 'index.html' else html.escape(other.title)}</a>"
        for other in shown
    )


def style() -> str:
    """The style sheet: pages.css, and the colours of code on light and on dark pages."""
    light, dark = (
        HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("xcode", "github-dark")
    )
    css = (HERE / "pages.css").read_text(encoding="utf-8")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{css}"


def make(notebooks: Path, out: Path) -> None:
    """Write the site of the .ipynb files in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    lessons = [notebook_page(path.resolve()) for path in sorted(notebooks.glob("*.ipynb"))]
    others = []
    for name, (source, title) in EXTRA.items():
        body = to_html(source.read_text(encoding="utf-8"))
        others.append(Page(name, source, title, "", body))
    pages = [contents(lessons, others), *lessons, *others]
    finisher = Finisher(pages, out)
    for page in pages:
        body = finisher.finish(page)
        title = page.title if page.name == "index.html" else f"{page.title} · {TITLE}"
        frame = FRAME.format(
            title=html.escape(title),
            menu=menu(page, [pages[0], *others]),
            neighbours=neighbours(page, pages),
            body=with_sections(body),
        )
        (out / page.name).write_text(frame, encoding="utf-8")
    (out / "pages.css").write_text(style(), encoding="utf-8")


def with_sections(body: str) -> str:
    """The list of sections after the title."""
    return re.sub(r"(</h1>)", lambda m: m[1] + on_this_page(body), body, count=1)
