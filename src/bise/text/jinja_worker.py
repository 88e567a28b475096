"""The process that renders chat templates of strangers: a sandbox with a budget, and nothing else.

Started by `jinja_process` as a script of its own; imports nothing of bise, opens no file once it is warm,
and dies when a template takes too much time or memory. Frames on both pipes: length (4 bytes, big
endian), then JSON.

Requests: {"compile": source}, {"render": variables}. Replies: {"text": text}, {"error": kind, "message":
text} with kind one of syntax, raised, template, memory, output.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, cast

CPU_SECONDS = 1.0
MEMORY_BYTES = 64 << 20
OUTPUT_CHARS = 1 << 20
_MAX_INT_BITS = 4096

# What a template may ask of the modules that Jinja imports late; rendering it once loads them all.
_WARM_UP = """{% macro m(a) %}{{ a | tojson }}{% endmacro %}
{% for x in [1, 2] %}{{ m(x) }}{{ x ** 2 }}{% endfor %}
{% generation %}{{ 'a' | upper | trim | replace('A', 'b') }}{% endgeneration %}{{ strftime_now('%d %B %Y') }}
{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ undefined is defined }}{{ 'é' | title }}
{{ [3, 1] | sort | join(',') }}{{ '%s' | format('x') }}{{ {'a': 1}.items() | list | length }}{{ 'x' * 3 }}"""


def main() -> None:
    """Serve requests until the pipe closes."""
    sys.path += sys.argv[1:]
    environment = make_environment()
    environment.from_string(_WARM_UP).render()
    for faulty in ("{{ 1 // 0 }}", "{% if %}"):
        with suppress(Exception):  # the paths of errors import late too
            environment.from_string(faulty).render()
    _give_up_rights()
    template: Any = None
    while frame := _read_frame():
        request = json.loads(frame)
        _arm(len(frame))
        try:
            if "compile" in request:
                template = environment.from_string(request["compile"])
                reply = {"text": ""}
            else:
                reply = _render(template, request["render"], OUTPUT_CHARS + len(frame))
        except MemoryError:
            reply = {"error": "memory", "message": ""}
        except RecursionError:
            reply = {"error": "template", "message": "is nested too deeply"}
        except Exception as error:  # every fault of a template is reported, none ends the worker
            reply = {"error": _kind(error), "message": str(error)[:500]}
        _disarm()
        _write_frame(json.dumps(reply).encode())


def make_environment() -> Any:
    """Return Jinja's immutable sandbox with what chat templates of the transformers library may use."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The {% generation %} block, which marks the assistant's text for training: its body, unchanged."""

        tags = {"generation"}  # noqa: RUF012  # the name and form that Jinja reads

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Also computes no huge powers and products, not even while it compiles."""

        intercepted_binops = frozenset(["**", "*"])

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and _power_bits(left, right) > _MAX_INT_BITS:
                raise SecurityError("a power this large is not computed")
            if operator == "*" and _product_size(left, right) > OUTPUT_CHARS:
                raise SecurityError("a product this large is not computed")
            return super().call_binop(context, operator, left, right)

    class RaisedError(TemplateError):
        """What raise_exception raises."""

    def raise_exception(message: object) -> None:
        raise RaisedError(str(message))

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)  # local time, as in transformers

    environment: Any = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _power_bits(base: object, exponent: object) -> float:
    if not isinstance(base, int | float) or not isinstance(exponent, int | float):
        return _MAX_INT_BITS + 1
    if isinstance(base, float) or isinstance(exponent, float):
        return 0  # floats overflow cheaply
    return base.bit_length() * abs(exponent)


def _product_size(left: object, right: object) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return (left.bit_length() + right.bit_length()) * (OUTPUT_CHARS // _MAX_INT_BITS)
    for sized, count in ((left, right), (right, left)):
        if isinstance(sized, str | list | tuple) and isinstance(count, int):
            return len(cast(Sequence[object], sized)) * count
    return 0


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _render(template: Any, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    parts: list[str] = []
    size = 0
    for part in template.generate(**variables):
        size += len(part)
        if size > max_chars:
            return {"error": "output", "message": ""}
        parts.append(part)
    return {"text": "".join(parts)}


def _kind(error: Exception) -> str:
    from jinja2.exceptions import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return "syntax"
    return "raised" if type(error).__name__ == "RaisedError" else "template"


def _give_up_rights() -> None:
    """Allow no new file, process or byte on disk from here on: what is open stays open."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def _arm(frame_bytes: int) -> None:
    """Start the budget of one request: the kernel ends the process after CPU_SECONDS, whatever it does.

    Memory and output grow with the request, so that the budget is the template's own.
    """
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    if mapped := _mapped_bytes():
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES + 8 * frame_bytes, hard))


def _disarm() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _make_mapped_bytes() -> Callable[[], int]:
    """Return a function that tells the size of the address space; 0 where the system does not say."""
    try:
        file = Path("/proc/self/statm").open("rb", buffering=0)  # noqa: SIM115  # stays open: no file opens later
    except OSError:
        return lambda: 0

    def read() -> int:
        file.seek(0)
        return int(file.read(64).split()[0]) * resource.getpagesize()

    return read


def _read_frame() -> bytes:
    header = sys.stdin.buffer.read(4)
    return sys.stdin.buffer.read(int.from_bytes(header, "big")) if len(header) == 4 else b""


def _write_frame(data: bytes) -> None:
    sys.stdout.buffer.write(len(data).to_bytes(4, "big") + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    _mapped_bytes = _make_mapped_bytes()
    main()
