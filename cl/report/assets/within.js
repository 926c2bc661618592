"use strict";
// The first domains of one strategy over optimizer steps: how deep they fall inside experiences.

function nameWithin(strategy) {
  const count = strategy.within ? strategy.within.seeds : 0;
  return count > 1 ? `${strategy.label}, mean of ${count} seeds` : strategy.label;
}

function drawWithin(place, section, strategy, label) {
  const { unit, within: columns } = section;
  const found = strategy.within;
  const names = cutAll(columns.map((j) => section.domains[j]), 16);
  const right = Math.max(...names.map((name) => name.length)) * 7 + 22;
  const box = canvas(place, found ? 300 : 40, { left: 46, right, top: 26, bottom: 40 }, label);
  if (!found) return box.root.append(svg("text", { x: 0, y: 20 }, "not evaluated inside experiences"));
  const lines = found.values.map((line) => line.map((cell) => (cell === null ? null : cell / DATA.scale)));
  const [low, high] = extent(lines.flat().map((v) => v && v * unit.factor));
  const last = found.steps[found.steps.length - 1];
  const x = linear(0, last, box.left + 4, box.right);
  const y = linear(low, high, box.bottom - 4, box.top);
  const at = (value) => y(value * unit.factor);
  axisY(box, y, ticks(low, high, 6), plain, axisTitle(unit));
  const thinned = found.worst_of > 1 ? `; each point is the worst of ${found.worst_of}` : "";
  axisX(box, x, ticks(0, last, 8, true), plain, `optimizer steps; experiences end at the vertical lines${thinned}`);
  for (const i of found.ends) box.root.append(svg("line", { class: "axis", x1: x(found.steps[i]), x2: x(found.steps[i]), y1: box.top, y2: box.bottom }));
  const colours = columns.map((_, k) => orderColour(k, columns.length));
  lines.forEach((line, k) => {
    box.root.append(svg("path", { d: path(found.steps, line, x, at), style: `stroke:${colours[k]};fill:none`, "stroke-width": 1.7, "stroke-linejoin": "round" }));
    if (found.ends.length > 60) return;
    for (const i of found.ends) if (line[i] !== null) box.root.append(svg("circle", { cx: x(found.steps[i]), cy: at(line[i]), r: 3, style: `fill:${colours[k]}` }));
  });
  const final = found.steps.length - 1;
  nameEnds(box, lines.flatMap((line, k) => (line[final] === null ? [] : [{ x: x(last), y: at(line[final]), text: names[k], colour: colours[k] }])));
  pointAlong(box, box.bottom, (event) => {
    const i = nearest(found.steps.map(x), Math.max(box.left, within(box, event)[0]));
    const when = found.ends.includes(i) ? ", end of an experience" : "";
    const known = lines.flatMap((line, k) => (line[i] === null ? [] : [[colours[k], names[k], `${writer(unit)(line[i])} ${unit.symbol}`]]));
    showTip(event, `step ${plain(found.steps[i])}${when}`, known);
    return x(found.steps[i]);
  });
}
