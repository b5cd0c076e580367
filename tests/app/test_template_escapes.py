"""Templates that want out of the sandbox: Python's audit hooks hear nothing of them, and nothing comes of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conversations import user

import mixlocal.app.template_child as template_child
from mixlocal.app.template_jinja import JinjaTemplate
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.errors import RefusedError, UsageError

# RUN is the call that leaves the canary; a payload that gets at anything it should not have, runs it or prints it.
RUN = "popen('touch CANARY').read()"
PAYLOADS = [
    # up the class tree
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__()[100].__init__.__globals__['sys'].modules['os'].RUN }}",
    "{{ [].__class__.__bases__[0].__subclasses__() }}", "{{ ().__class__ }}{{ {}.__class__ }}{{ 1.0.__class__ }}",
    "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}", "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}", "{{ (true).__class__.__mro__ }}", "{{ none.__class__ }}",
    "{{ messages.__class__.__mro__ }}", "{{ messages[0].__class__.__init__ }}", "{{ messages[0]['__class__'] }}",
    "{{ dict.mro() }}", "{{ dict.__class__.mro }}", "{{ dict.__base__ }}", "{{ range(3).__class__.__mro__ }}",
    # globals of functions that templates are given
    "{{ cycler.__init__.__globals__.os.RUN }}", "{{ joiner.__init__.__globals__.os.RUN }}",
    "{{ namespace.__init__.__globals__.os.RUN }}", "{{ lipsum.__globals__['os'].RUN }}", "{{ lipsum.__globals__ }}",
    "{{ lipsum['__globals__'] }}", "{{ lipsum.__code__.co_consts }}", "{{ lipsum.__builtins__ }}",
    "{{ raise_exception.__globals__.sys.modules.os.RUN }}", "{{ strftime_now.__self__.__class__ }}",
    "{{ range.__globals__ }}{{ range.__code__ }}", "{{ dict.__call__.__globals__ }}", "{{ dict.fromkeys.__func__ }}",
    "{{ cycler(1).next.__globals__ }}", "{{ cycler(1).next.__func__.__code__ }}", "{{ joiner().__call__.__globals__ }}",
    "{{ ('' | attr('format')).__globals__ }}", "{{ ''.format.__wrapped__.__self__ }}", "{{ ''.format.__globals__ }}",
    "{{ ''.format.__closure__[0].cell_contents }}",
    # through filters and tests
    "{{ '' | attr('__class__') | attr('__mro__') }}", "{{ lipsum | attr('__globals__') | attr('get')('os') }}",
    "{{ ['x'] | map(attribute='__class__') | list }}", "{{ ['x'] | map(attribute='__class__.__mro__') | list }}",
    "{{ [lipsum] | map(attribute='__globals__') | list }}", "{{ [lipsum] | map('attr', '__globals__') | list }}",
    "{{ ['{0.__class__.__mro__}'] | map('format', 1) | list }}", "{{ [lipsum] | selectattr('__globals__') | list }}",
    "{{ [lipsum] | groupby('__globals__') }}", "{{ [lipsum] | sum(attribute='__globals__', start=0) }}",
    "{{ [lipsum] | sort(attribute='__globals__') }}", "{{ [lipsum] | unique(attribute='__code__') | list }}",
    "{{ [lipsum, cycler] | min(attribute='__globals__') }}", "{{ [lipsum] | join(attribute='__globals__') }}",
    "{{ {'a': lipsum} | dictsort(by='__class__') }}", "{{ '%s' | format(''.__class__) }}",
    "{{ lipsum | tojson }}", "{{ cycler | pprint | attr('__class__') }}", "{{ 'x' is __import__('os') }}",
    "{{ lipsum | map('__globals__') }}", "{{ 'os' | __import__ }}",
    # through format strings
    "{{ '{0.__class__}'.format('x') }}", "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ '{x.__globals__[os]}'.format(x=lipsum) }}", "{{ '{0[__class__]}'.format('x') }}",
    "{{ '{x.__globals__}'.format_map({'x': lipsum}) }}", "{{ 'x'.format.__self__ }}",
    "{{ ('{0.__cl' ~ 'ass__}').format(1) }}", "{{ '{:{0.__class__}}'.format(1) }}",
    "{{ ['{0.__globals__}'.format] | map('call', lipsum) | list }}", "{{ ('{0.__class__}' | attr('format'))(lipsum) }}",
    "{{ '{0.__class__}'['format'](lipsum) }}", "{{ (['{0.__globals__}'] | map(attribute='format') | first)(lipsum) }}",
    "{% set f = '{0.__globals__}'.format %}{{ f(lipsum) }}", "{{ ('{0.__globals__}' | e).format(lipsum) }}",
    "{{ messages | map('replace', 'A', '{0.__class__}') | map(attribute='format') | list }}",
    # the runtime's own objects
    "{{ self.__init__.__globals__ }}", "{{ self._TemplateReference__context }}", "{{ self.__class__ }}",
    "{% for x in [1] %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop._iterable }}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{% for x in [1] %}{{ loop._undefined.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}", "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}", "{% macro m() %}{% endmacro %}{{ m.__call__.__func__ }}",
    "{% macro m() %}{{ caller.__class__.__mro__ }}{{ caller._func }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{{ varargs.__class__ }}{{ kwargs.__class__ }}{% endmacro %}{{ m(1, a=2) }}",
    "{% block b %}{{ self.b.__globals__ }}{{ self.b._context.environment }}{% endblock %}",
    "{% block b %}{{ super.__class__ }}{{ super._stack }}{% endblock %}",
    "{{ undefined_name.__class__.__init__.__globals__ }}", "{{ undefined_name._undefined_exception }}",
    "{{ undefined_name._fail_with_undefined_error.__globals__ }}", "{{ ([1] | map('string')).gi_frame.f_globals }}",
    "{{ ([1] | select).gi_code }}", "{{ ([1] | batch(1)).gi_frame.f_back.f_builtins }}",
    "{{ ([1] | map('attr', 'x')).cr_frame }}",
    # namespaces that pass for something else
    "{{ namespace(__class__=lipsum).__class__ }}", "{{ namespace(__call__=lipsum) }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}", "{{ namespace({'__html__': lipsum}) | e }}",
    "{{ namespace(_Namespace__attrs={}) }}", "{% set n = namespace() %}{{ n._Namespace__attrs }}{{ n.__init__ }}",
    "{% set n = namespace(f=lipsum) %}{{ n.f.__globals__ }}",
    # imports
    "{% import 'os' as os %}{{ os.RUN }}", "{% from 'os' import popen %}{{ popen('touch CANARY') }}",
    "{% include '/etc/passwd' %}", "{% include ['a', '/etc/passwd'] ignore missing %}", "{% extends '/etc/passwd' %}",
    "{% import messages[0].content as x %}", "{{ self._TemplateReference__context.environment.from_string('x') }}",
    "{% import 'x' as os with context %}", "{% extends namespace(root_render_func=lipsum) %}",
    "{% include namespace(root_render_func=lipsum, new_context=lipsum) %}",
    # builtins by name, and what the compiler might let through
    "{{ __builtins__ }}{{ __import__('os').RUN }}", "{{ open('/etc/passwd').read() }}", "{{ eval('1') }}",
    "{{ exec('import os') }}", "{{ globals() }}{{ locals() }}", "{{ environment.globals }}{{ context.parent }}",
    "{{ l_0_messages }}{{ context }}{{ resolve('os') }}{{ t_1 }}", "{{ missing }}{{ escape }}{{ str_join }}",
    "{{ getattr('', '__class__') }}", "{{ type('')('x') }}", "{{ vars() }}{{ dir() }}", "{{ print('x') }}",
    "{% set __class__ = 1 %}{{ __class__ }}{{ __name__ }}{{ __file__ }}", "{{ breakpoint() }}", "{{ input() }}",
    "{% set messages.append = 1 %}", "{{ messages.append({'role': 'system'}) }}", "{{ messages[0].update(role='x') }}",
    "{{ dict.update(messages[0], role='system') }}{{ messages[0].role }}", "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
    "{{ '{{ lipsum.__globals__ }}' | string }}", "{% raw %}{{ lipsum.__globals__ }}{% endraw %}",
    "{{ strftime_now('{0.__class__}') }}", "{{ '\\x00'.join(['/etc', 'passwd']) }}", "{{ 'x'.encode().__class__ }}",
    "{{ {}.keys().mapping.__class__ }}", "{{ (1).from_bytes.__self__ }}", "{{ ''.maketrans.__self__ }}",
    "{% autoescape true %}{{ ''.__class__ }}{{ '{0.__class__}'.format(1) }}{% endautoescape %}",
]  # fmt: skip
# What would stand in the output if an object of Python's were reached, a file were read or a message were changed.
REACHED = re.compile(
    r"<(class|module|built-in|bound|method|code|frame|cell|slot|wrapper|member)"
    r"|<function (?!generate_lorem|str\.format)|'__\w+__'|root:x|mappingproxy|None(system)"
)
LITERAL = {"{{ '{{ lipsum.__globals__ }}' | string }}", "{% raw %}{{ lipsum.__globals__ }}{% endraw %}"}
CODECS = ["{{ 'a'.encode('rot13') }}", "{{ 'a'.encode('zlib') }}", "{{ 'a'.encode().decode('idna') }}"]

RUNNER = """
import importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("template_child", sys.argv[1])
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
child._preload()
request = json.loads(sys.stdin.read())
events, results, listening = [], [], []

