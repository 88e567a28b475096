"""Accounts in a real browser: the first one, signing in; a second person sees nothing of the first."""

from __future__ import annotations

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
PASSWORD = "correct horse battery"


def sign_in(page, name, password):
    """Fill the sign-in dialog."""
    page.get_by_role("textbox", name="Name").fill(name)
    page.get_by_role("textbox", name="Password").fill(password)
    page.get_by_role("dialog").get_by_role("button", name="Sign in").click()


def test_the_first_account_is_the_admins_and_everyone_signs_in_from_then_on(own_site, visit, ask):
    page = visit(own_site().start().url, expects=("401", "403"))
    ask(page, "count 3")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="Accounts").click()
    page.get_by_role("textbox", name="Name").fill("ana")
    page.get_by_role("textbox", name="Password").fill(PASSWORD)
    page.get_by_role("button", name="Create account").click()
    page.get_by_text("Signed in as ana").wait_for()
    page.get_by_role("textbox", name="Name").fill("ben")
    page.get_by_role("textbox", name="Password").fill(PASSWORD)
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_role("list", name="Accounts").get_by_text("ben").wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("dialog", name="Sign in").wait_for()
    sign_in(page, "ana", "wrong password")
    page.get_by_role("dialog").get_by_role("alert").wait_for()
    sign_in(page, "ben", PASSWORD)
    expect(page.get_by_role("dialog")).to_have_count(0)
    entries = page.get_by_role("list", name="Conversations").get_by_role("listitem")
    assert entries.count() == 0
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="Accounts").click()
    page.get_by_text("Signed in as ben").wait_for()
    assert page.get_by_role("button", name="Add", exact=True).count() == 0
    page.get_by_role("button", name="Sign out").click()
    sign_in(page, "ana", PASSWORD)
    expect(entries).to_have_count(1)


def test_a_draft_outlives_a_session_that_ended(own_site, visit, ask):
    page = visit(own_site().start().url, expects=("401",))
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="Accounts").click()
    page.get_by_role("textbox", name="Name").fill("ana")
    page.get_by_role("textbox", name="Password").fill(PASSWORD)
    page.get_by_role("button", name="Create account").click()
    page.get_by_text("Signed in as ana").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("textbox", name="Message").fill("count 4")
    page.context.clear_cookies()
    page.get_by_role("button", name="Send").click()
    sign_in(page, "ana", PASSWORD)
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.get_by_role("textbox", name="Message").input_value() == "count 4"
    page.get_by_role("button", name="Send").click()
    page.get_by_text("003").wait_for()
