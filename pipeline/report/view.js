"use strict";
// The page of view.py. data.js fills VIEWS, one entry a run; maps/ID.js call viewMap.
const views = window.VIEWS, first = views[0], two = views.length > 1;
const checkpoints = first.panels.slice(2), measure = first.task === "panoptic" ? "PQ" : "IoU";
const SPURIOUS = "spurious", LOST = "lost", STEP = 48, LARGE = 1000, KEPT = 40;
const title = { image: "image", truth: "ground truth", ...first.titles };

function el(tag, set = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(set)) name in made ? (made[name] = value) : made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------------------------------------ images, filters, order

const images = new Map();
views.forEach((view, number) => {
  for (const [id, width, height, quality, truth, spurious] of view.images) {
    if (!images.has(id)) images.set(id, { id, width, height, runs: [] });
    images.get(id).runs[number] = { quality, truth, spurious };
  }
});
const all = [...images.values()];
const of = checkpoint => checkpoints.indexOf(checkpoint);
const quality = (image, run = 0) => image.runs[run].quality[of(state.checkpoint)];
const ORDERS = {
  lowest: [`${measure}, lowest first`, quality],
  highest: [`${measure}, highest first`, image => -quality(image)],
  ...(two
    ? { behind: [`${views[1].run} farthest behind`, image => quality(image, 1) - quality(image)],
        ahead: [`${views[1].run} farthest ahead`, image => quality(image) - quality(image, 1)] }
    : { worse: [`lost most against ${checkpoints[0]}`, image => quality(image) - image.runs[0].quality[0]],
        better: [`gained most over ${checkpoints[0]}`, image => image.runs[0].quality[0] - quality(image)] }),
  number: ["image number", image => image.id],
};
const state = { checkpoint: checkpoints[1], order: "lowest", class: "", group: "", cause: "" };
Object.assign(state, Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].filter(([name]) => name in state)));

const groupOf = k => (first.classes[k].seen ? "seen" : "unseen");
const wanted = k => (!state.class || first.classes[k].name === state.class) && (!state.group || groupOf(k) === state.group);

function fits(image) {
  const c = of(state.checkpoint);
  return image.runs.some(({ truth, spurious }) =>
    (state.cause !== SPURIOUS && truth.some(([k, ...fates]) => {
      const fate = fates[c];
      return wanted(k) && (!state.cause || (state.cause === LOST ? fate > 0 : fate === +state.cause));
    })) || ((!state.cause || state.cause === SPURIOUS) && spurious[c].some(wanted)));
}

// ----------------------------------------------------------------------------------------------------------- the overview

function choice(name, text, options) {
  const select = el("select", { name, onchange: () => { state[name] = select.value; refresh(); } });
  for (const [head, entries] of options) {
    const made = entries.map(([value, label]) => el("option", { value, textContent: label, selected: state[name] === value }));
    select.append(...(head ? [el("optgroup", { label: head }, ...made)] : made));
  }
  if (select.value !== state[name]) state[name] = select.value;  // what an address asked for and there is not
  return el("label", { textContent: text }, select);
}

function overview() {
  const heads = Object.keys(first.rows[checkpoints[0]]);
  const rows = views.flatMap(view => checkpoints.map(name => el("tr", {},
    el("th", { textContent: two ? `${view.run}, ${title[name]}` : title[name] }),
    ...heads.map(head => el("td", { textContent: view.rows[name][head].toFixed(1) })))));
  const names = group => first.classes.map((one, k) => [one.name, k]).filter(([, k]) => groupOf(k) === group)
    .map(([name]) => [name, name]).sort((a, b) => a[0].localeCompare(b[0]));
  const causes = first.fates.map(([name, meaning], number) => [String(number), name, meaning]).slice(1);
  document.body.classList.toggle("two", two);
  document.body.prepend(
    el("header", {},
      el("h1", { textContent: views.map(view => view.run).join(" | ") },
        el("small", { textContent: `${first.benchmark}, ${all.length.toLocaleString("en")} validation images` })),
      el("table", { className: "scores" }, el("tr", {}, el("th"), ...heads.map(textContent => el("th", { textContent }))), ...rows)),
    el("div", { id: "controls" }, el("form", { onsubmit: () => false },
      choice("checkpoint", "prediction", [["", checkpoints.map(name => [name, title[name]])]]),
      choice("order", "order", [["", Object.entries(ORDERS).map(([value, [label]]) => [value, label])]]),
      choice("group", "classes", [["", [["", "seen and unseen"], ["seen", "seen"], ["unseen", "unseen"]]]]),
      choice("class", "class", [["", [["", "any class"]]], ["unseen", names("unseen")], ["seen", names("seen")]]),
      choice("cause", "with a segment that is", [
        ["", [["", "anything"], ["0", "found"], ...(causes.length > 1 ? [[LOST, "lost, by any cause"]] : [])]],
        [causes.length > 1 ? "lost at the step" : "lost", causes.map(([value, name]) => [value, name])],
        ["in excess", [[SPURIOUS, "spurious"]]]]))),
    el("p", { id: "count" }), el("main", { id: "grid" }), el("div", { id: "more" }), dialog);
}

