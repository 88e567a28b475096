"""The assistant's tables and search on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import io
import json

import pytest

from bise.assistant.accounts import Accounts
from bise.assistant.conversations import Conversations, cursor_after
from bise.assistant.documents import Documents
from bise.assistant.exchange import as_json, import_file
from bise.assistant.folders import change_many, folders_of, rename_folder
from bise.assistant.messages import Messages
from bise.assistant.personas import Personas
from bise.assistant.reader import ReadText
from bise.assistant.scripted import quick_hasher
from bise.errors import ConflictError, NotFoundError, RequestError


def asked(database, text, title="", owner="ana"):
    conversation = Conversations(database).create(owner, title=title)
    messages = Messages(database)
    _, answer, _ = messages.ask(
        owner, conversation.id, text=text, parent_id=None, client_id=None, model="m", params={}
    )
    return conversation.id, answer.id, messages


@pytest.mark.parametrize("query", ["ete", "ÉTÉ", "lac ete", "passer l'ét", "ou pass"])
def test_words_are_found_without_accents_and_case_and_while_they_are_typed(database, query):
    wanted, _, _ = asked(database, "Où passer l'été au bord du lac ?")
    asked(database, "Something else entirely")
    asked(database, "Où passer l'été au bord du lac ?", owner="bob")
    (found,) = Conversations(database).search("ana", query).found
    assert found.id == wanted
    assert "été" in found.snippet


@pytest.mark.parametrize("query", ["Straße", "STRASSE", "straß", "die strasse"])
def test_sharp_s_and_two_are_the_same(database, query):
    wanted, _, _ = asked(database, "Die Straße nach Sion")
    assert [found.id for found in Conversations(database).search("ana", query).found] == [wanted]


def test_a_title_ranks_before_a_text_and_deleted_ones_are_not_found(database):
    conversations = Conversations(database)
    in_text, _, _ = asked(database, "the wind and the wind and the wind")
    in_title, _, _ = asked(database, "nothing", title="Wind")
    assert [found.id for found in conversations.search("ana", "wind").found] == [in_title, in_text]
    conversations.delete("ana", [in_title])
    assert [found.id for found in conversations.search("ana", "wind").found] == [in_text]
    assert conversations.purge(before=9e12) == 1
    with pytest.raises(NotFoundError):
        conversations.restore("ana", in_title)


@pytest.mark.parametrize("query", ["'; DROP TABLE messages", '" OR *', "a & | ! ( ) : *", "\\", "%", "NEAR("])
def test_what_looks_like_a_query_language_is_only_words(database, query):
    asked(database, "harmless")
    Conversations(database).search("ana", query)


def test_an_answer_is_found_by_its_last_words_only(database):
    conversation, answer, messages = asked(database, "question")
    messages.save(answer, {"text": "first draft", "status": "running"}, is_final=False)
    messages.save(answer, {"text": "zephyr", "status": "complete"}, is_final=True)
    messages.save(answer, {"text": "mistral", "status": "complete"}, is_final=True)
    search = Conversations(database).search
    assert [search("ana", word).found != () for word in ("draft", "zephyr", "mistral")] == [
        False,
        False,
        True,
    ]
    assert search("ana", "mistral").found[0].id == conversation


def test_half_written_answers_of_a_dead_process_are_interrupted(database):
    conversation, answer, messages = asked(database, "question")
    messages.save(answer, {"text": "half", "status": "running", "seq": 4}, is_final=False)
    assert messages.interrupt_all() == 1
    found = messages.branch("ana", conversation)[1]
    assert (found.status, found.text) == ("interrupted", "half")
    assert Conversations(database).search("ana", "half").found


def test_the_list_is_paged_without_gaps_and_folders_and_archive_are_kept_apart(database):
    conversations = Conversations(database)
    ids = [conversations.create("ana", title=f"t{number}").id for number in range(45)]
    change_many(database, "ana", ids[:3], {"folder": "F"})
    change_many(database, "ana", ids[3:5], {"archived": True})
    first = conversations.listing("ana")
    rest = conversations.listing("ana", cursor=cursor_after(first))
    assert {found.id for found in [*first, *rest]} == set(ids) - set(ids[3:5])
    assert len(first) + len(rest) == 43
    assert [(folder.name, folder.conversations) for folder in folders_of(database, "ana")] == [("F", 3)]
    assert rename_folder(database, "ana", "F", None) == 3
    assert {found.id for found in conversations.listing("ana", archived=True)} == set(ids[3:5])


def test_documents_with_their_embeddings_personas_and_exports_are_kept(database):
    conversation, _, messages = asked(database, "question")
    documents = Documents(database)
    read = ReadText(text="one two", pages=((1, 0), (2, 4)))
    added = documents.add("ana", conversation, name="a.pdf", kind="pdf", read=read, tokens=2)
    documents.add_vectors(added.id, "m", {0: b"\0\1\2\3", 1: b"abcd"})
    documents.add_vectors(added.id, "m", {0: b"wxyz"})
    assert documents.vectors(added.id, "m") == {0: b"wxyz", 1: b"abcd"}
    assert documents.get("ana", conversation, added.id).pages == ((1, 0), (2, 4))
    assert documents.listing("ana", conversation)[0].chars == 7
    personas = Personas(database)
    poet = personas.create("ana", {"name": "Poet", "system": "In verse."})
    with pytest.raises(ConflictError):
        personas.create("ana", {"name": "Poet"})
    personas.change("ana", poet.id, {"params": {"top_p": 0.5}})
    assert personas.get("ana", poet.id).params == {"top_p": 0.5}
    whole = as_json(
        Conversations(database).get("ana", conversation),
        messages.all("ana", conversation),
        [documents.get("ana", conversation, added.id)],
    )
    assert import_file(database, "bob", io.BytesIO(json.dumps(whole).encode())).messages == 1
    (copy,) = Conversations(database).listing("bob")
    assert [found.name for found in documents.listing("bob", copy.id)] == ["a.pdf"]


def test_a_talkative_conversation_hides_no_other_and_pages_of_a_search_miss_nothing(database):
    conversations, messages = Conversations(database), Messages(database)
    talkative = conversations.create("ana").id
    parent = None
    for number in range(40):
        message, _, _ = messages.ask(
            "ana", talkative, text=f"wind wind {number}", parent_id=parent, client_id=None, model="m",
            params={}, with_answer=False,
        )  # fmt: skip
        parent = message.id
    others = [conversations.create("ana", title=f"Wind {number}").id for number in range(6)]
    seen, cursor = [], None
    while True:
        page = conversations.search("ana", "wind", limit=3, cursor=cursor)
        assert len({found.id for found in page.found}) == len(page.found) <= 3
        seen += [found.id for found in page.found]
        if (cursor := page.cursor) is None:
            break
    assert sorted(seen) == sorted([talkative, *others])
    assert seen[-1] == talkative  # titles come first
    with pytest.raises(RequestError, match="cursor"):
        conversations.search("ana", "wind", cursor="-1")


def test_nul_is_refused_by_name_and_a_bad_import_leaves_nothing(database):
    conversation, _, messages = asked(database, "question")
    with pytest.raises(RequestError, match="U\\+0000"):
        messages.ask("ana", conversation, text="a\0b", parent_id=None, client_id=None, model="m", params={})
    good = {
        "format": "bise-conversation-1",
        "title": "A\0B",
        "messages": [{"id": "a", "role": "user", "text": "x\0"}],
    }
    bad = good | {"params": {"seed": -1}}
    with pytest.raises(RequestError, match="nothing was imported"):
        import_file(database, "bob", io.BytesIO(json.dumps(bad).encode()))
    assert Conversations(database).listing("bob") == []
    import_file(database, "bob", io.BytesIO(json.dumps([bad, good]).encode()))
    assert Conversations(database).listing("bob")[0].title == "A\ufffdB"


def test_accounts_sign_in_and_out(database):
    accounts = Accounts(database, quick_hasher())
    asked(database, "question", owner="local")
    ana = accounts.create_first("Ana", "a long enough one", adopts="local")
    assert len(Conversations(database).listing(ana.id)) == 1
    _, token = accounts.sign_in("ANA", "a long enough one")
    assert accounts.whose(token) == ana
    accounts.sign_out(token)
    with pytest.raises(ConflictError):
        accounts.create("ana", "a long enough one")
