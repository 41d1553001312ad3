"""Completion scripts for bash, zsh and fish: every command, its flags, and the choices of their values.

The script is made from the parsers once, so that a shell need not start Python to complete a word.
"""

from __future__ import annotations

import os
import re
import shlex
from argparse import Action
from collections.abc import Mapping
from pathlib import Path

from ..errors import RequestError
from .flags import Parser, Switch

# A command's name, with its line of help and its parser.
Commands = Mapping[str, tuple[str, Parser]]

_BASH = """\
_{function}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command= word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case $word in {commands}) command=$word; break;; esac
    done
    COMPREPLY=()
    case "$command $previous" in
{values}
    esac
    case "$command $current" in
{flags}
    esac
}}
complete -o default -F _{function} {program}"""

# With the name of the program in the first line, zsh finds the file by itself.
_ZSH = """\
#compdef {program}
_{function}() {{
    local current=$words[CURRENT] previous=$words[CURRENT-1] command= word
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case $word in {commands}) command=$word; break;; esac
    done
    case "$command $previous" in
{values}
    esac
    case "$command $current" in
{flags}
        *) _files;;
    esac
}}
# zsh runs the file itself when it is on fpath.
if [[ $funcstack[1] == _{program} ]]; then _{function} "$@"; else compdef _{function} {program}; fi"""


def script(shell: str, program: str, own: Parser, commands: Commands) -> str:
    """The completion script of a shell.

    Args:
        own: the parser of the flags before the command.

    Raises:
        RequestError: an unknown shell.
    """
    if shell == "fish":
        return _fish(program, own, commands)
    if shell not in ("bash", "zsh"):
        raise RequestError(f"Completion is for bash, zsh and fish, not {shell}; name one of them.")
    reply = 'COMPREPLY=($(compgen -W "{}" -- "$current"))' if shell == "bash" else "compadd -- {}"
    values, flags = [], []
    parsers = {"": own} | {name: parser for name, (_, parser) in commands.items()}
    for name, parser in parsers.items():
        for action in _actions(parser):
            if choices := _choices(action):
                pattern = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                values.append(f"        {pattern}) {reply.format(' '.join(choices))}; return;;")
        flags.append(f'        "{name} -"*) {reply.format(" ".join(parser.flags))};;')
    flags.append(f'        " "*) {reply.format(" ".join(commands))};;')
    template = _BASH if shell == "bash" else _ZSH
    return template.format(
        function=program.replace("-", "_"),
        program=program,
        commands="|".join(commands),
        values="\n".join(values),
        flags="\n".join(flags),
    )


def install(shell: str, program: str, text: str) -> str:
    """Write the script where the shell looks for it, and return what to tell the user."""
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    paths = {
        "bash": data / "bash-completion" / "completions" / program,
        "zsh": home / ".zfunc" / f"_{program}",
        "fish": config / "fish" / "completions" / f"{program}.fish",
    }
    path = paths[shell]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")
    needs = {
        "bash": f"New shells read it if the package bash-completion is installed. If it is not, add to ~/.bashrc: "
        f"source {shlex.quote(str(path))}",
        "zsh": "If ~/.zshrc does not have it yet, add: fpath+=~/.zfunc; autoload -Uz compinit && compinit",
        "fish": "New shells read it.",
    }
    return f"Wrote {path}. {needs[shell]}"


def _fish(program: str, own: Parser, commands: Commands) -> str:
    lines = []
    for name, (line, _) in commands.items():
        lines.append(f"complete -c {program} -n __fish_use_subcommand -f -a {name} -d {_quoted(line)}")
    parsers = {"__fish_use_subcommand": own}
    parsers |= {f"__fish_seen_subcommand_from {name}": parser for name, (_, parser) in commands.items()}
    for condition, parser in parsers.items():
        for action in _actions(parser):
            flags = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings]
            choices = _choices(action)
            value = f" -x -a {_quoted(' '.join(choices))}" if choices else " -r" if action.nargs is None else ""
            # The first sentence says enough.
            about = _quoted(re.split(r"[.;:] ", action.help or "")[0].rstrip("."))
            lines.append(f"complete -c {program} -n {_quoted(condition)} {' '.join(flags)}{value} -d {about}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A word of fish, in which a backslash escapes a quote inside of quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _actions(parser: Parser) -> list[Action]:
    """The flags, each once."""
    return list(dict.fromkeys(parser.flags.values()))


def _choices(action: Action) -> list[str]:
    """The words of `mlx|peft`; one in capitals, like FILE, stands for something else. Switches need no value."""
    if isinstance(action, Switch) or "|" not in str(action.metavar):
        return []
    return [word for word in str(action.metavar).split("|") if not word.isupper()]
