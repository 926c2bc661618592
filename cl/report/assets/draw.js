"use strict";
// Scales, axes, labels and the tooltip. Text always enters as text nodes, so a name can never become markup.

const NAMESPACE = document.getElementById("svg").namespaceURI;
const tip = document.getElementById("tip");

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  return fill(made, attributes, children);
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(NAMESPACE, name);
  return fill(made, attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") made.style.cssText = value;
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function linear(from, to, low, high) {
  const span = to - from || 1;
  const scale = (value) => low + ((value - from) / span) * (high - low);
  scale.invert = (place) => from + ((place - low) / (high - low)) * span;
  return scale;
}

// at most `count` round numbers inside [low, high]
function ticks(low, high, count, whole = false) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw - 1e-12 * raw);
  if (whole) step = Math.max(1, Math.ceil(step));
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(10)));
  return found;
}

// the same least-squares rule as `cl.report.style.spread`: touching labels become a block around their mean
function spread(positions, gap, low, high) {
  const order = positions.map((_, i) => i).sort((a, b) => positions[a] - positions[b]);
  const blocks = [];
  for (const index of order) {
    let start = positions[index];
    let size = 1;
    while (blocks.length) {
      const last = blocks[blocks.length - 1];
      if (last.start + last.size * gap <= start) break;
      blocks.pop();
      start = (last.start * last.size + (start - last.size * gap) * size) / (last.size + size);
      size += last.size;
    }
    blocks.push({ start, size });
  }
  // the range last, and for all alike: a block that it stops must not run into the next one
  const highest = Math.max(high - (positions.length - 1) * gap, low);
  const placed = [];
  for (const { start, size } of blocks) {
    const shift = placed.length * gap;
    const first = Math.min(Math.max(start - shift, low), highest) + shift;
    for (let k = 0; k < size; k++) placed.push(first + k * gap);
  }
  const out = [];
  order.forEach((index, k) => (out[index] = placed[k]));
  return out;
}

function extent(values, pad = 0.06) {
  const known = values.filter((value) => value !== null && Number.isFinite(value));
  if (!known.length) return [0, 1];
  let low = known[0];
  let high = known[0];
  for (const value of known) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const margin = (high - low || Math.abs(high) || 1) * pad;
  return [low - margin, high + margin];
}

// paper is narrower than the window that the page is printed from
function widthOf(place) {
  if (printing) return place.closest(".wide") ? 680 : 330;
  return Math.max(place.clientWidth, 260);
}

// an empty drawing of the width of its place, with the inner box that the data gets
function canvas(place, height, margin, label) {
  const width = widthOf(place);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  place.replaceChildren(root);
  return { root, width, height, left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom };
}

// a title stays inside the drawing, however narrow the box is
function middleOf(box, title) {
  const half = title.length * 3.1;
  return Math.max(half, Math.min((box.left + box.right) / 2, box.width - half));
}

function axisX(box, scale, values, write, title) {
  box.root.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  for (const value of values) {
    box.root.append(svg("text", { x: scale(value), y: box.bottom + 17, "text-anchor": "middle" }, write(value)));
  }
  box.root.append(svg("text", { x: middleOf(box, title), y: box.height - 3, "text-anchor": "middle" }, title));
}

function axisY(box, scale, values, write, title) {
  for (const value of values) {
    const y = scale(value);
    box.root.append(svg("line", { class: "rule", x1: box.left, x2: box.right, y1: y, y2: y }));
    box.root.append(svg("text", { x: box.left - 8, y: y + 4, "text-anchor": "end" }, write(value)));
  }
  if (title) box.root.append(svg("text", { x: 0, y: 11 }, title));
}

function linesX(box, scale, values) {
  for (const value of values) {
    box.root.append(svg("line", { class: "rule", x1: scale(value), x2: scale(value), y1: box.top, y2: box.bottom }));
  }
}

let numClips = 0;

// the value of a `clip-path` that keeps a line inside the box
function clip(box) {
  const id = `clip-${numClips++}`;
  const size = { x: box.left, y: box.top - 4, width: box.right - box.left, height: box.bottom - box.top + 4 };
  box.root.append(svg("clipPath", { id }, svg("rect", size)));
  return `url(#${id})`;
}

