"""The documentation site builds without a warning, and what came out holds together."""

from __future__ import annotations

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fastopt
import fastopt.checkpoint
import fastopt.distributed

from ..commands import ROOT, run_command

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")


class Links(HTMLParser):
    """The addresses that a page refers to, those that a browser loads by itself, and the places it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.undescribed = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places |= {str(found[key]) for key in ("id", "name") if found.get(key)}
        if tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.loads.append(str(found["src"]))
        if tag == "link" and found.get("rel") not in ("next", "prev", "canonical"):
            self.loads.append(str(found["href"]))
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        self.undescribed += tag == "img" and not found.get("alt")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as scripts/docs builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "scripts/mkdocs.yml")
    done = run_command(*command, "--site-dir", folder, timeout=240, env={"NO_MKDOCS_2_WARNING": "1"})
    assert "WARNING" not in done.stdout, done.stdout
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def test_nothing_comes_from_another_server(pages: dict[Path, Links]) -> None:
    loaded = {address for page in pages.values() for address in page.loads}
    assert [address for address in loaded if urlsplit(address).netloc] == []


def test_every_link_and_picture_leads_somewhere(pages: dict[Path, Links]) -> None:
    lost = []
    for path, page in pages.items():
        for address in (*page.links, *page.loads):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            home = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if not home.exists() or (parts.fragment and home in pages and parts.fragment not in pages[home].places):
                lost.append(f"{path.name}: {address}")
    assert lost == []


def test_every_picture_is_described(pages: dict[Path, Links]) -> None:
    assert [path.name for path, page in pages.items() if page.undescribed] == []


def test_the_reference_has_every_public_name(pages: dict[Path, Links]) -> None:
    places = set().union(*(page.places for path, page in pages.items() if path.parent.name == "api"))
    for module in (fastopt, fastopt.distributed, fastopt.checkpoint):
        assert [name for name in module.__all__ if f"{module.__name__}.{name}" not in places] == []


def test_pages_show_what_their_blocks_print_and_draw(site: Path) -> None:
    page = (site / "tour" / "optimizers.html").read_text()
    assert "0.08167919578200449" in page  # RAdam's factor at step 6
    picture = (site / "tour" / "made" / "optimizers-2.svg").read_text()
    assert all(f"sqr_mom={value}" in picture for value in (0.95, 0.99, 0.999))
    assert "write state grad_avg" in (site / "own-optimizer.html").read_text()


def test_the_chart_of_the_readme_is_that_of_the_page(site: Path) -> None:
    both = (site / "made" / "performance-1.svg", ROOT / "docs" / "benchmarks" / "adam-h200.svg")
    texts = [re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text()) for path in both]
    assert texts[0] == texts[1]
    assert "torch fused" in texts[0]


def test_all_pages_are_in_the_site(site: Path) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert sources <= {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
