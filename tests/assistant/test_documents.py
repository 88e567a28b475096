"""Documents: reading files in a limited process, whole into the prompt or by passages."""

from __future__ import annotations

import asyncio
import io
import zipfile
import zlib

import pytest

from bise.assistant.documents import WholeDocument, excerpt
from bise.assistant.passages import by_meaning, by_words, cut_passages, fuse, passage_size, take
from bise.assistant.reader import DocumentReader
from bise.assistant.scripted import ScriptedModels
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import ConflictError, RequestError


def read(name, content):
    return asyncio.run(DocumentReader().read(name, content))[1]


def word_file(*paragraphs, notes=()):
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"

    def part(tag, inside, texts):
        body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in texts)
        return f'<w:{tag} xmlns:w="{space}"><w:{inside}>{body}</w:{inside}></w:{tag}>'

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("word/document.xml", part("document", "body", paragraphs))
        if notes:
            archive.writestr("word/footnotes.xml", part("footnotes", "footnote", notes))
    return content.getvalue()


def pdf_file(text):
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(out)
    trailer = b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "Où va l'été ?\r\n".encode(), "Où va l'été ?"),
        (
            "a.html",
            b"<head><title>t</title></head><p>One <b>two</b></p><script>x()</script><p>3</p>",
            "One two\n\n3",
        ),
        ("a.csv", b"name;age\nAna;3\nBob;4\n", "name | age\nAna | 3\nBob | 4"),
        ("a.docx", word_file("First", "Second"), "First\nSecond"),
        ("a.docx", word_file("First", notes=["So said Ann."]), "First\nSo said Ann."),
        ("a.pdf", pdf_file("Wind from the north"), "[page 1]\nWind from the north"),
        ("a", pdf_file("No ending"), "[page 1]\nNo ending"),
        ("a.md", b"# One\r\n\r\n\r\n\r\n* two", "# One\n\n* two"),
        ("a.html", b"<head><title>t</title><body><p>no end of head", "no end of head"),
        ("a.html", "<meta charset=iso-8859-1><p>été".encode("latin-1"), "été"),
        ("a.txt", "wide été".encode("utf-16"), "wide été"),
    ],
)
def test_each_kind_of_file_gives_its_text(name, content, text):
    assert read(name, content).text == text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\xff\xfa", "not UTF-8"),
        ("a.pdf", b"%PDF-1.4 nonsense", "is damaged"),
        ("a.docx", b"PK nonsense", "not a Word document"),
        ("a.txt", b"  \n", "no text"),
        ("a.xlsx", b"PK\x03\x04 sheet", "PDF, DOCX, HTML and CSV can be read"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PDF, DOCX, HTML and CSV can be read"),
        ("a.html", b"<meta charset=klingon><p>x", "character set 'klingon' is not known"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(name, content, reason):
    with pytest.raises(RequestError, match=reason):
        read(name, content)


def zipped(content, **options):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        archive.writestr("word/document.xml", content)
    return out.getvalue()


def encrypted_pdf(password, algorithm, text="secret wind"):
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf_file(text))))
    writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "ha" * 50}">' for n in range(12))
HOSTILE = {
    "a word document that unpacks to a gigabyte": (
        "a.docx",
        lambda: zipped(b"<a>" + b" " * (1 << 28)),
        "larger than",
    ),
    "entities that multiply": (
        "a.docx",
        lambda: zipped(f"<!DOCTYPE d [{ENTITIES}]><d>&e11;</d>".encode()),
        "damaged",
    ),
    "an element in an element, very often": ("a.docx", lambda: zipped(b"<p>" * 500_000), "a.docx: "),
    "a page with very many brackets": ("a.html", lambda: b"<div>" * 200_000, "no text|too"),
    "a PDF that asks for a password": ("a.pdf", lambda: encrypted_pdf("x", "RC4-128"), "asks for a password"),
    "a PDF that asks for a new kind of password": (
        "a.pdf",
        lambda: encrypted_pdf("x", "AES-256"),
        "password",
    ),
    "a PDF whose stream unpacks to gigabytes": ("a.pdf", lambda: bomb_pdf(), "a.pdf: "),
    "a PDF whose pages are their own parents": ("a.pdf", lambda: looping_pdf(), "a.pdf: "),
    "a text of many megabytes": ("a.txt", lambda: b"word " * 1_700_000, "longer than 8,000,000 characters"),
}


