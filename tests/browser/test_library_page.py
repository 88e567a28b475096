"""Folders, picking several, personas, mentions, thoughts, cost, compare, import: in a real browser."""

from __future__ import annotations

import json
import re

import pytest

expect = pytest.importorskip("playwright.sync_api").expect


def entries(page):
    """Return the conversations in the sidebar that are in no folder."""
    return page.get_by_role("list", name="Conversations").get_by_role("listitem")


def act(page, entry, action):
    """Choose an action of a conversation's menu."""
    entry.hover()
    entry.get_by_role("button", name="Actions").click()
    page.get_by_role("menuitem", name=action).click()


def test_a_conversation_goes_into_a_folder_which_is_renamed_and_dissolved(own_site, visit, ask):
    page = visit(own_site().start().url)
    for question in ("count 3", "count 4"):
        page.get_by_role("button", name="New chat").click()
        ask(page, question)
    act(page, entries(page).first, "Move to a folder")
    page.get_by_role("textbox", name="Folder name").fill("Thesis")
    page.get_by_role("button", name="Move", exact=True).click()
    expect(entries(page)).to_have_count(1)
    folder = page.get_by_role("button", name=re.compile("^Thesis"))
    folder.click()
    expect(page.get_by_role("list", name="Thesis").get_by_role("listitem")).to_have_count(1)
    page.reload()
    page.get_by_role("button", name=re.compile("^Thesis")).hover()
    page.get_by_role("region", name="Folders").get_by_role("button", name="Actions").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.get_by_role("textbox", name="Folder name").fill("Paper")
    page.keyboard.press("Enter")
    page.get_by_role("button", name=re.compile("^Paper")).hover()
    page.get_by_role("region", name="Folders").get_by_role("button", name="Actions").click()
    page.get_by_role("menuitem", name="Dissolve").click()
    expect(entries(page)).to_have_count(2)


def test_several_conversations_are_deleted_at_once_and_come_back(own_site, visit, ask):
    page = visit(own_site().start().url)
    for question in ("count 3", "count 4", "count 5"):
        page.get_by_role("button", name="New chat").click()
        ask(page, question)
    page.get_by_role("button", name="Pick several").click()
    page.get_by_role("checkbox").nth(0).check()
    page.get_by_role("checkbox").nth(1).check()
    page.get_by_role("toolbar").get_by_role("button", name="Delete").click()
    expect(entries(page)).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(entries(page)).to_have_count(3)


def test_a_persona_is_made_called_with_an_at_sign_and_kept_by_its_conversation(own_site, visit, ask):
    page = visit(own_site().start().url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="Personas").click()
    page.get_by_role("button", name="Make a persona").click()
    page.get_by_role("textbox", name="Name").fill("Proofreader")
    page.get_by_role("textbox", name="Instructions").fill("Correct the spelling.")
    page.get_by_role("button", name="Keep").click()
    page.get_by_role("list", name="Personas").get_by_text("Proofreader").wait_for()
    page.keyboard.press("Escape")
    field = page.get_by_role("textbox", name="Message")
    field.press_sequentially("@pro")
    page.get_by_role("option", name=re.compile("@Proofreader")).wait_for()
    field.press("Enter")
    assert field.input_value() == ""
    page.get_by_role("button", name="Answer without Proofreader").wait_for()
    ask(page, "count 3")
    page.reload()
    page.get_by_role("button", name="Answer without Proofreader").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="This conversation").click()
    assert page.get_by_role("textbox", name="Instructions").input_value() == "Correct the spelling."


def test_the_at_sign_chooses_a_model_and_the_slash_a_command(site, visit):
    page = visit(site.url)
    field = page.get_by_role("textbox", name="Message")
    field.press_sequentially("Hello @7b")
    field.press("Enter")
    assert field.input_value() == "Hello "
    assert page.get_by_role("combobox", name="Model").input_value() == "scripted-7b"
    field.fill("")
    field.press_sequentially("/shortc")
    field.press("Enter")
    page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()