let chosen = [], drawn = 0;

function refresh() {
  const order = ORDERS[state.order][1];
  chosen = all.filter(fits).sort((a, b) => order(a) - order(b) || a.id - b.id);
  const set = Object.entries(state).filter(([, value]) => value);
  history.replaceState(null, "", `#${new URLSearchParams(set)}`);
  const cause = first.fates[state.cause]?.[1];
  document.getElementById("count").textContent =
    `${chosen.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} images.` + (cause ? ` ${cause}` : "");
  document.getElementById("grid").replaceChildren();
  drawn = 0;
  more();
}

function more() {
  const next = chosen.slice(drawn, drawn + STEP);
  document.getElementById("grid").append(...next.map((image, number) => card(image, drawn + number)));
  drawn += next.length;
  // what is seen again only after it was out of sight would stop: look anew
  watch.disconnect();
  if (drawn < chosen.length) watch.observe(document.getElementById("more"));
}
const watch = new IntersectionObserver(entries => entries.some(entry => entry.isIntersecting) && more(), { rootMargin: "1500px" });

const file = (view, folder, image) => `${view.base}${folder}/${String(image.id).padStart(12, "0")}`;

function thumb(view, image, panel) {
  const place = 100 * first.panels.indexOf(panel) / (first.panels.length - 1);
  return el("img", { loading: "lazy", decoding: "async", src: `${file(view, "thumbs", image)}.webp`, alt: checkpoints.includes(panel) ? `${view.run} ${title[panel]}` : title[panel],
    style: `aspect-ratio: ${image.width} / ${image.height}; object-position: ${place}% 0` });
}

function card(image, position) {
  const c = of(state.checkpoint), shown = two ? [] : [el("b", { textContent: `${measure} ${quality(image).toFixed(1)}` })];
  views.forEach((view, run) => {
    const counts = new Map();
    const count = name => counts.set(name, (counts.get(name) ?? 0) + 1);
    for (const [, ...fates] of image.runs[run].truth) if (fates[c] > 0) count(first.fates[fates[c]][0]);
    image.runs[run].spurious[c].forEach(() => count(SPURIOUS));
    if (two) shown.push(el("span", { className: "dim", textContent: view.run }),
      el("b", { textContent: `${measure} ${quality(image, run).toFixed(1)}` }));
    shown.push(...[...counts].map(([name, number]) => el("span", { className: "chip", textContent: `${number} ${name}` })));
  });
  return el("button", { className: "card", title: `image ${image.id}`, onclick: () => enlarge(position) },
    el("div", { className: "strip" }, thumb(first, image, "image"), thumb(first, image, "truth"),
      ...views.map(view => thumb(view, image, state.checkpoint))),
    el("div", { className: "facts" }, ...shown, el("span", { className: "dim", textContent: `no. ${image.id}` })));
}

// ------------------------------------------------------------------------------------------------------- one image, large

const dialog = el("dialog"), loaded = new Map();
const large = { position: 0, panel: state.checkpoint, names: true };

window.viewMap = (base, id, content) => loaded.get(base + id).found(content);

function load(view, image) {
  const key = view.base + image.id;
  if (!loaded.has(key)) {
    const entry = {};
    entry.ready = new Promise((found, failed) => {
      entry.found = found;
      const script = el("script", { src: `${file(view, "maps", image)}.js`, onload: () => script.remove(),
        onerror: () => { loaded.delete(key); failed(new Error(`${script.src} cannot be read`)); } });
      document.head.append(script);
    });
    loaded.set(key, entry);
    if (loaded.size > KEPT) loaded.delete(loaded.keys().next().value);
  }
  return loaded.get(key).ready;
}

async function decode({ png }) {
  const picture = new Image();
  picture.src = `data:image/png;base64,${png}`;
  await picture.decode();
  const { width, height } = picture, scale = Math.max(1, Math.round(LARGE / Math.max(width, height)));
  const canvas = el("canvas", { width, height }), context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const map = { width: width * scale, height: height * scale, places: new Uint16Array(width * height * scale * scale) };
  for (let y = 0, i = 0; y < map.height; y++) for (let x = 0; x < map.width; x++, i++) {
    const from = 4 * ((y / scale | 0) * width + (x / scale | 0));
    map.places[i] = data[from] + 256 * data[from + 1];
  }
  return map;
}