// Texts beside points: of eight places each takes the first that covers least, in the order of the points.
// Where those of points in one column would touch, they take a column of their own beside it.
// The same rule as `cl.report.style.beside`. points: {x, y, width}; returns the left end and middle height of each text.
function beside(points, box, height, gap, obstacles) {
  const taken = [...points.map((p) => [p.x - gap, p.y - gap, p.x + gap, p.y + gap]), ...obstacles];
  const overlap = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const framed = (left, middle, width) => {
    const frame = [left, middle - height / 2, left + width, middle + height / 2];
    const outside = overlap(frame, frame) - overlap(frame, [box.left, box.top - height, box.right, box.bottom]);
    return { left, middle, frame, cost: outside * 4 + taken.reduce((sum, other) => sum + overlap(frame, other), 0) };
  };
  const stacked = new Map();
  for (const column of crowdedColumns(points, height, gap)) {
    const middles = spread(column.map((p) => p.y), height * 1.1, box.top, box.bottom - height / 2);
    const x = column.reduce((sum, p) => sum + p.x, 0) / column.length;
    const side = (sign) => column.map((p, i) => framed(x + sign * 2.6 * gap - (sign < 0 ? p.width : 0), middles[i], p.width));
    const cost = (places) => places.reduce((sum, place) => sum + place.cost, 0);
    const [right, left] = [side(1), side(-1)];
    (cost(left) < cost(right) - 1e-9 ? left : right).forEach((place, i) => {
      stacked.set(column[i], { ...place, leads: true });
      taken.push(place.frame);
    });
  }
  return points.map((p) => {
    if (stacked.has(p)) return stacked.get(p);
    let best = null;
    for (const [dx, dy] of [[-1, -1], [1, 1], [1, 0], [-1, 0], [1, -1], [-1, 1], [0, -1.6], [0, 1.6]]) {
      const left = p.x + dx * gap - (dx < 0 ? p.width : dx ? 0 : p.width / 2);
      const place = framed(left, p.y + dy * (gap + height * 0.25), p.width);
      if (!best || place.cost < best.cost - 1e-9) best = place;
    }
    taken.push(best.frame);
    return best;
  });
}

// points at one x, of which two are nearer to each other than lines of text are
function crowdedColumns(points, height, gap) {
  const columns = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || a.y - b.y)) {
    const last = columns[columns.length - 1];
    if (last && point.x - last[0].x <= gap) last.push(point);
    else columns.push([point]);
  }
  return columns.filter((column) => {
    const heights = column.map((p) => p.y).sort((a, b) => a - b);
    return heights.length > 2 && heights.some((y, i) => i && y - heights[i - 1] < 1.5 * height);
  });
}

// a line through the defined points; a gap where one is missing
function path(xs, ys, scaleX, scaleY) {
  let out = "";
  let pen = "M";
  xs.forEach((x, i) => {
    if (ys[i] === null || ys[i] === undefined) return (pen = "M");
    out += `${pen}${scaleX(x).toFixed(1)} ${scaleY(ys[i]).toFixed(1)}`;
    pen = "L";
  });
  return out;
}

function area(xs, lows, highs, scaleX, scaleY) {
  const known = xs.map((_, i) => i).filter((i) => lows[i] !== null && highs[i] !== null);
  if (known.length < 2) return "";
  const point = (i, values) => `${scaleX(xs[i]).toFixed(1)} ${scaleY(values[i]).toFixed(1)}`;
  return `M${known.map((i) => point(i, highs)).join("L")}L${known.reverse().map((i) => point(i, lows)).join("L")}Z`;
}

function between(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const index = Math.min(Math.floor(place), stops.length - 2);
  const channel = (stop, k) => parseInt(stop.slice(1 + 2 * k, 3 + 2 * k), 16);
  return [0, 1, 2].map((k) => {
    const [a, b] = [channel(stops[index], k), channel(stops[index + 1], k)];
    return Math.round(a + (b - a) * (place - index));
  });
}

function isDark(rgb) {
  const [r, g, b] = rgb.map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.3;
}

function cut(name, length) {
  if (name.length <= length) return name;
  const head = Math.floor(((length - 1) * 2) / 3);
  return `${name.slice(0, head)}…${name.slice(name.length - (length - 1 - head))}`;
}

// names cut; those that would read the same are cut around the place from which they differ, as `cl.report.style.shorts`
function cutAll(names, length) {
  const groups = new Map();
  names.forEach((name, i) => groups.set(cut(name, length), [...(groups.get(cut(name, length)) || []), i]));
  const found = names.map((name) => cut(name, length));
  for (const same of groups.values()) {
    const first = names[same[0]];
    if (same.every((i) => names[i] === first)) continue;
    let common = 0;
    while (same.every((i) => common < names[i].length && names[i][common] === first[common])) common++;
    const start = Math.max(0, common - Math.floor(length / 3));
    for (const i of same) {
      const rest = names[i].slice(start);
      found[i] = `…${rest.length < length ? rest : `${rest.slice(0, length - 2)}…`}`;
    }
  }
  return found;
}

// lines: [colour or null, name, value]
function showTip(event, title, lines) {
  tip.replaceChildren(node("b", {}, title));
  for (const [colour, name, value] of lines) {
    const dot = node("i", colour ? { style: `background:${colour}` } : {});
    tip.append(node("span", { class: "line" }, dot, node("span", {}, name), node("span", {}, value)));
  }
  tip.hidden = false;
  const room = document.documentElement.clientWidth;
  const box = tip.getBoundingClientRect();
  const x = event.clientX + 16 + box.width > room ? event.clientX - box.width - 16 : event.clientX + 16;
  const y = Math.min(event.clientY + 14, window.innerHeight - box.height - 8);
  tip.style.left = `${Math.max(4, x) + window.scrollX}px`;
  tip.style.top = `${Math.max(4, y) + window.scrollY}px`;
}

function hideTip() {
  tip.hidden = true;
}

// pointer position in the drawing's own units
function within(box, event) {
  const frame = box.root.getBoundingClientRect();
  return [((event.clientX - frame.left) * box.width) / frame.width, ((event.clientY - frame.top) * box.height) / frame.height];
}
