"""The one writer of HTML pages: figures, tables and words in one file that asks the network for nothing, to leaf
through by keys.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from cosmos_ssl.evaluation.document import document
from cosmos_ssl.files import written_whole

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_WEBP_SIDE = 16_383  # pixels: no WebP is longer
_WIDE = 1.6  # pictures wider than this times their height get a row of their own


class Page:
    """A page of sections, which a reader sees one at a time (arrow keys) or all at once (the key a).

    What is added goes into the last section; before the first it stays above all of them. Every method returns the
    page. Strings are escaped: nothing in them is read as HTML.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._top = [f'<p class="subtitle">{_text(subtitle)}</p>'] if subtitle else []
        self._sections: list[tuple[str, list[str]]] = []

    def section(self, title: str) -> Page:
        """Begin a section."""
        self._sections.append((title, []))
        return self

    def text(self, text: str) -> Page:
        """A paragraph; its line breaks are kept."""
        return self._add(f"<p>{_text(text)}</p>")

    def table(self, rows: Sequence[Sequence[object]], caption: str = "") -> Page:
        """Rows of cells, the first of them the heads. Numbers stand to the right."""
        head, *body = rows
        heads = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
        lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in body)
        told = f"<caption>{_text(caption)}</caption>" if caption else ""
        return self._add(
            f'<div class="table"><table>{told}<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        )

    def figure(self, picture: Tensor | bytes | Path, caption: str = "") -> Page:
        """A picture: uint8 [3, H, W], or the bytes or path of a PNG, JPEG, WebP or GIF. Figures in a row stand side by
        side.

        Raises ValueError for bytes that are none of these, OSError for a file that cannot be read.
        """
        kind, data, (width, height) = _encoded(picture)
        wide = ' class="wide"' if width > _WIDE * height else ""
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        image = f'<img src="{source}" width="{width}" height="{height}" alt="{_text(caption)}">'
        return self._add(f"<figure{wide}>{image}<figcaption>{_text(caption)}</figcaption></figure>")

    def words(self, words: Sequence[tuple[str, float]], caption: str = "") -> Page:
        """Words, each on ground as strong as its weight in 0..1."""
        marked = " ".join(
            f'<span style="--w:{weight:.3f}" title="{weight:.2f}">{_text(word)}</span>' for word, weight in words
        )
        return self._add(f'<figure class="words"><div>{marked}</div><figcaption>{_text(caption)}</figcaption></figure>')

    def legend(self, entries: Sequence[tuple[tuple[int, int, int], str]]) -> Page:
        """Return what colours (red, green, blue in 0..255) stand for."""
        items = "".join(
            f'<li><i style="background:rgb({r} {g} {b})"></i>{_text(name)}</li>' for (r, g, b), name in entries
        )
        return self._add(f'<ul class="legend">{items}</ul>')

    def html(self) -> str:
        """The whole page."""
        options = "".join(
            f'<option value="{n}">{n}. {_text(title)}</option>' for n, (title, _) in enumerate(self._sections, 1)
        )
        sections = "".join(
            f'<section id="s{n}"><h2>{_text(title)}</h2>{"".join(parts)}</section>'
            for n, (title, parts) in enumerate(self._sections, 1)
        )
        body = (
            f"<header><h1>{_text(self.title)}</h1>{''.join(self._top)}</header>\n"
            '<nav hidden><button id="back" title="left arrow">&#8592;</button><select '
            f'aria-label="section">{options}</select>'
            f'<button id="next" title="right arrow">&#8594;</button><button id="all" title="key a">all</button></nav>\n'
            f"<main>{sections}</main>"
        )
        return document(self.title, body, style=_STYLE, scripts=[_SCRIPT])

    def write(self, path: Path) -> None:
        """Write the page; it is never there by half. Raises OSError."""
        with written_whole(path) as file:
            file.write(self.html().encode("utf-8", "replace"))

    def _add(self, part: str) -> Page:
        (self._sections[-1][1] if self._sections else self._top).append(part)
        return self


def _text(value: object) -> str:
    return escape(str(value))


def _cell(value: object) -> str:
    return f'<td class="number">{value}</td>' if isinstance(value, int | float) else f"<td>{_text(value)}</td>"


def _encoded(picture: Tensor | bytes | Path) -> tuple[str, bytes, tuple[int, int]]:
    """The kind of a picture, its bytes, and its width and height.

    Tensors become WebP, a tenth of a photograph's PNG; long ones PNG.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(picture, Tensor):
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
        file = io.BytesIO()
        form = "webp" if max(image.size) <= _WEBP_SIDE else "png"
        image.save(file, form, quality=92)
        return form, file.getvalue(), image.size
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return str(image.format).lower(), data, image.size
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"a figure must be one of {', '.join(_FORMATS)}, of a size that PIL opens") from error


_STYLE = """
h2{font-size:1.15rem;margin:0 0 .25rem;flex-basis:100%}
p{margin:.25rem 0;flex-basis:100%;white-space:pre-line}
.subtitle,figcaption,caption{color:var(--soft);font-size:.875rem;text-align:left;white-space:pre-line}
nav{position:sticky;top:0;z-index:1;display:flex;gap:.5rem;padding:.75rem 0;background:var(--ground)}
nav[hidden]{display:none}
select{flex:0 1 40rem;min-width:0}
section{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start;margin:1rem 0;padding:1.25rem;
background:var(--card);border:1px solid var(--line);border-radius:.75rem;overflow-wrap:anywhere;scroll-margin-top:4rem}
body.one section:not(.shown){display:none}
figure{margin:0;flex:0 1 22rem}figure.wide,figure.words{flex-basis:100%}
img{display:block;width:100%;height:auto;border-radius:.5rem;cursor:zoom-in}
img.large{position:fixed;inset:0;z-index:2;width:100vw;height:100vh;object-fit:contain;background:var(--ground);border-radius:0;cursor:zoom-out}
figcaption{margin-top:.35rem}
.words div{line-height:2.1}
.words span{padding:.15em .3em;border-radius:.3em;background:rgb(var(--mark)/calc(var(--w)*.8))}
.table{flex-basis:100%;overflow-x:auto}table{border-collapse:collapse}caption{padding-bottom:.35rem}
th,td{padding:.3rem .8rem;text-align:left;border-bottom:1px solid var(--line)}
.number{text-align:right;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:0;padding:0;list-style:none;flex-basis:100%}
.legend i{display:inline-block;width:.9em;height:.9em;margin-right:.4em;border-radius:.2em;vertical-align:-.1em}
"""

_SCRIPT = """
const $=s=>document.querySelector(s),leaves=[...document.querySelectorAll('section')],nav=$('nav'),pick=$('select');
let at=0,one=leaves.length>1;
function show(n){
  at=Math.max(0,Math.min(leaves.length-1,n));
  document.body.classList.toggle('one',one);
  leaves.forEach((leaf,i)=>leaf.classList.toggle('shown',i===at));
  pick.value=at+1;$('#all').textContent=one?'all':'one';$('#back').disabled=at===0;$('#next').disabled=at===leaves.length-1;
  try{history.replaceState(null,'','#s'+(at+1))}catch{}
}
function leaf(n){show(n);if(one)scrollTo(0,0);else leaves[at].scrollIntoView()}
function small(){const large=$('img.large');if(large)large.classList.remove('large');return large}
if(leaves.length>1){
  nav.hidden=false;show((parseInt(location.hash.slice(2))||1)-1);
  $('#back').onclick=()=>leaf(at-1);$('#next').onclick=()=>leaf(at+1);
  $('#all').onclick=()=>{one=!one;leaf(at)};pick.onchange=()=>leaf(pick.value-1);
}
addEventListener('keydown',e=>{
  if(e.ctrlKey||e.metaKey||e.altKey||e.target===pick)return;
  if(e.key==='Escape'){small();return}
  const to={ArrowLeft:at-1,ArrowRight:at+1,Home:0,End:leaves.length-1}[e.key];
  if(leaves.length>1&&to!==undefined){small();leaf(to);e.preventDefault()}
  else if(leaves.length>1&&e.key==='a'){one=!one;leaf(at)}
});
addEventListener('click',e=>{if(!small()&&e.target.matches('figure img'))e.target.classList.add('large')});
"""
