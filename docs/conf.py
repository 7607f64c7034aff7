"""Sphinx settings; `make docs` turns warnings into errors."""

from pathlib import Path

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
smartquotes = False  # it would make a dash of --resume

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# A parameter or attribute name, such as `inputs`, belongs to several classes.
suppress_warnings = ["ref.python"]


def printed_runs(app):
    """A page for every report in benchmarks/results, with the figures that belong to it."""
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    out = Path(__file__).parent / "benchmarks"
    out.mkdir(exist_ok=True)
    pages = {page.stem: page.read_text(encoding="utf-8") for page in sorted(results.glob("*.md"))}
    for old in out.glob("*"):
        old.unlink()
    for figure in sorted(results.glob("*.png")):
        owner = max((name for name in pages if figure.stem.startswith(name)), key=len, default=None)
        if owner:
            (out / figure.name).write_bytes(figure.read_bytes())
            pages[owner] += f"\n![{figure.stem.replace('_', ' ')}]({figure.name})\n"
    for name, text in pages.items():
        (out / f"{name}.md").write_text(text, encoding="utf-8")


def setup(app):
    app.connect("builder-inited", printed_runs)
