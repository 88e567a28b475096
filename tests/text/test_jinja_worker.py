"""Templates of strangers: no way out of the sandbox, and no more than the budget."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from bise.errors import BiseError, ModelFileError, RequestError
from bise.text.jinja_process import JinjaProcess

CANARY = "canary"
COMMAND = "touch {}"
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.system('COMMAND') }}",
    "{{ joiner.__init__.__globals__.os.popen('COMMAND').read() }}",
    "{{ namespace.__init__.__globals__.os.system('COMMAND') }}",
    "{{ lipsum.__globals__['os'].popen('COMMAND').read() }}",
    "{{ lipsum.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ range.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ strftime_now.__globals__.sys.modules.os.system('COMMAND') }}",
    "{{ raise_exception.__closure__ }}",
    "{{ strftime_now.__code__.replace(co_code='x') }}",
    "{{ ().__class__.__bases__[0].__subclasses__()[104].load_module('os').system('COMMAND') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ['{0.__class__}'] | map('format', messages) | first }}",
    "{% set f = '{0.__class__.__base__}'.format %}{{ f(messages) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('COMMAND') }}",
    "{% from 'os' import system %}{{ system('COMMAND') }}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages.__getattribute__('__class__') }}",
    "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
    "{{ messages | sum(attribute='__class__', start=1) }}",
    "{% for k in messages[0].items() %}{{ k.__class__.__base__ }}{% endfor %}",
    "{{ config.__class__.__init__.__globals__['os'].popen('COMMAND').read() }}{{ undefined_name.x }}",
    "{{ (1).__class__.from_bytes.__self__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}{{ m.__globals__.x }}",
    "{{ loop.__class__ }}{% for a in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
]
BOMBS = [
    "{{ 9 ** (9 ** 9) }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ (9 ** 99) ** 99 ** 3 }}",
    "{% set x = 7 ** 777777777 %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{% set n = namespace(s='x' * 1000) %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(i=2) %}{% for i in range(99) %}{% set n.i = n.i * n.i %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 10 ** 9 * 'xy' }}",
    "{{ [0] * 1000000000 }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format('x') }}",
    "{{ ('x,' * 500000).split(',') | map('center', 1000) | join }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x'.replace('', 'y' * 1000000) * 100 }}",
    "{{ range(99999) | map('string') | map('center', 10000) | join }}",
    "{{ messages | tojson(indent=100000000) }}",
    "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
    "{% for i in messages[0].content * 100000 %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ lipsum(n=100000, max=100000) }}",
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ 1" + " + 1" * 40000 + " }}",
    "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa' | wordwrap(1) * 1000000 }}",
]
VARIABLES = {"messages": [{"role": "user", "content": "hello"}], "tools": None, "add_generation_prompt": True}


@pytest.mark.parametrize("source", ESCAPES)
def test_escape_reaches_nothing(source, tmp_path: Path):
    canary = tmp_path / CANARY
    process = JinjaProcess(
        source.replace("COMMAND", f"touch {canary}").replace("CANARY", str(canary)), "template"
    )
    try:
        shown = process.render(VARIABLES)
    except BiseError:
        shown = ""
    finally:
        process.close()
    assert not canary.exists()
    assert not any(
        word in shown for word in ("root:", "<class", "<module", "<built-in", "<function", "environ")
    )


def spent_by_children() -> float:
    """Return the seconds of processor time of all processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_bomb_is_refused_within_the_budget(source):
    process = JinjaProcess(source, "template")
    begin = spent_by_children()
    try:
        with pytest.raises((RequestError, ModelFileError)) as caught:
            process.render(VARIABLES)
    finally:
        process.close()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert spent_by_children() - begin < 5  # a second, and what the start and the end take


def test_bomb_at_compile_time_is_refused_by_the_check():
    process = JinjaProcess("{{ 9 ** (9 ** 9) }}{% for a in range(9) %}", "chat_template.jinja")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: is malformed"):
        process.check()
    process.close()


def test_worker_is_used_again_and_replaced_after_a_bomb():
    process = JinjaProcess(
        "{% if bomb %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}{{ text }}",
        "template",
    )
    assert process.render({"text": "one"}) == "one"
    first = process._process
    assert process.render({"text": "two"}) == "two"
    assert process._process is first
    with pytest.raises(RequestError, match="1 s of processor time"):
        process.render({"text": "three", "bomb": True})
    assert process.render({"text": "four"}) == "four"
    process.close()


def test_closing_leaves_no_process_behind():
    process = JinjaProcess("x", "template")
    process.check()
    assert process._process is not None
    pid = process._process.pid
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_filters_and_functions_of_transformers_exist():
    process = JinjaProcess(
        "{{ {'é': [1, 2.5, none, true]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=2) }}"
        "{{ strftime_now('%%') }}"
        "{% generation %}!{% endgeneration %}"
        "{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "template",
    )
    assert process.render({}) == '{"é": [1, 2.5, null, true]}{\n  "b": 1,\n  "a": 2\n}%!1'
    process.close()


def test_output_budget_grows_with_the_conversation():
    process = JinjaProcess("{{ text }}", "template")
    text = "x" * (3 << 20)
    assert process.render({"text": text}) == text
    process.close()
