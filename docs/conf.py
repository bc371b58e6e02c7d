"""How the site is built: `make docs`, or `make docs-fast` without running the examples.

The pages are Markdown that also reads on its own; the API comes from the docstrings,
the tutorials from examples/. No network is needed: where the inventories of other
projects cannot be fetched, those written here stand in.
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from inventories import write_inventories  # noqa: E402  # from this folder
from numpydoc.xref import DEFAULT_LINKS  # noqa: E402
from sphinx_gallery.scrapers import matplotlib_scraper  # noqa: E402

from fishermask_sk import __version__  # noqa: E402

project = "fishermask_sk"
author = "The fishermask_sk developers"
project_copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_saved", "results"]  # data of pages, not pages
templates_path = ["_templates"]
suppress_warnings = [
    "config.cache"
]  # the gallery's settings hold what cannot be pickled

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's types say it in words
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # the template lists them
numpydoc_xref_param_type = True
numpydoc_xref_aliases = {
    "ndarray": "numpy.ndarray",
    "DataFrame": "pandas.DataFrame",
    "Dataset": "torch.utils.data.Dataset",
    "Tensor": "torch.Tensor",
    "Path": "pathlib.Path",
    "Bunch": "sklearn.utils.Bunch",
}
numpydoc_xref_ignore = {
    "of",
    "or",
    "shape",
    "default",
    "optional",
    "in",
    "with",
    "to",
    "type",
    "same",
}
# Some of numpydoc's links go to glossaries, which the inventories written here do not
# have.
for word in [
    word
    for word, target in DEFAULT_LINKS.items()
    if target.startswith((":term:", ":ref:"))
]:
    del DEFAULT_LINKS[word]

intersphinx_mapping = write_inventories(DOCS / "_build" / "inventories")
intersphinx_timeout = 5

html_theme = "pydata_sphinx_theme"
html_title = f"fishermask_sk {version}"
# Formulas need no network: MathJax in one file, as a package of Python ships it.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
html_static_path = ["_static", str(MATHJAX / "tex-svg-full.js")]
mathjax_path = "tex-svg-full.js"
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
# Pages without pages below or beside them have nothing to show at the left.
html_sidebars = {name: [] for name in ("index", "choosing", "api")}
html_theme_options = {
    "logo": {"text": "fishermask_sk"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}


def svg_figures(*args, **kwargs):
    """Keep what an example draws as SVG."""
    return matplotlib_scraper(*args, format="svg", **kwargs)


# Run for the site: what takes seconds. The others are shown with the output that
# docs/_saved keeps of a run.
RUN = [
    "pictures",
    "custom_mask",
    "folder_of_images",
    "frames_for_a_purpose",
    "modal_loop",
    "tabular_pipeline",
    "text_transformer",
    "vision_transformer",
]
# Run from a command line, and so no tutorials.
COMMANDS = ["demo", "distributed"]
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": rf"/({'|'.join(RUN)})\.py",
    "ignore_pattern": rf"(^|/)({'|'.join(COMMANDS)})\.py",
    "image_scrapers": ("conf.svg_figures",),
    "remove_config_comments": True,
    "copyfile_regex": "",
    "within_subsection_order": "ExampleTitleSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "capture_repr": ("_repr_html_",),
    "min_reported_time": 10**6,  # a busy machine's seconds say nothing
    "show_signature": False,
    "default_thumb_file": str(DOCS / "images" / "gains.svg"),
    "abort_on_example_error": True,
    "reference_url": {"fishermask_sk": None},
    "doc_module": ("fishermask_sk",),
    "backreferences_dir": "generated/backreferences",
}


def add_saved_output(app, docname, source):
    """Show below an example that is not run what it printed, and drew, when it was."""
    saved = DOCS / "_saved" / f"{Path(docname).name}.txt"
    if not docname.startswith("auto_examples/") or not saved.exists():
        return
    command, _, printed = saved.read_text(encoding="utf-8").partition("\n")
    lines = [
        "",
        "Output",
        "======",
        "",
        "Saved from a run of:",
        "",
        ".. code-block:: sh",
        "",
        f"   {command}",
    ]
    if printed.strip():
        lines += [
            "",
            ".. code-block:: text",
            "",
            *(f"   {line}" for line in printed.strip("\n").splitlines()),
        ]
    if saved.with_suffix(".png").exists():
        lines += [
            "",
            f".. image:: /_saved/{docname.rpartition('/')[2]}.png",
            "   :alt: what the example drew",
        ]
    # In front of the links with which every page of the gallery ends.
    text = source[0]
    end = text.find(".. _sphx_glr_download_")
    source[0] = text[:end] + "\n".join(lines) + "\n\n" + text[end:]


CONTRIBUTING = DOCS.parent / "CONTRIBUTING.md"
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def link_to_site(app, docname, source):
    """Turn links that are meant for the files' own folders into links to the site's
    pages.

    Where a page, one of its sections or a picture is not there yet, its words remain;
    tests/test_docs.py asks for it.
    """
    folder = (DOCS / docname).parent
    if docname == "contributing":  # a file of the repository that is a page here, too
        source[0] = CONTRIBUTING.read_text(encoding="utf-8")
        folder = CONTRIBUTING.parent

    def link(match):
        picture, words, path, anchor = match[1], match[2], match[3], match[4] or ""
        target = (folder / path).resolve() if path else DOCS / f"{docname}.md"
        if not target.is_file() or (anchor and anchor[1:] not in anchors(target)):
            return words
        if picture:
            return match[0]
        if target.parent == DOCS.parent / "examples" and target.stem not in COMMANDS:
            path = f"{'../' * docname.count('/')}auto_examples/{target.stem}.rst"
        elif target == DOCS.parent / "CHANGELOG.md":
            path = "changelog.md"
        elif target == CONTRIBUTING:
            path = "contributing.md"
        elif folder != (DOCS / docname).parent and target.is_relative_to(DOCS):
            path = str(target.relative_to(DOCS))
        elif target == DOCS.parent / "README.md":
            path = "index.md"
        return f"[{words}]({path}{anchor})"

    if not docname.startswith(("auto_examples", "generated")):
        source[0] = LINK.sub(link, source[0])


def anchors(page):
    """The anchors that GitHub, and here MyST, give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def keep_names(app, what, name, obj, options, lines):
    """A name that ends in an underscore is what an estimator has learnt;
    reStructuredText takes it for a link.
    """
    lines[:] = [
        re.sub(r"(?<![\w`.:_])(_?[A-Za-z]\w*)_(?=$|[\s,.;:)])", r"\1\\_", line)
        for line in lines
    ]


def skip_what_says_nothing(app, what, name, obj, skip, options):
    """scikit-learn adds `set_fit_request` and the like to every estimator, of which its
    own guide tells; a named tuple's fields stand in the signature.
    """
    is_field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field")
    return True if is_field or re.fullmatch(r"set_\w+_request", name) else skip


def setup(app):
    app.connect("source-read", add_saved_output)
    app.connect("source-read", link_to_site)
    app.connect("autodoc-process-docstring", keep_names, priority=600)  # after numpydoc
    app.connect("autodoc-skip-member", skip_what_says_nothing)
