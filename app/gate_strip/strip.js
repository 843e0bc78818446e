// A text as coloured tokens with a bar per branch, above a grid of layers and branches. Streamlit calls the default function
// again on every rerun: tokens are rebuilt only when the text changes, so keyboard focus survives, and the selection lives here.
// Text enters the page as textContent and attributes only.
const ROW = 16;
const LEAST_CELL = 5;
const SETTLE_MS = 90; // arrow keys held down send one selection, not one per repeat
const strips = new WeakMap();

export default function (component) {
  const { parentElement, data, setStateValue } = component;
  const root = parentElement.querySelector(".gate-strip");
  if (!root || !data) return;
  let strip = strips.get(root);
  if (!strip) {
    strip = { root, selected: null, layer: null, timer: 0 };
    strips.set(root, strip);
    build(strip);
  }
  strip.send = (value) => setStateValue("selected", value);
  const content = JSON.stringify(data);
  if (content !== strip.content) {
    const sameText = strip.data && JSON.stringify(strip.data.tokens) === JSON.stringify(data.tokens) && strip.data.first === data.first;
    strip.content = content;
    strip.data = data;
    strip.colours = palette(data.scale.stops);
    if (!sameText || strip.selected === null || strip.fromPython !== data.selected) strip.selected = data.selected;
    strip.fromPython = data.selected;
    strip.layer = data.layer;
    if (!sameText) buildTokens(strip);
    paintHead(strip);
    paintTokens(strip);
    paintLabels(strip);
  }
  paintGrid(strip); // also after a change of theme
  return () => { clearTimeout(strip.timer); strip.observer.disconnect(); strips.delete(root); };
}