def test_thoughts_are_folded_away_timed_and_still_there_after_a_reload(site, visit, ask):
    page = visit(site.url)
    ask(page, "think about it")
    summary = page.get_by_text(re.compile(r"^Thought for \d"))
    summary.wait_for()
    assert page.get_by_text("then the mountains").is_hidden()
    page.reload()
    summary.click()
    page.get_by_text("then the mountains").wait_for()


def test_thoughts_can_be_watched_while_they_come(site, visit, ask):
    page = visit(site.url)
    ask(page, "think long about it", wait=False)
    page.get_by_text("Thinking", exact=True).click()
    thoughts = page.get_by_role("article", name="Assistant").locator("details")
    expect(thoughts).to_contain_text("mountains. First the pressure")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text(re.compile(r"^Thought for \d")).wait_for()
    expect(thoughts).to_contain_text("mountains. First the pressure")


def test_tool_calls_are_shown_as_text_with_their_arguments_and_results(site, visit, ask):
    page = visit(site.url)
    call = {"type": "tool_call", "name": "weather", "arguments": '{"place": "Genève", "days": 3}'}
    result = {"type": "tool_result", "name": "weather", "text": "<b onclick=alert(1)>windy</b>"}
    events = [
        ("state", {"status": "running", "before": 0}),
        ("parts", {"parts": [call]}),
        ("parts", {"parts": [call, result]}),
        ("message", {"choices": [{"index": 0, "delta": {"content": "It is windy."}}]}),
        ("end", {"status": "complete", "finish_reason": "stop", "error": None}),
    ]
    stream = "".join(
        f"id: {number}\nevent: {kind}\ndata: {json.dumps(body)}\n\n"
        for number, (kind, body) in enumerate(events, 1)
    )
    page.route(
        re.compile("/api/v1/runs/.*/events"),
        lambda route: route.fulfill(body=stream, content_type="text/event-stream"),
    )
    ask(page, "slow weather")
    answer = page.get_by_role("article", name="Assistant")
    answer.get_by_text("It is windy.").wait_for()
    answer.get_by_text("Tool call weather").click()
    answer.get_by_text('"place": "Genève"').wait_for()
    answer.get_by_text("Result of weather").click()
    answer.get_by_text(result["text"]).wait_for()
    assert answer.locator("b").count() == 0


def test_an_answer_says_what_it_cost(site, visit, ask):
    page = visit(site.url)
    ask(page, "count 3")
    page.get_by_text("€0.00042").wait_for()


def test_two_models_answer_side_by_side_and_one_is_kept(site, visit, ask):
    page = visit(site.url)
    ask(page, "count 3")
    page.get_by_role("button", name="Compare two models").click()
    dialog = page.get_by_role("dialog", name="Compare two models")
    dialog.get_by_role("textbox").fill("count 7")
    dialog.get_by_role("button", name="Ask both").click()
    expect(dialog.get_by_text("006")).to_have_count(2)
    dialog.get_by_role("button", name="Keep this one").last.click()
    expect(page.get_by_role("article")).to_have_count(4)
    last = page.get_by_role("article", name="Assistant").last
    last.get_by_text("scripted-7b").wait_for()
    last.get_by_text("2/2").wait_for()


def test_an_export_of_another_assistant_comes_in(own_site, visit, tmp_path):
    page = visit(own_site().start().url)
    node = {
        "a": {
            "parent": None,
            "message": {"author": {"role": "user"}, "content": {"parts": ["Old question"]}},
        },
        "b": {
            "parent": "a",
            "message": {"author": {"role": "assistant"}, "content": {"parts": ["An **old** answer"]}},
        },
    }
    export = [{"title": "From elsewhere", "mapping": node, "current_node": "b", "create_time": 1.6e9}]
    file = tmp_path / "conversations.json"
    file.write_text(json.dumps(export))
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="Your data").click()
    page.get_by_role("dialog", name="Settings").locator("input[type=file]").set_input_files(file)
    page.get_by_text("1 conversations with 2 messages came in").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("link", name="From elsewhere").first.click()
    page.get_by_role("article", name="Assistant").get_by_text("old", exact=True).wait_for()


