"use strict";
// Scales, axes and the tooltip. Text always enters as text nodes, so a name can never become markup.

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

let leave = () => {};

// shows while a mouse is over the target, or from a tap on it to the next one
function point(target, show, hide = hideTip) {
  target.onpointermove = target.onpointerdown = (event) => {
    leave = hide;
    show(event);
  };
  target.onpointerleave = (event) => {
    // a finger that is lifted leaves too
    if (event.pointerType !== "touch") hide();
  };
}

document.addEventListener("pointerdown", () => leave(), true);

// the same with a vertical line at the place that `show` returns
function pointAlong(box, bottom, show) {
  const line = svg("line", { class: "cross", y1: box.top, y2: bottom, visibility: "hidden" });
  box.root.append(line);
  const place = (event) => {
    const x = show(event);
    fill(line, { x1: x, x2: x, visibility: "visible" }, []);
  };
  point(box.root, place, () => {
    hideTip();
    line.setAttribute("visibility", "hidden");
  });
}

// pointer position in the drawing's own units
function within(box, event) {
  const frame = box.root.getBoundingClientRect();
  return [((event.clientX - frame.left) * box.width) / frame.width, ((event.clientY - frame.top) * box.height) / frame.height];
}
