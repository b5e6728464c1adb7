# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The site of the documents is built without a warning, and its links lead somewhere. Needs what
``pip install '.[docs]'`` brings, and torch."""

import html.parser
import importlib.util
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

import cupy_cache as cc

DOCS = Path(__file__).resolve().parent.parent / "docs"

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "torch")),
    reason="pip install '.[docs]' torch",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, folder / "html"]
    done = subprocess.run(
        [*command, "-d", folder / "read"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Page(html.parser.HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found["id"]} if found.get("id") else set()
        name = {"a": "href", "img": "src", "link": "href", "script": "src"}.get(tag)
        if found.get(name):
            self.links.append(found[name])


def test_links_lead_somewhere(site):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    documents = list(DOCS.rglob("*.md"))
    assert len(pages) >= len(documents) > 20
    broken, seen = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            seen += 1
            name = urllib.parse.unquote(parts.path)
            target = (path.parent / name).resolve() if name else path
            if target.is_dir():
                target = target / "index.html"
            anchors = pages[target].anchors if target in pages else None
            lost = parts.fragment and anchors is not None and parts.fragment not in anchors
            if not target.exists() or lost:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert seen > 500 and not broken


def test_the_reference_is_rendered(site):
    text = "\n".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    anchors = {f'id="cupy_cache.{name}"' for name in cc.__all__ if name != "__version__"}
    anchors -= {'id="cupy_cache.flash_attn"'}  # a module, of which the functions are
    assert not [anchor for anchor in anchors if anchor not in text]
    assert 'id="cupy_cache.flash_attn.flash_attn_with_kvcache"' in text
    assert "system-message" not in text  # what docutils could not read


def test_names_on_pages_are_links(site):
    links = Page(site / "from_others.html").links
    for name in ("copy_tokens", "PagedKVCache.attend", "flash_attn.flash_attn_varlen_func"):
        assert any(link.endswith(f"#cupy_cache.{name}") for link in links), name
