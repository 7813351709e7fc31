// Each figure is drawn in the page's colours when it comes near the view. The first one unpacks Plotly. A change of theme redraws them.

(() => {
  const charts = [...document.querySelectorAll(".chart")];
  const specs = embeddedJson("figures");
  const hidden = new Set(); // numbers of runs
  const drawn = new Set();
  // Without a pointer that hovers, the buttons would cover the figure all the time.
  const displayModeBar = matchMedia("(hover: hover)").matches ? "hover" : false;

  async function unpackPlotly() {
    const code = document.createElement("script");
    code.textContent = await inflate("plotly");
    document.head.append(code);
  }
  let unpacked = null;

  /** The layout that all figures share; sizes are in CSS pixels. */
  function frame(isTall) {
    const probe = document.body.appendChild(element("span")); // the browser gives the current value of a style's colour only for an element
    const colour = (name) => {
      probe.style.color = `var(${name})`;
      return getComputedStyle(probe).color;
    };
    const axis = {
      gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line"),
      ticks: "outside", ticklen: 4, automargin: true, title: { standoff: 10, font: { size: 12, color: colour("--muted") } },
    };
    const layout = {
      font: { family: getComputedStyle(probe).fontFamily, size: 12, color: colour("--text") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 52, r: 12, t: 10, b: 44 },
      height: isTall ? 400 : 270,
      xaxis: axis,
      yaxis: axis,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      hoverlabel: { bgcolor: colour("--surface"), bordercolor: colour("--line"), font: { color: colour("--text"), size: 12 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--text") },
    };
    probe.remove();
    return layout;
  }

  async function draw(chart) {
    drawn.add(chart);
    await (unpacked ??= unpackPlotly());
    const { data, layout } = specs[chart.dataset.figure];
    // An interval in the bar's own colour would not show inside the bar.
    const color = getComputedStyle(chart).color;
    const traces = data.map((trace) => ({
      ...trace,
      visible: !hidden.has(trace.meta?.run),
      ...(trace.type === "bar" && trace.error_y && { error_y: { ...trace.error_y, color } }),
    }));
    const isTall = !chart.closest(".charts-training");
    const config = { responsive: true, displayModeBar, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
    return Plotly.react(chart, traces, { ...layout, template: { layout: frame(isTall) } }, config);
  }

  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      draw(target);
    }
  }, { rootMargin: "400px" });
  charts.forEach((chart) => observer.observe(chart));

  for (const box of document.querySelectorAll("[data-run-toggle]")) {
    box.addEventListener("change", () => {
      const run = Number(box.dataset.runToggle);
      box.checked ? hidden.delete(run) : hidden.add(run);
      drawn.forEach(draw);
    });
  }
  theme.onChange(() => drawn.forEach(draw));
  addEventListener("beforeprint", () => charts.forEach(draw));
})();
