"use strict";
// Charts of one strategy: R as a heatmap, and the course of every domain. They point at each other through `hover`.

// rows and columns of R as numbers, with the row before training where there is one
function unpack(section, matrix) {
  const number = (cell) => (cell === null ? null : cell / DATA.scale);
  const values = matrix.R.map((row) => row.map(number));
  const names = section.rows[matrix.rows].filter((_, i) => i % section.step === 0);
  const domains = section.domains.filter((_, i) => i % section.step === 0);
  const hasStart = matrix.init.length > 0;
  if (hasStart) {
    values.unshift(matrix.init.map(number));
    names.unshift("before training");
  }
  // the number of the experience, from 0; of the row before training, -1
  const row = (i) => x(i) - 1;
  const seen = (i, j) => matrix.taught[j] >= 0 && (hasStart ? (i - 1) * section.step : i * section.step) >= matrix.taught[j];
  const x = (i) => (hasStart ? (i ? (i - 1) * section.step + 1 : 0) : i * section.step + 1);
  return { values, names, domains, seen, x, row };
}

// one range for all strategies of a section, so that colours can be compared; what was not trained on may leave it
function colourRange(section) {
  if (section.measure === "accuracy") return [0, 1];
  const found = section.strategies.flatMap((s) => {
    const table = unpack(section, s.matrices[0]);
    return table.values.flatMap((row, i) => row.filter((_, j) => table.seen(i, j)));
  });
  return extent(found, 0);
}

function cellColour(section, range, value) {
  const share = (value - range[0]) / (range[1] - range[0] || 1);
  return between(DATA.goodness, section.unit.up ? share : 1 - share);
}

function orderColour(j, count) {
  // the dark end of viridis vanishes on a dark page and the light end on a white one
  const share = count > 1 ? j / (count - 1) : 0;
  return `rgb(${between(DATA.order, isNight() ? 0.3 + 0.7 * share : 0.88 * share)})`;
}

function drawHeatmap(place, section, strategy, matrix, label, hover) {
  const table = unpack(section, matrix);
  const [numRows, numColumns] = [table.values.length, table.domains.length];
  const range = colourRange(section);
  const named = Math.max(numRows, numColumns) <= 40;
  const rowNames = numRows <= 40 ? cutAll(table.names, 18) : table.names.map((_, i) => String(table.row(i)));
  const columnNames = numColumns <= 40 ? cutAll(table.domains, 16) : table.domains.map((_, j) => String(j * section.step));
  const printed = Math.max(numRows - 1, numColumns) <= 12;
  const longest = (names) => names.reduce((most, name) => Math.max(most, name.length), 0);
  const nameWidth = Math.max(longest(rowNames) * 6.6 + 14, 40);
  const width = widthOf(place) - nameWidth - 8;
  const columnName = longest(columnNames) * 6.4;
  const turned = numColumns <= 40 && columnName > width / numColumns;
  const margin = { left: nameWidth, right: 8, top: 22, bottom: turned ? columnName * 0.7 + 34 : 42 };
  const cellHeight = Math.min(Math.max((printed ? 0.62 : 1) * (width / numColumns), printed ? 30 : 0.5), 54);
  const box = canvas(place, Math.min(Math.max(cellHeight * numRows, 54), 430) + margin.top + margin.bottom, margin, label);
  const [w, h] = [(box.right - box.left) / numColumns, (box.bottom - box.top) / numRows];
  const gap = numColumns <= 40 ? 1 : 0;
  if (named) {
    table.values.forEach((row, i) =>
      row.forEach((value, j) => {
        const rgb = value === null ? null : cellColour(section, range, value);
        const seen = table.seen(i, j);
        const style = rgb ? `fill:rgb(${rgb});opacity:${seen ? 1 : 0.28}` : "fill:var(--soft)";
        box.root.append(svg("rect", { x: box.left + j * w + gap / 2, y: box.top + i * h + gap / 2, width: w - gap, height: h - gap, rx: w > 20 ? 2 : 0, style }));
        if (printed && value !== null && w > 30) {
          const colour = seen ? (isDark(rgb) ? "#ffffff" : "#1f2328") : "var(--ink);opacity:0.75";
          box.root.append(svg("text", { x: box.left + (j + 0.5) * w, y: box.top + (i + 0.5) * h + 4, "text-anchor": "middle", style: `fill:${colour}` }, writer(section.unit)(value)));
        }
      })
    );
  } else box.root.append(picture(section, table, range, box));
  box.root.append(svg("path", { d: stair(table, box, w, h), style: "stroke:var(--ink);fill:none", "stroke-width": 1.3 }));
  nameHeatmap(box, rowNames, columnNames, section.step, turned);
  scaleBar(box, section, range);
  const frame = svg("rect", { width: w, height: h, style: "stroke:var(--ink);fill:none", "stroke-width": 2, visibility: "hidden" });
  box.root.append(frame);
  const hide = () => {
    hideTip();
    frame.setAttribute("visibility", "hidden");
    hover(-1);
  };
  const show = (event) => {
    const [px, py] = within(box, event);
    const [i, j] = [Math.floor((py - box.top) / h), Math.floor((px - box.left) / w)];
    if (i < 0 || j < 0 || i >= numRows || j >= numColumns) return hide();
    fill(frame, { x: box.left + j * w, y: box.top + i * h, visibility: "visible" }, []);
    const value = table.values[i][j];
    const note = value === null ? "not evaluated" : `${writer(section.unit)(value)} ${section.unit.symbol}`;
    const when = table.x(i) ? `after training on ${table.names[i]}` : "before training";
    showTip(event, table.domains[j], [[null, when, note], ...(table.seen(i, j) ? [] : [[null, "not trained on yet", ""]])]);
    hover(j);
  };
  point(box.root, show, hide);
}

