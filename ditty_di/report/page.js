"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const single = data.runs.length === 1;
const hidden = new Set(); // positions of runs whose curves are not shown
const dark = matchMedia("(prefers-color-scheme: dark)");
const PALETTE = {
  light: ["#3457d5", "#d9480f", "#0b8a5b", "#a62bb5", "#b07d00", "#0a87a8", "#c2255c", "#5f6b7a", "#6741d9", "#5c8a00"],
  dark: ["#8ea6ff", "#ff9a62", "#4cc996", "#d98be6", "#e3b341", "#55c7e6", "#f783ac", "#a5b0c0", "#b197fc", "#a9d14b"],
};

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A color between violet (0) and yellow (1): five of viridis, and what lies between. */
function scale(at) {
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const n = Math.min(Math.floor(at * 4), 3);
  return `rgb(${stops[n].map((low, c) => Math.round(low + (stops[n + 1][c] - low) * (at * 4 - n))).join()})`;
}

/** Color of run n of `count`, the best first: bright on dark, dark on light. */
const graded = (n, count) => scale(0.5 + (dark.matches ? 0.48 : -0.42) * (1 - (1.7 * n) / Math.max(count - 1, 1)));

/** Color of position n of `count`: of a palette, or where that is too short, graded. */
function color(n, count) {
  const palette = PALETTE[dark.matches ? "dark" : "light"];
  return count <= palette.length ? palette[n] : graded(n, count);
}

function theme() {
  const [soft, line, grid, font] = ["--soft", "--line", "--grid", "--font"].map(variable);
  return {
    background: "transparent", font, view: { stroke: null },
    axis: { labelColor: soft, titleColor: soft, gridColor: grid, domainColor: line, tickColor: line, labelFontSize: 11, titleFontWeight: "normal", titleFontSize: 11 },
  };
}

const OPTIONS = { actions: false, renderer: "canvas", ast: false };

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

/** Points of a chart, one object each, and whether they are of its bold curves. */
function points(chart) {
  const found = [];
  chart.series.forEach((series, n) => {
    if (hidden.has(series.run)) return;
    for (const kind of ["raw", "smooth"]) {
      if (!series[kind]) continue;
      const [xs, ys] = series[kind];
      const bold = kind === "smooth" || !series.smooth;
      xs.forEach((x, i) => found.push({
        x, y: ys[i], series: `${n}${kind}`, hue: single ? n : series.run, held: series.held_out, bold, few: xs.length < 20,
        label: single ? series.label : `${data.runs[series.run]}, ${series.label}`,
      }));
    }
  });
  return found;
}