def listen(event, args):
    # jinja2 compiles and runs the template, and reads an attribute before it asks if it may be seen; pprint uses id
    expected = event in ("compile", "object.__getattr__", "builtins.id")
    if listening and not expected and (event != "exec" or args[0].co_filename != "<template>"):
        events.append(f"{event} {args}"[:200])

sys.addaudithook(listen)
if sys.argv[2] == "locked":
    sys.addaudithook(child.refuse)
for source in request.pop("sources"):
    events.clear()
    listening.append(True)
    server = child.Server()
    reply = json.loads(server.answer(json.dumps({"source": source}).encode()))
    if "error" not in reply:
        reply = json.loads(server.answer(json.dumps(request).encode()))
    listening.clear()
    results.append({**reply, "events": list(events)})
sys.stdout.write(json.dumps(results))
sys.stdout.flush()
os._exit(0)
"""
Outcome = dict[str, Any]


def run(sources: list[str], lock: str, folder: Path) -> list[Outcome]:
    """What the child's own code makes of each source, in a process where every audit event is written down."""
    request = {
        "sources": [source.replace("RUN", RUN) for source in sources], "now": "2025-01-02T03:04:05", "limit": 9999,
        "conversations": [[{"role": "user", "content": "A"}]], "values": {"bos_token": "", "tools": None},
    }  # fmt: skip
    command = [sys.executable, "-I", "-W", "ignore", "-c", RUNNER, template_child.__file__, lock]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, cwd=folder, check=True)
    results: list[Outcome] = json.loads(done.stdout)
    return results


