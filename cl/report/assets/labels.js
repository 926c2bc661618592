"use strict";
// Names beside points and at the ends of lines, cut and placed so that they cover nothing; as in `cl/report/labels.py`.

// the same least-squares rule as `cl.report.labels.spread`: touching labels become a block around their mean
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

// Texts beside points: of eight places each takes the first that covers least, in the order of the points.
// Where those of points in one column would touch, they take a column of their own beside it, and lines lead to it.
// The same rule as `cl.report.labels.beside`, with y downwards. points: {x, y, width}; box: {left, top, right, bottom}.
function beside(points, box, height, gap, obstacles) {
  const taken = [...points.map((p) => [p.x - gap, p.y - gap, p.x + gap, p.y + gap]), ...obstacles];
  const overlap = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const framed = (left, middle, width) => {
    const frame = [left, middle - height / 2, left + width, middle + height / 2];
    const outside = overlap(frame, frame) - overlap(frame, [box.left, box.top, box.right, box.bottom]);
    return { left, middle, frame, cost: outside * 4 + taken.reduce((sum, other) => sum + overlap(frame, other), 0) };
  };
  const placed = new Map();
  for (const column of crowdedColumns(points, height, gap)) {
    const middles = spread(column.map((p) => p.y), height * 1.1, box.top + height / 2, box.bottom - height / 2);
    const x = column.reduce((sum, p) => sum + p.x, 0) / column.length;
    const side = (sign) => column.map((p, i) => framed(x + sign * 2.6 * gap - (sign < 0 ? p.width : 0), middles[i], p.width));
    const cost = (places) => places.reduce((sum, place) => sum + place.cost, 0);
    const [right, left] = [side(1), side(-1)];
    (cost(left) < cost(right) - 1e-6 ? left : right).forEach((place, i) => {
      placed.set(column[i], { ...place, hasLeader: true });
      taken.push(place.frame);
    });
  }
  for (const p of points.filter((p) => !placed.has(p))) {
    const around = [[-1, -1], [1, 1], [1, 0], [-1, 0], [1, -1], [-1, 1], [0, -1.6], [0, 1.6]].map(([dx, dy]) => {
      const left = p.x + dx * gap - (dx < 0 ? p.width : dx ? 0 : p.width / 2);
      return framed(left, p.y + dy * (gap + height * 0.25), p.width);
    });
    const best = around.reduce((a, b) => (b.cost < a.cost - 1e-6 ? b : a));
    taken.push(best.frame);
    placed.set(p, best);
  }
  return points.map((p) => placed.get(p));
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

function nameEnds(box, ends) {
  // names that reach as far as others begin move with them
  const columns = [];
  let reach = -Infinity;
  for (const end of [...ends].sort((a, b) => a.x - b.x)) {
    if (columns.length && end.x < reach) columns[columns.length - 1].push(end);
    else columns.push([end]);
    reach = Math.max(reach, end.x + end.text.length * 7);
  }
  for (const column of columns) {
    const placed = spread(column.map((end) => end.y), 14, box.top + 4, box.bottom);
    const moved = placed.some((y, i) => Math.abs(y - column[i].y) > 5);
    column.forEach((end, i) => {
      if (moved) {
        const points = `M${end.x + 4} ${end.y}L${end.x + 12} ${placed[i]}`;
        box.root.append(svg("path", { d: points, style: `stroke:${end.colour}`, "stroke-width": 0.7, fill: "none" }));
      }
      const style = `--c:${end.colour}`;
      box.root.append(svg("text", { class: "name", x: end.x + (moved ? 15 : 9), y: placed[i] + 4, style }, end.text));
    });
  }
}

function cut(name, length) {
  if (name.length <= length) return name;
  const head = Math.floor(((length - 1) * 2) / 3);
  return `${name.slice(0, head)}…${name.slice(name.length - (length - 1 - head))}`;
}

// names cut; those that would read the same are cut around the place from which they differ, as `cl.report.labels.shorts`
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
