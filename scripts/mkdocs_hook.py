"""Lets mkdocs run the examples of every page; named in mkdocs.yml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pages.blocks import BlockFailed, run_page, shown_only, with_examples


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """The page with the outputs of its blocks, whose pictures become files of the site."""
    path = Path(str(page.file.abs_src_path))
    if page.file.src_uri in config.extra["shown_only"]:
        return shown_only(markdown)
    # mkdocs has taken a page's head of metadata off: put as many lines in front as it had, for messages.
    missing = path.read_text().count("\n") - markdown.count("\n")
    try:
        made = run_page(path, "\n" * missing + markdown)
    except BlockFailed as error:
        raise PluginError(str(error)) from error
    folder = Path(page.file.src_uri).parent
    for name, svg in made.pictures.items():
        files.append(File.generated(config, str(folder / "made" / name), content=svg))
    return with_examples(path, made.text)
