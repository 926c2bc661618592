"use strict";
// Average ranks as a critical-difference diagram: best left, names hang from their rank, bars join what is not told apart.

function drawRanks(place, section, shown, label) {
  const ranks = section.ranks;
  const known = Object.entries(ranks.average).sort((a, b) => a[1] - b[1]);
  const [count, half] = [known.length, Math.ceil(known.length / 2)];
  const length = widthOf(place) < 420 ? 12 : 22;
  const names = cutAll(known.map(([name]) => name), length);
  const room = (side) => Math.max(...side.map((name) => name.length)) * 7 + 53;
  const [row, axis] = [22, ranks.difference === null ? 24 : 46];
  const firstRow = axis + 14 + 8 * ranks.groups.length + 12;
  const box = canvas(place, firstRow + row * half, { left: room(names.slice(0, half)), right: room(names.slice(half)), top: axis, bottom: 0 }, label);
  const x = linear(1, count, box.left, box.right);
  box.root.append(svg("line", { class: "axis", x1: x(1), x2: x(count), y1: axis, y2: axis }));
  // as many numbers as there is room for
  const every = Math.ceil(20 / (x(2) - x(1)));
  for (let k = 1; k <= count; k++) {
    box.root.append(svg("line", { class: "axis", x1: x(k), x2: x(k), y1: axis - 4, y2: axis }));
    if ((k - 1) % every === 0) box.root.append(svg("text", { x: x(k), y: axis - 8, "text-anchor": "middle" }, String(k)));
  }
  if (ranks.difference !== null) {
    const [from, to] = [x(1), x(1 + ranks.difference)];
    box.root.append(svg("path", { d: `M${from} 15v8m0 -4H${to}m0 -4v8`, style: "stroke:var(--ink);fill:none", "stroke-width": 1.3 }));
    box.root.append(svg("text", { class: "neutral", x: from, y: 10 }, `critical difference ${ranks.difference.toFixed(2)}`));
  }
  known.forEach(([name, average], i) => {
    const strategy = shown.find((s) => s.label === name);
    if (!strategy) return;
    // the outermost names are the highest, so that no line crosses another
    const left = i < half;
    const y = firstRow + row * (left ? i : count - 1 - i);
    const [end, side, anchor] = left ? [box.left - 6, -1, "end"] : [box.right + 6, 1, "start"];
    const group = svg("g", {});
    group.append(svg("path", { d: `M${x(average)} ${axis}V${y}H${end}`, style: `stroke:${strategy.colour};fill:none`, "stroke-width": 1.5 }));
    group.append(svg("circle", { class: "halo", cx: x(average), cy: axis, r: 5, style: `fill:${strategy.colour}` }));
    group.append(svg("text", { x: end + side * 5, y: y + 4, "text-anchor": anchor }, average.toFixed(2)));
    group.append(svg("text", { class: "name", x: end + side * (known[count - 1][1] < 9.995 ? 35 : 42), y: y + 4, "text-anchor": anchor, style: `--c:${strategy.colour}` }, names[i]));
    const final = strategy.final;
    const lines = [[strategy.colour, "average rank", average.toFixed(2)]];
    lines.push([null, `final ${section.unit.name.toLowerCase()}`, withInterval(section.unit, final.mean, final.low, final.high)]);
    point(group, (event) => showTip(event, name, lines));
    box.root.append(group);
  });
  ranks.groups.forEach((members, i) => {
    const [low, high] = [members[0], members[members.length - 1]].map((name) => x(ranks.average[name]));
    const y = axis + 13 + 8 * i;
    box.root.append(svg("line", { x1: low - 5, x2: high + 5, y1: y, y2: y, style: "stroke:var(--ink)", "stroke-width": 3.5 }));
  });
}
