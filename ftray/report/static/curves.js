// Draws every <figure class="chart" data-chart="…"> with uPlot: axis titles, values on hover, smoothing.
(() => {
  "use strict";
  const MANY = 4; // series; with more, hovering names the nearest one instead of a legend with all values
  const root = document.documentElement;
  const charts = [...document.querySelectorAll(".chart")].map((figure) => ({
    figure,
    chart: JSON.parse(figure.dataset.chart),
  }));
  let smoothing = 0;

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const color = (text) => text.replace(/var\((--[a-z]+)\)/g, (_, name) => css(name));

  // Exponential moving average, corrected for its start at zero. Missing values stay missing.
  function smooth(values) {
    let mean = 0;
    let weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = smoothing * mean + (1 - smoothing) * value;
      weight = smoothing * weight + 1 - smoothing;
      return mean / weight;
    });
  }

  const data = (chart) => [chart.x, ...chart.series.map((s) => (s.smooth && smoothing ? smooth(s.values) : s.values))];

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(3);
    return value.toLocaleString("en-US", { maximumSignificantDigits: 5 });
  }

  function options(entry) {
    const { chart, figure } = entry;
    const axis = { stroke: css("--dim"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 20 };
    const lines = { grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 } };
    const many = chart.series.length > MANY;
    const output = figure.querySelector("output");
    return {
      width: Math.max(240, figure.clientWidth),
      height: 240,
      cursor: { sync: { key: "ftray" }, focus: { prox: many ? 16 : -1 }, drag: { x: true, y: false } },
      focus: { alpha: many ? 0.25 : 1 },
      legend: { show: !many },
      scales: { x: { time: false }, y: chart.is_log ? { distr: 3 } : {} },
      axes: [
        { ...axis, ...lines, label: chart.x_title, size: 34 },
        {
          ...axis,
          ...lines,
          label: chart.is_log ? `${chart.y_title} (log scale)` : chart.y_title,
          values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick).replace(/\.?0*e/, "e"))),
          size: (_, ticks) => 14 + 7 * Math.max(3, ...(ticks ?? []).map((tick) => tick.length)),
        },
      ],
      series: [
        { label: chart.x_title, value: (_, value) => number(value) },
        ...chart.series.map((series) => ({
          label: series.label,
          stroke: color(series.color),
          width: series.width,
          dash: series.dash,
          spanGaps: true,
          points: { show: series.points, size: 6, fill: color(series.color) },
          value: (_, value) => number(value),
        })),
      ],
      hooks: {
        setSeries: [
          (_, index) => {
            if (many) output.textContent = index ? chart.series[index - 1].label : "";
          },
        ],
      },
    };
  }

  function draw() {
    for (const entry of charts) {
      entry.plot?.destroy();
      entry.plot = new uPlot(options(entry), data(entry.chart), entry.figure.querySelector(".plot"));
    }
  }

  for (const label of document.querySelectorAll(".smoothing")) {
    label.hidden = false;
    label.querySelector("input").addEventListener("input", (event) => {
      smoothing = Number(event.target.value);
      label.querySelector("output").textContent = smoothing.toFixed(2);
      for (const entry of charts) entry.plot.setData(data(entry.chart));
    });
  }
  draw();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    for (const entry of charts) entry.plot.setSize({ width: Math.max(240, entry.figure.clientWidth), height: 240 });
  });
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
})();
