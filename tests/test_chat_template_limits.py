"""Endless templates are stopped, even within a single call into C, and at little cost for others."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.text.tokenizer import Tokenizer

import pytest

ROOT = Path(__file__).parent.parent
TIME, MEMORY = "of processor time", "MB of memory"
DOUBLE = "{% set ns = namespace(x=1, y=1) %}{% for i in range(60) %}"
# The limit that stops each template; the first of each kind always runs, the others with --run-slow.
QUICK = {
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": TIME,
    "{{ [[[[1]]]] | tojson(indent=10**9) }}": MEMORY,
    "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}": "it renders 9999900 characters, more than",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "recursion",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "recursion",
}
SLOW = {
    "{{ 'x' * 10**9 }}": MEMORY,
    "{{ 10**(10**8) }}": TIME,
    "{{ lipsum(n=10**6) }}": TIME,
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}": TIME,
    DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}": TIME,
    "{{ 'x' | center(1000000000) }}": MEMORY,  # jinja2 computes it while compiling
    "{% for i in range(99999) %}{% set x = dict.fromkeys(range(99999)) %}{% endfor %}": TIME,
    "{{ [1,2,3,4,5,6,7,8,9] | tojson(separators=['x' * 10**8, 'y']) }}": MEMORY,
    "{{ lipsum(n=1, min=10**8, max=10**9) }}": TIME,
    "{{ ([0] * 10**9) | length }}": MEMORY,
    "{{ [0] * 10**8 }}": MEMORY,
    "{{ '%1000000000d' % 1 }}": MEMORY,
    "{{ '%*d' % (10**9, 1) }}": MEMORY,
    "{{ 'x'.center(10**9) }}": MEMORY,
    "{{ 'x'.ljust(10**9) }}": MEMORY,
    "{{ 'x'.zfill(10**9) }}": MEMORY,
    "{{ '{:1000000000}'.format(1) }}": MEMORY,
    "{{ '{a:1000000000}'.format_map({'a': 1}) }}": MEMORY,
    "{{ '%1000000000s' | format('x') }}": MEMORY,
    "{{ ('\\t' * 1000).expandtabs(10**7) }}": MEMORY,
    "{{ (1).to_bytes(10**9) }}": MEMORY,
    "{{ ('x' * 10**8).encode('utf-32') }}": MEMORY,
    "{% set ns = namespace(x=3) %}{% for i in range(99999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}": TIME,
    DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}": MEMORY,
    DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ 10**ns.x }}": TIME,
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": MEMORY,
    DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}": TIME,
    DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}": TIME,
    DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | pprint }}": "",
    DOUBLE + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}": TIME,
    "{{ range(99999) | map('string') | join('x' * 10**6) }}": MEMORY,
    "{{ ('x' * 10**6).join('y' * 10**6) }}": MEMORY,
    "{{ ('x' * 10**5).replace('x', 'y' * 10**5) }}": MEMORY,
    "{{ ('x' * 10**5) | replace('x', 'y' * 10**5) }}": MEMORY,
    "{{ ('x' * 10**5).translate({120: 'y' * 10**5}) }}": "",
    "{{ [1] | batch(10**9, 0) | list }}": MEMORY,
    "{{ [1] | slice(10**9) | list }}": "",
    "{{ 'x\ny' | indent(10**9) }}": MEMORY,
    "{{ ('x' * 10**7) | wordwrap(1) }}": "",
    "{{ ('x' * 10**6) | wordwrap(1, wrapstring='y' * 10**6) }}": "",
    "{{ 'xyzuvw' | truncate(2, end='x' * 10**9) }}": MEMORY,
    "{{ ('http://a.bc ' * 10**6) | urlize }}": "",
    "{{ ([range(99999) | list] * 1000) | pprint }}": "",
    "{{ ([[0] * 10**5] * 10**5) | sum(start=[]) }}": "",
    "{{ ([range(99999) | list] * 99999) | sort }}": TIME,
    "{{ ([range(9999) | list | string] * 99999) | unique | list }}": "",
    "{{ {'a': 'x' * 10**9} | xmlattr }}": MEMORY,
    "{{ ('<' * 10**8) | escape }}": "",
    "{{ ('<' * 10**8) | urlencode }}": "",
    "{{ ['x', 'y'] | map('center', 10**9) | list }}": MEMORY,
    "{{ strftime_now('%Y' * 10**8) }}": MEMORY,
    "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}": "recursion",
    "{{ " + "[" * 100000 + "]" * 100000 + " }}": "recursion",
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000: "recursion",
    "{{ " + "-" * 100000 + "1 }}": "recursion",
    "{{ x }}" * 140000: TIME,
    "{% set x %}{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}": MEMORY,
    "{% filter upper %}{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endfilter %}": MEMORY,
    "{% generation %}{{ 'x' * 10**9 }}{% endgeneration %}": MEMORY,
    "{{ raise_exception('x' * 10**8) }}": MEMORY,
}

# Runs the templates one after another and prints, for each, the error and the processor time, then the peak memory.
SCRIPT = """
import json, resource, sys
from mlx_openelm.text.chat_template_process import render
def seconds():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
rows = []
for source in json.load(sys.stdin):
    before = seconds()
    try:
        error = "none: " + render(source, {})[:50]
    except ValueError as caught:
        error = str(caught)
    rows.append((error, seconds() - before))
