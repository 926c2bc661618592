"use strict";
// Charts that compare strategies. Each takes its place, the section, and the strategies to show.

const DASH = { solid: null, dashed: "7 4", dotted: "2 3", dashdot: "8 3 2 3" };

function writer(unit) {
  return (value, signed = false) => {
    if (value === null || value === undefined) return "–";
    const text = (value * unit.factor).toFixed(unit.digits);
    const plus = signed && Number(text) > 0 ? "+" : "";
    return plus + (Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−"));
  };
}

function withInterval(unit, mean, low, high) {
  const write = writer(unit);
  return low === null || low === undefined ? write(mean) : `${write(mean)}  [${write(low)}, ${write(high)}]`;
}

function axisTitle(unit) {
  return `${unit.name} (${unit.symbol}), ${unit.up ? "higher" : "lower"} is better`;
}

function plain(value) {
  return String(Number(value.toPrecision(6))).replace("-", "−");
}

function drawCourse(place, section, shown, label) {
  const unit = section.unit;
  const names = cutAll(shown.map((s) => s.label), 24).map((name, i) => name + (shown[i].finished ? "" : " (unfinished)"));
  const longest = Math.max(4, ...names.map((name) => name.length));
  const box = canvas(place, 360, { left: 46, right: Math.min(20 + longest * 7.2, 230), top: 26, bottom: 40 }, label);
  const values = shown.flatMap((s) => [...s.average.mean, ...s.average.low, ...s.average.high]).map((v) => v && v * unit.factor);
  const [low, high] = extent(values);
  const last = Math.max(section.longest, 1);
  const x = linear(last === 1 ? 0.5 : 1, last === 1 ? 1.5 : last, box.left + 10, box.right);
  const y = linear(low, high, box.bottom - 4, box.top);
  const at = (value) => y(value * unit.factor);
  axisY(box, y, ticks(low, high, 8), plain, axisTitle(unit));
  axisX(box, x, ticks(1, last, Math.min(12, last), true), plain, "experiences seen");
  const ends = [];
  for (const [k, s] of shown.entries()) {
    const band = s.average;
    // one row stands for the whole stream, so it is a level and not a point at the first experience
    const wide = s.bound ? (a) => [a[0], a[0]] : (a) => a;
    const xs = s.bound ? [1, last] : band.x;
    const [mean, lows, highs] = [wide(band.mean), wide(band.low), wide(band.high)];
    box.root.append(svg("path", { d: area(xs, lows, highs, x, at), style: `fill:${s.colour};opacity:0.14` }));
    const width = s.neutral ? 1.6 : 2.2;
    const d = path(xs, mean, x, at);
    box.root.append(svg("path", { d, style: `stroke:${s.colour};fill:none`, "stroke-width": width, "stroke-dasharray": DASH[s.dash], "stroke-linejoin": "round" }));
    if (!s.bound && last <= 30) {
      xs.forEach((k, i) => {
        if (mean[i] !== null) box.root.append(svg("circle", { cx: x(k), cy: at(mean[i]), r: 3, style: `fill:${s.colour}` }));
      });
    }
    const final = mean[mean.length - 1];
    if (final !== null) ends.push({ x: x(xs[xs.length - 1]), y: at(final), text: names[k], colour: s.colour });
  }
  nameEnds(box, ends);
  pointAlong(box, box.bottom, (event) => {
    const k = Math.min(Math.max(Math.round(x.invert(within(box, event)[0])), 1), last);
    const lines = shown.map((s) => {
      const i = s.bound ? 0 : s.average.x.indexOf(k);
      return [s.colour, s.label, i < 0 ? null : withInterval(unit, s.average.mean[i], s.average.low[i], s.average.high[i]), s.average.mean[i]];
    });
    const sign = unit.up ? -1 : 1;
    const known = lines.filter((line) => line[2] !== null && line[3] !== null).sort((a, b) => sign * (a[3] - b[3]));
    showTip(event, `after ${k} experience${k === 1 ? "" : "s"}`, known);
    return x(k);
  });
}

function drawDots(place, section, shown, label, key) {
  const unit = section.unit;
  // the same rows in every such chart, so that they can be read across
  const known = shown.filter((s) => s.final);
  const names = cutAll(known.map((s) => s.label), 22);
  const longest = Math.max(4, ...names.map((name) => name.length));
  const step = 40;
  const box = canvas(place, Math.max(1, known.length) * step + 62, { left: longest * 7.2 + 12, right: 16, top: 10, bottom: 44 }, label);
  const values = known.filter((s) => s[key]).flatMap((s) => [...s[key].seeds.map((pair) => pair[1]), s[key].low, s[key].high, s[key].mean]);
  const [low, high] = extent(values.filter((v) => v !== null).map((v) => v * unit.factor));
  const x = linear(low, high, box.left, box.right);
  const at = (value) => x(value * unit.factor);
  const marks = ticks(low, high, 7);
  linesX(box, x, marks);
  const up = key === "final" ? unit.up : false;
  axisX(box, x, marks, plain, `${unit.symbol}, ${up ? "higher" : "lower"} is better`);
  known.forEach((s, i) => {
    const found = s[key];
    const y = box.top + step * (i + 0.5);
    const group = svg("g", {});
    group.append(svg("rect", { x: 0, y: y - step / 2, width: box.width, height: step, fill: "transparent" }));
    group.append(svg("text", { class: "name", x: box.left - 12, y: y + 4, "text-anchor": "end", style: `--c:${s.colour}` }, names[i]));
    if (!found) {
      group.append(svg("text", { x: box.left + 4, y: y + 4 }, "not defined"));
      return box.root.append(group);
    }
    for (const [, value] of found.seeds) group.append(svg("circle", { cx: at(value), cy: y + 11, r: 2.6, style: `fill:${s.colour};opacity:0.5` }));
    if (found.low !== null) {
      group.append(svg("line", { x1: at(found.low), x2: at(found.high), y1: y, y2: y, style: `stroke:${s.colour}`, "stroke-width": 3, "stroke-linecap": "round" }));
    }
    group.append(svg("circle", { class: "halo", cx: at(found.mean), cy: y, r: 5.5, style: `fill:${s.colour}` }));
    const lines = [[s.colour, "mean", withInterval(unit, found.mean, found.low, found.high)]];
    for (const [seed, value] of found.seeds.slice(0, 12)) lines.push([null, `seed ${seed}`, writer(unit)(value)]);
    point(group, (event) => showTip(event, s.label, lines));
    box.root.append(group);
  });
}

// linear from zero; logarithmic with a place for zero where the costs differ more than 30-fold
function costScale(values, left, right) {
  const positive = values.filter((v) => v > 0);
  const high = Math.max(...positive, 0) || 1;
  const low = positive.length ? Math.min(...positive) : 1;
  if (high / low <= 30) {
    const scale = linear(0, high * 1.06, left + 12, right);
    return { scale, marks: ticks(0, high * 1.06, 5) };
  }
  const from = Math.floor(Math.log10(low));
  const to = Math.ceil(Math.log10(high));
  const hasZero = values.some((v) => v <= 0);
  const log = linear(from, to, left + (hasZero ? 60 : 16), right - 8);
  const every = Math.ceil((to - from) / 5);
  const marks = hasZero ? [0] : [];
  for (let power = from; power <= to; power += every) marks.push(10 ** power);
  return { scale: (value) => (value > 0 ? log(Math.log10(value)) : left + 14), marks };
}

function drawCost(place, section, shown, label, key) {
  const unit = section.unit;
  const cost = DATA.costs.find((each) => each.key === key);
  const known = shown.filter((s) => s.final && s.cost[key] !== null);
  const box = canvas(place, 340, { left: 46, right: 16, top: 26, bottom: 42 }, label);
  const names = cost.base === 1000 ? ["", "k", "M", "G", "T", "P"] : ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  const largest = Math.max(...known.map((s) => s.cost[key]), 1);
  const power = Math.min(Math.floor(Math.log(largest) / Math.log(cost.base) + 1e-9), names.length - 1);
  const size = cost.base ** power;
  const [low, high] = extent(known.flatMap((s) => [s.final.mean, s.final.low, s.final.high]).filter((v) => v !== null).map((v) => v * unit.factor), 0.1);
  const y = linear(low, high, box.bottom - 4, box.top);
  const { scale, marks } = costScale(known.map((s) => s.cost[key] / size), box.left, box.right);
  const x = (s) => scale(s.cost[key] / size);
  const at = (value) => y(value * unit.factor);
  axisY(box, y, ticks(low, high, 8), plain, `Final ${unit.name.toLowerCase()} (${unit.symbol}), ${unit.up ? "higher" : "lower"} is better`);
  axisX(box, scale, marks, plain, names[power] ? `${cost.label} (${names[power]})` : cost.label);
  // the front is that of all strategies, so it does not move when some are hidden
  const front = section.strategies.filter((s) => s.fronts.includes(key) && s.final && s.cost[key] !== null).sort((a, b) => a.cost[key] - b.cost[key]);
  const steps = front.map((s, i) => (i ? `H${x(s)}V${at(s.final.mean)}` : `M${x(s)} ${at(s.final.mean)}`)).join("");
  const hasFront = front.length > 1 && front.every((s) => known.includes(s));
  if (hasFront) box.root.append(svg("path", { class: "faint", d: steps }));
  const texts = cutAll(known.map((s) => s.label), 22);
  const lines = [];
  front.slice(1).forEach((s, i) => {
    const [left, right, from, to] = [x(front[i]), x(s), at(front[i].final.mean), at(s.final.mean)];
    if (hasFront) lines.push([left, from, right, from + 1], [right, Math.min(from, to), right + 1, Math.max(from, to)]);
  });
  // a text may stand in the line above the highest mark
  const room = { ...box, top: box.top - 14 };
  const placed = beside(known.map((s, i) => ({ x: x(s), y: at(s.final.mean), width: texts[i].length * 6.7 })), room, 14, 8, lines);
  known.forEach((s, i) => {
    const found = s.final;
    const group = svg("g", {});
    if (found.low !== null) group.append(svg("line", { x1: x(s), x2: x(s), y1: at(found.low), y2: at(found.high), style: `stroke:${s.colour};opacity:0.8`, "stroke-width": 2 }));
    const look = s.label === "joint" ? `fill:var(--panel);stroke:${s.colour};stroke-width:2` : `fill:${s.colour}`;
    // the texts of a column line up towards it
    const { left, middle, hasLeader } = placed[i];
    const toLeft = hasLeader && left < x(s);
    const start = toLeft ? left + texts[i].length * 6.7 : left;
    if (hasLeader) {
      const end = start + (toLeft ? 3 : -3);
      group.append(svg("path", { d: `M${x(s)} ${at(found.mean)}L${end} ${middle}`, style: `stroke:${s.colour};fill:none`, "stroke-width": 0.7 }));
    }
    group.append(svg("circle", { cx: x(s), cy: at(found.mean), r: 6, style: look }));
    group.append(svg("text", { class: "name", x: start, y: middle + 4, "text-anchor": toLeft ? "end" : "start", style: `--c:${s.colour}` }, texts[i]));
    const amount = `${Number((s.cost[key] / size).toPrecision(3))} ${names[power]}`;
    const notes = [[s.colour, `final ${unit.name.toLowerCase()}`, withInterval(unit, found.mean, found.low, found.high)], [null, cost.label, amount]];
    if (s.fronts.includes(key)) notes.push([null, "on the front", ""]);
    point(group, (event) => showTip(event, s.label, notes));
    box.root.append(group);
  });
}
