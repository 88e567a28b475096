"""Budgets: first paint, a fast stream, a long conversation, the way from a key to the screen, memory.

Bounds are twice the budget where a shared machine decides; the figures are printed (`pytest -s`).
"""

from __future__ import annotations

import time

import pytest

from bise.assistant.conversations import Conversations
from bise.assistant.messages import Message, Messages
from bise.store.database import Database

FRAMES = """() => {
  window.frames = [];
  let last = performance.now();
  const step = (now) => { window.frames.push(now - last); last = now; requestAnimationFrame(step); };
  requestAnimationFrame(step);
}"""
KEYS = """() => {
  // The browser's own stopwatch: from the key to the paint that shows it, for all that take a frame or more.
  const start = performance.now();
  window.keys = [];
  window.observer?.disconnect();
  window.observer = new PerformanceObserver((list) => {
    for (const { name, startTime, duration } of list.getEntries())
      if (name === 'keydown' && startTime >= start) window.keys.push(duration);
  });
  window.observer.observe({ type: 'event', durationThreshold: 16 });
}"""
PAINTS = """() => new Promise((done) => {
  let left = 12;  // frames, until the last key was told
  const step = () => (left-- > 0 ? requestAnimationFrame(step) : done(window.keys));
  step();
})"""


def share(sorted_values, part):
    """Return the value below which `part` of all lie."""
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * part))]


def busy_s(session):
    """Return how many seconds the page's main thread has worked."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def long_conversation(server, count, times=12):
    """Put a conversation with `count` messages into the server's database; return its id."""
    database = Database.open(str(server.database))
    made = Conversations(database).create("local", title="Long")
    messages = [
        Message(
            id="", conversation_id="", parent_id=None, role="assistant" if number % 2 else "user",
            text=f"Message number {number}. " + "Some **words** and `code`. " * times, model=None,
            status="complete", created_at=1e9 + number,
        )
        for number in range(count)
    ]  # fmt: skip
    Messages(database).copy("local", made.id, messages, {})
    database.close()
    return made.id


def typed(page, *words, before=lambda: None):
    """Type words as fast as keys can be pressed; return, sorted, the milliseconds to their paints."""
    page.evaluate(KEYS)
    for word in words:
        before()
        page.get_by_role("textbox", name="Message").press_sequentially(word)
    slow = page.evaluate(PAINTS)
    assert len(slow) <= len("".join(words))
    return sorted([0.0] * (len("".join(words)) - len(slow)) + slow)


def look_further_up(page):
    """Scroll to the first message on the page and wait until earlier ones are there."""
    first = page.get_by_role("article").first.get_attribute("data-id")
    page.locator(".area").evaluate("area => { area.scrollTop = 0; }")
    page.wait_for_function("id => document.querySelector('article').dataset.id !== id", arg=first)


@pytest.mark.slow
def test_the_first_paint_is_soon(own_site, visit):
    page = visit(own_site().start().url)
    page.reload()
    page.get_by_role("textbox", name="Message").wait_for()
    usable = page.evaluate("performance.now()")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"first paint after {paint:.0f} ms (budget 1000), usable after {usable:.0f} ms (budget 1500)")
    assert paint < 2000
    assert usable < 3000


@pytest.mark.slow
def test_a_stream_of_200_tokens_a_second_is_smooth(own_site, visit, ask):
    page = visit(own_site(pace_s=0.005).start().url)
    ask(page, "count 3000", wait=False)
    page.get_by_text("000 001").wait_for()
    page.evaluate(FRAMES)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    busy, start = busy_s(session), time.monotonic()
    page.get_by_text("2998 2999").wait_for(timeout=90_000)
    used = (busy_s(session) - busy) / (time.monotonic() - start)
    frames = sorted(page.evaluate("window.frames"))
    median, p95 = share(frames, 0.5), share(frames, 0.95)
    print(
        f"3,000 tokens at 200 a second: frames {1000 / median:.0f} a second (budget 55), 95 % within "
        f"{p95:.0f} ms (budget 34), main thread busy {100 * used:.0f} % of the time (budget 40)"
    )
    assert median < 34
    assert p95 < 70
    assert used < 0.8


