"""Arguments of a command line: the files they name, and messages of functions in the words of its flags."""

import argparse
import os
import re
from pathlib import Path

_WORD = re.compile(
    r"""(?<![^\s"'`(])           # not in the middle of a path, nor of other settings
    (?P<name>[a-z]\w*)
    (?:=(?P<value>"[^"\s]+"|'[^'\s]+'|[\w.+-]*\w|(?=,)))?
    (?![^\s,.;:)"'`]|[.:]\w)""",
    re.VERBOSE,
)


def path(text: str) -> Path:
    """A file or folder, which may begin at the user's home (~): not every shell says so by itself."""
    return Path(named(text))


def named(text: str) -> str:
    """The same where it may be a model id as well."""
    return os.path.expanduser(text)


def in_flags(text: str, parser: argparse.ArgumentParser, args: argparse.Namespace, names: dict[str, str]) -> str:
    """A message that speaks of a function's arguments, `bits=4`, in the flags of a command line, `--bits 4`.

    What the user wrote stays as it is, and so do calls, which are code.

    Args:
        names: other names that arguments have in the function, and here.
    """
    options = {action.dest: action for action in parser._actions if action.option_strings}
    options |= {there: options[here] for there, here in names.items() if here in options}
    given = sorted((str(value) for value in vars(args).values() if isinstance(value, str | Path)), key=len)[::-1]
    kept = [value for value in given if "=" in value or "/" in value]
    for index, value in enumerate(kept):
        text = text.replace(value, f"\0{index}\0")
    found, end = [], 0
    for word in _WORD.finditer(text):
        name, option = word["name"], options.get(word["name"])
        said = None if option is None or _in_a_call(text[: word.start()]) else _flag(option, name, word["value"])
        if said is not None:
            found += [text[end : word.start()], said]
            end = word.end()
    text = "".join([*found, text[end:]]).replace("set no --", "leave out --")
    for index, value in enumerate(kept):
        text = text.replace(f"\0{index}\0", value)
    return text


def _flag(option: argparse.Action, name: str, value: str | None) -> str | None:
    """How one is said here; None where the word stays, which may be one of English."""
    flag, is_switch = option.option_strings[-1], option.nargs == 0
    if not value:
        return flag if value == "" or "_" in name else None
    if is_switch:
        return {"True": flag, "False": f"no {flag}"}.get(value)
    if value == "None":
        return f"{flag} none" if name == "tolerance" else None
    return f"{flag} {value.strip(chr(34) + chr(39))}"


def _in_a_call(before: str) -> bool:
    """Whether text ends between the parentheses of a call."""
    calls: list[bool] = []
    for at, sign in enumerate(before):
        if sign == "(":
            calls.append(at > 0 and (before[at - 1].isalnum() or before[at - 1] == "_"))
        elif sign == ")" and calls:
            calls.pop()
    return any(calls)
