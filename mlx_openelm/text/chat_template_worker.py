"""The process that renders chat templates: `chat_template_process` starts this file as a script and talks to it.

A chat template is a program that somebody else wrote. jinja2's sandbox blocks files and attributes, but not
`"x" * 10**9`, `10**10**8`, or comparing deeply nested lists. These are calls into C, which neither a signal handler nor
another thread can interrupt, and there are too many to wrap one by one. The kernel can end a separate process at any
time: with a timer on CPU time and a limit on memory.

Nothing else of the package is imported here, so that only Python and jinja2 have to start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

# Real templates take milliseconds and a few MB.
CPU_SECONDS = 0.5
MEMORY_BYTES = 100 << 20
# The longest text, in addition to ten times the length of the request: far more than a model's context.
MAX_CHARACTERS = 1 << 18
# This process's exit statuses.
OUT_OF_MEMORY = 77
NO_JINJA = 78


@lru_cache(maxsize=8)
def compile_template(source: str) -> Any:
    """A template in the environment that transformers 5 gives it (`utils/chat_template_utils.py`)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text. It renders its body unchanged, in its own scope."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> str:
            return caller()

    class PublicNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # like jinja2's, which also accepts a name `self`
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                refuse_private(name)
            Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: Any, value: Any) -> None:
            refuse_private(name)
            Namespace.__setitem__(self, name, value)

    class Dict:
        """`dict` without the class's own attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict:
            return dict.fromkeys(*args)

    def refuse_private(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a name in a namespace must not begin with _, as {name!r} does")

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        dict=Dict(),
        namespace=PublicNamespace,
    )
    return environment.from_string(source)


def answer(line: bytes) -> dict[str, str]:
    """The answer to a request in JSON: the `text`, or the `error` that the template raised and its `place`."""
    request = json.loads(line)
    try:
        text = compile_template(request["template"]).render(request["variables"])
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    # A template can raise anything, from a syntax error to a division by zero.
    except Exception as error:
        place = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
        return {"error": str(error)[:1000] or type(error).__name__, "place": place}
    limit = MAX_CHARACTERS + 10 * len(line)
    if len(text) > limit:
        return {"error": f"it renders {len(text)} characters, more than {limit}", "place": ""}
    return {"text": text}


def main(path: list[str], limits_itself: bool) -> None:
    """Answer the requests on standard input, one per line, until it is closed.

    Args:
        path: where to look for jinja2, the parent's `sys.path`.
        limits_itself: whether the system enforces the memory limit; otherwise the parent watches the memory.
    """
    sys.path[:] = path
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process even in the middle of a call
    try:
        compile_template("")
    except ImportError:
        os._exit(NO_JINJA)
    if limits_itself:
        import resource

        # This limits allocations, not mapped libraries. A larger allocation fails at once.
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    try:
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            reply = json.dumps(answer(line), ensure_ascii=False).encode("utf-8", "surrogatepass")
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.buffer.write(reply + b"\n")
            sys.stdout.buffer.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
