"""Accounts in a real browser: the first one, signing in, quotas, deleting; nobody sees what is another's."""

from __future__ import annotations

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
PASSWORD = "correct horse battery"


def sign_in(page, name, password):
    """Fill the sign-in dialog."""
    dialog = page.get_by_role("dialog", name="Sign in")
    dialog.get_by_role("textbox", name="Name").fill(name)
    dialog.get_by_role("textbox", name="Password").fill(password)
    dialog.get_by_role("button", name="Sign in").click()


def make_first_account(page):
    """Make ana's account, the administrator's, in the settings."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="Accounts").click()
    page.get_by_role("textbox", name="Name").fill("ana")
    page.get_by_role("textbox", name="Password").fill(PASSWORD)
    page.get_by_role("button", name="Create account").click()
    page.get_by_text("Signed in as ana").wait_for()


def add(page, name):
    """Add somebody's account."""
    page.get_by_role("textbox", name="Name").fill(name)
    page.get_by_role("textbox", name="Password").fill(PASSWORD)
    page.get_by_role("button", name="Add", exact=True).click()
    row(page, name).wait_for()


def row(page, name):
    """Return the line of an account in the administrator's list."""
    return page.get_by_role("list", name="Accounts").get_by_role("listitem").filter(has_text=name)


def test_the_first_account_is_the_admins_and_everyone_signs_in_from_then_on(own_site, visit, ask):
    page = visit(own_site().start().url, expects=("401", "403", "404"))
    ask(page, "count 3")
    make_first_account(page)
    add(page, "ben")
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
    page = visit(own_site().start().url, expects=("401", "404"))
    make_first_account(page)
    page.keyboard.press("Escape")
    page.get_by_role("textbox", name="Message").fill("count 4")
    page.context.clear_cookies()
    page.get_by_role("button", name="Send").click()
    sign_in(page, "ana", PASSWORD)
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.get_by_role("textbox", name="Message").input_value() == "count 4"
    page.get_by_role("button", name="Send").click()
    page.get_by_text("003").wait_for()


def test_an_admin_sets_roles_and_quotas_and_deletes_an_account(served, visit):
    page = visit(served("--example", "Who tames the wind?").url, expects=("401", "409", "429"))
    page.get_by_role("button", name="Who tames the wind?").click()
    assert page.get_by_role("textbox", name="Message").input_value() == "Who tames the wind?"
    make_first_account(page)
    add(page, "ben")
    row(page, "ben").get_by_text("Nothing used this month").wait_for()
    for role in ("admin", "user"):
        with page.expect_response(lambda answer: answer.request.method == "PATCH" and answer.ok):
            row(page, "ben").get_by_role("combobox", name="Role of ben").select_option(role)
    quota = page.get_by_role("spinbutton", name="Tokens per day for ben")
    money = page.get_by_role("spinbutton", name="Money per month for ana")
    for field, value in ((quota, "5"), (money, "2.50")):
        field.fill(value)
        with page.expect_response(lambda answer: "/limits/" in answer.url and answer.ok):
            field.press("Tab")
    page.get_by_role("alert").get_by_text("cannot use them: brise").wait_for()
    page.get_by_role("button", name="Sign out").click()
    sign_in(page, "ben", PASSWORD)
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("textbox", name="Message").fill("Hello, who are you?")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("alert").get_by_text("5 tokens per day").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="Usage").click()
    page.get_by_text("5 of 5 left today").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="ben").click()
    page.get_by_role("button", name="Sign out").click()
    sign_in(page, "ana", PASSWORD)
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="ana").click()
    expect(quota).to_have_value("5")
    expect(money).to_have_value("2.50")
    row(page, "ben").get_by_role("button", name="Actions").click()
    page.get_by_role("menuitem", name="Delete the account").click()
    delete = row(page, "ben").get_by_role("button", name="Delete the account")
    assert delete.is_disabled()
    page.get_by_role("textbox", name="Type ben to delete the account").fill("ben")
    delete.click()
    expect(row(page, "ben")).to_have_count(0)


def test_people_change_their_own_password(own_site, visit):
    page = visit(own_site().start().url, expects=("401", "403", "404"))
    make_first_account(page)
    page.get_by_role("button", name="Change password").click()
    page.get_by_label("Old password").fill("not that one")
    page.get_by_label("New password").fill("another correct horse")
    page.get_by_role("button", name="Keep").click()
    page.get_by_role("dialog").get_by_role("alert").wait_for()
    page.get_by_label("Old password").fill(PASSWORD)
    page.get_by_role("button", name="Keep").click()
    page.get_by_text("The password is changed").wait_for()
    page.get_by_role("button", name="Sign out").click()
    sign_in(page, "ana", "another correct horse")
    expect(page.get_by_role("dialog")).to_have_count(0)
