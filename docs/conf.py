# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The site of the documents: ``sphinx-build -W --keep-going docs build/site``."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

import cupy_cache

project = "cupy_cache"
author = "the cupy_cache authors"
copyright = f"2026 {author}"
version = release = cupy_cache.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
html_theme = "furo"
html_title = f"cupy_cache {release}"
html_show_sourcelink = html_copy_source = False

myst_heading_anchors = 3
default_role = "py:obj"  # a single backtick in a docstring: a link where there is something to link
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they are in the signatures; the docstrings say what they mean
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
numpydoc_show_class_members = False
python_use_unqualified_type_names = True


class Operations(SphinxDirective):
    """``.. operations:: TITLE``: functions that the package's docstring has under it."""

    required_arguments, final_argument_whitespace = 1, True

    def run(self):
        _, found, rest = cupy_cache.__doc__.partition(f"\n{self.arguments[0]}\n")
        if not found:
            raise self.error(f"the docstring of cupy_cache has nothing under {self.arguments[0]}")
        names = re.findall(r"`(\w+)`", re.match(r"(?: {4}.*\n)+", rest)[0])
        lines = [f".. autofunction:: cupy_cache.{name}\n" for name in names]
        return self.parse_text_to_nodes("".join(lines))


def link_names(app, doctree):
    """Make a link of each name of the library that a page shows as code, where there is something
    to link to. On GitHub it stays code."""
    for shown in list(doctree.findall(nodes.literal)):
        name = shown.astext().removesuffix("()").removeprefix("cc.").removeprefix("cupy_cache.")
        linked = isinstance(shown.parent, (nodes.reference, nodes.title, addnodes.pending_xref))
        if name.partition(".")[0] not in cupy_cache.__all__ or linked:
            continue
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=f"cupy_cache.{name}", refexplicit=True,
            refdoc=app.env.docname,
        )  # fmt: skip
        shown.replace_self(link)
        link += shown


def setup(app):
    app.add_directive("operations", Operations)
    app.connect("doctree-read", link_names)
