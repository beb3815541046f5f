"""The report's style sheet: light and dark, one column on a phone, two or three charts side by side elsewhere."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { --ink:#1b2030; --dim:#6a7186; --paper:#f5f6fa; --card:#fff; --line:#e3e6ef; --accent:#4361ee;
  --good:#1f9d63; --bad:#d7263d; --warn:#d98a00; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e8eaf2; --dim:#969db3; --paper:#12141c; --card:#1a1d28; --line:#2b2f3f; }
}
* { box-sizing: border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:15px/1.5 system-ui,sans-serif; }
main { max-width:1280px; margin:0 auto; padding:24px 20px 64px; }
header { display:flex; gap:18px; align-items:center; margin-bottom:18px; }
.brand { font-weight:700; letter-spacing:.02em; color:#fff; background:var(--accent); padding:6px 12px;
  border-radius:8px; }
h1 { font-size:22px; margin:0; }
h2 { font-size:20px; margin:0 0 2px; }
h3 { font-size:15px; margin:18px 0 6px; }
h3 small { color:var(--dim); font-weight:400; }
.dim { color:var(--dim); margin:0; }
.tag { border:1px solid var(--line); border-radius:99px; padding:0 9px; font-size:12px; margin-left:6px; }
section { background:var(--card); border:1px solid var(--line); border-radius:14px; padding:18px 20px; margin:16px
  0; }
.verdict { display:grid; grid-template-columns:auto 1fr; gap:6px 18px; align-items:center; border-left:8px solid
  var(--dim); }
.verdict p { margin:2px 0 0; color:var(--dim); }
.verdict h2 { font-size:24px; }
.lamp { width:34px; height:34px; border-radius:50%; background:var(--dim); }
.healthy { border-left-color:var(--good); }
.healthy .lamp { background:var(--good); }
.collapsed { border-left-color:var(--bad); }
.collapsed .lamp { background:var(--bad); }
.collapsed h2 { color:var(--bad); }
.warning { border-left-color:var(--warn); }
.warning .lamp { background:var(--warn); }
.tiles { grid-column:1/-1; display:flex; flex-wrap:wrap; gap:10px; margin-top:10px; }
.tile { background:var(--paper); border-radius:10px; padding:8px 14px; min-width:110px; }
.tile b { display:block; font-size:18px; font-variant-numeric:tabular-nums; }
.tile span { color:var(--dim); font-size:12px; }
.messages ul { list-style:none; margin:0; padding:0; }
.messages li { padding:6px 10px; border-left:4px solid var(--warn); margin:6px 0; background:var(--paper);
  border-radius:0 8px 8px 0; white-space:pre-line; }
.messages li.critical { border-left-color:var(--bad); }
.messages li span { color:var(--dim); margin-right:10px; }
nav { position:sticky; top:0; z-index:5; display:flex; flex-wrap:wrap; gap:6px; padding:8px 0;
  background:var(--paper); }
nav a { color:var(--ink); text-decoration:none; border:1px solid var(--line); background:var(--card);
  border-radius:99px; padding:3px 12px; font-size:13px; }
nav a:hover { border-color:var(--accent); color:var(--accent); }
section[id] { scroll-margin-top:56px; }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(340px,1fr)); gap:14px; margin-top:12px; }
figure { margin:0; border:1px solid var(--line); border-radius:10px; padding:10px 8px 2px; min-width:0; }
figcaption { font-weight:600; font-size:13px; padding:0 8px; }
.scroll { overflow-x:auto; max-height:560px; overflow-y:auto; border:1px solid var(--line); border-radius:10px; }
table { border-collapse:collapse; width:100%; font-size:13px; }
th { position:sticky; top:0; background:var(--paper); text-align:left; padding:7px 10px; color:var(--dim);
  font-weight:600; }
td { border-top:1px solid var(--line); padding:6px 10px; vertical-align:middle; }
td.number { font-variant-numeric:tabular-nums; }
td.text { white-space:pre-wrap; max-width:460px; overflow-wrap:anywhere; }
td img { width:44px; height:44px; object-fit:contain; image-rendering:pixelated; background:#000;
  border-radius:6px; display:block; }
details { margin:8px 0; }
details details { margin-left:14px; }
summary { cursor:pointer; color:var(--dim); }
pre { overflow:auto; background:var(--paper); padding:12px; border-radius:10px; font-size:12px; }
@media (max-width:480px) {
  .charts { grid-template-columns:1fr; }
}
"""