// thousands of cells as one image
function picture(section, table, range, box) {
  const screen = node("canvas", { width: table.domains.length, height: table.values.length });
  const context = screen.getContext("2d");
  const image = context.createImageData(screen.width, screen.height);
  table.values.forEach((row, i) =>
    row.forEach((value, j) => {
      if (value === null) return;
      image.data.set([...cellColour(section, range, value), table.seen(i, j) ? 255 : 72], 4 * (i * screen.width + j));
    })
  );
  context.putImageData(image, 0, 0);
  const size = { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top };
  return svg("image", { ...size, href: screen.toDataURL(), preserveAspectRatio: "none", style: "image-rendering:pixelated" });
}

// the border between domains taught and not taught yet
function stair(table, box, w, h) {
  let out = "";
  table.values.forEach((row, i) =>
    row.forEach((_, j) => {
      if (!table.seen(i, j)) return;
      if (j + 1 < row.length && !table.seen(i, j + 1)) out += `M${box.left + (j + 1) * w} ${box.top + i * h}v${h}`;
      if (i > 0 && !table.seen(i - 1, j)) out += `M${box.left + j * w} ${box.top + i * h}h${w}`;
    })
  );
  return out;
}

function nameHeatmap(box, rowNames, columnNames, step, turned) {
  const [w, h] = [(box.right - box.left) / columnNames.length, (box.bottom - box.top) / rowNames.length];
  const small = "font-size:11px";
  // where there are too many for names they are numbers, of which round ones are written
  const marks = (names) => new Set(names.length <= 40 ? names : ticks(0, (names.length - 1) * step, 8, true).map((k) => String(Math.round(k / step) * step)));
  const [rows, columns] = [marks(rowNames), marks(columnNames)];
  rowNames.forEach((text, i) => {
    if (!rows.has(text)) return;
    box.root.append(svg("text", { x: box.left - 7, y: box.top + (i + 0.5) * h + 4, "text-anchor": "end", style: small }, text));
  });
  columnNames.forEach((text, j) => {
    if (!columns.has(text)) return;
    const [x, y] = [box.left + (j + 0.5) * w, box.bottom + 14];
    const place = turned ? { "text-anchor": "end", transform: `rotate(-38 ${x + 4} ${y})`, x: x + 4, y } : { "text-anchor": "middle", x, y };
    box.root.append(svg("text", { ...place, style: small }, text));
  });
  box.root.append(svg("text", { x: (box.left + box.right) / 2, y: box.height - 2, "text-anchor": "middle" }, columnNames.length <= 40 ? "evaluated on" : "evaluated on (number)"));
  box.root.append(svg("text", { x: 0, y: 11 }, rowNames.length <= 40 ? "after training on" : "after training on (number)"));
}