function element(parent, tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

function build(strip) {
  strip.root.replaceChildren();
  strip.head = element(strip.root, "div", "head");
  strip.tokens = element(strip.root, "div", "tokens");
  strip.tokens.setAttribute("role", "listbox");
  strip.tokens.onclick = (event) => {
    const token = event.target.closest(".token");
    if (token) select(strip, Number(token.dataset.at), null, true);
  };
  strip.tokens.onkeydown = (event) => onKey(strip, event);
  const map = element(strip.root, "div", "map");
  strip.labels = element(map, "div", "labels");
  strip.scroll = element(map, "div", "scroll");
  strip.canvas = element(strip.scroll, "canvas");
  strip.canvas.setAttribute("role", "img");
  strip.canvas.onclick = (event) => {
    const cell = cellAt(strip, event);
    if (cell) select(strip, strip.data.first + cell.t, strip.data.blocks[cell.row], false);
  };
  strip.canvas.onmousemove = (event) => {
    const cell = cellAt(strip, event);
    const value = cell && strip.data.grid[cell.row][cell.t];
    const shown = value === null ? "not defined" : value;
    strip.canvas.title = cell
      ? `token ${strip.data.first + cell.t} ${strip.data.tokens[cell.t]}\n${strip.data.labels[cell.row]}: ${shown}` : "";
  };
  const foot = element(strip.root, "div", "foot");
  strip.hint = element(foot, "span", "hint");
  const save = element(foot, "button", "save", "PNG");
  save.type = "button";
  save.title = "Save this picture";
  save.onclick = () => savePicture(strip);
  strip.observer = new ResizeObserver(() => strip.data && paintGrid(strip));
  strip.observer.observe(strip.scroll);
}

function buildTokens(strip) {
  const focused = strip.tokens.contains(strip.root.getRootNode().activeElement);
  const { data } = strip;
  const list = document.createDocumentFragment();
  data.tokens.forEach((text, t) => {
    const token = element(list, "div", "token");
    token.dataset.at = data.first + t;
    token.setAttribute("role", "option");
    const label = element(token, "span", "text", text);
    label.dir = "auto";
    const bars = element(token, "span", "bars");
    bars.setAttribute("aria-hidden", "true");
    data.bars[t].forEach(() => element(bars, "i"));
    if (data.breaks[t]) element(list, "div", "break");
  });
  strip.tokens.replaceChildren(list);
  strip.boxes = [...strip.tokens.querySelectorAll(".token")];
  if (focused) boxOf(strip, strip.selected)?.focus({ preventScroll: true });
}

function paintTokens(strip) {
  const { data } = strip;
  strip.tokens.setAttribute("aria-label", data.alt);
  strip.hint.textContent = `Click a token or a cell, or use the arrow keys, Home and End. Bars: ${data.bars_show}.`;
  strip.boxes.forEach((box, t) => {
    const colour = colourOf(strip, data.shown[t]);
    const label = box.firstChild;
    label.style.background = colour.css;
    label.style.color = colour.ink;
    box.title = data.hover[t];
    const value = data.shown[t] === null ? "not defined" : data.shown[t].toFixed(2);
    box.setAttribute("aria-label", `token ${data.first + t}, ${data.tokens[t]}, ${data.scale.unit} ${value}`);
    [...box.lastChild.children].forEach((bar, m) => { bar.style.height = `${Math.round(13 * (data.bars[t][m] ?? 0))}px`; });
  });
  paintSelection(strip);
}

function paintSelection(strip) {
  for (const box of strip.boxes) {
    const chosen = Number(box.dataset.at) === strip.selected;
    box.setAttribute("aria-selected", String(chosen));
    box.tabIndex = chosen ? 0 : -1;
  }
  if (!boxOf(strip, strip.selected) && strip.boxes.length) strip.boxes[0].tabIndex = 0;
}

function paintHead(strip) {
  const { scale } = strip.data;
  strip.head.replaceChildren();
  const legend = element(strip.head, "span", "legend");
  element(legend, "b", "", strip.data.title);
  element(legend, "span", "", format(scale.low));
  element(legend, "span", "ramp").style.background = `linear-gradient(to right, ${scale.stops.join(",")})`;
  element(legend, "span", "", format(scale.high));
  const middle = scale.middle ? ` (middle ${format((scale.low + scale.high) / 2)}: ${scale.middle})` : "";
  element(legend, "span", "", scale.unit + middle);
}

function paintLabels(strip) {
  strip.labels.replaceChildren();
  strip.data.labels.forEach((text, row) => {
    element(strip.labels, "div", strip.data.blocks[row] === strip.layer ? "on" : "", text);
  });
}

function paintGrid(strip) {
  const { data, canvas } = strip;
  const width = strip.scroll.clientWidth;
  if (!width || !data.tokens.length) return;
  const cell = Math.min(48, Math.max(LEAST_CELL, width / data.tokens.length));
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [cell * data.tokens.length, ROW * data.grid.length];
  canvas.width = Math.round(w * ratio);
  canvas.height = Math.round(h * ratio);
  canvas.style.width = `${w}px`;
  canvas.style.height = `${h}px`;
  canvas.setAttribute("aria-label", `${data.labels.length} rows by ${data.tokens.length} tokens. ${data.alt}`);
  strip.cell = cell;
  const paint = canvas.getContext("2d");
  paint.scale(ratio, ratio);
  const gap = cell > 8 ? 1 : 0;
  data.grid.forEach((values, row) => values.forEach((value, t) => {
    paint.fillStyle = colourOf(strip, value).css;
    paint.fillRect(t * cell, row * ROW, cell - gap, ROW - 1);
  }));
  const at = strip.selected - data.first;
  if (at >= 0 && at < data.tokens.length) {
    paint.strokeStyle = getComputedStyle(strip.root).color;
    paint.lineWidth = 2;
    paint.strokeRect(at * cell + 1, 1, Math.max(cell - gap - 2, 2), h - 3);
  }
}

function cellAt(strip, event) {
  const box = strip.canvas.getBoundingClientRect();
  const t = Math.floor((event.clientX - box.left) / strip.cell);
  const row = Math.floor((event.clientY - box.top) / ROW);
  const inside = t >= 0 && t < strip.data.tokens.length && row >= 0 && row < strip.data.grid.length;
  return inside ? { t, row } : null;
}

function boxOf(strip, at) {
  return strip.boxes?.find((box) => Number(box.dataset.at) === at);
}

function select(strip, at, layer, focus) {
  strip.selected = at;
  paintSelection(strip);
  paintGrid(strip);
  if (focus) boxOf(strip, at)?.focus({ preventScroll: false });
  clearTimeout(strip.timer);
  // `when` makes every choice a new one: the same place in another text is not the old choice.
  strip.timer = setTimeout(() => strip.send({ token: at, layer: layer ?? -1, when: Date.now() }), SETTLE_MS);
}

function onKey(strip, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const boxes = strip.boxes;
  const now = Math.max(0, boxes.findIndex((box) => Number(box.dataset.at) === strip.selected));
  const moves = {
    ArrowLeft: () => now - 1, ArrowRight: () => now + 1, Home: () => 0, End: () => boxes.length - 1,
    ArrowUp: () => onNextLine(boxes, now, -1), ArrowDown: () => onNextLine(boxes, now, 1),
    Enter: () => now, " ": () => now,
  };
  if (event.key === "Escape") { boxes[now]?.blur(); event.stopPropagation(); return; }
  if (!(event.key in moves)) {
    event.stopPropagation(); // Streamlit listens for single letters on the page
    return;
  }
  event.preventDefault();
  event.stopPropagation();
  const next = Math.min(boxes.length - 1, Math.max(0, moves[event.key]()));
  select(strip, Number(boxes[next].dataset.at), null, true);
}

function onNextLine(boxes, now, step) {
  const here = boxes[now].getBoundingClientRect();
  let [best, distance, line] = [now, Infinity, null];
  for (let i = now + step; i >= 0 && i < boxes.length; i += step) {
    const box = boxes[i].getBoundingClientRect();
    if (Math.abs(box.top - here.top) < 4) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) > 4) break;
    const gap = Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
    if (gap < distance) [best, distance] = [i, gap];
  }
  return best;
}

