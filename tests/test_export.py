"""The pages as HTML: complete in one folder, and readable in a narrow window."""

import re
import shutil
from urllib.parse import unquote

import export
import pytest
from bs4 import BeautifulSoup
from pages import find_pages

pytestmark = pytest.mark.author


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("html")
    assert export.main(["--out", str(folder)]) in (None, 0)
    return folder


@pytest.fixture(scope="module")
def soups(folder):
    return {file.name: BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")
            for file in folder.iterdir()}


def test_every_page_is_there_with_its_title(soups):
    assert {path.stem + ".html" for path in find_pages([])} == set(soups)
    for name, soup in soups.items():
        assert soup.title.text == soup.h1.text and soup.title.text.startswith(name[:2])


def test_nothing_is_fetched(soups):
    for name, soup in soups.items():
        assert soup.find_all(["script", "link", "iframe"], src=True) == [], name
        assert soup("link") == [] and not re.search(r"url\(['\"]?http|@import", str(soup)), name
        assert all(image["src"].startswith("data:") for image in soup("img")), name


def test_links_stay_in_the_folder_and_lead_somewhere(soups):
    found = 0
    for name, soup in soups.items():
        for link in soup("a", href=True):
            file, _, anchor = unquote(link["href"]).partition("#")
            if not file.startswith("https://"):
                there = soups.get(file or name)
                assert there, f"{name}: there is no {file}"
                assert not anchor or there.find(id=anchor), f"{name}: {link['href']} leads nowhere"
                found += bool(anchor)
    assert found > 40, "the glossary alone has more"


def test_every_picture_is_told_in_words(soups):
    alts = [image.get("alt", "") for soup in soups.values() for image in soup("img")]
    assert len(alts) > 40 and all(re.match(r"Figure \d\.\d+\. \w", alt) for alt in alts)


@pytest.mark.parametrize("width", [720, 480])
def test_no_line_of_code_is_cut_off(folder, width):
    program = next(filter(None, map(shutil.which, export.BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs a browser, which may be {' or '.join(export.BROWSERS)}")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p, p.chromium.launch(executable_path=program) as browser:
        tab = browser.new_page(viewport={"width": width, "height": 900})
        outside = []
        tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or outside.append(r.url))
        for file in sorted(folder.iterdir()):
            tab.goto(file.as_uri())
            cells, cut, wide = tab.evaluate("""() => {
                const cells = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-editor')];
                const over = e => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1;
                return [cells.length, cells.filter(c => [c, ...c.querySelectorAll('*')].some(over))
                        .length, document.documentElement.scrollWidth];
            }""")
            assert cells > 10 and cut == 0 and wide <= width, f"{file.name}: {cut} of {cells}"
        assert outside == []
