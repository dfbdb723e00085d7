"""The report of a search as one HTML page that needs nothing but itself: no script, no file, no address."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

SHORT = 20
"""Letters of what is never broken in a table."""
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem 1rem 3rem; color: #202124; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; padding-top: .6rem; border-top: 1px solid #dadce0; }
p { margin: .3rem 0 .7rem; max-width: 75ch; }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 2rem 1.8rem; }
.beside, .figures { display: grid; grid-template-columns: minmax(0, 1fr); gap: .8rem 1.8rem; align-items: start; }
@media (min-width: 900px) {
  main, .beside, .figures { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  main > section { grid-column: 1 / -1; }
  main > section.half { grid-column: auto; }
}
.answer { font-size: 1.05rem; padding: .7rem .9rem; border-left: 4px solid #9aa0a6; background: #f6f7f8;
  max-width: none; }
.answer.better { border-color: #009e73; background: #eef8f4; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(44%, 240px), 1fr)); gap: .5rem 1.2rem;
  margin: 1rem 0 2rem; padding: 0; }
.facts dt { color: #5f6368; font-size: .8rem; }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; max-width: 620px; height: auto; display: block; }
figcaption { color: #5f6368; font-size: .85rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums;
  margin: .5rem 0; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e8eaed; vertical-align: top; }
th { color: #5f6368; font-weight: 600; }
.short { white-space: nowrap; }
td:last-child { padding-right: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #0072b2; }
@media (max-width: 640px) {
  table, tbody { display: block; }
  thead { display: none; }
  tr { display: block; padding: .4rem 0; border-bottom: 1px solid #dadce0; }
  td { display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); gap: .5rem; border: 0; padding: .1rem 0; }
  td::before { content: attr(data-name); color: #5f6368; }
  .short { white-space: normal; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { display: block; }
  main > section { margin-bottom: 1.2rem; }
  h2 { break-after: avoid; }
  tr, .answer, .beside { break-inside: avoid; }
  .beside, .figures { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  main > section.half { display: inline-block; width: 48%; margin-right: 1.5%; vertical-align: top; }
}
"""


def page(title: str, head: str, sections: Sequence[str]) -> str:
    """The whole page. `head` and `sections` are HTML already; two half sections in a row stand side by side where
    there is room."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{head}\n<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str, half: bool = False) -> str:
    """A heading with what belongs below it; parts that are empty vanish. `half`: one of two columns is enough."""
    opened = '<section class="half">' if half else "<section>"
    return f"{opened}\n<h2>{escape(heading)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    """Text; `kind` is a class of the style."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def beside(*parts: str) -> str:
    """Parts side by side where there is room, else one below the other."""
    return '<div class="beside">\n' + "\n".join(f"<div>{part}</div>" for part in parts) + "\n</div>"


def facts(rows: Mapping[str, str]) -> str:
    """Names with their values."""
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    return f'<dl class="facts">{inner}</dl>'


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A column per key of the first row; on a narrow screen each row becomes a block. Nothing for no rows."""
    if not rows:
        return ""
    head = "".join(f"<th{_short(name)}>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(_cell(name, str(row[name])) for name in rows[0]) + "</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _cell(name: str, value: str) -> str:
    return f'<td data-name="{escape(name)}"{_short(value)}><span>{escape(value)}</span></td>'


def _short(text: str) -> str:
    """Few words stay on one line."""
    return ' class="short"' if len(text) <= SHORT else ""


def folded(summary: str, content: str) -> str:
    """Shown on demand."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>" if content else ""


def figures(pictures: Sequence[tuple[Path, str]]) -> str:
    """PNGs with their captions, inside the page, two in a row where there is room."""
    return '<div class="figures">\n' + "\n".join(figure(path, told) for path, told in pictures) + "\n</div>"


def figure(path: Path, told: str) -> str:
    """A PNG with its caption, inside the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{content}" alt="{escape(told)}">'
        f"<figcaption>{escape(told)}</figcaption></figure>"
    )
