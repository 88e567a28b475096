"""Documents in a real browser: whole where they fit, else by passages whose citations open them."""

from __future__ import annotations

import pytest

expect = pytest.importorskip("playwright.sync_api").expect


def test_a_short_file_goes_along_whole_and_can_be_mentioned_again(site, visit, ask, tmp_path):
    page = visit(site.url)
    file = tmp_path / "winds.md"
    file.write_text("# Winds\n\nThe bise is cold.\n")
    page.locator("form input[type=file]").set_input_files(file)
    page.get_by_role("list", name="Files").get_by_text("winds.md").wait_for()
    ask(page, "count 3")
    page.get_by_role("article", name="You").get_by_text("winds.md").wait_for()
    field = page.get_by_role("textbox", name="Message")
    field.press_sequentially("Again #win")
    page.get_by_role("option", name="#winds.md").wait_for()
    field.press("Enter")
    page.get_by_role("list", name="Files").get_by_text("winds.md").wait_for()
    assert field.input_value() == "Again "


def test_a_citation_opens_the_passage_in_its_document(site, visit, ask, tmp_path):
    page = visit(site.url)
    file = tmp_path / "long.txt"
    file.write_text(
        "\n\n".join(f"Entry {number}: the wind blew over the lake all day." for number in range(3000))
        + "\n\nThe bise blows from the north-east, so cite this."
    )
    page.locator("form input[type=file]").set_input_files(file)
    page.get_by_role("list", name="Files").get_by_text("long.txt").wait_for()
    ask(page, "Where does the bise come from? Please cite.")
    answer = page.get_by_role("article", name="Assistant")
    answer.get_by_text("[99]").wait_for()
    answer.get_by_role("button", name="Source 1: long.txt").click()
    dialog = page.get_by_role("dialog", name="long.txt")
    mark = dialog.locator("mark")
    expect(mark).to_be_in_viewport()
    assert mark.inner_text().strip() != ""
    page.keyboard.press("Escape")
    answer.get_by_text("passages used").click()
    expect(answer.get_by_role("listitem").nth(1)).to_be_visible()


def test_citations_open_their_passage_in_a_comparison_too(site, visit, ask, tmp_path):
    page = visit(site.url)
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(f"Entry {number}: the bise blew all day." for number in range(3000)))
    page.locator("form input[type=file]").set_input_files(file)
    page.get_by_role("list", name="Files").get_by_text("long.txt").wait_for()
    page.get_by_role("button", name="Compare two models").click()
    compare = page.get_by_role("dialog", name="Compare two models")
    compare.get_by_role("textbox").fill("When did the bise blow? Please cite.")
    compare.get_by_role("button", name="Ask both").click()
    for model in ("scripted-24b", "scripted-7b"):
        lane = compare.get_by_role("region", name=f"Answer of {model}")
        lane.get_by_role("button", name="Source 1: long.txt").click()
        passage = page.get_by_role("dialog", name="long.txt")
        expect(passage.locator("mark")).to_be_in_viewport()
        passage.get_by_role("button", name="Close").click()
        expect(passage).to_have_count(0)
        lane.get_by_text("passages used").wait_for()


def test_files_stay_with_the_conversation_they_were_attached_in(site, visit, tmp_path):
    page = visit(site.url)
    file = tmp_path / "winds.md"
    file.write_text("The bise is cold.\n")
    page.locator("form input[type=file]").set_input_files(file)
    files = page.get_by_role("list", name="Files")
    files.get_by_text("winds.md").wait_for()
    page.get_by_role("button", name="New chat").click()
    expect(files).to_have_count(0)
    page.go_back()
    files.get_by_text("winds.md").wait_for()


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_is_refused_with_the_reason(site, visit, way):
    page = visit(site.url)
    page.evaluate(
        """way => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array([137, 80, 78, 71])], 'alps.png', {type: 'image/png'}));
          const field = document.getElementById('composer');
          field.dispatchEvent(way === 'paste'
            ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})
            : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        way,
    )
    page.get_by_role("alert").get_by_text("alps.png is an image, and scripted-24b reads text only").wait_for()
    assert page.get_by_role("list", name="Conversations").get_by_text("alps").count() == 0
    assert page.url == f"{site.url}/"


def test_a_file_that_cannot_be_read_says_why(site, visit, tmp_path):
    page = visit(site.url, expects=("400",))
    file = tmp_path / "broken.pdf"
    file.write_bytes(b"this is no pdf")
    page.locator("form input[type=file]").set_input_files(file)
    assert "broken.pdf" in page.get_by_role("alert").inner_text()