function specification(chart, log) {
  const all = points(chart);
  const bold = all.filter((point) => point.bold);
  const count = single ? chart.series.length : data.runs.length;
  const hues = [...Array(count).keys()];
  const hue = { field: "hue", type: "nominal", legend: null, scale: { domain: hues, range: hues.map((n) => color(n, count)) } };
    const ys = all.map((point) => point.y).filter((value) => value !== null);
  const [low, high] = ys.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  const scale = { ...(low === high ? { domain: [low - Math.abs(low) / 10 - 1e-9, high + Math.abs(high) / 10 + 1e-9] } : {}), zero: false, nice: true, type: log && low > 0 && /loss/i.test(chart.title) ? "log" : "linear" };
  const x = { field: "x", type: "quantitative", title: null, scale: { nice: false }, axis: { grid: false, tickCount: 5, format: "~s" } };
  const y = { field: "y", type: "quantitative", title: null, scale, axis: { tickCount: 5, domain: false, ticks: false } };
  const line = (values, opacity, strokeWidth) => ({
    data: { values },
    mark: { type: "line", opacity, strokeWidth, strokeJoin: "round", clip: true, invalid: "break-paths-show-domains" },
    encoding: {
      detail: { field: "series" }, color: hue,
      strokeDash: { field: "held", type: "nominal", legend: null, scale: { domain: [false, true], range: [[1, 0], [5, 3]] } },
    },
  });
  const dots = (values, size) => ({ data: { values }, mark: { type: "point", filled: true, size, opacity: 1, clip: true }, encoding: { color: hue } });
  const shift = "event.shiftKey";
  const main = line(bold, 1, 2);
  main.params = [{
    name: "zoom", bind: "scales",
    select: {
      type: "interval", encodings: ["x", "y"], on: `[pointerdown[${shift}], window:pointerup] > window:pointermove!`,
      translate: `[pointerdown[${shift}], window:pointerup] > window:pointermove!`, zoom: `wheel![${shift}]`,
    },
  }];
  const hover = dots(bold, 55);
  hover.params = [{ name: "hover", select: { type: "point", on: "pointerover", nearest: true, clear: "pointerout", toggle: false } }];
  hover.encoding.opacity = { condition: { param: "hover", empty: false, value: 1 }, value: 0 };
  hover.encoding.tooltip = [
    { field: "label", title: " " }, { field: "x", title: "step", format: "," }, { field: "y", title: "value", format: ".5~g" },
  ];
  const raw = all.filter((point) => !point.bold);
  const few = bold.filter((point) => point.few); // a single point makes no line
  const layer = [...(raw.length ? [line(raw, single ? 0.28 : 0.14, 1)] : []), main, ...(few.length ? [dots(few, 22)] : []), hover];
  return {
    description: chart.title, width: "container", height: 190, autosize: { type: "fit-x", contains: "padding" }, padding: { left: 0, right: 4, top: 4, bottom: 0 },
    encoding: { x, y }, layer: ys.length ? layer : [{ data: { values: [] }, mark: "text" }], config: theme(),
  };
}

const drawn = new Map(); // figure's plot -> the view in it, or a promise of it

async function draw(plot, spec) {
  const before = await drawn.get(plot);
  if (before) before.finalize();
  const promise = vegaEmbed(plot, spec, OPTIONS);
  drawn.set(plot, promise);
  await promise;
  plot.dataset.drawn = "true";
}

const logarithmic = document.getElementById("log");
const plots = new Map(); // plot -> chart
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !drawn.has(target)) draw(target, specification(plots.get(target), logarithmic.checked));
  }
}, { rootMargin: "400px" });

function addChart(chart) {
  const caption = element("figcaption", {}, chart.title);
  if (chart.unit) caption.append(element("small", { textContent: chart.unit }));
  if (single && chart.series.length > 1) {
    chart.series.forEach((series, n) => {
      const mark = element("i", { className: series.held_out ? "dashed" : "" });
      mark.dataset.hue = n;
      mark.dataset.count = chart.series.length;
      caption.append(element("small", {}, mark, series.label));
    });
  }
  const plot = element("div", { className: "plot" });
  plot.dataset.title = chart.title;
  plots.set(plot, chart);
  document.getElementById(chart.more ? "charts-more" : "charts").append(element("figure", {}, caption, plot));
  seen.observe(plot);
}

