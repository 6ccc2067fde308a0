"""Links from page to page, to pictures and to files lead somewhere."""

import re

import pytest
from pages import PAGES, ROOT, anchors


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    lost = []
    for link in links(PAGES[page]):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            lost.append(link)
    assert lost == []


def test_every_page_of_the_docs_is_linked_from_the_readme():
    reached = {link.partition("#")[0] for link in links(PAGES["README.md"])}
    reached |= set(re.findall(r"\b([\w-]+\.md)\b", PAGES["README.md"].split("## Files")[1]))
    pages = [page for page in PAGES if page.startswith("docs/")]
    assert [p for p in pages if p not in reached and p.split("/")[1] not in reached] == []


def test_anchors_are_githubs():
    text = "# A b, `c`\n```\n# no\n```\n## The `x:` y\n"
    assert anchors(text) == {"a-b-c", "the-x-y"}