print(json.dumps([rows, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


@pytest.mark.parametrize("attacks", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_an_endless_template_is_stopped(attacks):
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(list(attacks)), capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    rows, peak = json.loads(found.stdout)
    for (source, reason), (error, seconds) in zip(attacks.items(), rows, strict=True):
        # Memory is only sampled, so the other limit may be reached first.
        reasons = (TIME, MEMORY) if sys.platform == "darwin" and reason in (TIME, MEMORY) else (reason,)
        assert error.startswith("The chat template failed"), (source[:80], error)
        assert any(reason in error for reason in reasons), (source[:80], error)
        assert "\n" not in error and len(error) < 500
        assert seconds < 5, (source[:80], seconds)  # processor time, including the start of a process
    if sys.platform == "linux":
        assert peak << 10 < 200 << 20


WORKER = "chat_template_worker.py"


def new_copy() -> ModuleType:
    """A fresh copy of the module, as in a program that has rendered nothing yet."""
    spec = importlib.util.find_spec("mlx_openelm.text.chat_template_process")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workers() -> set[int]:
    """The live template processes that this one has started."""
    found = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in found.stdout.splitlines()]
    return {int(row[0]) for row in rows if int(row[1]) == os.getpid() and row[2][0] != "Z" and WORKER in row[-1]}


@pytest.fixture
def process() -> Iterator[ModuleType]:
    """The module before its first call; processes that it starts are ended afterwards."""
    before = workers()
    yield new_copy()
    for pid in workers() - before:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def worker(process) -> int:
    """A template process that has rendered one template."""
    before = workers()
    process.render("", {})
    (pid,) = workers() - before
    return pid


def test_memory_is_sampled_where_the_system_does_not_limit_it(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    process = new_copy()
    assert process.render("{{ 'x' * 10 }}", {}) == "x" * 10
    with pytest.raises(RequestError, match=MEMORY):
        process.render("{% set x = 'x' * (200 * 2**20) %}" + next(key for key in QUICK if "99999" in key), {})
    assert process.render("{{ 'x' * 10 }}", {}) == "x" * 10


def test_one_process_serves_all_requests_and_is_replaced_if_it_ends(process, worker):
    assert process.render("{{ b }}", {"b": "é\ud800\n\u2028"}) == "é\ud800\n\u2028"
    assert worker in workers()
    for code in (signal.SIGKILL, signal.SIGTERM):
        before = workers()
        os.kill(worker, code)
        assert process.render("{{ c }}", {"c": [1]}) == "[1]"
        assert worker not in workers()
        (worker,) = workers() - before


def test_threads_share_the_process(process):
    results: dict[int, list[str]] = {}

    def work(number: int) -> None:
        results[number] = [process.render("{{ a }}", {"a": f"{number}.{i}"}) for i in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [f"{number}.{i}" for i in range(20)] for number in range(5)}


def test_a_bad_template_does_not_fail_other_threads(process):
    outcomes: list[str] = []

    def work(source: str) -> None:
        try:
            outcomes.append(process.render(source, {"a": "ok"}))
        except Exception as error:
            outcomes.append(TIME if TIME in str(error) else repr(error))

    threads = [threading.Thread(target=work, args=(source,)) for source in ("{{ 10**(10**8) }}", *["{{ a }}"] * 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == sorted([TIME, *["ok"] * 4])


def test_a_request_is_repeated_when_the_process_is_killed_from_outside(process, worker):
    os.kill(worker, signal.SIGSTOP)  # so that it takes the request and never answers
    killing = threading.Timer(0.2, os.kill, (worker, signal.SIGKILL))
    killing.start()
    assert process.render("{{ a }}", {"a": 1}) == "1"
    killing.join()
    assert worker not in workers()


def test_a_process_that_ends_at_once_is_reported(monkeypatch, process):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RequestError, match="its process ended with status 1"):
        process.render("", {})


def test_sys_path_may_hold_entries_that_are_not_text(monkeypatch, process, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    assert process.render("{{ a }}", {"a": 1}) == "1"


def test_a_missing_jinja2_is_named(monkeypatch, process, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(OpenELMError, match="need jinja2, which cannot be imported"):
        process.render("", {})


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is limited on Linux")
def test_a_long_message_is_rendered_or_refused_with_a_reason(process):
    text = "語" * 2_000_000
    assert process.render("{{ a }}", {"a": text}) == text
    with pytest.raises(RequestError, match=MEMORY):
        process.render("{{ a }}", {"a": text * 15})


def test_the_answer_to_an_interrupted_request_is_not_given_to_the_next(process, worker):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    os.kill(worker, signal.SIGSTOP)
    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            process.render("first", {})
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert process.render("second", {}) == "second"


def test_a_forked_child_starts_its_own_process():
    script = (
        "import os; from mlx_openelm.text.chat_template_process import render; render('', {}); child = os.fork()\n"
        "texts = {render('{{ a }}', {'a': i}) for i in [bool(child)] * 50}\n"
        "assert texts == {str(bool(child))}, texts\n"
        "if child: assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_forked_child_leaves_the_parents_process_alone():
    """The child does not send what the parent has buffered, and leaves no ResourceWarning."""
    script = (
        "import gc, os, subprocess, sys; from mlx_openelm.text.chat_template_process import render; started = []\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs); started.append(self)\n"
        "subprocess.Popen = Popen; render('', {}); process = started.pop()\n"
        "process.stdin.write(b'half'); child = os.fork()\n"
        "if not child: del process; gc.collect(); sys.exit()\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        'os.write(process.stdin.fileno(), b\'{"template": "a", "variables": {}}\\n\')\n'
        'assert process.stdout.readline() == b\'{"text": "a"}\\n\''
    )
    found = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_no_process_is_left_behind():
    script = (
        "import os, sys; sys.path.insert(0, 'tests'); from test_chat_template_limits import workers\n"
        "from mlx_openelm.text.chat_template_process import render; render('', {})\n"
        "print(*workers(), flush=True)\n"
        "if len(sys.argv) > 1: os.kill(os.getpid(), 9)"
    )
    for killed in ([], ["killed"]):
        found = subprocess.run([sys.executable, "-c", script, *killed], capture_output=True, text=True, cwd=ROOT)
        assert found.stderr == "" and found.stdout.strip().isdigit()
        for _ in range(600):
            status = subprocess.run(["ps", "-o", "stat=", "-p", found.stdout.strip()], capture_output=True, text=True)
            if status.stdout.strip()[:1] in ("", "Z"):  # a zombie has ended, even if its parent never reads the status
                break
            time.sleep(0.05)
        else:
            pytest.fail("the process is still there")


def test_a_long_conversation_is_rendered(process):
    messages = [{"role": "user", "content": "Wörter 😀 " * 100_000}, {"role": "assistant", "content": "x" * 500_000}]
    source = "{% for m in messages %}{{ m.role + ': ' + m.content | trim }}{% endfor %}"
    text = process.render(source, {"messages": messages})
    assert text == "user: " + messages[0]["content"].strip() + "assistant: " + messages[1]["content"]


def test_values_json_cannot_hold_are_placeholders_as_in_transformers(process):
    values = {"a": b"bytes", "b": {1, 2}, "c": (1, None), "d": float("nan"), 5: 2**70}
    assert process.render("{{ v }}", {"v": values}) == (
        "{'a': '<bytes>', 'b': '<set>', 'c': [1, None], 'd': nan, '5': 1180591620717411303424}"
    )
    holds_itself: list = []
    holds_itself.append(holds_itself)
    for value in (holds_itself, {(1, 2): 3}):
        with pytest.raises(RequestError, match="cannot be written as JSON"):
            process.render("", {"v": value})


def test_the_built_in_templates_start_no_process():
    script = (
        "import sys; from mlx_openelm.text.tokenizer import Tokenizer\n"
        "t = Tokenizer.from_folder('tests/fixtures/shakespeare-hf')\n"
        "for name in ('plain', 'corenet'): t.apply_chat_template([{'role': 'user', 'content': 'Hi'}], name)\n"
        "assert not {'jinja2', 'subprocess', 'mlx_openelm.text.chat_template_process'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_template_files_are_limited_and_checked(tmp_path):
    tokenizer = Tokenizer.from_folder(ROOT / "tests/fixtures/shakespeare-hf")
    big, pipe, latin = tmp_path / "big.jinja", tmp_path / "pipe.jinja", tmp_path / "latin.jinja"
    big.write_bytes(b" " * ((1 << 20) + 1))
    os.mkfifo(pipe)
    latin.write_bytes(b"\xe9")
    for path, reason in ((big, "1048577 bytes"), (pipe, "a pipe"), (latin, "UTF-8"), (tmp_path, "a folder")):
        with pytest.raises(RequestError, match=f"{reason}.* give plain, corenet"):
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], path)
