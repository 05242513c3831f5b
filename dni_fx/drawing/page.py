"""The text of drawings: templates of the picture and of the page around it. Everything put in is
escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import DecouplingError
from .shapes import CHIP, Picture, colour_of

_STYLE = """
svg { font: 11.5px "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; }
.name, .shape { font-family: Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; \
font-size: 11.5px; }
.name, .title { font-weight: bold; }
.title { font-size: 15px; }
.soft { fill: #555; }
.thread { fill: none; stroke: #8a8a8a; stroke-width: 1.2; }
.link { fill: none; stroke-width: 4.5; }
.plain { fill: none; stroke-width: 1.6; stroke-dasharray: 5 4; }
g.cut:hover .link { stroke-width: 8; }
.halo { paint-order: stroke; stroke: #fff; stroke-width: 4px; }
a:hover rect, a:focus rect { stroke-width: 3; }
"""

_PICTURE = """
{%- macro picture(p, head=(), legend=()) -%}
{%- set top = 24 * head|length + (34 if legend else 0) + 8 -%}
{%- set width = [p.width, legend_width if legend else 0]|max -%}
<svg xmlns="http://www.w3.org/2000/svg" width="{{ width|n }}" height="{{ (p.height + top)|n }}" \
viewBox="0 0 {{ width|n }} {{ (p.height + top)|n }}" role="img" aria-label="{{ label }}">
{%- if head or not page %}<style>{{ style }}</style>\
<rect width="100%" height="100%" fill="#fff"/>{% endif %}
{%- for line in head %}
<text x="10" y="{{ 24 * loop.index }}" class="{{ 'title' if loop.first else 'soft' }}">\
{{ line }}</text>
{%- endfor %}
{%- for entry in legend %}<g transform="translate({{ entry.x|n }} {{ 24 * head|length + 8 }})">
{%- if entry.kind == 'stage' %}<rect width="14" height="14" rx="3" fill="{{ entry.colour }}"/>
{%- elif entry.kind == 'folded' %}\
<rect x="3" y="3" width="22" height="12" rx="3" fill="#fff" stroke="#555"/>\
<rect width="22" height="12" rx="3" fill="#fff" stroke="#555"/>
{%- elif entry.kind != 'share' %}<path class="{{ entry.kind }}" stroke="{{ entry.colour }}" \
d="M0 7H26"/>{% endif -%}
<text x="{{ entry.indent }}" y="11">{{ entry.text }}</text></g>{% endfor %}
<g transform="translate(0 {{ top }})">
{%- for panel in p.panels %}
<g class="stage"><rect x="{{ panel.x|n }}" y="{{ panel.y|n }}" width="{{ panel.w|n }}" \
height="{{ panel.h|n }}" \
rx="8" fill="{{ colour(panel.stage) }}" fill-opacity=".1" \
stroke="{{ colour(panel.stage) }}" stroke-opacity=".6"/>
<rect x="{{ (panel.x + 14)|n }}" y="{{ (panel.y + 12)|n }}" width="12" height="12" rx="3" \
fill="{{ colour(panel.stage) }}"/>
{%- for line in panel.head %}<text x="{{ (panel.x + (32 if loop.first else 14))|n }}" \
y="{{ (panel.y + 6 + 17 * loop.index)|n }}" class="{{ 'title' if loop.first else 'soft' }}">\
{{ line|middle(panel.w - (46 if loop.first else 24), 8.6 if loop.first else 6.1) }}\
</text>{% endfor %}</g>
{%- endfor %}
{%- for t in p.threads %}
<g><title>{{ t.tip }}</title><path class="thread" d="{{ t.d }}"/>\
<path d="{{ t.heads }}" fill="#8a8a8a"/></g>
{%- endfor %}
{%- for l in p.links %}
<g class="cut"><title>{{ l.link.tip }}</title>
{%- if l.link.label %}<path d="{{ l.d }}" fill="none" stroke="#fff" stroke-width="8"/>{% endif %}
<path class="{{ 'link' if l.link.label else 'plain' }}" stroke="{{ l.colour }}" d="{{ l.d }}"/>
<path d="{{ l.heads }}" fill="{{ l.colour }}"/>
{%- if l.link.label %}<rect x="{{ l.x|n }}" y="{{ l.y|n }}" width="{{ chip[0] }}" \
height="{{ chip[1] }}" rx="5" \
fill="#fff" stroke="{{ l.colour }}" stroke-width="2"/>
{%- for line in l.link.label %}\
<text class="{{ 'name' if loop.first else 'soft' }}" x="{{ (l.x + 8)|n }}" \
y="{{ (l.y + 14 * loop.index)|n }}">\
{{ line|end(chip[0] - 14, 7) if loop.first else line|start(chip[0] - 14, 6.1) }}</text>{% endfor %}
{%- endif %}</g>
{%- endfor %}
{%- for l in p.links if l.link.label %}{% for x, y in l.notes %}
<text class="name halo" x="{{ x|n }}" y="{{ y|n }}">\
{{ l.link.name|end(240, 7) }}</text>{% endfor %}{% endfor %}
{%- for b in p.items %}{% set i = b.item %}
{%- if not i.nodes %}
<g><title>{{ i.tip }}</title>\
<rect x="{{ b.x|n }}" y="{{ b.y|n }}" width="{{ b.w|n }}" height="{{ b.h|n }}" rx="12" \
fill="#fff" stroke="#777" stroke-dasharray="4 3"/>\
<text x="{{ (b.x + b.w / 2)|n }}" y="{{ (b.y + 16)|n }}" \
text-anchor="middle">{{ i.title|end(b.w - 16, 6.3) }}</text></g>
{%- else %}
{% if page and i.anchor %}<a href="#{{ i.anchor }}">{% else %}<g>{% endif %}\
<title>{{ i.tip }}</title>
{%- if i.nodes > 1 %}<rect x="{{ (b.x + 4)|n }}" y="{{ (b.y + 4)|n }}" \
width="{{ b.w|n }}" height="{{ b.h|n }}" \
rx="5" fill="#fff" stroke="{{ b.colour }}"/>{% endif -%}
<rect x="{{ b.x|n }}" y="{{ b.y|n }}" width="{{ b.w|n }}" height="{{ b.h|n }}" rx="5" fill="#fff" \
stroke="{{ b.colour }}" stroke-width="1.5"/>
<rect x="{{ b.x|n }}" y="{{ b.y|n }}" width="6" height="{{ b.h|n }}" rx="3" fill="{{ b.colour }}"/>
{%- set share = i.share is not none %}
<text class="name" x="{{ (b.x + 14)|n }}" y="{{ (b.y + 18)|n }}">\
{{ i.title|end(b.w - (62 if share else 20), 7) }}</text>
{%- if share %}<text x="{{ (b.x + b.w - 8)|n }}" y="{{ (b.y + 18)|n }}" text-anchor="end">\
{{ i.share|percent }}</text><rect x="{{ (b.x + 14)|n }}" y="{{ (b.y + b.h - 6)|n }}" \
height="3" fill="{{ b.colour }}" \
width="{{ ((b.w - 22) * i.share / (most or 1))|n }}"/>{% endif %}
<text class="soft" x="{{ (b.x + 14)|n }}" y="{{ (b.y + 34)|n }}">\
{{ i.kind|start(b.w - 34 - 7 * i.shape|length, 6.2) }}</text>
<text class="shape" x="{{ (b.x + b.w - 8)|n }}" y="{{ (b.y + 34)|n }}" \
text-anchor="end">{{ i.shape }}</text>
{%- if page and i.anchor %}</a>{% else %}</g>{% endif %}
{%- endif %}{% endfor %}
</g></svg>
{%- endmacro -%}
"""

_SVG = "{{ picture(main, head, legend) }}\n"

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ head[0] }}</title>
<style>
body { font: 14px/1.45 "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; \
margin: 20px; color: #222; }
h1 { font-size: 21px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 26px 0 6px; }
p { margin: 2px 0; color: #555; } ul { margin: 4px 0; }
.picture { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 3px 14px 3px 0; }
th { border-bottom: 2px solid #999; } td { border-bottom: 1px solid #ddd; }
td:first-child { white-space: nowrap; } .number { text-align: right; }
summary { cursor: pointer; padding: 3px 0; } details details { margin-left: 22px; }
details:target > summary { background: #fff3c4; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
{{ style }}</style></head><body>
<h1>{{ head[0] }}</h1>
{% for line in head[1:] %}<p>{{ line }}</p>
{% endfor %}
<div class="picture" id="picture">{{ picture(main, (), legend) }}</div>
{%- macro table(titles, rows) %}<table>\
<tr>{% for cell in titles %}<th>{{ cell }}</th>{% endfor %}</tr>
{%- for stage, row in rows %}
<tr>{% for cell in row %}\
<td{% if not loop.first and cell is number_like %} class="number"{% endif %}>
{%- if loop.first %}<span class="swatch" style="background:{{ colour(stage) }}"></span>{% endif -%}
{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endmacro %}
<h2>Stages</h2>{{ table(*stages) }}
<h2>Interfaces</h2>{{ table(*interfaces) }}
<h2>Notes</h2><ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% if folded %}<h2>Inside the modules</h2>
<p>Click a stacked box in the picture, or a line here.</p>
{% for f in folded recursive %}<details id="{{ f.anchor }}"><summary><span class="swatch" \
style="background:{{ colour(f.stage) }}"></span>{{ f.title }}</summary>
<div class="picture">{{ picture(f.picture) }}</div>
<p><a href="#picture">back to the whole model</a></p>
{{ loop(f.inner) }}</details>
{% endfor %}
<script>
function show() {
  const found = document.getElementById(location.hash.slice(1));
  if (!found || found.tagName !== "DETAILS") return;
  for (let e = found; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
  found.scrollIntoView();
}
addEventListener("hashchange", show);
addEventListener("click", e => { \
if (e.target.closest && e.target.closest("a")) setTimeout(show); });
show();
</script>
{% endif %}</body></html>
"""


def render(
    *,
    page: bool,
    main: Picture,
    head: Sequence[str],
    legend: Sequence[Mapping[str, Any]],
    **rest: Any,
) -> Iterator[str]:
    """The text of a page, or of a picture alone, in pieces.

    Args:
        page: whether to write a page around the picture.
        main: the picture of the whole model.
        head: lines above it, the title first.
        legend: entries with ``kind``, ``text``, and ``colour`` for stages and lines.
        rest: for a page: ``stages`` and ``interfaces`` (titles and rows, each with its stage),
            ``notes``, ``folded``.

    Raises:
        DecouplingError: Jinja is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise DecouplingError("drawing a plan needs Jinja: pip install 'dni_fx[draw]'") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(n=_number, start=_start, middle=_middle, end=_end, percent=_percent)
    environment.tests["number_like"] = lambda text: text.strip("0123456789.,%") == ""
    x, placed = 10.0, []
    for entry in legend:
        indent = {"stage": 20, "share": 0}.get(entry["kind"], 33)
        placed.append({**entry, "x": x, "indent": indent})
        x += indent + 6.3 * len(entry["text"]) + 22
    known = {
        "page": page,
        "colour": colour_of,
        "chip": CHIP,
        "style": Markup(_STYLE),
        "label": head[0],
    }
    text = _PICTURE + (_PAGE if page else _SVG)
    template = environment.from_string(text, globals={**known, "legend_width": x})
    return template.generate(main=main, head=head, legend=placed, **rest)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def _start(text: str, width: float, letter: float) -> str:
    """The start of a text that is wider than it may be."""
    most = max(int(width / letter), 1)
    return text if len(text) <= most else text[: most - 1] + "…"


def _middle(text: str, width: float, letter: float) -> str:
    """Both ends of a text that is wider than it may be."""
    most = max(int(width / letter), 1)
    if len(text) <= most:
        return text
    return text[: most // 3] + "…" + text[len(text) - most + most // 3 + 1 :]


def _end(text: str, width: float, letter: float) -> str:
    """The end of a path that is wider than it may be: it says more than the beginning."""
    most = max(int(width / letter), 1)
    return text if len(text) <= most else "…" + text[len(text) - most + 1 :]
