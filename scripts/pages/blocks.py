"""Runs the Python blocks of a page, in order and in one namespace, and puts what they print and draw beneath them.

The word after `python` at the head of a block says what is done with it:

    python              runs; shown with its output
    python folded       runs; its output is shown, the code itself is folded away
    python markdown     the same, and what it prints is Markdown
    python hidden       runs; only its output is shown
    python torchrun     is shown; the tests run it on several ranks
    python excerpt      is shown

A figure of matplotlib that is open at the end of a block becomes a picture; its label, `pyplot.figure("label")`, is the
text for those who do not see it. Every page begins with the same random numbers, so that building twice gives the same.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRAY = "#7d7d7d"
#: No background, and colours that can be read on white and on black.
STYLE: dict[str, Any] = {
    "svg.hashsalt": "fastopt",
    "svg.fonttype": "none",
    "savefig.transparent": True,
    "figure.figsize": (7.2, 3.2),
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "text.color": GRAY,
    "axes.labelcolor": GRAY,
    "axes.edgecolor": GRAY,
    "axes.titlecolor": GRAY,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRAY,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.5,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.frameon": False,
    "image.cmap": "viridis",
}
_COLOURS = ("#2f81f7", "#d9730d", "#3fa35b", "#a855c7", "#c9a227", "#7d7d7d")
_BLOCK = re.compile(r"^```python(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
_EXAMPLE = re.compile(r"^\[`?[^\]]+`?\]\((?P<path>[\w./-]+\.py)\)$", re.MULTILINE)
KINDS = ("", "folded", "markdown", "hidden", "torchrun", "excerpt")


class BlockFailed(Exception):
    """A block of a page cannot be run; the message names the page and the line."""


@dataclass
class Page:
    """A page whose blocks have run.

    Attributes:
        text: Markdown with the output of every block beneath it.
        pictures: SVG text by file name; the text links to `made/<file name>` beside the page.
    """

    text: str
    pictures: dict[str, str] = field(default_factory=dict)


def run_page(path: Path, text: str) -> Page:
    """Run the blocks of the page at `path`, whose Markdown is `text` with the lines of that file.

    Raises:
        BlockFailed: a block raises, is of an unknown kind, or draws a figure without a label.
    """
    page = Page("")
    namespace: dict[str, Any] = {"__name__": path.stem}
    rest = 0
    with _alike(path.parent):
        for block in _BLOCK.finditer(text):
            page.text += text[rest : block.start()]
            rest = block.end()
            line = text.count("\n", 0, block.start()) + 1
            page.text += _run_block(page, path, line, block["kind"].strip(), block["code"], namespace)
    page.text += text[rest:]
    return page


@contextlib.contextmanager
def _alike(folder: Path) -> Iterator[None]:
    """The same random numbers, one thread and the same style for every page, which runs in its folder."""
    import torch
    from cycler import cycler
    from matplotlib import pyplot, rc_context

    pyplot.switch_backend("Agg")
    pyplot.close("all")  # a page shows its own figures only
    before, threads = Path.cwd(), torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        style: Any = {**STYLE, "axes.prop_cycle": cycler(color=_COLOURS)}
        with rc_context(style):
            yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        pyplot.close("all")


def _run_block(page: Page, path: Path, line: int, kind: str, code: str, namespace: dict[str, Any]) -> str:
    """The Markdown in the place of a block."""
    if kind not in KINDS:
        raise BlockFailed(f"{path.name}, line {line}: a block `python {kind}`, expected one of {', '.join(KINDS[1:])}")
    shown = f"```python\n{code}```"
    if kind in ("torchrun", "excerpt"):
        return shown
    printed = io.StringIO()
    try:
        # With the lines of the file in front, a traceback and the recorder of cbs see the source as it is there.
        compiled = compile("\n" * line + code, str(path), "exec")
        with contextlib.redirect_stdout(printed):
            exec(compiled, namespace)
    except Exception as error:
        raise BlockFailed(f"{path.name}, the block at line {line}: {type(error).__name__}: {error}") from error
    pictures = list(_pictures(page, path, line))
    if kind == "hidden":
        shown = ""
    elif kind in ("folded", "markdown"):
        shown = '??? example "The code of this"\n\n' + "".join(f"    {row}\n" for row in shown.splitlines())
    output = printed.getvalue().rstrip("\n")
    result = [output if kind == "markdown" else f"```{{ .text .output }}\n{output}\n```"] if output else []
    return "\n\n".join([shown, *result, *pictures] if kind == "" else [*result, *pictures, shown])


def _pictures(page: Page, path: Path, line: int) -> Iterator[str]:
    """Keep the open figures as pictures of the page and close them; the Markdown that shows them."""
    from matplotlib import pyplot

    for number in pyplot.get_fignums():
        figure = pyplot.figure(number)
        if not (label := str(figure.get_label())):
            raise BlockFailed(f"{path.name}, the block at line {line}: a figure without a label, figure('label')")
        name = f"{path.stem}-{len(page.pictures) + 1}.svg"
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        page.pictures[name] = svg.getvalue()
        pyplot.close(figure)
        yield f"![{label}](made/{name})"


def shown_only(text: str) -> str:
    """`text` with its blocks as they are, without the words behind `python`, for pages that other tests run."""
    return _BLOCK.sub(lambda block: f"```python\n{block['code']}```", text)


def with_examples(path: Path, text: str) -> str:
    """`text` of the page at `path`, with the code of a file wherever a line is nothing but a link to it."""

    def code(link: re.Match[str]) -> str:
        file = path.parent / link["path"]
        shown = f'```{{ .python title="{file.name}" }}\n{file.read_text().rstrip()}\n```'
        return f"{shown}\n\n[Download]({link['path']}){{ .download }}"

    return _EXAMPLE.sub(code, text)
