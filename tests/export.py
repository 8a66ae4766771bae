"""Write the pages as HTML, to read without running: in one folder that fetches nothing.

    python tests/export.py [NAME...] [--out DIR] [--pictures]      # or: make html

Code is broken where the window ends, tables scroll, and links from page to page stay in the folder.
--pictures draws each page, too, as a wide and as a narrow window shows it; it needs Chromium.
"""

import argparse
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

from pages import NOTEBOOKS, Page, find_pages, write

LINES = {"linespans": "line"}  # pygments gives each line of code an element, with an id
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# nbconvert's page in JupyterLab's looks: without the scripts that it would fetch, and with the alt
# text of the figures, which it leaves out.
TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block data_png scoped %}{% set alt = output | get_metadata("alt", "image/png") or "" %}
{{- super() | replace("<img", '<img alt="' ~ (alt | e) ~ '"', 1) }}{% endblock %}
{% block html_head_css %}<style>
body.jp-Notebook { max-width: 62rem; margin: 0 auto; padding: 1rem; box-sizing: border-box; }
.jp-InputArea-editor .highlight pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.line { display: block; }
.jp-OutputArea-output { overflow-x: auto; }
.jp-OutputArea-output pre { white-space: pre; word-break: normal; }
.jp-RenderedHTMLCommon table { display: block; overflow-x: auto; max-width: 100%; margin-left: 0; }
.jp-RenderedImage img { max-width: 100%; height: auto; }
.jp-RenderedHTMLCommon :not(pre) > code { overflow-wrap: anywhere; }
.jp-RenderedHTMLCommon :is(td, th) > code { overflow-wrap: normal; white-space: nowrap; }
.jp-InputPrompt, .jp-OutputPrompt { display: none; }
</style>{% endblock %}
"""


def export(paths):
    """Yield (the page, its HTML) of each."""
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(raw_template=TEMPLATE, embed_images=True, anchor_link_text="",
                            config={"Highlight2HTML": {"extra_formatter_options": LINES}})
    here = {path.name for path in paths}
    for path in paths:
        page = Page(path)
        page.nb.metadata["title"] = next((text for *_, text in page.headings), path.stem)
        text, _ = exporter.from_notebook_node(
            page.nb, resources={"metadata": {"path": str(path.parent)}})
        soup = BeautifulSoup(text, "html.parser")
        for sign in soup(class_="anchor-link"):  # it comes with the headings' ids
            sign.decompose()
        for link in soup("a", href=True):
            name, _, anchor = unquote(link["href"]).partition("#")
            if name in here:
                link["href"] = Path(name).stem + ".html" + (anchor and f"#{anchor}")
            elif name and "://" not in name:  # the words stay
                link.unwrap()
        for line in soup.select('span[id^="line-"]'):
            text = line.get_text()
            deep = len(text) - len(text.lstrip(" ")) + 4  # where a broken line goes on
            line.attrs = {"class": "line", "style": f"padding-left:{deep}ch;text-indent:-{deep}ch"}
        yield path, str(soup)


def draw(browser, file):
    """Full-page pictures of an HTML file, beside it."""
    for label, width in ("wide", 1200), ("narrow", 480):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.goto(file.resolve().as_uri())
        tab.screenshot(path=file.with_suffix(f".{label}.png"), full_page=True)
        tab.close()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("pages-out"))
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS, help="the pages' folder")
    parser.add_argument("--pictures", action="store_true")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    files = []
    for path, text in export(find_pages(args.names, args.folder)):
        files.append(args.out / f"{path.stem}.html")
        write(files[-1], text)
    if args.pictures:
        from playwright.sync_api import sync_playwright
        program = next(filter(None, map(shutil.which, BROWSERS)))
        with sync_playwright() as p, p.chromium.launch(executable_path=program) as browser:
            for file in files:
                draw(browser, file)
    print(f"{len(files)} pages are in {args.out}; open {files[0]} in a browser")


if __name__ == "__main__":
    sys.exit(main())
