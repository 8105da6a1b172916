"""The report's style sheet and its only script. Both are inlined: the page needs no network."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --muted: #5f6b7a; --line: #e3e7ec;
  --shade: #eef1f5; --good: #16794c; --bad: #b42318; --warn: #a15c00;
  --c1: #2463d1; --c2: #d9730d; --c3: #12857a; --c4: #8a4fd3; --c5: #c23669; --c6: #75801f;
  --c7: #7b8794;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --page: #0e1116; --card: #161b22; --ink: #e6e9ee; --muted: #97a3b2; --line: #29313b;
    --shade: #1d242d; --good: #5bc98c; --bad: #ff8a7a; --warn: #e8b04b;
    --c1: #6ea5ff; --c2: #f5a04c; --c3: #4fcabb; --c4: #bd93f9; --c5: #f27ba5; --c6: #b9c563;
    --c7: #8e9aa8;
  }
}
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1140px; margin: 0 auto; padding: 40px 20px 60px; }
h1 {
  font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -0.02em; overflow-wrap: anywhere;
}
h2 { font-size: 19px; margin: 44px 0 14px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
.muted, figcaption, dt, th { color: var(--muted); }
.head { display: flex; align-items: center; gap: 12px; flex-wrap: wrap; }
.head + p { margin-top: 6px; }
.pill {
  font-size: 13px; font-weight: 600; padding: 2px 11px; border-radius: 99px;
  border: 1px solid currentColor; white-space: nowrap;
}
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  break-inside: avoid; min-width: 0; margin: 0;
}
.grid { display: grid; gap: 16px; grid-template-columns: repeat(6, minmax(0, 1fr)); }
.wide { grid-column: span 6; } .half { grid-column: span 3; } .third { grid-column: span 2; }
.hero { margin-top: 26px; }
.hero .big {
  display: flex; align-items: baseline; gap: 12px; font-size: 42px; font-weight: 650;
  letter-spacing: -0.03em; line-height: 1.25; white-space: nowrap; flex-wrap: wrap;
}
.hero .big .from { color: var(--muted); font-weight: 500; }
.hero .big .arrow { color: var(--muted); font-size: 28px; font-weight: 400; }
.hero .big small { font-size: 15px; letter-spacing: 0; font-weight: 500; }
.tiles { margin-top: 16px; display: grid; gap: 16px; grid-template-columns: repeat(6, 1fr); }
.tiles .card { padding: 13px 16px; }
.tiles b { display: block; font-size: 21px; letter-spacing: -0.02em; line-height: 1.3; }
.tiles span { font-size: 13px; color: var(--muted); display: block; line-height: 1.35; }
figcaption { font-size: 13px; margin: 2px 0 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin: 0 0 4px; }
.legend i {
  display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px;
  background: var(--c); vertical-align: -1px;
}
figure.card { display: flex; flex-direction: column; }
svg {
  display: block; margin-top: auto; width: 100%; height: auto; overflow: visible;
  touch-action: pan-y;
}
svg text {
  font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  fill: var(--muted);
}
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg rect.warm { fill: var(--shade); } svg text.warm { font-style: italic; }
svg .line {
  fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round;
}
svg .faint { stroke-width: 1; opacity: 0.32; } svg .thin { stroke-width: 1.75; }
svg .area { fill: var(--c); opacity: 0.85; } svg .dot { fill: var(--c); stroke: var(--card); }
svg .whisker { stroke: var(--c); stroke-width: 1.5; opacity: 0.75; }
svg .bound { stroke: var(--bad); stroke-width: 1.25; stroke-dasharray: 5 4; }
svg text.bound { stroke: none; fill: var(--bad); }
svg .cursor { stroke: var(--muted); stroke-width: 1; visibility: hidden; }
svg .track { fill: var(--shade); } svg .span { fill: var(--c); opacity: 0.3; }
.bar {
  display: flex; height: 22px; border-radius: 6px; overflow: hidden; margin: 10px 0 8px;
  gap: 1px;
}
.bar span { background: var(--c); opacity: 0.85; }
#tip {
  position: fixed; z-index: 9; pointer-events: none; visibility: hidden; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 6px 10px; font-size: 13px;
  box-shadow: 0 4px 18px rgb(0 0 0 / 0.16); max-width: 320px;
}
#tip b { display: block; } #tip i {
  display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 6px;
  background: var(--c);
}
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 500; font-size: 13px; }
th, td { padding: 8px 14px 8px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } tr { break-inside: avoid; }
code, pre, .text {
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.text {
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; display: block;
  max-height: 16em; overflow-y: auto;
}
.mark { font-weight: 700; margin-right: 8px; }
td .row { display: flex; align-items: flex-start; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.command { background: var(--shade); border-radius: 8px; padding: 11px 14px; margin: 8px 0 0; }
details summary { cursor: pointer; font-weight: 600; } details pre { margin-top: 12px; }
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0;
  font-size: 14px;
}
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 20px; } li + li { margin-top: 6px; }
footer { margin-top: 40px; font-size: 13px; color: var(--muted); }
.scroll { overflow-x: auto; }
@media screen and (max-width: 820px) {
  .half, .third { grid-column: span 6; } .tiles { grid-template-columns: repeat(2, 1fr); }
  .hero .big { font-size: 32px; } main { padding-top: 24px; }
  .wide svg text { font-size: 19px; } .third svg text { font-size: 9px; }
}
@media print {
  @page { margin: 12mm; }
  body {
    background: none; font-size: 11px; -webkit-print-color-adjust: exact;
    print-color-adjust: exact;
  }
  main { padding: 0; max-width: none; } .card { padding: 10px 12px; border-radius: 6px; }
  h1 { font-size: 22px; } h2 { margin: 20px 0 8px; break-after: avoid; }
  .hero .big { font-size: 26px; } .grid, .tiles { gap: 8px; }
  .tiles b { font-size: 15px; } .tiles span, figcaption { font-size: 10px; }
  .text { max-height: none; } table, dl { font-size: 11px; }
}
"""

SCRIPT = """
const tip = document.getElementById('tip');
function line(parent, kind, text, color) {
  const element = parent.appendChild(document.createElement(kind));
  if (color) element.appendChild(document.createElement('i')).className = color;
  element.appendChild(document.createTextNode(text));
}
for (const svg of document.querySelectorAll('svg[data-points]')) {
  const {series, points} = JSON.parse(svg.dataset.points);
  const cursor = svg.querySelector('.cursor');
  if (!points.length) continue;
  svg.addEventListener('pointermove', event => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) * svg.viewBox.baseVal.width / frame.width;
    const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.setAttribute('x1', near[0]);
    cursor.setAttribute('x2', near[0]);
    cursor.style.visibility = tip.style.visibility = 'visible';
    tip.replaceChildren();
    line(tip, 'b', near[1]);
    series.forEach(([color, name], i) => {
      if (near[i + 2] !== null) line(tip, 'div', name + ' ' + near[i + 2], color);
    });
    const right = event.clientX + 16, left = right - tip.offsetWidth - 32;
    const lowest = window.innerHeight - tip.offsetHeight - 8;
    tip.style.left = (right + tip.offsetWidth < window.innerWidth ? right : left) + 'px';
    tip.style.top = Math.min(event.clientY + 14, lowest) + 'px';
  });
  svg.addEventListener('pointerleave', () => {
    cursor.style.visibility = tip.style.visibility = 'hidden';
  });
}
window.addEventListener('beforeprint', () => {
  for (const details of document.querySelectorAll('details')) details.open = true;
});
"""
