"""docs/architecture.md leads to files that exist, and README's tree to every room."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()
PATHS = sorted({path for path in re.findall(r"`([\w/]+(?:/|\.py))`", PAGE) if "/" in path})
ROOMS = sorted(
    init.parent
    for top in ("apex_composer", "data_prep")
    for init in (ROOT / top).glob("*/__init__.py")
)


def test_every_path_of_the_page_exists():
    assert len(PATHS) > 20
    assert [path for path in PATHS if not (ROOT / path).exists()] == []


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
