"""The report's page around its charts: one self-contained document, light and dark, nothing fetched."""

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --page:#f6f7f9; --card:#fff; --ink:#1a1f2b; --soft:#667085; --rule:#e4e7ec;
  --train:#2563eb; --eval:#0f9d76; --merged:#d9480f; --heat:#4338ca; --good:#0f9d76; --good-soft:#b7e6d6;
  --bad:#d92d20; --neutral:#98a2b3; --k0:#2563eb; --k1:#0f9d76; --k2:#d9480f; --k3:#9333ea; --k4:#b7791f; --k5:#db2777;
  --k6:#64748b; }
@media (prefers-color-scheme: dark) { :root { --page:#0f131b; --card:#181e29; --ink:#e8ebf1; --soft:#98a2b3;
  --rule:#2a3342; --train:#6ea8fe; --eval:#4cc9a0; --merged:#ff9d66; --heat:#a5a1ff; --good:#4cc9a0;
  --good-soft:#1f5a48; --bad:#ff7a70; --neutral:#667085; --k0:#6ea8fe; --k1:#4cc9a0; --k2:#ff9d66; --k3:#c58bff;
  --k4:#e3b341; --k5:#ff8ac0; --k6:#94a3b8; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width:960px; margin:0 auto; padding:40px 20px 64px; }
h1 { font-size:26px; line-height:1.25; margin:0 0 6px; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size:17px; margin:0 0 2px; }
.lead, .note { color:var(--soft); margin:0; }
.note { font-size:13.5px; margin-bottom:14px; max-width:74ch; } .scroll + .note { margin:12px 0 0; }
section { background:var(--card); border:1px solid var(--rule); border-radius:12px; padding:22px 24px;
  margin-top:18px; }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin-top:22px; }
.fact { background:var(--card); border:1px solid var(--rule); border-radius:12px; padding:14px 16px; }
.fact b { display:block; font-size:21px; font-weight:650; letter-spacing:-.01em; font-variant-numeric:tabular-nums; }
.fact span { color:var(--soft); font-size:13px; }
.badge { display:inline-block; border-radius:99px; padding:1px 10px; font-size:13px; font-weight:600; color:var(--card);
  background:var(--good); vertical-align:3px; margin-left:8px; white-space:nowrap; }
.badge.bad { background:var(--bad); } .badge.neutral { background:var(--neutral); }
svg { display:block; width:100%; height:auto; } svg text { font-family:inherit; }
.scroll { overflow-x:auto; } .scroll svg { min-width:520px; }
.grid { stroke:var(--rule); } .line { fill:none; stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
.dashed { stroke-dasharray:6 5; }
.mark { stroke:var(--card); stroke-width:1.5; } .track { fill:var(--rule); }
.tick { fill:var(--soft); font-size:12px; } .row { fill:var(--ink); font-size:13px; }
.name { font-size:12.5px; font-weight:600; } .value { fill:var(--ink); font-size:13px; font-weight:600; }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr)); gap:0 28px; }
table { border-collapse:collapse; width:100%; font-size:13.5px; font-variant-numeric:tabular-nums; }
th { text-align:left; color:var(--soft); font-weight:500; }
td, th { padding:5px 14px 5px 0; border-bottom:1px solid var(--rule); }
td.n, th.n { text-align:right; } tr:last-child td { border-bottom:0; }
.scroll td { white-space:nowrap; }
details summary { cursor:pointer; color:var(--soft); font-size:14px; } details[open] summary { margin-bottom:10px; }
.empty { color:var(--soft); font-style:italic; margin:8px 0; }
@media print { body { background:#fff; } section, .fact { break-inside:avoid; } }
"""


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def section(title: str, note: str, *content: str) -> str:
    """A card: heading, one sentence on how to read it, what it shows."""
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{''.join(content)}</section>"


def facts(items: Sequence[tuple[str, str]]) -> str:
    """Numbers one looks for first: (value, what it is)."""
    cells = "".join(f'<div class="fact"><b>{escape(v)}</b><span>{escape(label)}</span></div>' for v, label in items)
    return f'<div class="facts">{cells}</div>'


def badge(text: str, kind: str = "") -> str:
    """A word on a coloured ground; kind is "", "bad" or "neutral"."""
    return f'<span class="badge {kind}">{escape(text)}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Numbers to the right, text to the left."""

    def cell(tag: str, value: object, right: bool) -> str:
        return f"<{tag}{' class=n' if right else ''}>{escape(str(value))}</{tag}>"

    right = [bool(rows) and isinstance(value, (int, float)) for value in rows[0]] if rows else [False] * len(head)
    top = "".join(cell("th", value, r) for value, r in zip(head, right, strict=True))
    body = "".join(
        "<tr>" + "".join(cell("td", _short(value), r) for value, r in zip(row, right, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def scroll(content: str) -> str:
    """Content that may be wider than a telephone."""
    return f'<div class="scroll">{content}</div>'


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def _short(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value
