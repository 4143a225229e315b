"""What all pages of the site have in common: heading anchors, links that lead to pages, described
pictures, tables that can be scrolled, and lines that break where they should."""

import base64
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import build
from bs4 import BeautifulSoup, NavigableString, Tag
from PIL import Image

ROOT = Path(__file__).parent.resolve().parent
LEGIBLE = 0.75  # share of its size that a picture with letters keeps on a phone
LONG = 40  # characters of a cell that must not be narrow


@dataclass(frozen=True)
class Page:
    """A page of the site."""

    name: str  # of its file
    source: Path  # the .ipynb or Markdown file, against which its links are read
    title: str
    question: str  # "" for pages that are not notebooks
    body: str


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def keep_together(soup: BeautifulSoup, formula: Tag) -> None:
    """No line break between a formula and the comma after it, or the bracket before it."""
    before, after = formula.previous_sibling, formula.next_sibling
    start = re.search(r"\S*\Z", before)[0] if isinstance(before, NavigableString) else ""
    end = re.match(r"\S*", after)[0] if isinstance(after, NavigableString) else ""
    if not start and not end:
        return
    whole = formula.wrap(soup.new_tag("span", attrs={"class": "whole"}))
    if start:
        before.replace_with(before[: -len(start)])
        whole.insert(0, start)
    if end:
        after.replace_with(after[len(end) :])
        whole.append(end)


def keep_hyphens(soup: BeautifulSoup, heading: Tag) -> None:
    """No line break at a hyphen in a heading."""
    for text in heading.find_all(string=re.compile(r"\w-\w")):
        parts = re.split(r"([\w-]*\w-\w[\w-]*)", text)
        text.replace_with(
            *(
                soup.new_tag("span", string=part, attrs={"class": "whole"}) if i % 2 else part
                for i, part in enumerate(parts)
            )
        )


class Finisher:
    """What all pages have in common, applied to one page after another."""

    def __init__(self, pages: list[Page], out: Path):
        self.out = out
        self.names = {page.source: page.name for page in pages if page.name != "index.html"}

    def finish(self, page: Page) -> str:
        """The body of a page with its headings, links, pictures and tables in order."""
        soup = BeautifulSoup(page.body, "html.parser")
        for tag in soup.find_all(["script", "link", "iframe", "img", "video", "source"]):
            address = str(tag.get("src") or tag.get("href") or "")
            if re.match(r"(https?:)?//", address):
                raise ValueError(f"{page.source.name}: loads {address}")
        for answer in soup.select(".celltag_answer .output_wrapper"):
            folded = answer.wrap(soup.new_tag("details"))
            folded.insert(0, soup.new_tag("summary", string=build.COVER))
        for formula in soup.find_all("math", display="inline"):
            keep_together(soup, formula)
        section = page.title
        for tag in soup.find_all(["h1", "h2", "h3", "a", "img", "table", "pre", "p", "code"]):
            if tag.name in ("h1", "h2", "h3"):
                section = tag.get_text()
                tag["id"] = slug(section)
                keep_hyphens(soup, tag)
            elif tag.name == "a":
                self.link(tag, page)
            elif tag.name == "img":
                self.picture(tag, page, section)
            elif tag.name == "table":
                tag.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
                for cell in tag.find_all("td"):
                    if len(cell.get_text()) > LONG:
                        cell["class"] = "long"  # not one word wide on a phone
                    elif re.match(r"\d[\d.,]*%? \(", cell.get_text()):
                        cell["class"] = "number"  # on one line there, with its range
            elif tag.name == "pre":
                tag["tabindex"] = "0"  # may be wider than the page: scrolled by keyboard
            elif tag.name == "code" and len(tag.get_text()) <= 28:
                tag["class"] = "short"  # not broken at the hyphens of an option
            elif page.name == "glossary.html" and isinstance(first := tag.contents[0], Tag):
                tag["id"] = slug(first.get_text())
        return str(soup)

    def file(self, target: str, page: Page) -> Path:
        return (page.source.parent / target).resolve()

    def link(self, tag: Tag, page: Page) -> None:
        """Links to pages of the site lead there; those to other files of the repository become
        text that names the file; external links stay."""
        target, _, anchor = str(tag.get("href", "")).partition("#")
        if re.match(r"[a-z]+:", target) or target.endswith(".html") or not target:
            return
        name = self.names.get(self.file(target, page))
        if name is None:
            if (file := self.file(target, page)).stem not in tag.get_text():
                tag.append(f" ({file.name})")
            tag.unwrap()
        else:
            tag["href"] = f"{name}#{anchor}" if anchor else name

    def picture(self, tag: Tag, page: Page, section: str) -> None:
        """Files are copied into the site; a picture without a description gets its section's."""
        source = str(tag["src"])
        if not str(tag.get("alt", "")).strip() or str(tag["alt"]).startswith("No description"):
            tag["alt"] = f"Picture in the section: {section}"
        if source.startswith("data:"):
            with Image.open(io.BytesIO(base64.b64decode(source.split(",")[-1]))) as picture:
                tag["style"] = f"--least: {LEGIBLE * picture.width:.0f}px"
            return
        path = self.file(source, page)
        if not path.is_relative_to(ROOT) or not path.is_file():
            raise FileNotFoundError(f"{page.source.name}: no picture {source}")
        copied = self.out / "pictures" / "-".join(path.relative_to(ROOT).parts)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
        tag["src"] = f"pictures/{copied.name}"
