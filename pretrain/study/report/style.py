"""The page's look: light, dark and on paper."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #ffffff; --soft: #5b6670; --line: #d8dde2; --tint: #f3f5f7;
  --warn: #8a4b00; --warn-tint: #fff4e2; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14181c; --soft: #a4aeb8; --line: #39424b; --tint: #1d2329;
  --warn: #ffc27a; --warn-tint: #33281a; --link: #7ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.8rem 0 .5rem; }
a { color: var(--link); }
nav { margin: .8rem 0 1.2rem; }
nav a { margin-right: 1.1rem; white-space: nowrap; }
.under, .note, figcaption { color: var(--soft); font-size: .9rem; }
.summary { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: .4rem 1.2rem; }
.summary li { margin: .45rem 0; }
.interval { color: var(--soft); white-space: nowrap; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: 6px; }
figcaption { margin-top: .45rem; }
.table { margin: 1.2rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
.refused { background: var(--warn-tint); color: var(--warn); border-left: 4px solid currentColor;
  padding: .7rem 1rem; margin: 1.2rem 0; }
.reason { color: var(--warn); }
.none { color: var(--soft); }
.flops { white-space: nowrap; }
sup { line-height: 0; font-size: .72em; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
@media print { :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --tint: #f6f6f6; --warn: #6b3a00;
    --warn-tint: #fff; --link: #000; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } nav { display: none; } .table { overflow: visible; }
  table { font-size: 8pt; } th, td { padding-right: .5rem; } .interval { white-space: normal; }
  pre { white-space: pre-wrap; } figure, .table, .refused { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
