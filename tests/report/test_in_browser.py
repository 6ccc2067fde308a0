"""The page as Chromium shows it: `make test-report`."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from example_report import example_answer, largest, two_runs

from apex_composer.report.page import make_page

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# What is measured, in the page itself: the copy that it is put into has no policy against scripts.
PROBE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const box = one => one.getBoundingClientRect();
  const wide = [], outside = [], over = [];
  for (const one of document.querySelectorAll("body *:not(svg *):not(.wide, .wide *)"))
    if (box(one).width && box(one).right > innerWidth + 1) wide.push(one.outerHTML.slice(0, 80));
  for (const svg of document.querySelectorAll(".charts svg")) {
    const texts = [...svg.querySelectorAll("text")], edge = box(svg);
    for (const text of texts) if (box(text).left < edge.left - 1 || box(text).right > edge.right + 1
      || box(text).bottom > edge.bottom + 1) outside.push(text.textContent);
    texts.forEach((one, n) => texts.slice(n + 1).forEach(other => {
      const a = box(one), b = box(other);
      if (a.left + 1 < b.right && b.left + 1 < a.right
        && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
        over.push([one.textContent, other.textContent]);
    }));
  }
  const style = getComputedStyle(document.body), root = getComputedStyle(document.documentElement);
  const colours = {};
  for (let n = 0; n < 8; n++) colours[n] = root.getPropertyValue("--series-" + n).trim();
  const drawn = [...document.querySelectorAll(".charts svg")].filter(
    one => box(one).width > 250 && one.querySelectorAll("path").length > 5);
  const found = {width: innerWidth, scroll: document.documentElement.scrollWidth, wide, outside,
    over, charts: drawn.length, maps: [...document.querySelectorAll(".map")].filter(
    one => box(one).width > 250 && box(one).height > 10).length,
    page: style.backgroundColor, ink: style.color, colours,
    requests: performance.getEntriesByType("resource").map(one => one.name).filter(
    one => !one.startsWith("data:"))};
  parent.postMessage(JSON.stringify(found), "*");
});</script>"""
# Chromium's windows are never narrower than 500 pixels; a frame is.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<script>addEventListener("message", event => {
  const out = document.createElement("pre"); out.id = "found"; out.textContent = event.data;
  document.body.append(out);
});</script><iframe src="PAGE" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


def chromium(page: Path, width: int, dark: bool, *options: str) -> subprocess.CompletedProcess:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.fail(f"No browser among {', '.join(NAMES)}. Debian, Ubuntu: apt install chromium")
    command = [program, "--headless=new", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--disable-background-networking", "--no-first-run", f"--window-size={width},900"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--no-sandbox"] * (os.geteuid() == 0)
    command += [f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def brightness(colour: str) -> float:
    """Relative luminance as in WCAG 2."""
    if colour.startswith("#"):
        parts = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
    else:
        parts = [int(part) for part in re.findall(r"\d+", colour)[:3]]
    linear = [((p / 255 + 0.055) / 1.055) ** 2.4 if p > 10 else p / 255 / 12.92 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(brightness, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    groups = two_runs()
    groups["a_name_without_a_place_to_break_" * 4] = groups["apex"]
    texts = {"small": make_page(example_answer(two_runs()), "apex against vanilla")}
    texts["long_names"] = make_page(example_answer(groups), "x" * 200)
    texts["largest"] = make_page(example_answer(largest()), "ten runs")
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
        assert len(POLICY.findall(text)) == 1
        probed = POLICY.sub("", text).replace("</body>", f"{PROBE}</body>")
        (folder / f"{name}_probed.html").write_text(probed)
    return folder


@pytest.mark.parametrize("name", ["small", "long_names", "largest"])
def test_the_policy_against_requests_and_scripts_is_not_broken(pages, name):
    told = chromium(pages / f"{name}.html", 1280, False, "--dump-dom").stderr
    assert "CONSOLE" not in told, told


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["small", "long_names", "largest"])
def test_what_is_seen(pages, name, width, dark):
    frame = pages / f"{name}_{width}.html"
    frame.write_text(FRAME.replace("PAGE", f"{name}_probed.html").replace("WIDTH", str(width)))
    shown = chromium(frame, width, dark, "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    text = re.search(r'<pre id="found">(.*?)</pre>', shown.stdout, re.S)[1]
    found = json.loads(html.unescape(text))
    assert found["width"] == width and found["scroll"] <= width
    assert found["wide"] == found["outside"] == found["over"] == found["requests"] == []
    assert found["charts"] >= 20 and found["maps"] >= 9
    assert (brightness(found["page"]) < 0.1) is dark
    assert contrast(found["page"], found["ink"]) > 7
    assert all(contrast(found["page"], colour) > 3 for colour in found["colours"].values())