function scaleBar(box, section, range) {
  const steps = 24;
  const [left, width] = [box.right - 120, 84];
  const write = (value) => plain(Number((value * section.unit.factor).toFixed(section.measure === "accuracy" ? 0 : 2)));
  for (let k = 0; k < steps; k++) {
    const rgb = cellColour(section, range, range[0] + ((range[1] - range[0]) * (k + 0.5)) / steps);
    box.root.append(svg("rect", { x: left + (k * width) / steps, y: 3, width: width / steps + 0.5, height: 8, style: `fill:rgb(${rgb})` }));
  }
  box.root.append(svg("text", { x: left - 5, y: 11, "text-anchor": "end", style: "font-size:11px" }, write(range[0])));
  box.root.append(svg("text", { x: left + width + 5, y: 11, style: "font-size:11px" }, write(range[1])));
}

// mean of each value and the `window` - 1 before it; where domains come back, a long line swings too fast to read
function runningMean(line, window) {
  return line.map((value, i) => {
    const known = value === null ? [] : line.slice(Math.max(0, i - window + 1), i + 1).filter((v) => v !== null);
    return known.length ? known.reduce((sum, v) => sum + v, 0) / known.length : null;
  });
}

// one row stands for the whole stream, so each of its domains is a level and not a point at the first experience
function leveled(section, table) {
  const row = table.values[table.values.length - 1];
  return { ...table, values: [row, row], seen: () => true, x: (i) => (i ? Math.max(section.longest, 1) : 1) };
}