/** Parallel coordinates: positions on the axes are computed by the report. */
function parallel() {
  const { axes, runs, values } = data.sweep;
  const names = axes.map((axis) => axis.name);
  const count = runs.length;
  const lines = [];
  runs.forEach((run, n) => {
    if (hidden.has(run)) return;
    axes.forEach((axis, a) => {
      if (axis.positions[n] === null) return;
      lines.push({ run: data.runs[run], n, a, at: axis.positions[n], value: values[n][a], axis: axis.name, width: n === 0 ? 3 : 1.4 });
    });
  });
  const ticks = axes.flatMap((axis, a) => axis.ticks.map(([at, text]) => ({ a, at, text })));
  const limit = Math.max(100, document.getElementById("parallel").clientWidth / axes.length - 16);
  const [ink, soft, line, card] = ["--ink", "--soft", "--line", "--card"].map(variable);
  const x = { field: "a", type: "quantitative", axis: null, scale: { domain: [-0.12, axes.length - 0.55], nice: false } };
  const y = { field: "at", type: "quantitative", axis: null, scale: { domain: [-0.03, 1.03], nice: false } };
  const hues = [...Array(count).keys()].map((n) => graded(n, count));
  const hue = { field: "n", type: "ordinal", legend: null, scale: { domain: [...Array(count).keys()], range: hues } };
  const spec = {
    description: "parallel coordinates of the runs", width: "container", height: 290, autosize: { type: "fit-x", contains: "padding" }, padding: { left: 0, right: 0, top: 4, bottom: 4 }, config: theme(),
    layer: [
      { data: { values: names.map((name, a) => ({ a, name })) }, mark: { type: "rule", color: line, strokeWidth: 1.5 }, encoding: { x } },
      {
        data: { values: names.map((name, a) => ({ a, name })) }, mark: { type: "text", align: "left", dx: -2, baseline: "bottom", fontSize: 12, fontWeight: 600, color: ink, limit },
        encoding: { x, y: { value: -6 }, text: { field: "name" } },
      },
      {
        data: { values: lines }, mark: { type: "line", interpolate: "monotone", opacity: 0.85 },
        encoding: { x, y, detail: { field: "n" }, order: { field: "a" }, color: hue, strokeWidth: { field: "width", type: "quantitative", scale: null } },
      },
      {
        data: { values: lines }, mark: { type: "point", filled: true, size: 36, opacity: 1 },
        encoding: { x, y, color: hue, tooltip: [{ field: "run", title: "run" }, { field: "axis", title: "key" }, { field: "value", title: "value" }] },
      },
      {
        data: { values: ticks }, mark: { type: "text", align: "left", dx: 6, fontSize: 11, color: soft, stroke: card, strokeWidth: 4, strokeOpacity: 0.85, strokeJoin: "round", limit: 110 },
        encoding: { x, y, text: { field: "text" } },
      },
      { data: { values: ticks }, mark: { type: "text", align: "left", dx: 6, fontSize: 11, color: soft, limit: 110 }, encoding: { x, y, text: { field: "text" } } },
    ],
  };
  return draw(document.getElementById("parallel"), spec);
}

function paint() {
  document.querySelectorAll("input[data-run]").forEach((box) => box.style.setProperty("--color", color(+box.dataset.run, data.runs.length)));
  document.querySelectorAll("i[data-hue]").forEach((mark) => { mark.style.color = color(+mark.dataset.hue, +mark.dataset.count); });
  if (data.sweep) parallel();
  for (const [plot, chart] of plots) if (drawn.has(plot)) draw(plot, specification(chart, logarithmic.checked));
}

/** Sort a table's rows by a column: numbers as numbers, missing ones last. */
function sort(heading) {
  const row = heading.parentElement, table = row.closest("table"), column = [...row.children].indexOf(heading);
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of row.querySelectorAll("[aria-sort]")) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (line) => {
    const text = line.children[column].dataset.value ?? "";
    return text === "None" || text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  const body = table.tBodies[0];
  const lines = [...body.rows].map((line) => [value(line), line]);
  lines.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : down ? compare(b, a) : compare(a, b)));
  body.append(...lines.map(([, line]) => line));
}

data.charts.forEach(addChart);
if (!data.charts.length) document.getElementById("charts").append(element("p", { className: "note", textContent: "No metrics were logged." }));
document.getElementById("more").hidden = !data.charts.some((chart) => chart.more);
document.getElementById("more").addEventListener("toggle", () => window.dispatchEvent(new Event("resize")));
document.querySelectorAll("th[aria-sort] button").forEach((button) => button.addEventListener("click", () => sort(button.parentElement)));
document.querySelectorAll("input[data-run]").forEach((box) => box.addEventListener("change", () => {
  hidden[box.checked ? "delete" : "add"](+box.dataset.run);
  paint();
}));
function open() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
window.addEventListener("hashchange", open);
dark.addEventListener("change", paint);
logarithmic.addEventListener("change", paint);
open();
paint();
