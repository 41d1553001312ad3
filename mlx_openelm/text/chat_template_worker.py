"""The process that renders chat templates: `chat_template_process` starts this file as a script and talks to it.

A chat template is a program that somebody else wrote. A sandbox keeps it from files and attributes, but not from
`"x" * 10**9`, `10**10**8`, or comparing lists that hold one another forty levels deep: calls into C that no signal
handler and no other thread can interrupt, and far too many to wrap one by one. A process of its own can be ended at
any time, by the kernel: a timer for the processor time, a limit for the memory.

Nothing of the package is imported here, so that starting costs Python and jinja2 alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

# Real templates take milliseconds, and a few MB.
CPU_SECONDS = 0.5
MEMORY_BYTES = 100 << 20
# How long the text may be, beside ten times what the request takes: far beyond what a model reads at once.
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
        """`{% generation %}` marks what an assistant says. It changes no text, but is a scope of its own."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> str:
            return caller()

    class PublicNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2's, so that `self` may be a name in it
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
            raise jinja2.exceptions.SecurityError(f"a namespace holds no names that begin with _, such as {name!r}")

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
    """The answer to a request, both JSON: `text`, or the `error` that the template raised and where."""
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
    """Answer the requests on standard input, a line each, until it is closed.

    Args:
        path: where to look for jinja2, the parent's `sys.path`.
        limits_itself: whether the system keeps the limit; else the parent watches the memory.
    """
    sys.path[:] = path
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, in the middle of a call, too
    try:
        compile_template("")
    except ImportError:
        os._exit(NO_JINJA)
    if limits_itself:
        import resource

        # What is allocated, and no libraries. An allocation beyond it fails at once, however large.
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
