"""The site: `make docs` builds it, and every warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "extensions"), str(DOCS)]

import lightning_sparse  # noqa: E402

project = "lightning_sparse"
author = copyright = "The lightning_sparse developers"
version = release = lightning_sparse.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "docstrings",
    "formulas",
    "cards",
    "pages",
    "narrow",
]
exclude_patterns = ["extensions"]

html_theme = "furo"
html_title = "lightning_sparse"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style, pygments_dark_style = "friendly", "github-dark"

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks
copybutton_exclude = ".linenos, .gp, .go"

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
add_module_names = False

nitpicky = True
nitpick_ignore_regex = [  # types in signatures: those of other libraries, and names that a module keeps to itself
    ("py:.*", r"(?!lightning_sparse\b).*"),
    ("py:class", r"lightning_sparse\..*"),
    ("py:obj", r"lightning_sparse\..*\.[A-Z]"),  # type variables
]
