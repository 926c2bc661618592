"use strict";
// What is left after so long without practice: points over the lag in log-log, and the power law fitted to them.

function logScale(low, high, from, to) {
  const scale = linear(Math.log10(low), Math.log10(high), from, to);
  const at = (value) => scale(Math.log10(value));
  at.invert = (place) => 10 ** scale.invert(place);
  return at;
}

// 1, 2, 5, 10, ... inside the range; every decade alone where that would be too many
function logTicks(low, high, most = 9) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const m of [1, 2, 5]) if (m * 10 ** power >= low && m * 10 ** power <= high) found.push(Number((m * 10 ** power).toPrecision(10)));
  }
  const decades = found.filter((v) => Number.isInteger(Math.log10(v)));
  return found.length > most && decades.length > 1 ? decades : found;
}

function drawRevisit(place, section, shown, label) {
  const unit = section.unit;
  const known = shown.filter((s) => s.revisit);
  const names = cutAll(known.map((s) => s.label), 18);
  const text = (s) => {
    const [law, name] = [s.revisit.law, names[known.indexOf(s)]];
    return law ? `${name} lag^${plain(Number((-law.exponent).toFixed(2)))}` : name;
  };
  const longest = Math.max(4, ...known.map((s) => text(s).length));
  const box = canvas(place, 340, { left: 46, right: Math.min(20 + longest * 7, 230), top: 26, bottom: 42 }, label);
  if (!known.length) return;
  const values = known.flatMap((s) => s.revisit.value.filter((v) => v > 0)).map((v) => v * unit.factor);
  const [low, high] = [Math.min(...values) / 1.08, Math.max(...values) * 1.08];
  const last = Math.max(...known.flatMap((s) => s.revisit.lag));
  const most = Math.max(...known.flatMap((s) => s.revisit.count));
  const x = logScale(0.9, Math.max(last, 2) * 1.05, box.left, box.right);
  const y = logScale(low, high, box.bottom - 4, box.top);
  const at = (value) => y(value * unit.factor);
  const marks = logTicks(low, high);
  axisY(box, y, marks.length > 1 ? marks : [low, Math.sqrt(low * high), high].map((v) => Number(v.toPrecision(2))), plain, `${unit.name} (${unit.symbol}), log`);
  axisX(box, x, logTicks(1, Math.max(last, 2)), plain, "experiences since last practice, log");
  const window = clip(box);
  const ends = [];
  for (const s of known) {
    const { lag, value, count, law } = s.revisit;
    const points = svg("g", {});
    lag.forEach((k, i) => {
      if (value[i] > 0) points.append(svg("circle", { cx: x(k), cy: at(value[i]), r: 2 + 5 * Math.sqrt(count[i] / most), style: `fill:${s.colour};opacity:0.45` }));
    });
    box.root.append(points);
    const final = value.findLastIndex((v) => v > 0);
    if (!law && final >= 0) ends.push({ x: x(lag[final]), y: at(value[final]), text: text(s), colour: s.colour });
    if (!law) continue;
    const xs = Array.from({ length: 40 }, (_, i) => lag[lag.length - 1] ** (i / 39));
    const ys = xs.map((k) => law.scale * k ** -law.exponent);
    const style = { style: `stroke:${s.colour};fill:none`, "stroke-width": 2, "stroke-dasharray": DASH[s.dash], "clip-path": window };
    box.root.append(svg("path", { d: path(xs, ys, x, at), ...style }));
    const end = Math.min(Math.max(at(ys[39]), box.top), box.bottom);
    ends.push({ x: x(xs[39]), y: end, text: text(s), colour: s.colour });
  }
  nameEnds(box, ends);
  const lags = [...new Set(known.flatMap((s) => s.revisit.lag))].sort((a, b) => a - b);
  pointAlong(box, box.bottom, (event) => {
    const k = lags[nearest(lags.map(x), within(box, event)[0])];
    const lines = known.flatMap((s) => {
      const i = s.revisit.lag.indexOf(k);
      if (i < 0) return [];
      return [[s.colour, s.label, `${writer(unit)(s.revisit.value[i])} of ${s.revisit.count[i]} pairs; just practised ${writer(unit)(s.revisit.practised)}`]];
    });
    showTip(event, `${k} experience${k === 1 ? "" : "s"} since last practice`, lines);
    return x(k);
  });
}