function drawCurves(place, section, strategy, index, label) {
  const unit = section.unit;
  const unpacked = unpack(section, strategy.matrices[index]);
  const table = strategy.bound ? leveled(section, unpacked) : unpacked;
  const count = table.domains.length;
  const direct = count <= 12;
  const names = direct ? cutAll(table.domains, 16) : [];
  const longest = Math.max(0, ...names.map((name) => name.length));
  const box = canvas(place, 396, { left: 46, right: direct ? longest * 7 + 22 : 14, top: 42, bottom: 40 }, label);
  const drawnAt = (i, j) => table.seen(i, j) || section.measure === "loss";
  const withBands = index === 0 && !strategy.bound && section.step === 1 && section.smooth === 1;
  const bands = withBands ? strategy.bands.map((band, j) => band && band.map((end) => end.map((v, i) => (drawnAt(i, j) ? v : null)))) : [];
  const from = table.x(0);
  const last = Math.max(section.longest, table.x(table.values.length - 1));
  const raw = table.domains.map((_, j) => table.values.map((row, i) => (drawnAt(i, j) ? row[j] : null)));
  const lines = section.smooth > 1 ? raw.map((line) => runningMean(line, section.smooth)) : raw;
  const naive = section.strategies.find((s) => s.label === "naive" && s !== strategy && !s.bound);
  const joint = section.strategies.find((s) => s.label === "joint" && s !== strategy && s.bound);
  const behind = naive && count <= 12 ? unpack(section, naive.matrices[0]) : null;
  const greys = behind ? behind.domains.map((_, j) => behind.values.map((row, i) => (behind.seen(i, j) ? row[j] : null))) : [];
  if (section.smooth > 1) greys.forEach((grey, j) => (greys[j] = runningMean(grey, section.smooth)));
  const level = joint ? joint.average.mean[0] : null;
  const average = naive && !behind ? naive.average : null;
  // what a loss was before training may be far off, and would leave no room for what is forgotten
  const trained = lines.flatMap((line, j) => line.filter((_, i) => table.seen(i, j)));
  const ranges = bands.flatMap((band, j) => (band ? band.flatMap((end) => end.filter((_, i) => table.seen(i, j))) : []));
  const every = [...trained, ...ranges, ...greys.flat(), ...(average ? average.mean : []), level];
  const [low, high] = extent(every.filter((v) => v !== null).map((v) => v * unit.factor));
  const x = linear(from === last ? from - 0.5 : from, from === last ? last + 0.5 : last, box.left + 10, box.right - (direct ? 0 : 6));
  const y = linear(low, high, box.bottom - 4, box.top);
  const at = (value) => y(value * unit.factor);
  axisY(box, y, ticks(low, high, 8), plain, axisTitle(unit));
  const smoothed = section.smooth > 1 ? `; mean of the last ${section.smooth * section.step}` : "";
  axisX(box, x, ticks(from, last, Math.min(10, last), true), plain, `experiences seen${smoothed}`);
  for (const grey of greys) box.root.append(svg("path", { d: path(behind.values.map((_, i) => behind.x(i)), grey, x, at), style: "stroke:var(--axis);fill:none" }));
  if (average) box.root.append(svg("path", { d: path(average.x, average.mean, x, at), style: "stroke:var(--naive);fill:none", "stroke-width": 2 }));
  if (level !== null) box.root.append(svg("path", { d: `M${x(from)} ${at(level)}H${x(last)}`, style: "stroke:var(--joint);fill:none", "stroke-dasharray": DASH.dashed }));
  const xs = table.values.map((_, i) => table.x(i));
  const ends = [];
  const inside = clip(box);
  // many intervals would cover each other; then each shows when its line is pointed at
  const bandOpacity = count > 6 ? 0 : 0.15;
  const drawn = lines.map((line, j) => {
    const colour = orderColour(j, count);
    const group = svg("g", {});
    const ready = line.map((value, i) => (table.seen(i, j) ? value : null));
    if (bands[j] && bands[j][0].some((v) => v !== null)) {
      const ends = bands[j].map((b) => b.map((v, i) => (table.seen(i, j) ? v : null)));
      const band = svg("path", { class: "band", d: area(xs, ...ends, x, at), style: `fill:${colour};opacity:${bandOpacity}` });
      group.append(band);
    }
    if (section.measure === "loss") {
      const before = line.map((value, i) => (i && table.seen(i - 1, j) ? null : value));
      group.append(svg("path", { d: path(xs, before, x, at), style: `stroke:${colour};fill:none;opacity:0.4`, "clip-path": inside }));
    }
    group.append(svg("path", { d: path(xs, ready, x, at), style: `stroke:${colour};fill:none`, "stroke-width": direct ? 2 : 1 }));
    if (last <= 20 && !strategy.bound) ready.forEach((v, i) => v !== null && group.append(svg("circle", { cx: x(xs[i]), cy: at(v), r: 2.8, style: `fill:${colour}` })));
    const final = ready[ready.length - 1];
    if (direct && final !== null) ends.push({ x: x(xs[xs.length - 1]), y: at(final), text: names[j], colour });
    box.root.append(group);
    return group;
  });
  nameEnds(box, ends);
  const references = [naive ? "grey: naive" : "", joint ? "dashed: joint" : "", direct ? "" : "dark to light: first to last domain"];
  const note = references.filter(Boolean).join(" · ");
  box.root.append(svg("text", { x: 0, y: 28 }, note));
  const highlight = (j) =>
    drawn.forEach((group, k) => {
      group.style.opacity = j < 0 || k === j ? 1 : 0.18;
      const band = group.querySelector(".band");
      if (band) band.style.opacity = k === j ? 0.2 : bandOpacity;
    });
  const hide = () => {
    hideTip();
    highlight(-1);
  };
  const show = (event) => {
    const [px, py] = within(box, event);
    const i = nearest(xs.map(x), px);
    const order = lines.map((line, j) => [j, line[i]]).filter(([, v]) => v !== null);
    if (i < 0 || !order.length) return hide();
    const [j] = order.reduce((a, b) => (Math.abs(at(a[1]) - py) <= Math.abs(at(b[1]) - py) ? a : b));
    highlight(j);
    const band = bands[j] ? [bands[j][0][i], bands[j][1][i]] : [null, null];
    const when = xs[i] ? `after ${xs[i]} experience${xs[i] === 1 ? "" : "s"}` : "before training";
    showTip(event, table.domains[j], [[orderColour(j, count), when, `${withInterval(unit, lines[j][i], ...band)} ${unit.symbol}`]]);
  };
  point(box.root, show, hide);
  return highlight;
}

function nearest(places, place) {
  return places.reduce((best, value, i) => (best < 0 || Math.abs(value - place) < Math.abs(places[best] - place) ? i : best), -1);
}
