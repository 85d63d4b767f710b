"""Removes passwords and keys from text: in URLs, by well-known formats, and the values of environment variables named like …_KEY
or …_TOKEN.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable
from typing import Any

_WORD = r"(?:token|key|secret|signature|sig|credential|password)"
# Every repetition before a fixed word has a bound: without, a long line would take time that grows with its square.
# Formats that services give their keys, by their fixed beginnings.
_KEYS = (
    r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}",  # Hugging Face
    r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}",  # AWS
    r"sk-(?=[\w-]*\d)[\w-]{20,}|xai-[\w-]{20,}|gsk_\w{20,}|pplx-\w{20,}|nvapi-[\w-]{20,}|r8_\w{30,}",  # OpenAI, Anthropic, …
    r"gh[opsur]_\w{30,}|github_pat_\w{20,}",
    r"gl(?:pat|dt|rt|ptt|cbt|ft|imt|agent|soat|oas|ffct)-[\w.-]{20,}",  # GitLab
    r"xox[a-z](?:\.xox[a-z])?-[\w-]{10,}|xapp-[\w-]{10,}|(?<=hooks\.slack\.com/services/)[\w/]{20,}",  # Slack
    r"AIza[\w-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}",  # Google
    r"(?:[srp]k|rk)_(?:live|test)_\w{16,}|whsec_[\w+/=]{20,}",  # Stripe
    r"npm_[A-Za-z0-9]{36,}|pypi-[\w-]{50,}|dckr_(?:pat|oat)_[\w-]{20,}|dapi[0-9a-f]{32}",  # npm, PyPI, Docker, Databricks
    r"SG\.[\w-]{16,}\.[\w-]{16,}|hvs\.[\w-]{20,}|dop_v1_[0-9a-f]{40,}|shp(?:at|ss|ca|pa)_[0-9a-fA-F]{32}",
    r"lin_api_\w{30,}|ntn_\w{30,}|ATATT3[\w=-]{20,}|wandb_v1_\w{20,}|AGE-SECRET-KEY-1[0-9A-Z]{50,}|sntrys_[\w+/=]{30,}",
    r"eyJ[\w-]{10,}(?:\.[\w-]*){1,4}",  # JSON web tokens
)
# Names whose values are secret wherever they are written as `name=value` or `"name": "value"`.
_NAMED = (
    r"(?:[A-Za-z0-9]{1,40}[-_]){0,6}(?:password|passwd|passphrase|api[-_]?key|access[-_]?token|auth[-_]?token|refresh[-_]?token|"
    r"id[-_]?token|session[-_]?token|bot[-_]?token|client[-_]?secret|secret[-_]?(?:access[-_]?)?key|private[-_]?key|"
    r"access[-_]?key|account[-_]?key|encryption[-_]?key|signing[-_]?key)"
)
_SCREAMED = (  # as environments are printed; MAX_TOKENS, PWD and paths of key files are none
    r"(?:[A-Z0-9]{1,40}_){0,6}(?:[A-Z0-9]{0,20}PASSWORD|[A-Z0-9]{0,20}PASSWD|[A-Z0-9]{0,20}SECRET|(?<=_)PWD|(?<=_)TOKEN|(?<=_)KEY|(?<=_)PASS|"
    r"(?<=_)CREDENTIALS?|APIKEY)(?:_(?!FILE\b|PATH\b|DIR\b|NAME\b|ENV\b|TYPE\b|LEN|SIZE|COUNT|TTL|ARN\b)[A-Z0-9]{1,40}){0,4}"
)
_PLAIN_VALUE = r"(?!(?:null|none|true|false|\d{1,7})\b)"
_SECRETS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL), "…"),
    # user:password, whatever is in it but no port; then a user alone
    (
        re.compile(
            r"(?<!\w)(\w{1,32}://)(?:[^\s\"'</@:]{0,256}:(?!\d+(?:[/\s\"']|$))[^\s\"'<]{0,1024}|[^/@\s\"'<]{1,256})@"
        ),
        r"\1…@",
    ),
    (
        re.compile(
            rf"([?&;](?:[\w-]{{0,60}}[-_])?(?:{_WORD}|\w{{0,20}}AccessKeyId)(?:[-_][\w-]{{0,60}})?=)[^&\s\"'<;]+",
            re.IGNORECASE,
        ),
        r"\1…",
    ),
    (re.compile(rf"(?<![\w-])(?:{'|'.join(_KEYS)})"), "…"),
    (
        re.compile(
            r"(?<![\w-])((?:set-)?cookie[\"']?\s*[:=]\s*[\"']?)(?=[^\s\"',;]{6})[^\s\"',;]+(?:;\s*[^\s\"',;]+){0,100}",
            re.IGNORECASE,
        ),
        r"\1…",
    ),
    (
        re.compile(
            r"(?<![\w-])((?:proxy-)?authorization|x-[\w-]{0,60}(?:key|token)|private-token)"
            r"([\"']?\s*[:=]\s*[\"']?)(?:(bearer|basic|token|digest|negotiate)\s+)?(?=[^\s\"',;]{6})[^\s\"',]+",
            re.IGNORECASE,
        ),
        lambda m: f"{m[1]}{m[2]}{m[3] + ' ' if m[3] else ''}…",
    ),
    (re.compile(r"\b(B(?:earer|asic)\s+)(?=\S*[\d+/=]|\S{20})[\w.~+/=-]{12,}"), r"\1…"),
    (re.compile(rf"(?<![\w-])({_SCREAMED}\s*=\s*)(?:\"[^\"\n]+\"|'[^'\n]+'|{_PLAIN_VALUE}[^\s\"',;&]{{4,}})"), r"\1…"),
    (
        re.compile(
            rf"(?<![\w-])((?:--)?{_NAMED}\\{{0,3}}[\"']?\s*[:=]\s*|--{_NAMED}\s+(?!-))"
            rf"(?:\\{{1,3}}\"[^\"\n]{{4,}}\\{{1,3}}\"|\"[^\"\n]{{4,}}\"|'[^'\n]{{4,}}'|"
            rf"{_PLAIN_VALUE}[^\s\"',;&<>]{{4,}})",
            re.IGNORECASE,
        ),
        r"\1…",
    ),
)
_NAMES = re.compile(
    r"(?:(?:^|_)(?:KEYS?|TOKENS?|PASS|AUTH|CREDENTIALS?)|.PWD|APIKEY|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE)"
    r"(?:_(?!FILE$|PATH$|DIR$|NAME$|ENV$|TYPE$|SOCK$|MODE$|URL$)[A-Z0-9]+)*$",
    re.IGNORECASE,
)
_NO_SECRETS = re.compile(r"^(?:OLDPWD|PWD|(?:.*_)?(?:MAX|NUM|MIN)_[A-Z_]*TOKENS?.*|TOKENIZERS_.*)$", re.IGNORECASE)
_NAMED_KEY = re.compile(_NAMED, re.IGNORECASE)
_SHORTEST = 8  # characters; shorter values may be ordinary words
_CERTAIN = 16  # characters; a value this long does not occur by chance


def redacted(text: str) -> str:
    """Returns the text with … in place of passwords and keys."""
    for value in _of_environment():
        for form in {value, *_html_forms(value), repr(value)[1:-1], json.dumps(value)[1:-1]}:
            text = text.replace(form, "…")
    return without_shapes(text)


def _html_forms(value: str) -> set[str]:
    """The value as HTML, escaped by the standard library and by Jinja2, which write quotes differently."""
    escaped = html.escape(value)
    return {escaped, escaped.replace("&quot;", "&#34;").replace("&#x27;", "&#39;")}


def without_shapes(text: str) -> str:
    """As `redacted`, but by format alone, independent of the environment."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def holds_secret(text: str) -> bool:
    """Whether the text contains a secret, by format or from the environment (except common words)."""
    return without_shapes(text) != text or any(len(v) >= _CERTAIN and v in text for v in _of_environment())


def _of_environment() -> list[str]:
    """Values of environment variables named like secrets, longest first; also the parts of lists."""
    values = set()
    for name, value in os.environ.items():
        if _NAMES.search(name) and not _NO_SECRETS.match(name):
            values |= {value.strip(), *re.split(r"[,\s]+", value)}
    return sorted(
        (v for v in values if len(v) >= _SHORTEST and not re.fullmatch(r"[a-z]{1,12}", v)), key=len, reverse=True
    )


def redacted_tree(tree: Any) -> Any:
    """Redacts every text of a JSON tree; text under a key such as `password` or `api_key` is removed completely."""
    if isinstance(tree, str):
        return redacted(tree)
    if isinstance(tree, dict):
        return {
            key: "…" if isinstance(value, str) and value and _NAMED_KEY.fullmatch(str(key)) else redacted_tree(value)
            for key, value in tree.items()
        }
    return [redacted_tree(value) for value in tree] if isinstance(tree, list | tuple) else tree
