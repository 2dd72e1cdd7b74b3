"""Command lines whose mistakes are one line: argparse without usage dumps, abbreviations or an exit of its own."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from ldm.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises `UserError` in one line, with the nearest option for an unknown one.

    What has no `type` names something, and may not be empty; `type=str` takes any text.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL):
            name, kind, value = found.groups()
            raise UserError(f"{name} is {value}; it must be a {'whole ' if kind == 'int' else ''}number")
        raise UserError(f"{' '.join(message.split())}; see `{self.prog} --help`")

    # argparse reports a missing option before an unknown one, so the unknown one is looked for first.
    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown_options(args)
        namespace, rest = super().parse_known_args(args, namespace)
        self._refuse_empty_names(namespace)
        return namespace, rest

    def parse_known_intermixed_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown_options(args)
        return super().parse_known_intermixed_args(args, namespace)

    def _refuse_unknown_options(self, arguments: Sequence[str]) -> None:
        known = [name for action in self._actions for name in action.option_strings]
        for argument in arguments:
            if argument == "--" or (self._subparsers is not None and not argument.startswith("-")):
                return  # what follows is positional, or a subcommand's own
            name = argument.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][\w-]*", name) and name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                remedy = f"did you mean '{nearest[0]}'?" if nearest else f"the options are {', '.join(known)}"
                raise UserError(f"unknown option '{name}'; {remedy}")

    def _refuse_empty_names(self, namespace: argparse.Namespace) -> None:
        for action in self._actions:
            values = getattr(namespace, action.dest, None)
            for value in values if isinstance(values, list) else [values]:
                if action.type is None and isinstance(value, str) and not value.strip():
                    name = action.option_strings[0] if action.option_strings else action.metavar
                    raise UserError(f"{name} '{value}' is empty; give a name, see `{self.prog} --help`")


def parse_training_arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a training script: `--config PATH [--resume] [key=value ...]`, in any order.

    `argv` defaults to the process's arguments. Returns `config` (str), `resume` (bool) and `overrides` (list of
    `key=value`). Raises `UserError` for anything else.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", metavar="PATH", required=True, help="the YAML file of this stage")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of output_dir")
    parser.add_argument("overrides", metavar="key=value", nargs="*", type=str, help="values that replace the file's")
    arguments = parser.parse_intermixed_args(argv)
    for override in arguments.overrides:
        if not re.match(r"[^=\s]+=", override):
            raise UserError(f"override '{override}' is not key=value, e.g. training.max_steps=500")
    return arguments
