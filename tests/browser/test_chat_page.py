"""The chat in a real browser, by roles and names alone."""

from __future__ import annotations

import re

import pytest

expect = pytest.importorskip("playwright.sync_api").expect


def counted(page):
    """Return the numbers that a `count N` answer shows."""
    text = page.get_by_role("article", name="Assistant").last.locator(".text").inner_text()
    return [int(number) for number in re.findall(r"\b\d{3}\b", text)]


def test_every_part_of_the_page_has_its_role_and_name(site, visit, ask):
    page = visit(site.url)
    for role, name in (
        ("textbox", "Message"), ("button", "Send"), ("button", "New chat"), ("button", "Settings"),
        ("list", "Conversations"), ("searchbox", "Search"), ("log", "Messages"), ("combobox", "Model"),
        ("meter", "Context"),
    ):  # fmt: skip
        assert page.get_by_role(role, name=name).count() == 1, (role, name)
    assert page.get_by_role("button", name="Send").is_disabled()
    assert page.get_by_role("button", name="Stop").count() == 0
    ask(page, "How does the bise form?")
    assert page.get_by_role("log", name="Messages").get_by_role("article").count() == 2
    assert page.get_by_role("article", name=re.compile("^You")).count() == 1
    assert page.get_by_role("article", name=re.compile("^Assistant")).count() == 1
    assert page.get_by_role("button", name="Copy code").count() == 1
    assert page.get_by_role("button", name="Stop").count() == 0
    assert page.get_by_role("list", name="Conversations").get_by_role("listitem").count() == 1
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("dialog", name="Settings").wait_for()


def test_a_stopped_answer_keeps_its_text_and_can_be_continued(site, visit, ask):
    page = visit(site.url)
    ask(page, "count 600 hold 590", wait=False)
    page.get_by_text("020").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Continue").wait_for()
    assert page.get_by_role("button", name="Stop").count() == 0
    cut = counted(page)
    assert 20 < len(cut) < 600
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("button", name="Stop").wait_for()
    site.go()
    page.get_by_text("599").wait_for()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert counted(page) == list(range(600))


def test_a_reload_in_mid_stream_loses_and_doubles_nothing(site, visit, ask):
    page = visit(site.url)
    ask(page, "count 500 hold 490", wait=False)
    page.get_by_text("030").wait_for()
    page.reload()
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_text("200").wait_for()
    page.reload()
    site.go()
    page.get_by_text("499").wait_for()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert counted(page) == list(range(500))


def test_a_second_tab_follows_and_can_stop(site, visit, ask):
    first = visit(site.url)
    ask(first, "count 300", wait=False)
    first.get_by_text("010").wait_for()
    second = visit(first.url, same_browser_as=first)
    second.get_by_text("100").wait_for()
    for page in (first, second):
        page.get_by_role("button", name="Regenerate").wait_for()
        assert counted(page) == list(range(300))
    second.bring_to_front()
    ask(second, "slow answer", wait=False)
    first.get_by_role("button", name="Stop").wait_for()
    first.get_by_role("button", name="Stop").click()
    for page in (first, second):
        page.get_by_role("button", name="Continue").wait_for()
    texts = {
        page.get_by_role("article", name="Assistant").last.locator(".text").inner_text()
        for page in (first, second)
    }
    assert len(texts) == 1


def rename(page, title):
    page.get_by_role("article").last.wait_for()  # before it has come there is nothing to rename
    page.get_by_role("heading", level=1).dblclick()
    page.get_by_role("textbox", name="Title").fill(title)
    page.keyboard.press("Enter")


def test_a_title_that_comes_takes_the_focus_from_nobody(site, visit, ask):
    first = visit(site.url)
    ask(first, "count 3")
    search = first.get_by_role("searchbox", name="Search")
    search.focus()
    rename(visit(first.url, same_browser_as=first), "Small numbers")
    first.get_by_role("heading", name="Small numbers").wait_for()
    expect(search).to_be_focused()


def test_a_title_that_comes_does_not_replace_the_one_that_is_being_typed(site, visit, ask):
    first = visit(site.url)
    ask(first, "count 3")
    first.get_by_role("heading", level=1).dblclick()
    field = first.get_by_role("textbox", name="Title")
    field.fill("My own words")
    rename(visit(first.url, same_browser_as=first), "Small numbers")
    first.get_by_role("list", name="Conversations").get_by_role("link", name="Small numbers").first.wait_for()
    expect(field).to_have_value("My own words")
    field.press("Enter")
    first.get_by_role("heading", name="My own words").wait_for()


def test_leaving_the_conversation_does_not_stop_its_answer(site, visit, ask):
    page = visit(site.url)
    ask(page, "count 180 hold 170", wait=False)  # while it waits, its title is the question
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    page.get_by_role("list", name="Conversations").get_by_role("link", name="count 180").first.click()
    page.get_by_role("article").last.wait_for()
    site.go()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert counted(page) == list(range(180))


