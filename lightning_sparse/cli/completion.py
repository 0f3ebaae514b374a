"""`lightning-sparse completion SHELL`: a script that completes commands, options, configurations and methods.

The words are written into the script, because importing torch at every key press would take seconds.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout, suppress

from lightning_sparse.cli.configs import config_names
from lightning_sparse.cli.methods import METHODS
from lightning_sparse.cli.run import options

__all__ = ["completion"]

SHELLS = ("bash", "zsh", "fish")

BASH = """# bash: lightning-sparse completion bash >> ~/.bashrc
_lightning_sparse() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    [[ $before == "=" ]] && before="${{COMP_WORDS[COMP_CWORD-2]}}"
    [[ $word == "=" ]] && word=""
    if [[ $COMP_CWORD == 1 ]]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [[ $before == --config || $before == -c ]]; then
        COMPREPLY=($(compgen -W "{configs}" -- "$word") $(compgen -f -- "$word"))
    elif [[ $word == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{bash_cases}
        esac
    elif [[ ${{COMP_WORDS[1]}} == methods ]]; then
        COMPREPLY=($(compgen -W "{methods}" -- "$word"))
    elif [[ ${{COMP_WORDS[1]}} == completion ]]; then
        COMPREPLY=($(compgen -W "{shells}" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o default -F _lightning_sparse lightning-sparse"""

ZSH = "# zsh: lightning-sparse completion zsh >> ~/.zshrc\nautoload -U +X bashcompinit && bashcompinit\n" + BASH

FISH = """# fish: lightning-sparse completion fish > ~/.config/fish/completions/lightning-sparse.fish
complete -c lightning-sparse -n __fish_use_subcommand -f -a "{commands}"
complete -c lightning-sparse -l config -s c -r -a "{configs}"
complete -c lightning-sparse -n "__fish_seen_subcommand_from methods" -f -a "{methods}"
complete -c lightning-sparse -n "__fish_seen_subcommand_from completion" -f -a "{shells}"
{fish_options}"""


def completion(args: list[str], run: Iterable[str], others: Mapping[str, Callable[[list[str]], None]]) -> None:
    """Print the script that a shell needs to complete this command line.

    Args:
        args: the shell.
        run: the commands that run a configuration.
        others: all other commands.
    """
    parser = argparse.ArgumentParser(
        "lightning-sparse completion", description="Print a script that completes commands, options and configurations."
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell whose startup file will contain the script")
    shell = parser.parse_args(args).shell

    flags = options() | {name: _flags(command) for name, command in others.items()}
    cases = [f'        {name}) COMPREPLY=($(compgen -W "{" ".join(found)}" -- "$word"));;' for name, found in flags.items()]
    lines = [
        f'complete -c lightning-sparse -n "__fish_seen_subcommand_from {name}" -l {flag.removeprefix("--")}'
        for name, found in flags.items()
        for flag in found
    ]
    print(
        {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell].format(
            commands=" ".join([*run, *others]),
            configs=" ".join(config_names()),
            shells=" ".join(SHELLS),
            methods=" ".join(method.__name__ for method in METHODS),
            bash_cases="\n".join(cases),
            fish_options="\n".join(lines),
        )
    )


def _flags(command: Callable[[list[str]], None]) -> list[str]:
    """The options on the help page of a command."""
    page = io.StringIO()
    with redirect_stdout(page), suppress(SystemExit):
        command(["--help"])
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[\w-]+", page.getvalue())))
