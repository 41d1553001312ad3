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
from ..hub import catalog
from .flags import Parser

_MODELS = [*catalog.PACKAGED, *(alias for release in catalog.releases() for alias in release.aliases)]

# The flags whose values are lists with commas.
_LISTS = {"--method", "--report-to", "--target-modules"}
# What completes one of some words, and the last word of a list.
_REPLIES = {
    "bash": (
        'COMPREPLY=($(compgen -W "{}" -- "$current"))',
        'COMPREPLY=($(compgen -P "${{current%"${{current##*,}}"}}" -W "{}" -- "${{current##*,}}"))',
    ),
    "zsh": ("compadd -- {}", "compset -P '*,'; compadd -S '' -- {}"),
}

# A command's name, with its line of help and its parser.
Commands = Mapping[str, tuple[str, Parser]]

_BASH = """\
_{function}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command= word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case $word in {commands}) command=$word; break;; esac
    done
    COMPREPLY=()
    # bash makes words of --flag=value: the flag, = and the value.
    if [[ $current == = ]]; then current=; elif [[ $previous == = ]]; then previous=${{COMP_WORDS[COMP_CWORD-2]}}; fi
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
    if [[ $current == --*=* ]]; then previous=${{current%%=*}}; compset -P 1 '*='; fi
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
        raise RequestError(f"No completion for {shell}; choose bash, zsh or fish.")
    reply, of_list = _REPLIES[shell]
    # bash completes files by itself if no choice fits.
    or_file = "" if shell == "bash" else "; _files"
    values, flags = [], []
    parsers = {"": own} | {name: parser for name, (_, parser) in commands.items()}
    for name, parser in parsers.items():
        for action in _actions(parser):
            choices, takes_others = _choices(action)
            if choices:
                pattern = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                files = or_file if takes_others else ""
                found = (of_list if _LISTS & {*action.option_strings} else reply).format(" ".join(choices))
                values.append(f"        {pattern}) {found}{files}; return;;")
        flags.append(f'        "{name} -"*) {reply.format(" ".join(parser.flags))};;')
        if _takes_models(parser):
            others = [f'"{name} {flag}"' for flag, action in parser.flags.items() if _takes_anything(action)]
            values.append(f"        {'|'.join(others)}) {or_file.removeprefix('; ') or ':'}; return;;")
            flags.append(f'        "{name} "*) {reply.format(" ".join(_MODELS))}{or_file};;')
    flags.append(f'        " "*) {reply.format(" ".join(["help", *commands]))};;')
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
    lines.append(f"complete -c {program} -n __fish_use_subcommand -f -a help -d 'Show the help of a command'")
    of_help = _quoted("__fish_seen_subcommand_from help")
    lines.append(f"complete -c {program} -n {of_help} -f -a {_quoted(' '.join(commands))}")
    parsers = {"__fish_use_subcommand": own}
    parsers |= {f"__fish_seen_subcommand_from {name}": parser for name, (_, parser) in commands.items()}
    for condition, parser in parsers.items():
        for action in _actions(parser):
            flags = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings]
            choices, takes_others = _choices(action)
            kind = " -r" if takes_others else " -x" if choices else ""
            found = f"(__fish_append , {' '.join(choices)})" if _LISTS & {*action.option_strings} else " ".join(choices)
            value = f"{kind} -a {_quoted(found)}" if choices else kind
            # The first sentence says enough.
            about = _quoted(re.split(r"[.;:] ", action.help or "")[0].rstrip("."))
            lines.append(f"complete -c {program} -n {_quoted(condition)} {' '.join(flags)}{value} -d {about}")
        if _takes_models(parser):
            lines.append(f"complete -c {program} -n {_quoted(condition)} -a {_quoted(' '.join(_MODELS))}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A word in quotes for fish, where a backslash escapes a quote."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _actions(parser: Parser) -> list[Action]:
    """The flags, each once."""
    return list(dict.fromkeys(parser.flags.values()))


def _takes_models(parser: Parser) -> bool:
    """Whether the arguments, without a flag, are models."""
    return any(not action.option_strings and action.metavar == "MODEL" for action in parser._actions)


def _takes_anything(action: Action) -> bool:
    """Whether a flag has a value that is none of some choices."""
    return action.nargs != 0 and not _choices(action)[0]


def _choices(action: Action) -> tuple[list[str], bool]:
    """The words that the shell completes as the value of a flag, and whether files can be a value too.

    They are the words of a metavar like `mlx|peft`; one in capitals, like FILE, stands for any value.
    """
    if action.nargs == 0:
        return [], False
    words = str(action.metavar).split("|")
    choices = _MODELS if words == ["MODEL"] else [word for word in words if not word.isupper()]
    return choices, any(word.isupper() for word in words)
