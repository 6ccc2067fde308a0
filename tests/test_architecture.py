"""The pages lead to files that exist, and README's tree to every room."""

import re

import pytest
from pages import PAGES, ROOT

PAGE = PAGES["docs/architecture.md"]
README = PAGES["README.md"]
FOLDERS = ("apex_composer", "benchmarks", "data_prep", "docs", "tests", "triton_kernels", "yamls")
SOURCES = [
    f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*")
]
ROOMS = sorted(
    init.parent
    for top in ("apex_composer", "data_prep")
    for init in (ROOT / top).glob("*/__init__.py")
)


def named(page: str) -> set[str]:
    """Files of Python and folders that a page names as code."""
    return set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.py|(?:[\w-]+/)+)`", PAGES[page]))


@pytest.mark.parametrize("page", [page for page in PAGES if named(page)])
def test_every_path_of_a_page_exists(page):
    """A file may be named by the end of its path, a folder is named from the root on."""
    files = {path for path in named(page) if path.endswith(".py")} - {"scripts/train/train.py"}
    folders = {path for path in named(page) if path.split("/")[0] in FOLDERS} - files
    sources = ["/train.py", *SOURCES]
    lost = [path for path in files if not any(s.endswith(f"/{path}") for s in sources)]
    assert lost + [path for path in folders if not (ROOT / path).is_dir()] == []


def test_most_pages_name_files():
    assert len([page for page in PAGES if named(page)]) >= 9


def test_methods_named_in_the_page_exist():
    algorithm = (ROOT / "apex_composer" / "trainer" / "algorithm.py").read_text()
    names = set(re.findall(r"`(_\w+)`", PAGE))
    assert names and all(f"def {name}(" in algorithm for name in names)


def test_the_page_shows_every_room():
    picture = PAGE.split("```")[1]
    assert [room.name for room in ROOMS if room.name not in picture] == []


def test_the_readme_has_one_line_for_each_room():
    tree = README.split("## Files")[1].split("```")[1].splitlines()
    for room in ROOMS:
        assert len([line for line in tree if line.startswith(f"  {room.name}/ ")]) == 1, room


def test_every_room_says_what_lives_there():
    for room in ROOMS:
        sentence = (room / "__init__.py").read_text()
        assert sentence.count('"""') == 2 and "Imports" in sentence, room