def test_the_ribbon_tells_what_fills_the_window(site, visit, ask):
    page = visit(site.url)
    ask(page, "How does the bise form?")
    expect(page.get_by_role("meter", name="Context")).not_to_have_attribute("aria-valuenow", "0")
    page.get_by_role("button", name="What fills the window").click()
    table = page.get_by_role("dialog", name="What fills the window")
    table.get_by_text("History").wait_for()
    table.get_by_text("First to go when it is full: “How does the bise form?”").wait_for()
    table.get_by_text("reused from the cache").wait_for()


def test_a_question_that_does_not_fit_can_go_without_the_oldest_turns(site, visit, ask):
    page = visit(site.url)
    long = "word " * 11_000  # 13,750 of the window's 32,768 tokens
    ask(page, f"first {long}")
    page.get_by_role("textbox", name="Message").fill(f"second {long}")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("article")).to_have_count(4)
    page.get_by_role("button", name="Regenerate").wait_for()
    page.get_by_role("textbox", name="Message").fill(f"third {long}")
    page.get_by_text("The oldest 2 messages would have to go").first.wait_for()
    page.get_by_role("button", name="Ask without the oldest turns").click()
    expect(page.get_by_role("article")).to_have_count(6)
    page.get_by_text("2 older messages were left out, as you asked").wait_for()


def test_a_chat_goes_on_in_a_new_one_that_begins_with_a_summary(site, visit, ask):
    page = visit(site.url)
    ask(page, "count 3 " + "word " * 23_000)
    page.get_by_role("button", name="What fills the window").click()
    page.get_by_role("dialog", name="What fills the window").get_by_role("button").click()
    page.get_by_role("button", name="Regenerate").wait_for()
    expect(page.get_by_role("article")).to_have_count(1)
    page.get_by_role("article").get_by_text("Summary of 2 messages of").wait_for()
    page.get_by_role("article").get_by_role("link").first.click()
    expect(page.get_by_role("article")).to_have_count(2)
    field = page.get_by_role("textbox", name="Message")
    field.fill("second " + "word " * 11_000)
    page.get_by_role("button", name="Start afresh with a summary").click()
    page.get_by_text("Summary of 2 messages of").wait_for()
    assert field.input_value().startswith("second word")


def test_a_mouse_over_the_ribbon_shows_its_table(site, visit):
    page = visit(site.url)
    page.get_by_role("meter", name="Context").hover()
    page.get_by_role("dialog", name="What fills the window").wait_for()
    page.get_by_role("textbox", name="Message").hover()
    expect(page.get_by_role("dialog", name="What fills the window")).to_have_count(0)


def test_the_palette_renames_what_is_open_and_print_shows_the_transcript_alone(site, visit, ask):
    page = visit(site.url)
    ask(page, "count 3")
    page.keyboard.press("Control+k")
    page.get_by_role("combobox", name="Command").fill("rename")
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Title").fill("Numbers in a row")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Numbers in a row").wait_for()
    page.get_by_role("link", name="Numbers in a row").first.wait_for()
    page.emulate_media(media="print", color_scheme="dark")
    expect(page.get_by_role("textbox", name="Message")).to_be_hidden()
    expect(page.get_by_role("searchbox", name="Search")).to_be_hidden()
    expect(page.get_by_role("button", name="Regenerate")).to_be_hidden()
    expect(page.get_by_role("article")).to_have_count(2)
    assert page.evaluate("getComputedStyle(document.body).overflow") == "visible"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(19, 33, 43)"


def test_a_model_that_is_being_loaded_says_how_far_it_is(site, visit):
    page = visit(site.url)

    def loading(route):
        answer = route.fetch()
        body = answer.json()
        body["models"][0] |= {"state": "loading", "loaded": 0.62}
        route.fulfill(response=answer, json=body)

    page.route(re.compile("/api/v1/(bootstrap|models)$"), loading)
    page.reload()
    page.get_by_text("scripted-24b is loading, 62 %").wait_for()
    page.unroute_all()
    page.get_by_text("scripted-24b is here").wait_for()
