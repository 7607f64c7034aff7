"""Sphinx settings; `make docs` turns warnings into errors."""

import dataopt

project = "dataopt"
author = "The dataopt developers"
copyright = f"2026, {author}"
release = version = dataopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dataopt {release}"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# A parameter or attribute name, such as `inputs`, belongs to several classes.
suppress_warnings = ["ref.python"]
