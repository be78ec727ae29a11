"""The report page's style sheet and its script: sorts a table by the column that is clicked, enlarges pictures, names the
segment under the pointer."""

from __future__ import annotations

from pipeline.report.overlay import UNSEEN

# the light and the dark colours of every page
COLOURS = f"""
:root {{ color-scheme: light dark; --unseen: {UNSEEN}; --ink: #1f2933; --dim: #616e7c; --faint: #b6bfc9; --line: #e4e7eb;
  --rule: #cbd2d9; --ground: #f5f7fa; --card: #fff; --main: #eef4fb; --bar: #dfeaf7; --loss: #f3c9a5; --link: #1d5fb4;
  --warn: #fff7e0; --warn-line: #f0d48a; --warn-ink: #6b4d00; --plot: none; }}
@media (prefers-color-scheme: dark) {{ :root {{ --unseen: #d6336c; --ink: #e2e6ea; --dim: #9aa5b1; --faint: #5b6673;
  --line: #2c343d; --rule: #46515d; --ground: #12161b; --card: #1a2027; --main: #21303f; --bar: #2b4159; --loss: #74482a;
  --link: #7db4f0; --warn: #33290f; --warn-line: #6b561d; --warn-ink: #f0d48a;
  --plot: invert(.895) hue-rotate(180deg); }} }}
"""

STYLE = f"""{COLOURS}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 36px 20px 60px; }}
header {{ margin-bottom: 20px; }}
.brand {{ margin: 0; color: var(--dim); letter-spacing: .06em; }}
h1 {{ margin: 0; font-size: 30px; line-height: 1.2; }}
h2 {{ margin: 0 0 6px; font-size: 18px; }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin-top: 18px; }}
.marks {{ margin: 0; padding: 12px 20px 12px 38px; background: var(--warn); border: 1px solid var(--warn-line);
  border-radius: 10px; color: var(--warn-ink); }}
.note {{ margin: 8px 0 10px; color: var(--dim); font-size: 13px; }}
.teacher {{ margin: 10px 0 0; padding-top: 12px; border-top: 1px solid var(--line); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th {{ text-align: left; font-weight: 600; }}
td, th {{ padding: 5px 8px; }}
thead th {{ color: var(--dim); font-size: 13px; white-space: nowrap; }}
thead tr:last-child > * {{ border-bottom: 1px solid var(--rule); }}
tbody tr + tr > * {{ border-top: 1px solid var(--line); }}
.number {{ text-align: right; }}
.group {{ text-align: center; }}
.group, .first {{ border-left: 1px solid var(--line); }}
.headline td {{ font-size: 17px; }}
.headline small, .losses small {{ display: block; font-weight: 400; font-size: 12.5px; line-height: 1.35;
  color: var(--dim); max-width: 23em; }}
.headline .main {{ font-weight: 700; background: var(--main); }}
.headline .ceiling > *, .headline .control > * {{ color: var(--dim); }}
.headline tr:not(.ceiling) + .ceiling > * {{ border-top: 2px solid var(--rule); }}
.losses small {{ max-width: 44em; }}
.losses .level > * {{ font-weight: 700; }}
.fall {{ width: 150px; background: linear-gradient(var(--loss), var(--loss)) var(--at) 50% / var(--v) 62% no-repeat; }}
.level .fall {{ background-image: linear-gradient(var(--bar), var(--bar)); }}
.ours > * {{ font-weight: 700; background: var(--main); }}
.aside {{ background: none; border-style: dashed; }}
.aside img {{ border-radius: 6px; }}
.pairs {{ grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }}
.pill {{ background: var(--unseen); color: #fff; border-radius: 6px; padding: 1px 7px; font-size: 12px;
  margin-left: 4px; }}
.note .pill {{ margin-left: 0; }}
.classes {{ font-size: 13.5px; }}
.classes td {{ padding: 3px 8px; white-space: nowrap; }}
.classes .unseen > td:first-child {{ box-shadow: inset 3px 0 var(--unseen); }}
.kind {{ color: var(--dim); }}
.classes th {{ font-size: 12px; padding: 3px 5px; }}
.bar {{ width: 78px; background: linear-gradient(var(--bar), var(--bar)) 0 50% / var(--v) 76% no-repeat; }}
.absent {{ color: var(--faint); }}
.sort {{ cursor: pointer; }}
.sort:hover {{ color: var(--ink); }}
.sort[data-order]::after {{ content: " \\25BE"; }}
.sort[data-order="1"]::after {{ content: " \\25B4"; }}
.pictures {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; margin-bottom: 8px; }}
.heads {{ color: var(--dim); font-size: 13px; font-weight: 600; margin-bottom: 4px; }}
.panel {{ width: 100%; display: block; border-radius: 5px; cursor: zoom-in; }}
dialog {{ padding: 0; border: 0; background: none; max-width: 100vw; max-height: 100dvh; }}
dialog::backdrop {{ background: #000c; }}
dialog figure {{ color: #fff; text-align: center; }} dialog figure.panel {{ cursor: default; width: auto; }}
dialog figcaption {{ padding: 6px 10px; }}
dialog img {{ width: min(100vw, 100dvh - 60px, 1200px); max-width: none; display: block; margin: auto; }}
dialog figure.plot img {{ width: min(100vw, 1000px); filter: none; background: #fff; }}
.tip {{ position: fixed; pointer-events: none; z-index: 9; background: var(--ink); color: var(--card); border-radius: 6px;
  padding: 2px 8px; font-size: 13px; white-space: nowrap; transform: translate(-50%, -150%); }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 16px; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; font-size: 14px; }}
figure img {{ width: 100%; max-width: 480px; filter: var(--plot); cursor: zoom-in; }}
a {{ color: var(--link); }}
.two {{ display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 18px; align-items: start; }}
.two td {{ overflow-wrap: anywhere; }} .two td:last-child:not(:nth-child(2)) {{ white-space: nowrap; }}
.plain {{ font-size: 13.5px; }}
.plain th {{ font-weight: 400; color: var(--dim); }}
code {{ font-family: ui-monospace, "Liberation Mono", monospace; font-size: 12.5px; }}
@media (max-width: 760px) {{
  main {{ padding: 20px 8px 40px; }} section {{ padding: 14px 10px; }}
  .two {{ grid-template-columns: minmax(0, 1fr); }}
  .pictures {{ grid-template-columns: repeat(2, 1fr); }} .heads {{ display: none; }}
  .pairs {{ grid-template-columns: minmax(0, 1fr) !important; }}
  .headline td {{ font-size: 15px; }} td, th {{ padding: 4px 6px; }} .fall {{ min-width: 92px; }}
  .scroll table {{ width: max-content; min-width: 100%; }}
  .scroll th[scope=row] {{ position: sticky; left: 0; background: var(--card); max-width: 150px; }}
  .scroll th[scope=row] small {{ display: none; }}
}}
"""

