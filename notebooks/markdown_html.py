"""Markdown to HTML as in Jupyter, for the pages of the site; formulas become MathML, which browsers
draw themselves."""

import re

from latex2mathml.converter import convert as to_mathml
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

NAME = r"<mi>(?:sin|cos|ln|log|exp)</mi>"
# The name of a function, not raised to a power, or with its base, before an argument without
# brackets.
FUNCTION = re.compile(
    rf"((?<!<msup>)(?<!<msub>){NAME}|<msub>{NAME}(?:(?!</?msub>).)*</msub>)(?=<m(?!o\b))"
)


def formula(body: str, display: str) -> str:
    """MathML, with a little space after the names of functions."""
    return FUNCTION.sub(r'\1<mspace width="0.17em"/>', to_mathml(body, display=display))


class Renderer(IPythonRenderer):
    """Markdown as in Jupyter, with formulas as MathML."""

    def block_math(self, body: str) -> str:
        return f'<div class="formula" tabindex="0">{formula(body, "block")}</div>'

    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")


def to_html(markdown: str) -> str:
    return MarkdownWithMath(Renderer(escape=False, exclude_anchor_links=True)).render(markdown)
