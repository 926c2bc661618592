"use strict";
// The losses of one strategy over the tokens it was trained on, and under them its learning rate.

function nameTokens(strategy) {
  const count = strategy.tokens ? strategy.tokens.seeds : 0;
  return count > 1 ? `${strategy.label}, mean of ${count} seeds` : strategy.label;
}

// 1234567 -> 1.23 M
function countText(value) {
  for (const [size, prefix] of [[1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))}${prefix}`;
  }
  return String(value);
}

function drawTokens(place, section, strategy, label) {
  const { unit, domains } = section;
  const found = strategy.tokens;
  const names = cutAll(domains, 16);
  const right = Math.max(...names.map((name) => name.length)) * 7 + 22;
  const margin = { left: 58, right, top: 26, bottom: 130 };
  const box = canvas(place, found ? 420 : 40, margin, label);
  if (!found) return box.root.append(svg("text", { x: 0, y: 20 }, "its course over tokens was not kept"));
  const low = { ...box, top: box.bottom + 34, bottom: box.height - 40 };
  const lines = found.values.map((line) => line.map((cell) => (cell === null ? null : cell / DATA.scale)));
  const [from, to] = extent(lines.flat().map((v) => v && v * unit.factor));
  const last = found.tokens[found.tokens.length - 1];
  const x = linear(0, last, box.left + 4, box.right);
  const y = linear(from, to, box.bottom - 4, box.top);
  const at = (value) => y(value * unit.factor);
  axisY(box, y, ticks(from, to, 6), plain, axisTitle(unit));
  const highest = Math.max(...found.rate);
  const rate = linear(0, highest || 1, low.bottom, low.top);
  axisY(low, rate, ticks(0, highest, 2), (value) => String(value));
  box.root.append(svg("text", { x: 0, y: low.top - 10 }, "learning rate"));
  axisX(low, x, ticks(0, last, 6, true), countText, "tokens trained on; experiences end at the vertical lines");
  for (const end of found.ends) {
    for (const part of [box, low]) box.root.append(svg("line", { class: "axis", x1: x(end), x2: x(end), y1: part.top, y2: part.bottom }));
  }
  const steps = found.rate.map((_, i) => i);
  box.root.append(svg("path", { d: path(steps, found.rate, (i) => x(found.at[i]), rate), style: "stroke:var(--muted);fill:none", "stroke-width": 1.5 }));
  const colours = domains.map((_, k) => orderColour(k, domains.length));
  // a domain is not measured everywhere: its line goes on to where it is measured next
  const known = lines.map((line) => line.map((_, i) => i).filter((i) => line[i] !== null));
  lines.forEach((line, k) => {
    const d = path(known[k].map((i) => found.tokens[i]), known[k].map((i) => line[i]), x, at);
    box.root.append(svg("path", { d, style: `stroke:${colours[k]};fill:none`, "stroke-width": 1.7, "stroke-linejoin": "round" }));
    if (found.tokens.length > 80) return;
    for (const i of known[k]) box.root.append(svg("circle", { cx: x(found.tokens[i]), cy: at(line[i]), r: 2.5, style: `fill:${colours[k]}` }));
  });
  const finals = known.map((indices) => indices[indices.length - 1]);
  nameEnds(box, lines.flatMap((line, k) => (finals[k] === undefined ? [] : [{ x: x(found.tokens[finals[k]]), y: at(line[finals[k]]), text: names[k], colour: colours[k] }])));
  pointAlong(box, low.bottom, (event) => {
    const i = nearest(found.tokens.map(x), Math.max(box.left, within(box, event)[0]));
    const measured = lines.flatMap((line, k) => (line[i] === null ? [] : [[colours[k], names[k], `${writer(unit)(line[i])} ${unit.symbol}`]]));
    const when = found.ends.includes(found.tokens[i]) ? ", end of an experience" : "";
    const now = found.rate[nearest(found.at, found.tokens[i])];
    showTip(event, `${countText(found.tokens[i])} tokens${when}`, [...measured, [null, "learning rate", String(now)]]);
    return x(found.tokens[i]);
  });
}
