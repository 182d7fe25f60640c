"""Command lines of the commands that have no config: options of a dataclass, flags, a place. Mistakes become InputError."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from data.errors import InputError


def parser_of(description: str) -> Any:
    """A parser whose first word is its command: `name: what it does`."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        exit_on_error=False, description=description, prog=f"python -m pretrain {description.split(':')[0]}"
    )


def options(cls: type, name: str, arguments: Sequence[str], positional: str = "") -> Any:
    """An options dataclass from a command line; its docstring is the help. `positional`: a list field given without its name."""
    parser = parser_of(f"{name}: {(cls.__doc__ or '').splitlines()[0]}")
    if positional:
        parser.add_argument(positional, nargs="*", default=[], help="files and folders to read")
    parser.add_class_arguments(cls, skip={positional} if positional else None)
    for field in dataclasses.fields(cls):
        arguments = flag(arguments, f"--{field.name}") if field.type in ("bool", bool) else arguments
    return cls(**vars(parser.instantiate(parse(parser, name, arguments))))


def flag(arguments: Sequence[str], option: str) -> list[str]:
    """`--quiet` alone means `--quiet true`."""
    found = list(arguments)
    for at, argument in enumerate(arguments):
        if argument == option and (at + 1 == len(arguments) or arguments[at + 1].startswith("--")):
            found[at] = f"{option}=true"
    return found


def _dashes_to_underscores(argument: str) -> str:
    """--val-fraction is accepted for --val_fraction."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def located(cls: type, name: str, arguments: Sequence[str]) -> Any:
    """An options dataclass whose field `location` is the argument without a name."""
    parser = parser_of(f"{name}: {(cls.__doc__ or '').splitlines()[0]}")
    parser.add_argument("location", help="a folder that holds manifest.json, or its address (https://, s3://, gs://)")
    parser.add_class_arguments(cls, skip={"location"})
    return cls(**vars(parser.instantiate(parse(parser, name, arguments))))


def parse(parser: Any, name: str, arguments: Sequence[str]) -> Any:
    """The values of a command line; InputError in one line."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args([_dashes_to_underscores(a) for a in arguments])
    except ArgumentError as error:
        raise InputError(
            f"{name}: {' '.join(str(error).split())}; `python -m pretrain {name} --help` shows the options"
        ) from None