def test_a_killed_server_leaves_the_text_marked_and_continuable(own_site, visit, ask):
    server = own_site(pace_s=0.004).start()
    page = visit(server.url, expects=("Failed to load resource", "ERR_"))
    ask(page, "count 900 hold 890", wait=False)
    page.get_by_text("299").wait_for()
    server.kill()
    page.get_by_text("No connection to the server").first.wait_for()
    assert page.get_by_text("299").count() == 1
    server.start()
    page.get_by_text("The server restarted in the middle of this answer").wait_for()
    kept = counted(page)
    assert len(kept) > 50
    assert kept == list(range(len(kept)))
    page.get_by_role("button", name="Continue").click()
    server.go()
    page.get_by_text("899").wait_for()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert counted(page) == list(range(900))


def answer_twice(page, ask):
    ask(page, "count 3")
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_text("2/2").wait_for()


def test_regenerate_and_edit_make_versions_to_step_through(site, visit, ask):
    page = visit(site.url)
    answer_twice(page, ask)
    page.get_by_role("article", name="You").hover()
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_role("textbox", name="Edit text").fill("count 5")
    page.get_by_role("button", name="Ask again").click()
    page.get_by_text("003 004").wait_for()
    expect(page.get_by_role("article")).to_have_count(2)
    page.get_by_role("article", name="You").hover()
    page.get_by_role("button", name="Previous version").first.click()
    page.get_by_text("count 3").first.wait_for()
    page.get_by_role("article", name="You: count 3").wait_for()
    assert counted(page) == [0, 1, 2]


MESSAGES = re.compile(r"/conversations/[^/]+\?limit=\d\d")
"""Where the page reads a conversation with its messages; with one alone it asks for the title."""


def hold_first(page, path):
    """Have the first answer to a GET of `path` wait; return the list that will hold what lets it go."""
    held = []

    def pass_on(route):
        if held or route.request.method != "GET":
            route.continue_()
            return
        answer = route.fetch()
        held.append(lambda: route.fulfill(response=answer))

    page.route(path, pass_on)
    return held


def test_an_old_state_of_a_conversation_that_comes_late_is_not_shown(site, visit, ask):
    page = visit(site.url)
    answer_twice(page, ask)
    page.get_by_role("button", name="Regenerate").wait_for()
    held = hold_first(page, MESSAGES)
    page.get_by_role("button", name="Previous version").first.click()
    while not held:
        page.wait_for_timeout(10)
    page.get_by_role("button", name="Previous version").first.click()
    page.get_by_text("1/2").wait_for()
    page.get_by_role("button", name="Next version").first.click()
    page.get_by_text("2/2").wait_for()
    with page.expect_response(MESSAGES):
        held[0]()
    page.wait_for_timeout(100)  # nothing is to happen
    assert page.get_by_text("2/2").count() == 1


def test_the_conversation_that_was_clicked_last_is_shown_whichever_comes_first(own_site, visit, ask):
    page = visit(own_site().start().url)
    ask(page, "count 3")
    page.get_by_role("button", name="New chat").click()
    ask(page, "count 4")
    page.get_by_role("button", name="New chat").click()
    held = hold_first(page, MESSAGES)
    newer, older = (
        page.get_by_role("list", name="Conversations").get_by_role("listitem").nth(n) for n in (0, 1)
    )
    older.get_by_role("link").first.click()
    while not held:
        page.wait_for_timeout(10)
    newer.get_by_role("link").first.click()
    page.get_by_role("article", name="You: count 4").wait_for()
    with page.expect_response(MESSAGES):
        held[0]()
    page.wait_for_timeout(100)  # nothing is to happen
    assert page.get_by_role("article", name="You: count 4").count() == 1


def test_conversations_are_searched_renamed_pinned_and_deleted_with_undo(own_site, visit, ask):
    page = visit(own_site().start().url)
    ask(page, "Où passer l'été ?")
    page.get_by_role("button", name="New chat").click()
    ask(page, "count 4")
    entries = page.get_by_role("list", name="Conversations").get_by_role("listitem")
    expect(entries).to_have_count(2)
    page.get_by_role("searchbox", name="Search").fill("ete passer")
    expect(entries).to_have_count(1)
    page.get_by_role("searchbox", name="Search").fill("")
    entries.nth(1).wait_for()
    entries.nth(1).hover()
    entries.nth(1).get_by_role("button").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.get_by_role("textbox", name="Title").fill("Summer")
    page.get_by_role("textbox", name="Title").press("Enter")
    page.get_by_role("link", name="Summer").wait_for()
    entry = entries.filter(has_text="Summer")
    entry.hover()
    entry.get_by_role("button").click()
    page.get_by_role("menuitem", name="Pin", exact=True).click()
    entries.first.filter(has_text="Summer").wait_for()
    entry.hover()
    entry.get_by_role("button").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("button", name="Undo").wait_for()
    expect(entries).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("link", name="Summer").wait_for()


