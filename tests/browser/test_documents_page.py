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
    assert answer.get_by_role("listitem").count() >= 2


def test_a_file_that_cannot_be_read_says_why(site, visit, tmp_path):
    page = visit(site.url, expects=("400",))
    file = tmp_path / "broken.pdf"
    file.write_bytes(b"this is no pdf")
    page.locator("form input[type=file]").set_input_files(file)
    assert "broken.pdf" in page.get_by_role("alert").inner_text()
