"""The README as a package index shows it, without the files around it; all else stands
in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def without_files(text: str) -> str:
    """Leave out pictures of the repository, and turn links to its files into their
    names.
    """
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    text = text.replace(
        "## Read on\n",
        "## Read on\n\nThe files named here are in the release's source archive.\n",
    )
    named = re.sub(
        r"\[`([^`\]]+)`\]\(\1\)", r"`\1`", text
    )  # words that are the name already
    return re.sub(r"\[([^\]]+)\]\((?!https?:)([^)#\s]+)[^)]*\)", r"\1 (`\2`)", named)


if __name__ == "__main__":
    setup(
        long_description=without_files(README),
        long_description_content_type="text/markdown",
    )
