"use strict";
// The texts' tokens in one row, a column of leaves for every layer; what is shown follows from `state`.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const LINE = 28, COLOURS = ["#08306b", "#15529a", "#2171b5", "#6ab0d8", "#cfd3b8", "#fdb870", "#ec7014", "#b6490c", "#7f2704"];
const SPREAD = 4; // colours end at 2 ** SPREAD times more or less use than even
const state = { text: 0, layer: 0, slot: 0, token: 0, node: null, found: new Set(), from: 0, to: 1 };
const starts = [0];
for (const text of data.texts) starts.push(starts.at(-1) + text.pieces.length);
const total = starts.at(-1);
// Layers are called by what tells their names apart.
const names = (() => {
  const all = data.layers.map((layer) => layer.name.split(".")), same = (at) => all.every((parts) => parts.at(at) === all[0].at(at));
  if (all.length < 2) return data.layers.map((layer) => layer.name);
  let first = 0, last = 0;
  while (same(first)) first++;
  while (same(-1 - last)) last++;
  return all.map((parts) => parts.slice(first, parts.length - last).join(".") || parts.join("."));
})();

function bytes(text, Kind) {
  const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Kind(raw.buffer);
}

// One layer, unpacked when it is first looked at.
const unpacked = new Map();
function layerOf(index) {
  if (!unpacked.has(index)) {
    const raw = data.layers[index];
    const leaf = bytes(raw.leaf, { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[raw.bytes]);
    unpacked.set(index, { ...raw, leaf, sureness: bytes(raw.sureness, Float32Array), k: raw.trees * raw.chosen, trees_: [] });
  }
  return unpacked.get(index);
}
const leavesOf = (layer, token, tree) =>
  layer.leaf.subarray(token * layer.k + tree * layer.chosen, token * layer.k + (tree + 1) * layer.chosen);

// Tokens of every leaf of a tree, and visits of its nodes (heap order; of a layer without trees the leaves alone).
function treeOf(layer, tree) {
  if (!layer.trees_[tree]) {
    const members = Array.from({ length: layer.leaves }, () => []);
    for (let token = 0; token < total; token++) for (const leaf of leavesOf(layer, token, tree)) members[leaf].push(token);
    const levels = [members.map((m) => m.length)];
    for (let level = 0; level < layer.depth; level++) {
      const below = levels[0];
      levels.unshift(Array.from({ length: below.length / 2 }, (_, i) => below[2 * i] + below[2 * i + 1]));
    }
    layer.trees_[tree] = { members, levels };
  }
  return layer.trees_[tree];
}
// Tokens that take each leaf, of every tree: without the lists, which only trees in sight need.
function countsOf(layer) {
  const counts = Array.from({ length: layer.trees }, () => new Array(layer.leaves).fill(0));
  for (let at = 0; at < layer.leaf.length; at++) counts[Math.floor((at % layer.k) / layer.chosen)][layer.leaf[at]]++;
  return counts;
}
const here = () => [layerOf(state.layer), treeOf(layerOf(state.layer), state.slot)];
const piece = (token) => data.texts[textOf(token)].pieces[token - starts[textOf(token)]];
function textOf(token) {
  let index = 0;
  while (token >= starts[index + 1]) index++;
  return index;
}
const shown = (text) => text.replace(/\n/g, "⏎").trim() || "␣";
const number = (value) => value.toLocaleString("en");
const exact = (value) => (Number.isFinite(value) ? value.toPrecision(3) : "–");
const percent = (value) => (100 * value).toFixed(1) + " %";

// ---- The tokens: only the lines in sight are in the document.
const list = $("tokens"), pen = document.createElement("canvas").getContext("2d");
let lines = [];
function layOut() {
  pen.font = getComputedStyle(list).font;
  const width = list.clientWidth - 16, first = starts[state.text], last = starts[state.text + 1];
  lines = [];
  let line = [], used = 0;
  for (let token = first; token < last; token++) {
    const text = piece(token).replace(/\n/g, "⏎");
    const wide = pen.measureText(text).width;
    if (line.length && (used + wide > width || piece(token).startsWith("\n"))) {
      lines.push(line);
      line = [];
      used = 0;
    }
    line.push(token);
    used += wide;
  }
  if (line.length) lines.push(line);
  list.replaceChildren();
  const space = document.createElement("div");
  space.style.height = lines.length * LINE + "px";
  space.setAttribute("role", "presentation");
  list.append(space);
  showTokens();
}
const lineOf = (token) => {
  let low = 0, high = lines.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (lines[middle][0] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
};
function showTokens() {
  const [layer, tree] = here();
  const first = Math.max(0, Math.floor(list.scrollTop / LINE) - 3);
  const last = Math.min(lines.length, Math.ceil((list.scrollTop + list.clientHeight) / LINE) + 3);
  const mine = new Set(leavesOf(layer, state.token, state.slot)), bySure = $("colour").value === "sure";
  const scale = bySure ? quantiles(layer) : null, base = starts[state.text], size = starts[state.text + 1] - base;
  const made = [];
  for (let index = first; index < last; index++) {
    const line = document.createElement("div");
    line.className = "line";
    line.style.top = index * LINE + "px";
    line.setAttribute("role", "presentation");
    for (const token of lines[index]) line.append(option(token, layer, mine, scale, base, size));
    made.push(line);
  }
  list.querySelectorAll(".line").forEach((line) => line.remove());
  list.append(...made);
  const chosen = document.getElementById("t" + state.token);
  if (chosen) list.setAttribute("aria-activedescendant", chosen.id);
  else list.removeAttribute("aria-activedescendant");
}
function option(token, layer, mine, scale, base, size) {
  const span = document.createElement("span"), leaves = leavesOf(layer, token, state.slot);
  span.id = "t" + token;
  span.textContent = piece(token).replace(/\n/g, "⏎");
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", token === state.token);
  span.setAttribute("aria-setsize", size);
  span.setAttribute("aria-posinset", token - base + 1);
  const hue = scale ? 220 - 200 * share(scale, layer.sureness[token]) : (leaves[0] * 137.508) % 360;
  span.style.backgroundColor = `hsl(${hue} 65% var(--light))`;
  span.title = `leaf ${[...leaves].join(", ")}; ${layer.surenessIs} ${exact(layer.sureness[token])}`;
  if (leaves.some((leaf) => mine.has(leaf))) span.classList.add("shared");
  if (state.found.has(token)) span.classList.add("found");
  return span;
}
function quantiles(layer) {
  layer.sorted ??= layer.sureness.slice().sort();
  return layer.sorted;
}
function share(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low / sorted.length;
}
function choose(token, { quiet = false } = {}) {
  state.token = Math.min(Math.max(token, starts[state.text]), starts[state.text + 1] - 1);
  const top = lineOf(state.token) * LINE;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + LINE > list.scrollTop + list.clientHeight) list.scrollTop = top + LINE - list.clientHeight;
  state.node = null;
  showTokens();
  showToken();
  showTree();
  if (!quiet) say();
}
function say() {
  const [layer, tree] = here(), leaves = [...leavesOf(layer, state.token, state.slot)];
  const others = new Set(leaves.flatMap((leaf) => tree.members[leaf])).size - 1;
  $("said").textContent =
    `${shown(piece(state.token))}: ${leaves.length > 1 ? "leaves" : "leaf"} ${leaves.join(", ")} of layer ${names[state.layer]}, ` +
    `shared with ${number(others)} tokens; ${layer.surenessIs} ${exact(layer.sureness[state.token])}`;
}
function neighbour(step) {
  const [layer, tree] = here();
  const sharing = [...new Set([...leavesOf(layer, state.token, state.slot)].flatMap((leaf) => tree.members[leaf]))]
    .filter((token) => textOf(token) === state.text).sort((a, b) => a - b);
  return sharing[(sharing.indexOf(state.token) + step + sharing.length) % sharing.length];
}
list.addEventListener("scroll", () => requestAnimationFrame(showTokens));
list.addEventListener("click", (event) => {
  if (event.target.id.startsWith("t") && event.target !== list) choose(Number(event.target.id.slice(1)));
});
list.addEventListener("keydown", (event) => {
  const line = lineOf(state.token), place = lines[line].indexOf(state.token);
  const page = Math.max(1, Math.floor(list.clientHeight / LINE) - 1);
  const at = (index) => {
    const other = lines[Math.min(Math.max(index, 0), lines.length - 1)];
    return other[Math.min(place, other.length - 1)];
  };
  const to = {
    ArrowRight: () => state.token + 1, ArrowLeft: () => state.token - 1, ArrowDown: () => at(line + 1), ArrowUp: () => at(line - 1),
    PageDown: () => at(line + page), PageUp: () => at(line - page), Home: () => starts[state.text], End: () => starts[state.text + 1] - 1,
    n: () => neighbour(1), p: () => neighbour(-1),
  }[event.key];
  if (!to || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  choose(to());
});

// ---- The chosen token in every layer.
function row(cells, head) {
  const made = document.createElement("tr");
  for (const cell of cells) {
    const box = document.createElement(head ? "th" : "td");
    if (head) box.scope = "col";
    box.append(cell);
    made.append(box);
  }
  return made;
}
function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", act);
  return made;
}
function showToken() {
  $("token-name").textContent = `“${shown(piece(state.token))}”, token ${number(state.token - starts[state.text] + 1)}`;
  const table = $("layers");
  table.tHead.replaceChildren(row(["Layer", "Leaves", "Margin or gate", "Tokens that share one"], true));
  const rows = data.layers.map((raw, index) => {
    const layer = layerOf(index), all = [...layer.leaf.subarray(state.token * layer.k, (state.token + 1) * layer.k)];
    const tree = treeOf(layer, Math.min(state.slot, layer.trees - 1));
    const leaves = leavesOf(layer, state.token, Math.min(state.slot, layer.trees - 1));
    const sharing = new Set([...leaves].flatMap((leaf) => tree.members[leaf])).size - 1;
    const named = button(names[index], () => setLayer(index));
    const made = row([named, all.slice(0, 12).join(" ") + (all.length > 12 ? " …" : ""), exact(layer.sureness[state.token]), number(sharing)]);
    if (index === state.layer) made.setAttribute("aria-current", "true");
    return made;
  });
  table.tBodies[0].replaceChildren(...rows);
}

// ---- The tree.
const tree = $("tree");
function prepared(canvas) {
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(box.width * ratio));
  canvas.height = Math.max(1, Math.round(box.height * ratio));
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.clearRect(0, 0, box.width, box.height);
  return [context, box.width, box.height];
}
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const visits = (levels) => levels[0].reduce((sum, count) => sum + count, 0);
// Colour of a node, and of the number on it.
function use(levels, level, index) {
  const even = visits(levels) / levels[level].length, count = levels[level][index];
  if (!count) return [ink("--faint"), ink("--ink")];
  const step = Math.round(((COLOURS.length - 1) * (Math.log2(count / even) + SPREAD)) / (2 * SPREAD));
  return [COLOURS[Math.min(Math.max(step, 0), COLOURS.length - 1)], step > 2 && step < 7 ? "#111" : "#fff"];
}
// Nodes of the chosen token: one path a leaf, root first.
function ways() {
  const [layer, found] = here();
  return [...leavesOf(layer, state.token, state.slot)].map((leaf) => found.levels.map((_, level) => leaf >> (found.levels.length - 1 - level)));
}
function showTree() {
  const [layer, found] = here(), levels = found.levels, [pen, width, height] = prepared(tree);
  const tall = height / levels.length, span = state.to - state.from, x = (share) => ((share - state.from) / span) * width;
  levels.forEach((counts, level) => {
    const wide = width / span / counts.length, first = Math.max(0, Math.floor(state.from * counts.length));
    const last = Math.min(counts.length, Math.ceil(state.to * counts.length)), gap = wide > 4 ? 1 : 0;
    for (let index = first; index < last; index++) {
      const [paper, letters] = use(levels, level, index);
      pen.fillStyle = paper;
      pen.fillRect(x(index / counts.length), level * tall + 1, Math.max(0.5, wide - gap), tall - 2);
      if (wide > 44 && tall > 14) {
        pen.fillStyle = letters;
        pen.font = "12px system-ui, sans-serif";
        pen.fillText(number(counts[index]), x(index / counts.length) + 4, level * tall + tall / 2 + 4);
      }
    }
  });
  for (const [ink, thick] of [["#fff", 6], ["#111", 3]]) { // a dark line in a light one is seen on every colour
    pen.strokeStyle = ink;
    pen.lineWidth = thick;
    for (const way of ways()) {
      pen.beginPath();
      way.forEach((index, level) => pen.lineTo(x((index + 0.5) / levels[level].length), (level + 0.5) * tall));
      pen.stroke();
      const end = way.at(-1), last = levels.length - 1;
      pen.strokeRect(x(end / levels[last].length), last * tall + 2, Math.max(2, width / span / levels[last].length), tall - 4);
    }
  }
  const [level, index] = node();
  pen.strokeStyle = ink("--chosen");
  pen.lineWidth = 4;
  pen.strokeRect(x(index / levels[level].length), level * tall + 2, Math.max(2, width / span / levels[level].length), tall - 4);
  $("tree-title").textContent = layer.depth ? `Tree ${state.slot + 1} of ${layer.trees}, layer ${names[state.layer]}` : `Leaves of layer ${names[state.layer]}`;
  $("tree-status").textContent = told(levels, level, index);
  showMembers(found, level, index);
}
const node = () => state.node ?? [here()[1].levels.length - 1, ways()[0].at(-1)];
function told(levels, level, index) {
  const kind = level === levels.length - 1 ? `Leaf ${index}` : `Level ${level}, node ${index}`, all = visits(levels);
  return `${kind}: ${number(levels[level][index])} visits, ${percent(levels[level][index] / all)} (even: ${percent(1 / levels[level].length)}).`;
}
function showMembers(found, level, index) {
  const below = found.levels.length - 1 - level, tokens = [];
  for (let leaf = index << below; leaf < (index + 1) << below; leaf++) tokens.push(...found.members[leaf]);
  const groups = new Map();
  for (const token of new Set(tokens)) {
    const word = shown(piece(token));
    groups.set(word, [...(groups.get(word) ?? []), token]);
  }
  const most = [...groups].sort((a, b) => b[1].length - a[1].length).slice(0, 60);
  $("members-title").textContent = `Tokens of the node: ${number(new Set(tokens).size)}, ${number(groups.size)} different` + (groups.size > 60 ? ", the 60 most frequent" : "");
  $("members").replaceChildren(...most.map(([word, own]) => button(own.length > 1 ? `${word} ×${own.length}` : word, () => goTo(own[0]))));
}
function goTo(token) {
  if (textOf(token) !== state.text) {
    state.text = textOf(token);
    $("text").value = state.text;
    layOut();
  }
  choose(token);
}
function zoom(factor, at = (state.from + state.to) / 2) {
  const leaves = here()[1].levels.at(-1).length, span = Math.min(1, Math.max(4 / Math.max(4, leaves), (state.to - state.from) * factor));
  const from = at - ((at - state.from) / (state.to - state.from)) * span;
  state.from = Math.min(Math.max(0, from), 1 - span);
  state.to = state.from + span;
  showTree();
}
function setNode(level, index) {
  const counts = here()[1].levels[level];
  state.node = [level, Math.min(Math.max(index, 0), counts.length - 1)];
  const middle = (state.node[1] + 0.5) / counts.length, span = state.to - state.from;
  if (middle < state.from || middle > state.to) {
    state.from = Math.min(Math.max(0, middle - span / 2), 1 - span);
    state.to = state.from + span;
  }
  showTree();
}
tree.addEventListener("keydown", (event) => {
  const [level, index] = node(), levels = here()[1].levels;
  const act = {
    "+": () => zoom(0.5, (index + 0.5) / levels[level].length), "=": () => zoom(0.5, (index + 0.5) / levels[level].length), "-": () => zoom(2), 0: () => zoom(Infinity),
    ArrowLeft: () => setNode(level, index - 1), ArrowRight: () => setNode(level, index + 1),
    ArrowUp: () => level && setNode(level - 1, index >> 1), ArrowDown: () => level + 1 < levels.length && setNode(level + 1, 2 * index),
  }[event.key];
  if (!act || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  act();
});
const place = (event) => {
  const box = tree.getBoundingClientRect();
  return [state.from + ((event.clientX - box.left) / box.width) * (state.to - state.from), (event.clientY - box.top) / box.height];
};
tree.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return; // a plain wheel scrolls the page
  event.preventDefault();
  zoom(event.deltaY > 0 ? 1.25 : 0.8, place(event)[0]);
}, { passive: false });
let drag = null;
tree.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, from: state.from, moved: false }; });
tree.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const span = state.to - state.from, by = ((event.clientX - drag.x) / tree.clientWidth) * span;
  drag.moved ||= Math.abs(event.clientX - drag.x) > 4;
  if (!drag.moved) return;
  state.from = Math.min(Math.max(0, drag.from - by), 1 - span);
  state.to = state.from + span;
  requestAnimationFrame(showTree);
});
window.addEventListener("pointerup", (event) => {
  if (drag && !drag.moved && event.target === tree) {
    const [x, y] = place(event), levels = here()[1].levels, level = Math.min(levels.length - 1, Math.floor(y * levels.length));
    setNode(level, Math.floor(x * levels[level].length));
  }
  drag = null;
});
$("in").addEventListener("click", () => zoom(0.5, (node()[1] + 0.5) / here()[1].levels[node()[0]].length));
$("out").addEventListener("click", () => zoom(2));
$("whole").addEventListener("click", () => zoom(Infinity));

