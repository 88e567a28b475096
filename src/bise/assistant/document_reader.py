"""Reads the text out of a document: run as a process of its own with little memory and time, because files
come from anywhere. `python -m bise.assistant.document_reader KIND < file` writes JSON: text, or error.
"""

from __future__ import annotations

import csv
import io
import json
import resource
import sys
import zipfile
from html.parser import HTMLParser
from xml.etree import ElementTree

MEMORY_BYTES = 1 << 30
CPU_S = 30
MAX_UNPACKED = 256 << 20
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_SKIPPED = ("script", "style", "noscript", "template", "head")
_BREAKS = ("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "pre")


class _TextOfHtml(HTMLParser):
    """Collects the visible text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        if tag in _SKIPPED:
            self._hidden += 1
        elif tag in _BREAKS:
            self.parts.append("\n")

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


def read_text(kind: str, content: bytes) -> str:
    """Return the text of a document; `kind` is text, html, csv, pdf or docx. Raises ValueError."""
    readers = {"text": _decoded, "html": _html, "csv": _csv, "pdf": _pdf, "docx": _docx}
    text = readers[kind](content)
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    kept = [line for line, before in zip(lines, ["x", *lines], strict=False) if line or before]
    return "\n".join(kept).strip().replace("\0", "\ufffd")


def _decoded(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error


def _html(content: bytes) -> str:
    parser = _TextOfHtml()
    parser.feed(_decoded(content))
    parser.close()
    return "\n".join(" ".join(line.split()) for line in "".join(parser.parts).split("\n"))


def _csv(content: bytes) -> str:
    text = _decoded(content)
    try:
        dialect = csv.Sniffer().sniff(text[:20_000], delimiters=",;\t|")
    except csv.Error:
        return text
    rows = list(csv.reader(io.StringIO(text), dialect))
    return "\n".join(" | ".join(cell.strip() for cell in row) for row in rows)


def _pdf(content: bytes) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("the PDF asks for a password")
        pages = [page.extract_text() for page in reader.pages]
    except PyPdfError as error:
        raise ValueError(f"the PDF cannot be read ({error})") from error
    text = "\n\n".join(f"[page {number}]\n{page}" for number, page in enumerate(pages, 1) if page.strip())
    if not text:
        raise ValueError("the PDF has no text (it may be a scan)")
    return text


def _docx(content: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.getinfo("word/document.xml").file_size > MAX_UNPACKED:
                raise ValueError("the document is too large")
            root = ElementTree.fromstring(archive.read("word/document.xml"))  # noqa: S314 (limited process)
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError) as error:
        raise ValueError("it is not a Word document") from error
    lines: list[str] = []
    for paragraph in root.iter(f"{_WORD}p"):
        parts: list[str] = []
        for node in paragraph.iter():
            if node.tag == f"{_WORD}t":
                parts.append(node.text or "")
            elif node.tag in (f"{_WORD}tab", f"{_WORD}br"):
                parts.append("\t" if node.tag.endswith("tab") else "\n")
        lines.append("".join(parts))
    return "\n".join(lines)


def main() -> None:
    """Read one document from standard input."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        answer = {"text": read_text(sys.argv[1], sys.stdin.buffer.read())}
    except ValueError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "it takes too much memory to read"}
    except RecursionError:
        answer = {"error": "it is nested too deeply"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
