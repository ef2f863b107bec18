"""Records as they may be read by everybody: no paths of the machine, and addresses without user, password and query."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote


_END = r"\s\"'`<>"  # characters that end an address or a path within a text
_PART = rf"/[^{_END}/|,;:()\[\]{{}}]+"
_HOST = re.compile(r"(?:[\w.*-]*|\[[\da-f:.]+\])(?::\d*)?", re.IGNORECASE)
_PRIVATE = re.compile(
    rf"""
    (?P<address>[a-z][a-z0-9+.-]*://[^{_END}]*)
    | (?P<windows>(?<!\w)(?:[a-z]:[\\/]|\\\\[^{_END}\\]+\\)[^{_END}|,;]+)
    | (?P<path>(?<![\w<./~)\]}}*%-])(?:~[\w.-]*(?:{_PART})+|(?:{_PART}){{2,}}|\.\.(?:{_PART})+)/?)
    | (?P<user>(?<!\w)(?!mailto:)[^{_END}/@:(]+:[^{_END}/@]+@(?=[\w.]))
    | (?P<query>\?[\w.%-]+=[^{_END})\]]*)
    """,
    re.VERBOSE | re.IGNORECASE,
)


def public(value: Any) -> Any:
    """The value with every string in it, also in lists and dicts, made public."""
    if isinstance(value, dict):
        return {public(name): public(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    return public_text(_last_part(value) if _is_outside(value) else value)


def public_text(text: str) -> str:
    """A text in which paths outside the working folder are cut to their last part, and addresses say only where they lead."""
    return _PRIVATE.sub(_replaced, text)


def _is_outside(value: str) -> bool:
    """Whether a string as a whole is a path, or the address of a file, outside the working folder."""
    return value.startswith(("/", "~", "../", "..\\")) or bool(
        re.match(r"file:|[a-z]:[\\/]|\\\\", value, re.IGNORECASE)
    )


def _last_part(path: str) -> str:
    name = PureWindowsPath(PurePosixPath(unquote(path) if path.lower().startswith("file:") else path).name).name
    return "~" if name.startswith("~") and PurePosixPath(path).parent.name == "" else name  # `~alice` is a home too


def _replaced(match: re.Match) -> str:
    text = match[0]
    if match["address"]:
        return _public_address(text)
    return _last_part(text) if match["windows"] or match["path"] else ""


def _public_address(address: str) -> str:
    closing = address.find(")")
    if closing >= 0 and "(" not in address[:closing] and "@" not in address[closing:]:  # a link in Markdown ends here
        return _public_address(address[:closing]) + public_text(address[closing:])
    scheme, _, rest = address.partition("://")
    if scheme.lower() == "file":
        return _last_part(address)
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2]
    if not _HOST.fullmatch(host) or ("@" in rest and ":" in authority and "@" not in authority):
        # A password with a slash or the like: only what follows the last @ is surely none of it.
        before, _, after = rest.rpartition("@")
        return _public_address(f"{scheme}://{after}") if before else f"{scheme}://"
    return f"{scheme}://{host}{slash}{path}"