// ---- Load, margins and the table of layers.
function usage(counts) {
  const all = counts.reduce((sum, count) => sum + count, 0) || 1;
  const bits = counts.reduce((sum, count) => (count ? sum - (count / all) * Math.log2(count / all) : sum), 0);
  return { all, dead: counts.filter((count) => !count).length, bits, most: Math.max(...counts) };
}
function bars(canvas, values, even) {
  const [pen, width, height] = prepared(canvas), most = Math.max(...values, even ?? 0) || 1, wide = width / values.length;
  pen.fillStyle = ink("--fill");
  values.forEach((value, index) => pen.fillRect(index * wide, height - (value / most) * (height - 4), Math.max(0.5, wide - (wide > 3 ? 1 : 0)), (value / most) * (height - 4)));
  if (even !== undefined) {
    pen.strokeStyle = ink("--shared");
    pen.lineWidth = 2;
    pen.strokeRect(0, height - (even / most) * (height - 4), width, 0);
  }
}
function showLoad() {
  const [layer, found] = here(), counts = found.levels.at(-1), u = usage(counts);
  bars($("load"), counts.slice().sort((a, b) => b - a), u.all / counts.length);
  $("load-status").textContent =
    `${number(counts.length)} leaves, most used first; the line is an even load. ${number(u.dead)} dead; the most used takes ` +
    `${percent(u.most / u.all)}; entropy ${u.bits.toFixed(2)} of ${Math.log2(counts.length).toFixed(2)} bits.`;
  showNumbers();
  const finite = quantiles(layer).filter(Number.isFinite), end = finite.at(Math.floor(0.99 * finite.length)) || 1;
  const bins = new Array(40).fill(0);
  for (const value of finite) bins[Math.min(39, Math.floor((40 * value) / end))]++;
  $("sure-title").textContent = layer.surenessIs === "margin" ? "Margins" : "Smallest gates";
  bars($("sure"), bins);
  $("sure-status").textContent = finite.length
    ? `Tokens by ${layer.surenessIs}, from 0 to ${exact(end)}: a tenth below ${exact(finite[Math.floor(finite.length / 10)])}, half below ${exact(finite[Math.floor(finite.length / 2)])}.`
    : `This layer decides nothing: no ${layer.surenessIs}.`;
}
function showNumbers() {
  if (!$("load-details").open) return;
  const counts = here()[1].levels.at(-1), table = document.createElement("table"), body = document.createElement("tbody"), head = document.createElement("thead");
  head.append(row(["Leaf", "Tokens", "Share"], true));
  body.append(...counts.map((count, leaf) => row([String(leaf), number(count), percent(count / (usage(counts).all))])));
  table.append(head, body);
  $("load-details").lastElementChild.replaceChildren(table);
}
$("load-details").addEventListener("toggle", showNumbers);
function showAll() {
  $("all").tHead.replaceChildren(row(["Layer", "Shape", "Leaves taken", "Dead leaves", "Entropy, bits", "Half of the margins or gates below"], true));
  $("all").tBodies[0].replaceChildren(...data.layers.map((_, index) => {
    const layer = layerOf(index), found = countsOf(layer).map(usage);
    const dead = found.reduce((sum, u) => sum + u.dead, 0), bits = found.reduce((sum, u) => sum + u.bits, 0) / found.length;
    const shape = layer.depth ? `${layer.trees} × depth ${layer.depth}` : `${number(layer.leaves)} leaves`, sorted = quantiles(layer);
    return row([button(names[index], () => setLayer(index)), shape, String(layer.k), `${number(dead)} of ${number(layer.leaves * layer.trees)}`,
      `${bits.toFixed(2)} of ${Math.log2(layer.leaves).toFixed(2)}`, exact(sorted[Math.floor(sorted.length / 2)])]);
  }));
}

