"""What a model writes can only ever be text: attacks streamed a character at a time into a real browser."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

import bise

STATIC = Path(bise.__file__).parent / "server" / "static"
PAYLOADS = json.loads(Path(__file__).with_name("payloads.json").read_text())
LIVE = (
    "script, iframe, object, embed, form, video, audio, style, link, base, meta, img, svg:not(.lucide), "
    "textarea, template"
)
LOOK = f"""() => {{
  const found = [];
  for (const text of document.querySelectorAll('article .text, article .bubble')) {{
    for (const node of text.querySelectorAll('*')) {{
      if (node.closest('.katex')) continue;
      if (node.matches({LIVE!r})) found.push(node.outerHTML.slice(0, 120));
      for (const name of node.getAttributeNames())
        if (/^on|^srcdoc$|^formaction$/.test(name)) found.push(name);
    }}
    for (const link of text.querySelectorAll('a')) {{
      if (!/^(https?:|mailto:)/.test(link.protocol)) found.push(link.href);
      if (link.origin === location.origin) found.push('own origin: ' + link.href);
    }}
  }}
  if (window.__hit) found.push('executed');
  return found;
}}"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_attack_runs_fetches_or_becomes_an_element(own_site, visit):
    assert len(PAYLOADS) >= 100
    server = own_site(pace_s=0.002, piece=1).start()
    page = visit(server.url)
    dialogs, foreign = [], []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda request: (
            foreign.append(request.url)
            if not request.url.startswith((server.url, "blob:", "data:image/svg+xml"))
            else None
        ),
    )
    problems = []
    for number, payload in enumerate(PAYLOADS):
        # Once as the answer, once as the question itself, which also becomes the title.
        # (A question with a NUL is refused: no database keeps one.)
        for question in (f"payload {number}", *([payload] if "\0" not in payload else [])):
            page.keyboard.press("Control+Shift+O")
            page.get_by_role("textbox", name="Message").fill(question)
            page.get_by_role("button", name="Send").click()
            page.get_by_role("button", name="Regenerate").wait_for()
            if found := page.evaluate(LOOK):
                problems.append((payload, found))
            if question == payload:
                break
    assert problems == []
    assert dialogs == []
    assert foreign == []
    assert page.url.startswith(server.url)


def test_a_few_attacks_of_each_kind_stay_text(site, visit, ask):
    page = visit(site.url)
    for number in (0, 2, 4, 10, 30, 58, 96, 110):
        page.get_by_role("button", name="New chat").click()
        ask(page, f"payload {number}")
        assert page.evaluate(LOOK) == []


def test_the_page_comes_with_a_strict_policy_and_right_types(site, visit):
    page = visit(site.url)
    answer = page.request.get(site.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    asset = re.search(r"/assets/index-[^\"]+\.js", answer.text())[0]
    script = page.request.get(site.url + asset)
    assert script.headers["content-type"].startswith("text/javascript")
    assert "immutable" in script.headers["cache-control"]
    assert page.request.get(f"{site.url}/assets/..%2f..%2fapp.py").status == 404


def test_the_first_load_keeps_its_budget(site, visit):
    page = visit(site.url)
    names = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    loaded = {name for name in names if name.endswith((".js", ".css"))}
    size = sum(len(gzip.compress(page.request.get(name).body(), 9)) for name in loaded)
    built = [path for path in STATIC.glob("assets/*.gz") if path.name.endswith((".js.gz", ".css.gz"))]
    rest = sum(path.stat().st_size for path in built if not path.name.startswith("typeset"))
    print(
        f"scripts and styles, compressed: first load {size / 1000:.1f} kB (budget 120), everything but KaTeX "
        f"{rest / 1000:.1f} kB (budget 200)"
    )
    assert 20_000 < size < 120_000
    assert size < rest < 200_000


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1280),
        ("dark", 390),
        pytest.param("dark", 1280, marks=pytest.mark.slow),
        pytest.param("light", 390, marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_serious(site, visit, ask, scheme, width):
    source = Path(__file__).parents[2] / "web" / "node_modules" / "axe-core" / "axe.min.js"
    if not source.is_file():
        pytest.skip("axe-core is not installed; make web")
    page = visit(
        site.url, expects=("404",), color_scheme=scheme, viewport={"width": width, "height": 844},
        has_touch=width < 500, is_mobile=width < 500, reduced_motion="reduce",
    )  # fmt: skip

    def check(place):
        page.evaluate(source.read_text())
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [
            (place, violation["id"], [node["html"][:160] for node in violation["nodes"][:3]])
            for violation in result["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == []

    check("empty")
    ask(page, "think about the bise")
    page.get_by_text("Thought for").click()
    check("answer")
    page.get_by_role("button", name="What fills the window").click()
    check("ribbon")
    page.keyboard.press("Escape")
    page.get_by_role("textbox", name="Message").fill("/")
    page.get_by_role("textbox", name="Message").press("End")
    page.get_by_role("textbox", name="Message").press_sequentially("s")
    page.get_by_role("listbox", name="Suggestions").wait_for()
    check("suggestions")
    page.get_by_role("textbox", name="Message").fill("")
    page.keyboard.press("Control+k")
    page.get_by_role("listbox", name="Commands").wait_for()
    check("palette")
    page.keyboard.press("Escape")
    if width < 500:
        page.get_by_role("button", name="Show the sidebar").click()
    page.get_by_role("button", name="Pick several").click()
    check("sidebar")
    page.get_by_role("button", name="Pick several").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("dialog", name="Settings").wait_for()
    for tab in page.get_by_role("tab").all():
        tab.click()
        check(f"settings, {tab.inner_text()}")
    page.get_by_role("tab", name="Personas").click()
    page.get_by_role("button", name="Make a persona").click()
    check("persona")