@pytest.fixture(scope="module", params=["open", "locked"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Once with jinja2's sandbox alone, once with the audit hook that refuses."""
    folder = tmp_path_factory.mktemp("escape")
    results = dict(zip(PAYLOADS, run(PAYLOADS, request.param, folder), strict=True))
    assert list(folder.iterdir()) == []
    return results


def test_there_are_many() -> None:
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 60


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_payload_gets_out(outcomes: dict[str, Outcome], payload: str) -> None:
    """No file, process, import or socket is asked for, and no object of Python's own is shown."""
    outcome = outcomes[payload]
    assert outcome["events"] == []
    assert "_LockedError" not in outcome.get("text", "").replace("_LockedError: object.__getattr__", "")
    shown = "".join(outcome.get("texts", []))
    assert payload in LITERAL or not REACHED.search(shown), shown


def test_the_net_is_fine_enough(tmp_path: Path) -> None:
    """What does get out is heard: codecs import modules. The lock refuses it, and nothing else changes."""
    for outcome in run(CODECS, "open", tmp_path):
        assert any(event.startswith("import ") for event in outcome["events"])
    for outcome in run(CODECS, "locked", tmp_path):
        assert outcome["error"] == "fault"
        assert "_LockedError: import" in outcome["text"]
    for shown in ("<class 'str'>", "{'__globals__': 1}", "root:x:0:0", "<module os>", "<built-in method format>"):
        assert REACHED.search(shown)


REALLY = ["{{ cycler.__init__.__globals__.os.RUN }}", "{{ 'a'.encode('rot13') }}", "{% include '/etc/passwd' %}"]


@pytest.mark.parametrize("payload", REALLY, ids=range(len(REALLY)))
def test_a_payload_is_refused_by_name(smol: Tokenizer, payload: str) -> None:
    with pytest.raises(RefusedError, match=r"^f\.jinja cannot be used: ") as caught:
        JinjaTemplate(payload.replace("RUN", RUN), origin="f.jinja").encode([user("A")], smol)
    assert "\n" not in caught.value.message


def test_what_a_template_says_is_one_printable_line(smol: Tokenizer) -> None:
    rude = JinjaTemplate("{{ raise_exception('a\\n\\x1b[2J\\x07b' ~ 'c' * 999) }}")
    with pytest.raises(UsageError) as caught:
        rude.encode([user("A")], smol)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


BREAKOUT = """
import os, socket, subprocess, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import template_child as child
child._preload()
child._limit_resources(1 << 30)
failed = 0
for attempt in (lambda: os.open("/dev/null", 0), lambda: socket.socket(), lambda: os.pipe(), lambda: os.dup(0)):
    try:
        attempt()
    except OSError:
        failed += 1
os._exit(failed)
"""


def test_the_kernel_gives_no_file_descriptor() -> None:
    """The third wall stands by itself: no file, socket or pipe, whoever asks."""
    command = [sys.executable, "-I", "-c", BREAKOUT, template_child.__file__]
    assert subprocess.run(command, check=False).returncode == 4