def pdf_of(*objects):
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + trailer


def bomb_pdf():
    packed = zlib.compress(zlib.compress(b"\0" * (1 << 28), 9), 9)
    stream = b"<< /Length %d /Filter [/FlateDecode /FlateDecode] >>\nstream\n%s\nendstream"
    return pdf_of(
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R >>",
        stream % (len(packed), packed),
    )


def looping_pdf():
    return pdf_of(
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [2 0 R 2 0 R 2 0 R] /Count 1000000000 >>",
    )


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_one_line_and_no_harm(what):
    name, make, reason = HOSTILE[what]
    with pytest.raises(RequestError, match=reason) as caught:
        read(name, make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_a_pdf_that_everybody_may_read_is_read_though_it_is_encrypted(algorithm):
    assert read("a.pdf", encrypted_pdf("", algorithm)).text == "[page 1]\nsecret wind"


def test_pages_are_told_with_their_places():
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter()
    for text in ("First", "Second", "Third"):
        writer.append(PdfReader(io.BytesIO(pdf_file(text))))
    out = io.BytesIO()
    writer.write(out)
    found = read("a.pdf", out.getvalue())
    assert [(page, found.text[place:].split("\n")[1]) for page, place in found.pages] == [
        (1, "First"), (2, "Second"), (3, "Third"),
    ]  # fmt: skip


def test_tables_of_word_are_rows():
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    cell = "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc>"
    row = "<w:tr>" + cell.format("a") + cell.format("b") + "</w:tr>"
    content = f'<w:document xmlns:w="{space}"><w:body><w:tbl>{row}{row}</w:tbl></w:body></w:document>'
    assert read("a.docx", zipped(content.encode())).text == "a | b\na | b"


def test_passages_cover_the_whole_document_and_say_where_they_lie():
    text = "\n\n".join(f"Paragraph {number} " + "word " * 60 for number in range(40))
    found = cut_passages(text, [(1, 0), (2, 5000)])
    assert "".join("".join(passage.text for passage in found).split()) == "".join(text.split())
    assert all(text[passage.start : passage.end] == passage.text for passage in found)
    assert {passage.page for passage in found if passage.start < 5000} == {1}
    assert {passage.page for passage in found if passage.start >= 5000} == {2}


def test_the_passage_that_answers_is_found_without_its_accents():
    filler = [f"Nothing of interest here, line {number}. " * 12 for number in range(60)]
    texts = [*filler, "La température de fusion du gallium est 29,76 degrés.", *filler]
    assert by_words(texts, "temperature de FUSION du gallium ?") == [60]


def test_what_all_vectors_share_does_not_decide_which_is_nearest():
    import numpy as np

    common = np.full(8, 5.0, np.float32)
    vectors = np.eye(8, dtype=np.float32)[:4] + common
    assert by_meaning(vectors, common + np.eye(8, dtype=np.float32)[2])[0] == 2


def test_passages_are_so_small_that_several_fit_a_small_window():
    assert [passage_size(room, 0.25) for room in (16_000, 1200, 512, 100)] == [1200, 800, 300, 200]
    text = "word " * 2000
    assert max(len(passage.text) for passage in cut_passages(text, (), 200)) <= 200


def test_ranks_are_fused_so_that_good_in_both_beats_best_in_one():
    assert fuse([[0, 1, 2], [3, 1, 4]]) == [1, 0, 3, 2, 4]


def test_passages_are_taken_while_they_fit_and_in_reading_order():
    assert take([3, 1, 0], [100, 500, 100, 100], room=300, most=9) == [0, 3]
    assert take([3, 1, 0], [1, 1, 1, 1], room=300, most=2) == [1, 3]
    assert take([], [100, 100], room=150, most=9) == [0]


@pytest.mark.parametrize(("size", "has_sources"), [(400, False), (200_000, True)])
def test_a_document_goes_in_whole_where_it_fits_else_by_passages(size, has_sources):
    async def scenario():
        asked = []

        class Models(ScriptedModels):
            def stream(self, job):
                asked.append(job.messages[-1]["content"])
                return super().stream(job)

        assistant = Assistant(Memory(), Models(lambda _: "ok", context=8192))
        conversation = (await assistant.create("ana")).id
        content = ("filler words here. " * (size // 19) + "The code is 4711.").encode()
        added = await assistant.add_document("ana", conversation, "notes.txt", content)
        _, answer = await assistant.ask(
            "ana", conversation, text="What is the code?", parent_id=None, documents=[added.id]
        )
        await asyncio.wait([assistant.runs.get(answer.run_id).task])
        kept = (await assistant.page("ana", conversation, before=None, limit=9)).messages[1]
        assert "4711" in asked[0]
        assert asked[0].endswith("What is the code?")
        assert bool(kept.sources) is has_sources
        assert any("4711" in source["text"] for source in kept.sources) is has_sources
        await assistant.close()

    asyncio.run(scenario())


def test_an_answer_goes_on_with_the_passages_it_was_begun_with_and_the_context_counts_them(run, listening):
    async def scenario(site):
        made = await site.post("/api/v1/conversations", json={"params": {"max_tokens": 2}})
        path = f"/api/v1/conversations/{made.json()['id']}"
        content = ("The ridge is windy. " * 4000 + "The code is 4711.").encode()
        kind = {"content-type": "application/octet-stream"}
        document = (await site.post(f"{path}/documents?name=a.txt", content=content, headers=kind)).json()[
            "id"
        ]
        _, asked = await site.ask("What is the code?", made.json()["id"], documents=[document])
        cut = await site.ended(asked["answer"])
        assert cut["finish_reason"] == "length"
        assert cut["sources"]
        view = (await site.post(f"{path}/context", json={})).json()
        files = next(segment["tokens"] for segment in view["segments"] if segment["kind"] == "files")
        assert files > 100
        assert view["used"] >= cut["usage"]["prompt_tokens"]
        more = (await site.post(f"/api/v1/messages/{cut['id']}/continue")).json()
        whole = await site.ended(more)
        assert whole["sources"] == cut["sources"]
        first, again = [job.messages for job in site.models.jobs if not job.is_aside]  # titles are asides
        assert again[:1] == first
        assert again[1]["content"] == cut["text"]

    run(scenario, models=listening(lambda _: "The code is 4711, says the document.", context=4096))


class Site:
    """An assistant with one long document in a conversation of Ana's."""

    def __init__(self, models=None):
        self.asked = []
        site = self

        class Models(ScriptedModels):
            def stream(self, job):
                site.asked.append(job.messages[-1]["content"])
                return super().stream(job)

        self.models = models or Models(lambda _: "ok", context=4096)
        self.assistant = Assistant(Memory(), self.models)

    async def add(self, text, name="notes.txt"):
        self.conversation = (await self.assistant.create("ana")).id
        return (await self.assistant.add_document("ana", self.conversation, name, text.encode())).id

    async def ask(self, question, *documents):
        _, answer = await self.assistant.ask(
            "ana", self.conversation, text=question, parent_id=None, documents=documents
        )
        await asyncio.wait([self.assistant.runs.get(answer.run_id).task])
        page = await self.assistant.page("ana", self.conversation, before=None, limit=9)
        return page.messages[-1], self.assistant.runs.get(answer.run_id)


def long_text(needle):
    filler = [f"Line {number} tells of bread, butter and of the price of salt. " * 15 for number in range(60)]
    return "\n\n".join([*filler[:40], needle, *filler[40:]])


def test_meaning_finds_what_shares_no_word_with_the_question():
    async def scenario():
        site = Site()
        added = await site.add(long_text("Solidification: gallium melts, refreezing at thirty degrees."))
        answer, run = await site.ask("gallium's meltingpoint?", added)
        best = [source for source in answer.sources if "gallium" in source["text"]]
        assert best
        assert {source["method"] for source in answer.sources} == {"words and meaning"}
        assert "reading" in {event.kind for event in run.events}
        shelf = await site.assistant.shelf_of("ana", site.conversation)
        document = shelf.documents.get("ana", site.conversation, added)
        for source in answer.sources:
            assert document.text[source["start"] : source["end"]] == source["text"]
            assert f"[{source['number']}] from notes.txt:\n{source['text']}" in site.asked[0]
        await site.assistant.close()

    asyncio.run(scenario())


def test_embeddings_are_made_once_and_kept():
    async def scenario():
        site = Site()
        counts = []
        embed = site.models.embed

        async def counting(model, texts, **options):
            counts.append(len(texts))
            return await embed(model, texts, **options)

        site.models.embed = counting
        added = await site.add(long_text("The code is 4711."))
        await site.ask("What is the code?", added)
        first = sum(counts)
        await site.ask("And the price of salt?", added)
        assert sum(counts) == first + 1
        await site.assistant.close()

    asyncio.run(scenario())


def test_words_decide_alone_where_the_model_cannot_embed_and_the_sources_say_so():
    async def scenario():
        site = Site()

        async def refuse(model, texts, **options):
            raise RequestError("no embeddings here")

        site.models.embed = refuse
        added = await site.add(long_text("The code is 4711."))
        answer, _ = await site.ask("What is the code?", added)
        assert any("4711" in source["text"] for source in answer.sources)
        assert {source["method"] for source in answer.sources} == {"words"}
        await site.assistant.close()

    asyncio.run(scenario())


def test_a_branch_takes_its_documents_along():
    async def scenario():
        site = Site()
        added = await site.add(long_text("The code is 4711."))
        answer, _ = await site.ask("What is the code?", added)
        made = await site.assistant.branch_off("ana", answer.id)
        page = await site.assistant.page("ana", made.id, before=None, limit=9)
        shelf = await site.assistant.shelf_of("ana", made.id)
        (copy,) = shelf.documents.listing("ana", made.id)
        assert page.messages[0].documents == (copy.id,)
        assert {source["document_id"] for source in page.messages[1].sources} == {copy.id}
        assert copy.id != added
        await site.assistant.close()

    asyncio.run(scenario())


def test_a_document_that_was_asked_about_cannot_be_removed():
    async def scenario():
        site = Site()
        added = await site.add("short")
        shelf = await site.assistant.shelf_of("ana", site.conversation)
        await site.ask("What?", added)
        with pytest.raises(ConflictError):
            shelf.documents.delete("ana", site.conversation, added)
        other = await site.assistant.add_document("ana", site.conversation, "b.txt", b"other")
        shelf.documents.delete("ana", site.conversation, other.id)
        assert [found.id for found in shelf.documents.listing("ana", site.conversation)] == [added]
        await site.assistant.close()

    asyncio.run(scenario())


def test_an_excerpt_shows_what_stands_around_a_passage():
    text = "".join(f"{number:03d} " for number in range(300))
    whole = WholeDocument(
        id="d", conversation_id="c", name="n", kind="text", tokens=9, chars=len(text), text=text,
        pages=((1, 0), (2, 600)),
    )  # fmt: skip
    shown = excerpt(whole, 800, 804, around=8)
    assert (shown["before"], shown["text"], shown["after"]) == ("198 199 ", "200 ", "201 202 ")
    assert (shown["page"], shown["begins"], shown["ends"]) == (2, False, False)
    for start, end in ((-1, 4), (5, 5), (0, 9999)):
        with pytest.raises(RequestError, match="range"):
            excerpt(whole, start, end)
