"""One HTML page with text and pictures inline: a single file that can be opened anywhere, or sent."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.7rem; margin-bottom: 0 }
h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1.2rem }
img { max-width: 100%; display: block; margin: 1rem 0 .3rem }
figure { margin: 0 }
figcaption, .small { color: #666; font-size: .9rem }
pre { background: #f5f5f2; padding: .7rem 1rem; overflow-x: auto; font-size: .85rem }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: heading, the command that makes it, a paragraph (HTML), pictures with captions, a table (text)."""

    title: str
    command: str
    text: str
    pictures: tuple[tuple[Path, str], ...] = ()
    table: str = ""

    def html(self) -> str:
        """The part as HTML."""
        parts = [f"<h2>{escape(self.title)}</h2>", f"<p>{self.text}</p>"]
        for path, caption in self.pictures:
            # As a data address, so that the page needs no other file.
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            picture = f'<img alt="{escape(self.title)}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
        if self.table:
            parts.append(f"<pre>{escape(self.table)}</pre>")
        parts.append(f"<pre>{escape(self.command)}</pre>")
        return "\n".join(parts)


def page(title: str, sections: list[Section], headline: list[str], seconds: float, facts: Mapping[str, Any]) -> str:
    """The whole page. `facts` are those of ``igpt info --json``: versions, devices and the extension stand at its end."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    libraries = (f"{device} {'loaded' if one['loaded'] else one['reason']}" for device, one in facts["extension"].items())
    made = f"{versions}; Python {facts['python']}; extension: {'; '.join(libraries)}"
    lines = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="small">{seconds:.0f} seconds on {escape("; ".join(facts["devices"]))}</p>',
        f"<pre>{escape(chr(10).join(headline))}</pre>",
        *(section.html() for section in sections),
        f'<h2>Made with</h2><p class="small">{escape(made)}</p></html>',
    ]
    return "\n".join(lines) + "\n"
