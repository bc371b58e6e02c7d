"""Every python block of the README and the docs runs, page by page from top to bottom;
every link leads somewhere.
"""

import re
from functools import partial
from pathlib import Path

import distributed
import matplotlib
import numpy as np
import pytest
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
MADE = ("_build", "auto_examples", "generated", "results")  # by sphinx, by studies
PAGES = [
    ROOT / "README.md",
    *sorted(
        page
        for page in (ROOT / "docs").glob("**/*.md")
        if page.relative_to(ROOT / "docs").parts[0] not in MADE
    ),
]
BLOCK = re.compile(r"^```py(?:thon)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


# Their blocks search, compare or stream for a minute and more on quiet cores.
SLOW = {"scikit_learn.md", "large_pools.md", "choosing.md"}


def page_name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else ())
        for page in PAGES
    ],
    ids=page_name,
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "from distributed import Client" in page.read_text(encoding="utf-8"):
        # In place of the machines that the page speaks of: one thread of this process.
        local = partial(
            distributed.Client,
            processes=False,
            n_workers=1,
            threads_per_worker=1,
            dashboard_address=None,
        )
        monkeypatch.setattr(distributed, "Client", lambda address: local())
    text = page.read_text(encoding="utf-8")
    if 'ImageFolderPool("photos")' in text:  # the reader has some
        for i, part in enumerate(["photos"] * 20 + ["target"] * 5):
            (tmp_path / part).mkdir(exist_ok=True)
            noise = np.random.default_rng(i).integers(256, size=(20, 24, 3))
            image = Image.fromarray(noise.astype(np.uint8))
            image.save(tmp_path / part / f"{i}.jpg")
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        # Blank lines in front make a traceback name the line of the page.
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], page, "exec"), namespace)
    plt.close("all")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_block_is_passed_over(page):
    """A block is Python, which is run; a command; what something prints; or a directive
    of the site.
    """
    for kind, _ in FENCE.findall(page.read_text(encoding="utf-8")):
        assert kind in ("python", "py", "sh", "bash", "text") or kind.startswith("{"), (
            f"{page_name(page)}: ```{kind}"
        )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_fit_the_site(page):
    """88 columns, as the sources: a wider block is cut off next to the side bars."""
    for kind, block in FENCE.findall(page.read_text(encoding="utf-8")):
        wide = [line for line in block.splitlines() if len(line) > 88]
        assert kind.startswith("{") or not wide, f"{page_name(page)}: {wide}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in (
        block
        for kind, block in FENCE.findall(page.read_text(encoding="utf-8"))
        if kind in ("sh", "bash")
    ):
        for target in re.findall(r"^make ([\w-]+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (
                f"{page_name(page)}: make {target}"
            )
        for script, options in re.findall(
            r"^python (\S+\.py)([^#\n]*)", block, re.MULTILINE
        ):
            known = (ROOT / script).read_text(encoding="utf-8")
            for option in re.findall(r"--[\w-]+", options):
                assert f'"{option}"' in known, f"{page_name(page)}: {script} {option}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), f"{page_name(page)} links to {path}, which is not there"
        if anchor:
            assert anchor[1:] in anchors(target), (
                f"{page_name(page)} links to {anchor}, which no heading has"
            )


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }
