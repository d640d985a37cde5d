"""The frame of every HTML page: one file that asks the network for nothing and runs no scripts but its own.

It imports no torch, so that commands which answer at once can write pages too.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--ground:#fbfbfa;--card:#fff;--ink:#1d1d1f;--soft:#6b6b70;--line:#e3e3e0;--mark:234 88 12}
@media (prefers-color-scheme:dark){
:root{--ground:#141416;--card:#1d1d20;--ink:#ececee;--soft:#a0a0a8;--line:#34343a;--mark:251 146 60}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:78rem;padding:1.5rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.5rem;margin:0}
button,select{font:inherit;color:inherit;
background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.25rem .75rem}
"""
"""Colours by their use, in light and dark, and what all pages share."""


def document(title: str, body: str, *, style: str, scripts: Sequence[str] = (), head: str = "") -> str:
    """A whole page. ``body``, ``style``, ``scripts`` and ``head`` are ours and taken as they are; ``title`` is text.

    The policy names the scripts by their hashes: even a string that was not escaped could bring in no other.
    """
    allowed = " ".join(f"'{_digest(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    run = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{head}'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n<body>\n{body}\n{run}</body></html>\n"
    )


def _digest(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