def test_what_is_typed_while_a_question_is_on_its_way_stays(site, visit):
    page = visit(site.url)
    held = []
    page.route("**/messages", lambda route: held.append(route))
    field = page.get_by_role("textbox", name="Message")
    field.fill("count 3")
    with page.expect_request("**/messages"):
        page.get_by_role("button", name="Send").click()
    field.fill("and the next one")
    while not held:
        page.wait_for_timeout(10)
    held[0].continue_()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert field.input_value() == "and the next one"


def test_a_failed_answer_says_why_in_an_alert(site, visit, ask):
    page = visit(site.url)
    ask(page, "FAIL please", wait=True)
    assert "FAIL" in page.get_by_role("alert").inner_text()


def test_the_model_and_the_settings_belong_to_the_conversation(site, visit, ask):
    page = visit(site.url)
    page.get_by_role("combobox", name="Model").select_option("scripted-7b")
    ask(page, "count 30")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="This conversation").click()
    page.get_by_label("Most tokens per answer").fill("5")
    with page.expect_response(lambda answer: answer.request.method == "PATCH" and answer.ok):
        page.get_by_label("Most tokens per answer").press("Tab")
    page.keyboard.press("Escape")
    ask(page, "count 40")
    page.get_by_text("Cut off at the length limit").wait_for()
    assert counted(page) == list(range(5))
    page.reload()
    page.get_by_text("Cut off at the length limit").wait_for()
    assert page.get_by_role("combobox", name="Model").input_value() == "scripted-7b"
    assert page.get_by_role("article", name="Assistant").last.get_by_text("scripted-7b").count() == 1


def test_the_keyboard_does_everything(site, visit):
    page = visit(site.url)
    page.keyboard.type("count 5")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Regenerate").wait_for()
    page.get_by_role("textbox", name="Message").press("ArrowUp")
    page.get_by_role("textbox", name="Edit text").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    page.get_by_role("combobox", name="Command").wait_for()
    page.keyboard.type("keyboard")
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("textbox", name="Message").fill("slow one")
    page.get_by_role("textbox", name="Message").press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_text("word0003").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Continue").wait_for()
    page.keyboard.press("Control+Shift+O")
    page.get_by_text("Good").first.wait_for()
    assert page.get_by_role("article").count() == 0


def test_the_first_stop_of_the_tab_key_leads_past_the_list_and_dialogs_give_the_focus_back(site, visit):
    page = visit(site.url)
    skip = page.get_by_role("link", name="Skip to the question")
    expect(skip).not_to_be_in_viewport()
    assert page.locator("a, button, input, select, textarea").first.inner_text() == skip.inner_text()
    skip.focus()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    settings = page.get_by_role("button", name="Settings")
    settings.click()
    page.get_by_role("dialog", name="Settings").get_by_role("button", name="Close").click()
    expect(settings).to_be_focused()


def test_enter_in_an_input_method_does_not_send(site, visit):
    page = visit(site.url)
    field = page.get_by_role("textbox", name="Message")
    field.fill("にほん")
    field.evaluate(
        "field => field.dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'Enter', keyCode: 229, isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert field.input_value() == "にほん"
    assert page.get_by_role("article").count() == 0


def test_copying_code_puts_it_on_the_clipboard(site, visit, ask):
    page = visit(site.url, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "How does the bise form?")
    page.evaluate("window.setTimeout = () => 0")  # "Copied" stays until this test has looked
    page.get_by_role("button", name="Copy code").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("def pressure(speed_kmh: float")


def test_a_temporary_chat_is_in_no_list_and_gone_after_a_reload(own_site, visit, ask):
    page = visit(own_site().start().url)
    page.get_by_role("button", name="Temporary chat").click()
    ask(page, "count 4")
    assert page.get_by_role("list", name="Conversations").get_by_role("listitem").count() == 0
    page.reload()
    page.get_by_role("textbox", name="Message").wait_for()
    assert page.get_by_role("article").count() == 0


@pytest.mark.parametrize(
    ("language", "words"), [("fr", "Nouvelle"), ("de", "Neue"), ("es", "Nuev"), ("it", "Nuov")]
)
def test_the_page_speaks_the_browsers_language(site, visit, chromium, language, words):
    context = chromium.new_context(locale=language)
    page = context.new_page()
    page.goto(site.url)
    page.locator("nav button", has_text=words).first.wait_for()
    expect(page.locator("html")).to_have_attribute("lang", language)
    context.close()


def test_on_a_phone_the_sidebar_is_a_drawer_and_nothing_is_cut(site, visit, ask):
    page = visit(site.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    ask(page, "How does the bise form?")
    for width in (390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)
    page.get_by_role("button", name="Show the sidebar").click()
    page.get_by_role("button", name="Settings").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("textbox", name="Message").press("Enter")
    expect(page.get_by_role("textbox", name="Message")).to_have_value("\n")