// ---- Controls.
function fill(select, names) {
  select.replaceChildren(...names.map((name, index) => new Option(name, index)));
}
function setLayer(index) {
  state.layer = index;
  const layer = layerOf(index);
  state.slot = Math.min(state.slot, layer.trees - 1);
  [state.from, state.to] = [0, 1];
  $("layer").value = index;
  fill($("slot"), Array.from({ length: layer.trees }, (_, t) => `${t + 1} of ${layer.trees}`));
  $("slot").value = state.slot;
  $("slot-label").hidden = layer.trees === 1;
  $("colour").options[1].textContent = layer.surenessIs;
  state.node = null;
  showTokens(); showToken(); showTree(); showLoad(); say();
}
function find() {
  const words = $("find").value.toLowerCase();
  state.found.clear();
  const pieces = data.texts[state.text].pieces, base = starts[state.text];
  if (words.trim()) {
    const ends = [];
    let all = "";
    for (const one of pieces) { all += one.toLowerCase(); ends.push(all.length); }
    for (let at = all.indexOf(words), token = 0; at >= 0; at = all.indexOf(words, at + words.length)) {
      while (ends[token] <= at) token++;
      for (let other = token; other < pieces.length && (other ? ends[other - 1] : 0) < at + words.length; other++) state.found.add(base + other);
    }
  }
  $("found").textContent = words.trim() ? `${number(state.found.size)} tokens` : "";
  const next = [...state.found].find((token) => token > state.token) ?? [...state.found][0];
  if (next !== undefined) choose(next, { quiet: true });
  else showTokens();
}
fill($("text"), data.texts.map((text) => `${text.title} (${number(text.pieces.length)} tokens)`));
fill($("layer"), names);
$("text").addEventListener("change", () => { state.text = Number($("text").value); list.scrollTop = 0; state.found.clear(); layOut(); choose(starts[state.text]); });
$("layer").addEventListener("change", () => setLayer(Number($("layer").value)));
$("slot").addEventListener("change", () => { state.slot = Number($("slot").value); setLayer(state.layer); });
$("colour").addEventListener("change", showTokens);
$("find").addEventListener("input", find);
$("find").addEventListener("keydown", (event) => { if (event.key === "Enter") find(); });
let pending = 0;
window.addEventListener("resize", () => {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => { layOut(); showTree(); showLoad(); });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { showTree(); showLoad(); });
layOut();
setLayer(0);
choose(0, { quiet: true });
showAll();