@pytest.mark.slow
def test_the_last_token_is_visible_at_once(own_site, visit, ask):
    page = visit(own_site(pace_s=0.002).start().url)
    # An EventSource of the test's own notes when the last piece reached this machine.
    page.evaluate(
        """() => {
          const Real = window.EventSource;
          window.EventSource = class extends Real {
            constructor(...all) {
              super(...all);
              this.addEventListener('message', () => { window.arrived = performance.now(); });
            }
          };
        }"""
    )
    ask(page, "count 300", wait=False)
    shown = page.evaluate(
        """() => new Promise((done) => {
          const look = () => document.querySelector('article .text')?.textContent.includes('299')
            ? done(performance.now()) : requestAnimationFrame(look);
          look();
        })"""
    )
    delay = shown - page.evaluate("window.arrived")
    print(f"the last token is on screen {delay:.0f} ms after it came (budget 500)")
    assert delay < 500


@pytest.mark.slow
def test_a_reload_in_mid_stream_goes_on_soon(own_site, visit, ask):
    page = visit(own_site(pace_s=0.01).start().url)
    ask(page, "count 2000", wait=False)
    page.get_by_text("050").wait_for()
    start = time.monotonic()
    page.reload()
    page.wait_for_function(
        """() => {
          const length = document.querySelector('article .text')?.textContent.length ?? 0;
          window.lengths = [...(window.lengths ?? []), length];
          return length > 0 && length > window.lengths.find((earlier) => earlier > 0);
        }""",
        polling=20,
    )
    growing_s = time.monotonic() - start
    page.get_by_role("button", name="Stop").click()
    print(f"growing again {growing_s:.2f} s after a reload (budget 3)")
    assert growing_s < 3


@pytest.mark.slow
def test_a_thousand_messages_stay_usable(own_site, visit):
    server = own_site()
    made = long_conversation(server, 1000)
    page = visit(f"{server.start().url}/c/{made}")
    start = time.monotonic()
    page.reload()
    page.get_by_text("Message number 999").wait_for()
    usable_s = time.monotonic() - start
    articles = page.get_by_role("article")
    for _ in range(16):
        look_further_up(page)
    assert 100 < articles.count() <= 160
    page.get_by_role("textbox", name="Message").press_sequentially("warm")
    delays = typed(page, "the quick brown fox jumps over the lazy dog, and then once more")
    area = page.locator(".area")
    words = ("and again ", "and again ", "while earlier ", "messages come ", "into the ", "page, which")
    loading = typed(page, *words, before=lambda: area.evaluate("area => { area.scrollTop = 0; }"))
    print(
        f"1,000 messages: usable after {usable_s:.2f} s (budget 1), key to paint median "
        f"{share(delays, 0.5):.0f} ms, 95 % within {share(delays, 0.95):.0f} ms (budget 50); while earlier "
        f"messages come {share(loading, 0.5):.0f} and {share(loading, 0.95):.0f} ms"
    )
    assert usable_s < 3
    assert 0 < share(loading, 0.95) < 100
    assert share(delays, 0.95) < 100


@pytest.mark.slow
def test_three_hundred_exchanges_stay_light(own_site, visit, ask):
    server = own_site()
    made = long_conversation(server, 600, times=60)
    page = visit(f"{server.start().url}/c/{made}")
    page.get_by_text("Message number 599").wait_for()
    for _ in range(40):
        look_further_up(page)
    start = time.monotonic()
    ask(page, "count 3")
    late_s = time.monotonic() - start
    page.context.new_cdp_session(page).send("HeapProfiler.collectGarbage")
    heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
    page.get_by_role("button", name="New chat").click()
    start = time.monotonic()
    ask(page, "count 3")
    first_s = time.monotonic() - start
    print(
        f"300 exchanges: heap {heap:.0f} MB (budget 150), sending took {late_s:.2f} s, in an empty one "
        f"{first_s:.2f} s (budget: twice)"
    )
    assert heap < 150
    assert late_s < 2 * first_s + 0.5
