"""`mlx-openelm serve`: an HTTP server with OpenAI's protocol."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from collections.abc import Sequence
from copy import copy
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

from .. import console, errors
from ..errors import RequestError, quote
from ..hub import catalog
from ..inputs import to_path
from ..loading import load
from ..messages import warn
from ..model import OpenELM
from ..serving.options import ServeOptions
from ..sources import open_source
from ..text.chat_template import NAMED_TEMPLATES, find_template
from ..text.tokenizer import Tokenizer
from ..wording import counted, install
from . import flags

if TYPE_CHECKING:
    from ..serving.models import Models

MAIN_FLAGS = ("--model", "--adapter", "--host", "--port", "--chat-template", "--api-key-file", "--max-tokens", "--temp")
EXAMPLES = """\
  mlx-openelm serve
  mlx-openelm serve --model 1.1b-instruct --port 8000 --api-key-file keys.txt
  mlx-openelm serve --model small=270m --model large=3b --model-bytes 8GB
  mlx-openelm serve --model 270m --adapter expenses=my_adapter --prompt-cache-dir held"""

log = logging.getLogger("mlx_openelm.serving")

OWN = "own"
_PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `serve` to its parser."""
    common, model, limits = parser.groups["Common flags"], parser.groups["Model"], parser.groups["Limits"]
    cache, output = parser.groups["Key-value cache"], parser.groups["Network"]
    common.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]MODEL",
        help="Model to serve, and the name that requests give it; repeatable, the first is used where none is named.  "
        f"[default: {catalog.TINY}]",
    )
    common.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=PATH",
        help="Adapter that requests may use, as the model MODEL:NAME; repeatable.",
    )
    parser.groups["Prompt"].add_argument(
        "--chat-template",
        metavar="own|plain|corenet|FILE",
        help="How to write a conversation.  [default: the model's own, else plain]",
    )
    output.add_argument(
        "--api-key-file", metavar="FILE", help="File with API keys, one a line; requests then need one of them."
    )
    flags.add_fields(parser, ServeOptions)
    limits.add_argument(
        "--memory-limit",
        type=flags.memory_size,
        metavar="SIZE",
        help="Memory that all texts may take besides the models, such as 4GB; others wait.  "
        "[default: half of what is free]",
    )
    limits.add_argument(
        "--model-bytes",
        type=flags.memory_size,
        metavar="SIZE",
        help="Memory of all models that are loaded at a time; the least recently used leaves for another.  "
        "[default: most of what is free]",
    )
    cache.add_argument(
        "--prompt-cache-bytes",
        type=flags.memory_size,
        metavar="SIZE",
        help="Memory for what prompts begin with, which later ones share.  [default: a quarter of what is free]",
    )
    cache.add_argument(
        "--prompt-cache-dir", metavar="FOLDER", help="Keep what prompts begin with in this folder across restarts."
    )
    cache.add_argument(
        "--warm",
        metavar="FILE",
        help="Process these prompts at the start, one a line; in a .jsonl file objects with prompt or messages.",
    )
    parser.groups["Drafts"].add_argument(
        "--draft-model",
        metavar="auto|MODEL",
        help="Smaller model that drafts tokens, which the model checks several at a time.",
    )
    flags.add_shared(model, "--tokenizer", "--config-yaml", "--revision", "--dtype", "--expand", "--exact-activations")


def run(args: Namespace) -> int:
    """Serve models over HTTP, with OpenAI's protocol and a chat page at /.

    The server listens on this machine only, unless --host says otherwise. Ctrl-C finishes what runs, and then ends.
    """
    given = flags.given(args, ServeOptions)
    options = ServeOptions(**given)
    options.validate()
    if options.num_draft_tokens and args.draft_model is None:
        raise RequestError("--num-draft-tokens needs --draft-model.")
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise RequestError(f"The server needs {', '.join(missing)}: {install('serve')}.")
    from ..serving.limits import read_keys
    from ..serving.running import listen, url_of

    names, adapters = read_names(args.model or [catalog.TINY]), read_adapters(args.adapter or [])
    keys = None if args.api_key_file is None else read_keys(to_path(args.api_key_file))
    if args.chat_template not in (None, OWN, *NAMED_TEMPLATES):
        find_template(args.chat_template)
    with listen(options.host, options.port) as bound:
        return _serve(args, options, names, adapters, keys, bound, url_of(bound))