function enlarge(position) {
  large.position = position;
  if (large.panel !== "image" && large.panel !== "truth") large.panel = state.checkpoint;
  if (!dialog.open) dialog.showModal();
  draw();
}

let turn = 0;

async function draw() {
  const mine = ++turn, image = chosen[large.position];
  const tabs = first.panels.map((panel, number) => el("button", { textContent: title[panel],
    title: `key ${number + 1}`, "aria-pressed": large.panel === panel, onclick: () => { large.panel = panel; draw(); } }));
  const bar = el("div", { className: "bar" },
    el("h2", { textContent: `image ${image.id}` },
      el("span", { className: "dim", textContent: `  ${large.position + 1} of ${chosen.length.toLocaleString("en")}` })),
    el("div", { className: "tabs" }, ...tabs),
    el("label", { className: "names" }, el("input", { type: "checkbox", checked: large.names,
      onchange: event => { large.names = event.target.checked; draw(); } }), "names"),
    el("div", { className: "tabs" },
      el("button", { textContent: "\u2039", title: "left arrow", ariaLabel: "previous image", onclick: () => go(-1) }),
      el("button", { textContent: "\u203a", title: "right arrow", ariaLabel: "next image", onclick: () => go(1) }),
      el("button", { textContent: "\u2715", title: "Esc", ariaLabel: "close", onclick: () => dialog.close() })));
  const figures = [], lists = [];
  try {
    for (const [run, view] of views.entries()) {
      const content = await load(view, image);
      const truth = await decode(content.truth);
      const shown = large.panel === "image" ? null : large.panel === "truth" ? truth : await decode(content[large.panel]);
      if (mine !== turn) return;
      const part = stage(view, image, content, shown, truth);
      const c = checkpoints.includes(large.panel) ? large.panel : state.checkpoint;
      const head = `${two ? `${view.run}, ` : ""}${title[c]}: ${measure} ${image.runs[run].quality[of(c)].toFixed(1)}`;
      figures.push(el("figure", {}, el("figcaption", { textContent: head }), part.box));
      lists.push(list(image.runs[run], content, c, part));
    }
  } catch (error) {
    figures.push(el("p", { className: "lost", textContent: error.message }));
  }
  dialog.replaceChildren(bar, el("div", { className: "shown" }, ...figures, ...lists));
}

function go(by) {
  large.position = (large.position + by + chosen.length) % chosen.length;
  draw();
}

document.addEventListener("keydown", event => {
  if (!dialog.open) return;
  const panel = first.panels[event.key - 1];
  if (event.key === "ArrowLeft") go(-1);
  else if (event.key === "ArrowRight") go(1);
  else if (panel) { large.panel = panel; draw(); }
});

const rgb = colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
const UNSEEN = [214, 51, 108];

// The image with a map's segments over it; `mark` lights up a place of the truth.
function stage(view, image, content, map, truth) {
  const canvas = el("canvas", { width: truth.width, height: truth.height }), tip = el("div", { className: "tip", hidden: true });
  const longest = Math.max(image.width, image.height);
  const box = el("div", { className: "stage", style: `--fit: calc((100dvh - 130px) * ${image.width / image.height})` },
    el("img", { src: `${file(view, "images", image)}.webp`, alt: "", className: longest < LARGE / 3 ? "small" : "",
      style: `aspect-ratio: ${image.width} / ${image.height}` }), canvas, tip);
  const segments = map ? content[large.panel].segments : [];
  paint(canvas, map, segments);
  canvas.onpointermove = canvas.onpointerdown = event => {
    const area = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - area.left) / area.width * canvas.width);
    const y = Math.floor((event.clientY - area.top) / area.height * canvas.height);
    const place = map ? map.places[y * map.width + x] ?? 0 : 0;
    tip.hidden = !map;
    tip.textContent = place ? label(segments[place - 1]) : "void";
    tip.style.left = `${Math.min(Math.max(event.clientX - area.left, 70), area.width - 70)}px`;
    tip.style.top = `${event.clientY - area.top}px`;
    if (map) paint(canvas, map, segments, map, place);
  };
  canvas.onpointerleave = () => { tip.hidden = true; paint(canvas, map, segments); };
  return { box, mark: place => paint(canvas, map, segments, truth, place) };
}

function label({ class: k, score, iou, spurious }) {
  const { name, seen } = first.classes[k], facts = [];
  if (!seen) facts.push("unseen");
  if (score !== undefined && first.task === "panoptic") facts.push(`score ${score.toFixed(2)}`);
  if (iou !== undefined) facts.push(`IoU ${iou.toFixed(2)}`);
  if (spurious) facts.push(SPURIOUS);
  return [name, ...facts].join(", ");
}

