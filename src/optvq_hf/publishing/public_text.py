"""Records as they may be read by everybody: no paths of the machine, no tokens, no users at hosts, and addresses without user,
password and query."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote


_END = r"\s\"'`<>"  # characters that end an address or a path within a text
_PART = rf"/[^{_END}/|,;:()\[\]{{}}]+"
_START = rf"(?<![^{_END}|,;:()=])"
_HOST = re.compile(r"(?:[\w.*-]*|\[[\da-f:.]+\])(?::\d*)?", re.IGNORECASE)
_ADDRESS = rf"[a-z][a-z0-9+.-]*://[^{_END}]*"
# Tokens of the Hub, GitHub, GitLab, OpenAI, Slack and AWS.
_TOKEN = (
    r"(?:hf|gh[opusr])_[a-z0-9]{30,}|github_pat_\w{20,}|(?<![\w-])(?:glpat|sk|xox[abprs])-[\w-]{20,}"
    r"|(?-i:AKIA[0-9A-Z]{16})"
)
_AT_HOST = r"(?<![\w.+@/-])(?<!mailto:)[\w.+-]*\w@(?:\w[\w.-]*|\[[\da-f:.]+\])"
_HOME = rf"[\\/]+(?:home|users)[\\/]+[^{_END}\\/|,;:()\[\]{{}}]+"
_PRIVATE = re.compile(
    rf"""
    (?P<token>{_TOKEN})
    | (?P<address>{_ADDRESS})
    | (?P<encoded>{_START}[^{_END}]*%(?:25)*(?:2f|5c|40|7e)[^{_END}]*)
    | (?P<home>{_START}[^{_END}|,;:()=]*?{_HOME}(?:[\\/][^{_END}|,;:()]*)?)
    | (?P<variable>(?-i:\$\{{?[A-Z_][A-Z0-9_]+\}}?|%[A-Z_][A-Z0-9_]+%)[\\/][^{_END}|,;]*)
    | (?P<windows>(?<!\w)(?:[a-z]:[\\/]|\\\\[^{_END}\\]+\\)[^{_END}|,;]+)
    | (?P<path>(?<![\w<./~)\]}}*%-])(?:~[\w.-]*(?:{_PART})+|(?:{_PART}){{2,}}|\.\.(?:{_PART})+)/?)
    | (?P<at_host>{_AT_HOST}(?::[^{_END}]*)?)
    | (?P<user>(?<!\w)(?!mailto:)[^{_END}/@:(]+:[^{_END}/@]+@(?=[\w.]))
    | (?P<query>\?[\w.%-]+=[^{_END})\]]*)
    """,
    re.VERBOSE | re.IGNORECASE,
)
# What must not be left in a file that is published, by what it looks like.
_LEFT = {"a token": _TOKEN, "a user at a host": _AT_HOST, "a home folder": _HOME}


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


def private_parts(text: str) -> str | None:
    """What a text holds that nobody else may read: a net under [`public`], for whole files. None if it holds nothing."""
    text = re.sub(_ADDRESS, " ", text, flags=re.IGNORECASE)
    return next((kind for kind, pattern in _LEFT.items() if re.search(pattern, text, re.IGNORECASE)), None)


def _is_outside(value: str) -> bool:
    """Whether a string as a whole is a path, or the address of a file, outside the working folder."""
    return value.startswith(("/", "~", "../", "..\\")) or bool(
        re.match(r"file:|[a-z]:[\\/]|\\\\", value, re.IGNORECASE)
    )


def _last_part(path: str) -> str:
    whole = PureWindowsPath(unquote(path) if path.lower().startswith("file:") else path)
    name = whole.name
    if whole.parent.name.lower() in ("home", "users"):  # the name of a user
        return "~"
    return "~" if name.startswith("~") and PurePosixPath(path).parent.name == "" else name  # `~alice` is a home too


def _replaced(match: re.Match) -> str:
    text = match[0]
    if match["address"]:
        return _public_address(text)
    if match["encoded"]:
        return public(_decoded(text))
    return _last_part(text) if match.lastgroup in ("home", "variable", "windows", "path") else ""


def _decoded(text: str) -> str:
    """A text without percent encoding, also of what was encoded twice."""
    while (decoded := unquote(text)) != text:
        text = decoded
    return text


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
