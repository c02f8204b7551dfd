"""Style sheet of the reports: one column on a phone, several on a desk, light or dark as the reader has it."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #ffffff; --ink: #1c2024; --muted: #5c6670; --line: #dcdfe3;
  --accent: #0b62a8; --yes: #0f7a4d; --no: #b3361b; --open: #8a6100; --shade: #00000040; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1b1f23; --ink: #e6e8ea; --muted: #9aa4ad;
  --line: #333a41; --accent: #6cb6f2; --yes: #4fc48f; --no: #f08a6c; --open: #e0b04a; --shade: #ffffff50; }
  /* Figures are drawn in dark ink on nothing: turning lightness round keeps hue and contrast. */
  .plot svg { filter: invert(0.93) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
main, header, footer { max-width: 1200px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 10px; }
h2 { font-size: 1.25rem; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 6px; }
p { max-width: 76ch; margin: 8px 0; }
.question { font-weight: 650; }
.answer p { max-width: 90ch; border-left: 3px solid var(--accent); padding-left: 12px; }
header > figure { margin: 16px 0; }
.lead { color: var(--muted); font-size: 1.05rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 14px 0 0; }
a { color: var(--accent); }
.grid { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); margin: 14px 0; }
.grid.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0; padding: 14px;
  min-width: 0; }
figcaption { color: var(--muted); font-size: 0.88rem; margin-top: 8px; }
.plot > div { overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; max-width: 760px; margin: 0 auto; }
.plot svg text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif !important; }
.gallery { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); margin: 14px 0; }
.gallery figure { padding: 8px; }
.gallery img { width: 100%; image-rendering: pixelated; display: block; border-radius: 3px; }
.gallery figcaption { font-size: 0.78rem; line-height: 1.3; margin-top: 5px; }
.table { overflow-x: auto; margin: 0 0 14px;
  background: linear-gradient(to right, var(--paper) 30%, transparent) left / 36px 100% no-repeat local,
    linear-gradient(to left, var(--paper) 30%, transparent) right / 36px 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 14px 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 14px 100% no-repeat scroll; }
.card .table { --paper: var(--card); }
.table.wide::before { content: "more columns: scroll \\2192"; position: sticky; left: 0; display: inline-block; color: var(--accent);
  font-size: 0.8rem; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
p.caption { color: var(--muted); font-size: 0.88rem; margin: 16px 0 6px; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
th button { all: unset; cursor: pointer; font: inherit; color: inherit; }
th button:hover { color: var(--accent); }
th button:focus-visible, .table:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; font-size: 0.7em; }
th[aria-sort=descending] button::after { content: " \\25BC"; font-size: 0.7em; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 0.82rem; line-height: 1.5; }
.commands code { display: block; padding-left: 3ch; text-indent: -3ch; white-space: normal; }
.commands span { display: inline-block; max-width: 100%; text-indent: 0; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.92em; }
.equations p { max-width: none; margin: 3px 0; padding-left: 3ch; text-indent: -3ch; font-family: "Cambria Math", "DejaVu Serif", serif; }
.equations .map { font-weight: 600; }
.letters { display: grid; grid-template-columns: minmax(60px, max-content) 1fr; gap: 2px 14px; font-size: 0.88rem; }
.letters dt, .letters dd { margin: 0; overflow-wrap: anywhere; } .letters dt { max-width: 16ch; }
.verdict { font-weight: 650; margin: 4px 0; }
.verdict.yes { color: var(--yes); } .verdict.no { color: var(--no); } .verdict.open { color: var(--open); }
.card p { font-size: 0.95rem; } .card .small { color: var(--muted); font-size: 0.85rem; }
.card table { font-size: 0.86rem; }
footer { color: var(--muted); font-size: 0.85rem; padding-top: 30px; padding-bottom: 40px; }
@media (max-width: 480px) { main, header, footer { padding: 0 12px; }
  header { padding-top: 22px; } h1 { font-size: 1.4rem; }
  figure, .card { padding: 10px; } }
@media print { nav, .table.wide::before { display: none; } table { font-size: 0.7rem; }
  .plot > div, .table { overflow: visible; background: none; } figure, .card { break-inside: avoid; } }
"""