function paint(canvas, map, segments, lit, mark = 0) {
  const context = canvas.getContext("2d"), { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  if (!map && !mark) return;
  const pixels = context.createImageData(width, height), data = pixels.data;
  const colours = segments.map(({ class: k }) => rgb(first.classes[k].colour)), seen = segments.map(({ class: k }) => first.classes[k].seen);
  const places = map?.places;
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++, i++) {
    const to = 4 * i, place = places ? places[i] : 0;
    if (place) {
      const known = seen[place - 1], reach = known ? 1 : 4;
      let edge = false;
      for (let d = 1; d <= reach && !edge; d++)
        edge = (x >= d && places[i - d] !== place) || (x + d < width && places[i + d] !== place)
          || (y >= d && places[i - d * width] !== place) || (y + d < height && places[i + d * width] !== place);
      const colour = edge && !known ? UNSEEN : edge ? [255, 255, 255] : colours[place - 1];
      data[to] = colour[0]; data[to + 1] = colour[1]; data[to + 2] = colour[2]; data[to + 3] = edge ? 255 : 125;
    } else if (places) { data[to] = data[to + 1] = data[to + 2] = 120; data[to + 3] = 150; }
    if (mark && lit.places[i] === mark && (x + y) % 8 < 3) {
      data[to] = data[to + 1] = data[to + 2] = 255; data[to + 3] = 210;
    }
  }
  context.putImageData(pixels, 0, 0);
  if (map && large.names) write(context, map, segments);
}

// Names at the pixel of a segment that is nearest to its mean.
function write(context, { width, height, places }, segments) {
  const sums = segments.map(() => [0, 0, 0]), best = segments.map(() => [Infinity, 0, 0]);
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++, i++) if (places[i]) {
    const sum = sums[places[i] - 1];
    sum[0] += x; sum[1] += y; sum[2]++;
  }
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++, i++) if (places[i]) {
    const [a, b, n] = sums[places[i] - 1], distance = (x - a / n) ** 2 + (y - b / n) ** 2;
    if (distance < best[places[i] - 1][0]) best[places[i] - 1] = [distance, x, y];
  }
  const letters = Math.round(Math.max(width, height) / 42);
  context.font = `600 ${letters}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  segments.forEach(({ class: k }, i) => {
    if (sums[i][2] < 0.003 * width * height) return;
    const { name, seen } = first.classes[k], wide = context.measureText(name).width + letters * 0.7;
    const x = Math.min(Math.max(best[i][1], wide / 2), width - wide / 2), y = best[i][2];
    context.fillStyle = seen ? "#fffe" : `rgb(${UNSEEN})`;
    context.beginPath();
    context.roundRect(x - wide / 2, y - 0.7 * letters, wide, 1.4 * letters, letters / 3);
    context.fill();
    context.fillStyle = seen ? "#1f2933" : "#fff";
    context.fillText(name, x, y);
  });
}

// The true segments, lost ones first, and the spurious ones.
function list({ truth }, content, checkpoint, part) {
  const c = of(checkpoint), segments = content[checkpoint].segments;
  const named = k => [el("span", { className: "swatch", style: `background: ${first.classes[k].colour}` }), first.classes[k].name,
    ...(first.classes[k].seen ? [] : [" ", el("span", { className: "pill", textContent: "unseen" })])];
  const rows = truth.map(([k, ...fates], i) => {
    const fate = fates[c], [j, share] = content.over[checkpoint][i], lost = fate > 0;
    const over = j < 0 ? "void" : label(segments[j]);
    const name = fate < 0 ? "crowd, does not count" : lost ? `lost: ${first.fates[fate][0]}` : first.fates[0][0];
    const row = el("tr", { onpointerenter: () => part.mark(i + 1), onpointerleave: () => part.mark(0) },
      el("td", {}, ...named(k)), el("td", { className: lost ? "lost" : "dim", textContent: name, title: first.fates[fate]?.[1] ?? "" }),
      el("td", { className: "dim", textContent: `${Math.round(100 * share)} % under ${over}` }));
    return [lost ? fate : 99, row];
  }).sort((a, b) => a[0] - b[0]).map(([, row]) => row);
  const spurious = segments.filter(segment => segment.spurious).map(segment => el("tr", {},
    el("td", {}, ...named(segment.class)), el("td", { className: "lost", textContent: SPURIOUS }),
    el("td", { className: "dim", textContent: segment.score === undefined ? "" : `score ${segment.score.toFixed(2)}` })));
  return el("table", { className: "segments" }, ...rows, ...spurious);
}

overview();
refresh();
