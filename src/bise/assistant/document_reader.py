"""Reads the text out of a document: run as a process of its own with little memory and time, because files
come from anywhere. `python -m bise.assistant.document_reader KIND < file` writes JSON: text, pages; or error.
"""

from __future__ import annotations

import csv
import io
import json
import re
import resource
import sys
import zipfile
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

MEMORY_BYTES = 1 << 30
CPU_S = 30
MAX_UNPACKED = 128 << 20
"""Bytes of the text part of a Word document."""
MAX_CHARS = 8_000_000
"""Characters of one document's text, about 2,500 pages."""
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_NOTES = {"word/footnotes.xml", "word/endnotes.xml"}
_SKIPPED = ("script", "style", "noscript", "template", "title", "svg")
_BREAKS = (
    "p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "pre", "table",
    "blockquote", "dt", "dd", "figcaption", "header", "footer",
)  # fmt: skip
_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?([A-Za-z0-9_:.-]{1,40})", re.IGNORECASE)
READS = "text, Markdown, PDF, DOCX, HTML and CSV can be read"


class _TextOfHtml(HTMLParser):
    """Collects the visible text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        if tag == "body":
            self._hidden = 0
        elif tag in _SKIPPED:
            self._hidden += 1
        elif tag in _BREAKS:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        if tag in _SKIPPED:
            self._hidden = max(0, self._hidden - 1)
        elif tag in _BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep text that is shown."""
        if not self._hidden:
            self.parts.append(data)


def read_document(kind: str, content: bytes) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a document and its pages as (page, character where it begins).

    `kind` is text, html, csv, pdf or docx. Raises ValueError saying what is wrong with it.
    """
    if kind == "pdf":
        parts = [(number, f"[page {number}]\n{text}") for number, text in _pdf_pages(content)]
    else:
        parts = [(0, {"text": _text, "html": _html, "csv": _csv, "docx": _docx}[kind](content))]
    text, pages = "", list[tuple[int, int]]()
    built: list[str] = []
    length = 0
    for number, part in parts:
        tidy = _tidy(part)
        if number:
            pages.append((number, length))
        built.append(tidy)
        length += len(tidy) + 2
        if length > MAX_CHARS:
            raise ValueError(f"its text is longer than {MAX_CHARS:,} characters; split it")
    text = "\n\n".join(built)
    return text, pages


def _tidy(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    kept = [line for line, before in zip(lines, ["x", *lines], strict=False) if line or before]
    return re.sub("[\0\ud800-\udfff]", "\ufffd", "\n".join(kept).strip())


def _text(content: bytes) -> str:
    is_wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    if content[:2] == b"PK" or (b"\0" in content[:4096] and not is_wide):
        raise ValueError(f"it is no text; {READS}")
    return _decoded(content)


def _decoded(content: bytes, charset: str = "utf-8-sig") -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        charset = "utf-16"
    try:
        return content.decode(charset)
    except LookupError as error:
        raise ValueError(f"its character set '{charset[:40]}' is not known") from error
    except UnicodeDecodeError as error:
        name = "UTF-8" if charset == "utf-8-sig" else charset
        raise ValueError(f"it is not {name} text (byte {error.start}); save it as UTF-8") from error


def _html(content: bytes) -> str:
    declared = _CHARSET.search(content[:2048])
    parser = _TextOfHtml()
    parser.feed(_decoded(content, declared[1].decode() if declared else "utf-8-sig"))
    parser.close()
    return "\n".join(" ".join(line.split()) for line in "".join(parser.parts).split("\n"))


def _csv(content: bytes) -> str:
    text = _text(content)
    try:
        dialect = csv.Sniffer().sniff(text[:20_000], delimiters=",;\t|")
        rows = list(csv.reader(io.StringIO(text), dialect))
    except csv.Error:
        return text
    return "\n".join(" | ".join(cell.strip() for cell in row) for row in rows)


def _pdf_pages(content: bytes) -> list[tuple[int, str]]:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    try:
        reader = PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("the PDF asks for a password; save it without one")
        total, pages = 0, list[tuple[int, str]]()
        for number, page in enumerate(reader.pages, 1):
            text = page.extract_text()
            total += len(text)
            if total > MAX_CHARS:
                raise ValueError(f"its text is longer than {MAX_CHARS:,} characters; split it")
            if text.strip():
                pages.append((number, text))
    except DependencyError as error:
        raise ValueError("the PDF is encrypted in a way that cannot be read here") from error
    except PyPdfError as error:
        raise ValueError(f"the PDF is damaged ({' '.join(str(error).split())[:120]})") from error
    if not pages:
        raise ValueError("the PDF has no text (it may be a scan)")
    return pages


def _docx(content: bytes) -> str:
    """Return the text of a Word document, its notes after it."""
    lines: list[str] = []
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            there = set(archive.namelist())
            for name in ("word/document.xml", *sorted(_NOTES & there)):
                entry = archive.getinfo(name)
                if entry.file_size > MAX_UNPACKED:
                    raise ValueError(f"the document's text is larger than {MAX_UNPACKED >> 20} MiB")
                root = ElementTree.fromstring(archive.read(entry))  # noqa: S314 (limited process)
                body = root.find(f"{_WORD}body")
                lines += _blocks(root if body is None else body)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, KeyError, EOFError, NotImplementedError) as error:
        raise ValueError("it is not a Word document") from error
    except ElementTree.ParseError as error:
        raise ValueError("the Word document is damaged") from error
    except RuntimeError as error:  # what zipfile says of an encrypted entry
        raise ValueError("the Word document asks for a password; save it without one") from error
    return "\n".join(lines)


def _blocks(parent: ElementTree.Element) -> Iterator[str]:
    """Yield a line for each paragraph and each row of a table."""
    for child in parent:
        if child.tag == f"{_WORD}p":
            yield "".join(_runs(child))
        elif child.tag == f"{_WORD}tr":
            cells = [" ".join(_blocks(cell)) for cell in child.iter(f"{_WORD}tc")]
            yield " | ".join(cells)
        else:
            yield from _blocks(child)


def _runs(paragraph: ElementTree.Element) -> Iterator[str]:
    for node in paragraph:
        if node.tag == f"{_WORD}t":
            yield node.text or ""
        elif node.tag in (f"{_WORD}tab", f"{_WORD}br", f"{_WORD}cr"):
            yield "\t" if node.tag.endswith("tab") else "\n"
        elif node.tag == f"{_WORD}p":  # a text box
            yield "\n"
            yield from _runs(node)
        elif node.tag not in (f"{_WORD}pPr", f"{_WORD}rPr"):
            yield from _runs(node)


def _answer(arguments: Sequence[str]) -> dict[str, Any]:
    try:
        text, pages = read_document(arguments[1], sys.stdin.buffer.read())
    except ValueError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it takes too much memory to read"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:  # the root of the process: a parser may raise anything about a bad file
        return {"error": f"it is damaged ({type(error).__name__})"}
    return {"text": text, "pages": pages}


def main() -> None:
    """Read one document from standard input."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(json.dumps(_answer(sys.argv)))


if __name__ == "__main__":
    main()
