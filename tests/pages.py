"""The Markdown pages of the project, and what stands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "data_prep", "triton_kernels", "benchmarks")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        ROOT / "README.md",
        *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.md"))),
    )
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, also those within lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands(text: str) -> list[str]:
    """Command lines in its fenced blocks, continued lines as one, without prompts."""
    shell = "".join(blocks(text, "bash")) + "".join(
        line.removeprefix("$ ") + "\n"
        for block in blocks(text, "")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    )
    return shell.replace("\\\n", " ").splitlines()


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