SCRIPT = r"""
"use strict";
for (const head of document.querySelectorAll("th.sort")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, text = "text" in head.dataset;
  const order = "order" in head.dataset ? -head.dataset.order : text ? 1 : -1;
  for (const other of head.parentNode.children) delete other.dataset.order;
  head.dataset.order = order;
  const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  body.append(...[...body.rows].sort((a, b) =>
    order * (text ? value(a).localeCompare(value(b)) : value(a) - value(b))));
};

// The map of a picture as pixels, decoded when the pointer first comes.
const maps = new Map();
async function pixels(url) {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: picture.width, height: picture.height });
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  return context.getImageData(0, 0, picture.width, picture.height);
}

function named(img, holder) {
  const { places, names } = img.dataset;
  if (!places) return;
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  holder.append(tip);
  img.onpointermove = async event => {
    if (!maps.has(places)) maps.set(places, pixels(places));
    const { width, height, data } = await maps.get(places), area = img.getBoundingClientRect();
    const [x, y] = [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return;
    const at = 4 * (Math.floor(y * height) * width + Math.floor(x * width));
    tip.textContent = ["void", ...JSON.parse(names)][data[at] + 256 * data[at + 1]];
    tip.style.left = `${Math.min(Math.max(event.clientX, 70), innerWidth - 70)}px`;
    tip.style.top = `${event.clientY}px`;
    tip.hidden = false;
  };
  img.onpointerleave = () => { tip.hidden = true; };
}

const dialog = document.body.appendChild(document.createElement("dialog"));
dialog.onclick = event => { if (event.target.tagName !== "IMG") dialog.close(); };
for (const group of [document.querySelectorAll(".panel"), document.querySelectorAll(".curves img")]) {
  const all = [...group];
  const enlarge = place => {
    const from = all[(place + all.length) % all.length], large = from.cloneNode(), caption = document.createElement("figcaption");
    const figure = document.createElement("figure");
    caption.textContent = `${from.alt}, ${all.indexOf(from) + 1} of ${all.length}`;
    figure.className = from.className || "plot";
    large.className = "";
    figure.append(large, caption);
    dialog.replaceChildren(figure);
    dialog.onkeydown = ({ key }) => { if (key === "ArrowRight") enlarge(place + 1); else if (key === "ArrowLeft") enlarge(place - 1); };
    named(large, dialog);
    if (!dialog.open) dialog.showModal();
  };
  all.forEach((img, place) => {
    img.tabIndex = 0;
    img.onclick = () => enlarge(place);
    img.onkeydown = ({ key }) => { if (key === "Enter") enlarge(place); };
    named(img, document.body);
  });
}
"""