def _serve(
    args: Namespace,
    options: ServeOptions,
    names: dict[str, str],
    adapters: dict[str, str],
    keys: list[str] | None,
    bound: Any,
    url: str,
) -> int:
    """Load the models and serve them on a socket."""
    from ..serving.app import make_app
    from ..serving.context import Context
    from ..serving.metrics import Metrics
    from ..serving.models import Models
    from ..serving.running import make_server
    from ..serving.running import run as run_server
    from ..serving.worker import Worker

    models = Models(
        names,
        adapters,
        partial(open_source, tokenizer=args.tokenizer, config_yaml=args.config_yaml, revision=args.revision),
        partial(_load, args),
        max_rows=options.max_rows,
        max_bytes=args.model_bytes,
        text_bytes=args.memory_limit,
        prefix_bytes=args.prompt_cache_bytes,
        folder=None if args.prompt_cache_dir is None else to_path(args.prompt_cache_dir),
    )
    template = use_template(args.chat_template, models)
    gave_up: list[bool] = []

    def give_up() -> None:
        gave_up.append(True)
        server.should_exit = True

    metrics = Metrics()
    worker = Worker(models, metrics, options.max_rows + options.max_queue, give_up)
    context = Context(worker, options, metrics, template)
    worker.start()
    worker.run(models.load_first).result()
    if args.warm is not None:
        _warm(context, args.warm)
    is_local = is_loopback(bound)
    if not is_local and keys is None:
        warn("The server can be reached from other machines, and asks nobody for an API key; see --api-key-file.")
    app = make_app(context, keys=keys, hosts=[options.host.lower()] if is_local and keys is None else None)
    server = make_server(app, options.log_level.upper(), lambda: console.say(f"Serving {_listed(models)} at {url}"))
    errors.names_flags = False  # clients know no flags
    warnings.filterwarnings("ignore", "The (prompt|text) ")  # of single requests, whose clients do not see them
    warnings.showwarning = lambda message, *_: log.warning("%s", models.without_paths(str(message)))  # type: ignore
    run_server(server, bound)
    return int(bool(gave_up))


def is_loopback(bound: socket) -> bool:
    """Whether only this machine can reach a socket: its address says so, not a name like localhost.example.com."""
    return ip_address(bound.getsockname()[0]).is_loopback


def _listed(models: Models) -> str:
    return ", ".join(name for name, _ in models.names())


def _warm(context: Any, name: str) -> None:
    from ..serving.warming import missed_prompts, read_warm, warm

    prompts = read_warm(context, name)
    missed = context.worker.run(lambda: warm(context, prompts)).result()
    count = sum(len(one.ids) for one in prompts)
    console.say(f"Processed {counted(len(prompts), 'prompt')} of {counted(count, 'token')}")
    if missed:
        warn(missed_prompts(context, name, missed))


def _load(args: Namespace, source: str) -> tuple[OpenELM, Tokenizer, OpenELM | None]:
    """A model, its tokenizer, and its draft model."""
    names = ("tokenizer", "config_yaml", "revision", "expand", "exact_activations")
    model, tokenizer = load(source, dtype=args.dtype, **{name: getattr(args, name) for name in names})
    if args.draft_model is None:
        return model, tokenizer, None
    from .drafts import load_draft_model

    of_this = copy(args)
    of_this.model = source
    return model, tokenizer, load_draft_model(of_this, model, tokenizer)


def read_names(given: Sequence[str]) -> dict[str, str]:
    """Models by the names of `[NAME=]MODEL`; without a name the model's own, or that of its folder or file.

    Raises:
        RequestError: two models with one name.
    """
    names: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals or Path(text).exists():
            name, model = _name_of(text), text
        if not name.strip() or not model:
            raise RequestError(f"--model must be MODEL or NAME=MODEL, got {quote(text)}.")
        if name in names:
            raise RequestError(f"Two models have the name {quote(name)}; give one another: --model NAME={model}.")
        names[name] = model
    return names


def _name_of(model: str) -> str:
    """The name of a model that was given none: a path shows its last part only."""
    path = Path(model).expanduser()
    if path.exists() and catalog.find(model) is None:
        return path.resolve().name
    return model


def read_adapters(given: Sequence[str]) -> dict[str, str]:
    """Adapters by the names of `NAME=PATH`.

    Raises:
        RequestError: no name, a name with a colon, or one twice.
    """
    adapters: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name.strip() or not path or ":" in name:
            raise RequestError(f"--adapter must be NAME=PATH, without a colon in the name, got {quote(text)}.")
        if name in adapters:
            raise RequestError(f"Two adapters have the name {quote(name)}; give one another.")
        adapters[name] = path
    return adapters


def use_template(template: str | None, models: Models) -> str | None:
    """The `Context.template` for `--chat-template`; a file is read once, and becomes the own template of every model.

    Raises:
        RequestError: a model has no template of its own, or the file cannot be read.
    """
    if template is None or template in NAMED_TEMPLATES:
        return template
    if template != OWN:
        source = find_template(template)
        for entry in models.entries.values():
            entry.tokenizer.chat_template = source
    for entry in models.entries.values():
        if entry.tokenizer.chat_template is None:
            raise RequestError(f"{entry.name} has no chat template of its own; choose plain, corenet or a file.")
    return None
