"""Documents: reading files in a limited process, whole into the prompt or by passages."""

from __future__ import annotations

import asyncio
import io
import zipfile

import pytest

from bise.assistant.documents import Document, best_passages, passages_of, read_document
from bise.assistant.scripted import ScriptedModels
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import RequestError


def word_file(*paragraphs):
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    body = "".join(f"<w:p><w:r><w:t>{paragraph}</w:t></w:r></w:p>" for paragraph in paragraphs)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(
            "word/document.xml", f'<w:document xmlns:w="{space}"><w:body>{body}</w:body></w:document>'
        )
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
        ("a.pdf", pdf_file("Wind from the north"), "[page 1]\nWind from the north"),
    ],
)
def test_each_kind_of_file_gives_its_text(name, content, text):
    assert asyncio.run(read_document(name, content))[1] == text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\xff\xfa", "not UTF-8"),
        ("a.pdf", b"%PDF-1.4 nonsense", "cannot be read"),
        ("a.docx", b"PK nonsense", "not a Word document"),
        ("a.txt", b"  \n", "no text"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(name, content, reason):
    with pytest.raises(RequestError, match=reason):
        asyncio.run(read_document(name, content))


def document(text, key="d"):
    return Document(
        id=key, conversation_id="c", name="notes.txt", kind="text", tokens=len(text) // 4, text=text
    )


def test_passages_cover_the_whole_document():
    text = "\n\n".join(f"Paragraph {number} " + "word " * 60 for number in range(40))
    joined = "".join(passage.text for passage in passages_of(document(text)))
    assert "".join(joined.split()) == "".join(text.split())


def test_the_passage_that_answers_is_found_without_its_accents():
    filler = "\n\n".join(f"Nothing of interest here, line {number}. " * 12 for number in range(60))
    text = f"{filler}\n\nLa température de fusion du gallium est 29,76 degrés.\n\n{filler}"
    found = best_passages([document(text)], "temperature de fusion du gallium ?", room=2000)
    assert any("29,76" in passage.text for passage in found)
    assert sum(len(passage.text) for passage in found) // 4 <= 2000


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
