"use strict";
// What the reader can do: hide strategies, sort the tables, look inside one strategy.

const DATA = JSON.parse(document.getElementById("data").textContent);
const night = window.matchMedia("(prefers-color-scheme: dark)");
let printing = false;

function isNight() {
  return night.matches && !printing;
}

class SectionPage {
  constructor(root, section) {
    this.root = root;
    this.section = section;
    this.hidden = new Set();
    // the best that is no bound is what a reader wants to see first
    const first = (wanted) => section.strategies.find(wanted);
    this.strategy = first((s) => s.finished && !s.neutral) || first((s) => s.finished && !s.bound) || section.strategies[0];
    this.matrix = 0;
    if (!this.strategy) return;
    this.buildLegend();
    this.buildChoices();
    for (const button of root.querySelectorAll(".pick")) {
      button.onclick = () => {
        const found = section.strategies.find((s) => s.label === button.dataset.strategy);
        if (!found) return;
        this.choose(found);
        root.querySelector(".inside").scrollIntoView({ block: "start" });
      };
    }
    let width = 0;
    const fit = () => {
      if (root.clientWidth !== width) this.draw();
      width = root.clientWidth;
    };
    fit();
    // drawing changes heights, which a resize observer must not do within its own round
    new ResizeObserver(() => requestAnimationFrame(fit)).observe(root);
  }

  buildLegend() {
    const legend = this.root.querySelector(".legend");
    if (this.section.strategies.length < 2) return legend.remove();
    for (const strategy of this.section.strategies) {
      const line = { x1: 0, x2: 22, y1: 6, y2: 6, "stroke-width": 3, "stroke-dasharray": DASH[strategy.dash], style: `stroke:${strategy.colour}` };
      const swatch = svg("svg", { width: 22, height: 12, "aria-hidden": "true" }, svg("line", line));
      const button = node("button", { type: "button", "aria-pressed": "true", title: "Show or hide" }, swatch, cut(strategy.label, 60));
      button.onclick = () => {
        if (!this.hidden.delete(strategy)) this.hidden.add(strategy);
        button.setAttribute("aria-pressed", String(!this.hidden.has(strategy)));
        this.drawComparison();
      };
      legend.append(button);
    }
  }

  buildChoices() {
    this.strategies = this.root.querySelector("select.strategy");
    this.matrices = this.root.querySelector("select.matrix");
    this.section.strategies.forEach((s, i) => this.strategies.append(node("option", { value: i }, s.label)));
    this.strategies.onchange = () => this.choose(this.section.strategies[Number(this.strategies.value)]);
    this.matrices.onchange = () => {
      this.matrix = Number(this.matrices.value);
      this.drawInside();
    };
    this.choose(this.strategy, false);
  }

  choose(strategy, draw = true) {
    this.strategy = strategy;
    this.matrix = 0;
    this.strategies.value = this.section.strategies.indexOf(strategy);
    this.matrices.replaceChildren(...strategy.matrices.map((matrix, i) => node("option", { value: i }, matrix.name)));
    for (const button of this.root.querySelectorAll(".pick")) {
      button.closest("tr").classList.toggle("picked", button.dataset.strategy === strategy.label);
    }
    if (draw) this.drawInside();
  }

  draw() {
    if (!this.strategy) return;
    this.drawComparison();
    this.drawInside();
  }

  drawComparison() {
    const shown = this.section.strategies.filter((s) => !this.hidden.has(s));
    for (const figure of this.root.querySelectorAll(".chart")) {
      const { chart, key, label } = figure.dataset;
      const draw = { course: drawCourse, dots: drawDots, cost: drawCost, ranks: drawRanks, revisit: drawRevisit }[chart];
      if (draw) draw(figure.querySelector(".canvas"), this.section, shown, label, key);
    }
  }

  drawInside() {
    const place = (chart) => this.root.querySelector(`[data-chart=${chart}]`);
    const name = `${this.strategy.label}, ${this.strategy.matrices[this.matrix].name}`;
    const label = (chart) => `${place(chart).querySelector(".whose").textContent}. ${place(chart).dataset.label}`;
    for (const chart of this.root.querySelectorAll(".inside .chart")) {
      const names = { within: nameWithin, tokens: nameTokens };
      chart.querySelector(".whose").textContent = names[chart.dataset.chart]?.(this.strategy) ?? name;
    }
    const canvasOf = (chart) => place(chart).querySelector(".canvas");
    let highlight = () => {};
    if (place("curves")) highlight = drawCurves(canvasOf("curves"), this.section, this.strategy, this.matrix, label("curves"));
    drawHeatmap(canvasOf("heatmap"), this.section, this.strategy, this.strategy.matrices[this.matrix], label("heatmap"), highlight);
    if (place("tokens")) drawTokens(canvasOf("tokens"), this.section, this.strategy, label("tokens"));
    if (place("within")) drawWithin(canvasOf("within"), this.section, this.strategy, label("within"));
  }
}

function makeSortable(table) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    head.querySelector("button").onclick = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const isText = rows.every((row) => row.cells[column].dataset.value === undefined);
      const value = (row) => (isText ? row.cells[column].textContent : Number(row.cells[column].dataset.value ?? NaN));
      rows.sort((a, b) => {
        const [u, v] = [value(a), value(b)];
        if (isText) return down ? v.localeCompare(u) : u.localeCompare(v);
        // rows without a number stay at the end in both directions
        if (Number.isNaN(u) || Number.isNaN(v)) return Number.isNaN(u) - Number.isNaN(v);
        return down ? v - u : u - v;
      });
      table.tBodies[0].append(...rows);
    };
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
const pages = [...document.querySelectorAll("section.report")].map((root) => new SectionPage(root, DATA.sections[Number(root.dataset.section)]));
const redraw = () => pages.forEach((page) => page.draw());
night.addEventListener("change", redraw);
window.addEventListener("beforeprint", () => ((printing = true), redraw()));
window.addEventListener("afterprint", () => ((printing = false), redraw()));