function palette(stops) {
  const rgb = stops.map((stop) => [1, 3, 5].map((i) => parseInt(stop.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const position = (i / 255) * (rgb.length - 1);
    const low = Math.min(Math.floor(position), rgb.length - 2);
    const mixed = rgb[low].map((c, k) => Math.round(c + (rgb[low + 1][k] - c) * (position - low)));
    const light = mixed.map((c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
    return { css: `rgb(${mixed.join(",")})`, ink: luminance > 0.179 ? "#000000" : "#ffffff" };
  });
}

function colourOf(strip, value) {
  if (value === null) return { css: "rgb(160,160,160)", ink: "#000000" };
  const { low, high } = strip.data.scale;
  const position = (value - low) / (high - low || 1);
  return strip.colours[Math.round(255 * Math.min(1, Math.max(0, position)))];
}

function format(value) {
  return String(Number(value.toPrecision(3)));
}

// The picture as it is on the screen, at twice its size, with the caption that says where it comes from.
function savePicture(strip) {
  const origin = strip.root.getBoundingClientRect();
  const style = getComputedStyle(strip.root);
  const [width, height] = [Math.ceil(origin.width) + 16, Math.ceil(origin.height) + 28];
  const canvas = document.createElement("canvas");
  canvas.width = 2 * width;
  canvas.height = 2 * height;
  const paint = canvas.getContext("2d");
  paint.scale(2, 2);
  paint.fillStyle = style.getPropertyValue("--st-background-color") || "#ffffff";
  paint.fillRect(0, 0, width, height);
  paint.translate(8, 6);
  const place = (node) => {
    const box = node.getBoundingClientRect();
    return [box.left - origin.left, box.top - origin.top, box.width, box.height];
  };
  paint.textBaseline = "middle";
  for (const box of strip.boxes) {
    const label = box.firstChild;
    const [x, y, w, h] = place(label);
    paint.fillStyle = label.style.background;
    paint.fillRect(x, y, w, h);
    paint.fillStyle = label.style.color;
    paint.font = getComputedStyle(label).font;
    paint.fillText(label.textContent, x + 1, y + h / 2, w);
    paint.fillStyle = "#7a7f87";
    for (const bar of box.lastChild.children) paint.fillRect(...place(bar));
  }
  paint.fillStyle = style.color;
  paint.font = "11px sans-serif";
  for (const label of strip.labels.children) {
    const [x, y, , h] = place(label);
    paint.fillText(label.textContent, x, y + h / 2);
  }
  const [gx, gy, gw, gh] = place(strip.canvas);
  paint.drawImage(strip.canvas, gx, gy, gw, gh);
  paint.font = "12px sans-serif";
  paint.fillText(strip.head.querySelector(".legend").textContent, 0, 10);
  paint.fillText(strip.data.caption, 0, height - 20, width - 16);
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${strip.data.file}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}
