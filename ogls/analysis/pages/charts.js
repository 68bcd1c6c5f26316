"use strict";
// Line charts as SVG in the colours of the page. The panels of a group share their horizontal axis: the cursor shows the
// values of all of them at one place, and a zoom holds for all of them. ogls/analysis/curves.py describes the data.
(() => {
  const { make, svg } = Page;
  const HEIGHT = 150, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;
  const DASHES = ["", "2 4", "8 4"];

  const nice = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
    return ticks;
  };
  const short = (x) => {
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (size < 1e-3 || size >= 1e6) return x.toExponential(2).replace(/\.?0+e/, "e");
    return String(Number(x.toPrecision(4)));
  };

  for (const place of document.querySelectorAll("[data-charts]")) {
    const data = Page.json(place.dataset.charts);
    const state = { axis: data.axes[0], zoom: null, at: null, drag: null };
    const lines = (panel) => panel[state.axis] || [];
    const panelsHere = () => data.panels.filter((p) => lines(p).length);
    const allX = () => [...new Set(panelsHere().flatMap((p) => lines(p).flatMap((l) => l.x)))].sort((a, b) => a - b);
    const domain = () => {
      if (state.zoom) return state.zoom;
      const xs = allX(), low = xs[0], high = xs[xs.length - 1];
      return low === high ? [low - 0.5, high + 0.5] : [low, high];
    };
    const nearest = (list, x) => list.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(list[best] - x) ? i : best), 0);

    // --- one panel ---
    const drawPanel = (panel, figure) => {
      const width = Math.max(figure.clientWidth, 160), [from, to] = domain();
      const inside = width - LEFT - RIGHT, bottom = HEIGHT - BOTTOM;
      const seen = lines(panel).flatMap((l) => l.x.flatMap((x, i) => (x >= from && x <= to ? [l.y[i], ...(l.low ? [l.low[i], l.high[i]] : [])] : [])));
      let low = Math.min(...seen), high = Math.max(...seen);
      if (!seen.length) [low, high] = [0, 1];
      if (low >= 0 && low < 0.5 * high) low = 0;
      if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
      const px = (x) => LEFT + ((x - from) / (to - from)) * inside, py = (y) => bottom - ((y - low) / (high - low)) * (bottom - TOP);
      const picture = figure.querySelector("svg");
      picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      const clip = picture.dataset.clip, parts = [svg("clipPath", { id: clip }, svg("rect", { x: LEFT - 4, y: 0, width: inside + 8, height: bottom + 4 }))];
      for (const y of nice(low, high, 3)) parts.push(svg("line", { class: "grid-line", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }), svg("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, short(Number(y.toPrecision(6)))));
      const ticks = nice(from, to, Math.max(2, Math.floor(inside / 70))).filter((x) => state.axis === "position" || Number.isInteger(x));
      for (const x of ticks) parts.push(svg("text", { x: px(x), y: HEIGHT - 6, "text-anchor": "middle" }, short(x)));
      if (data.common !== undefined && state.axis === "round" && data.common >= from && data.common <= to)
        parts.push(svg("line", { class: "common", x1: px(data.common), x2: px(data.common), y1: TOP, y2: bottom }));
      const drawn = svg("g", { "clip-path": `url(#${clip})` });
      for (const line of lines(panel)) {
        const group = svg("g", { class: `series s${line.run % 7}` }), points = line.x.map((x, i) => `${px(x).toFixed(1)},${py(line.y[i]).toFixed(1)}`);
        if (line.low) group.append(svg("path", { class: "band", d: "M" + [...line.x.map((x, i) => `${px(x).toFixed(1)},${py(line.high[i]).toFixed(1)}`), ...line.x.map((x, i) => `${px(x).toFixed(1)},${py(line.low[i]).toFixed(1)}`).reverse()].join("L") + "Z" }));
        group.append(svg("path", { class: "line", d: "M" + points.join("L"), "stroke-dasharray": DASHES[(line.dash + Math.floor(line.run / 7)) % 3] }));
        if (line.x.filter((x) => x >= from && x <= to).length <= 40) for (const point of points) { const [cx, cy] = point.split(","); group.append(svg("circle", { cx, cy, r: line.dash ? 1.5 : 2.5 })); }
        drawn.append(group);
      }
      parts.push(drawn);
      if (state.at !== null) parts.push(svg("line", { class: "cursor", x1: px(state.at), x2: px(state.at), y1: TOP, y2: bottom }));
      if (state.drag) { const [a, b] = [...state.drag].sort((p, q) => p - q); parts.push(svg("rect", { class: "chosen", x: px(a), y: TOP, width: Math.max(px(b) - px(a), 0), height: bottom - TOP })); }
      picture.replaceChildren(...parts);
      figure.querySelector(".readout").replaceChildren(...readout(panel));
      return { px, toX: (position) => from + ((Math.min(Math.max(position, LEFT), width - RIGHT) - LEFT) / inside) * (to - from) };
    };
    // The values at the cursor, or the last ones.
    const readout = (panel) => {
      const last = domain()[1], x = state.at === null ? last : state.at;
      const items = lines(panel).flatMap((line) => {
        const i = nearest(line.x, x);
        if (state.at !== null && data.axes.includes("round") && state.axis === "round" && line.x[i] !== x) return [];
        const band = line.low ? ` (${short(line.low[i])} to ${short(line.high[i])})` : "";
        const name = [data.runs.length > 1 ? data.runs[line.run] : "", line.name].filter(Boolean).join(" ");
        const early = state.at === null && state.axis !== "position" && i === line.x.length - 1 && line.x[i] < last ? ` (${state.axis} ${short(line.x[i])})` : "";
        return [make("span", { class: `value s${line.run % 7}` }, make("i", { class: line.dash ? "swatch dotted" : "swatch" }), `${name ? name + " " : ""}${short(line.y[i])}${band}${early}`)];
      });
      const where = state.axis === "position" ? `token ${Math.round(x)}` : `${state.axis} ${short(Math.round(x))}`;
      return [make("span", { class: "where" }, (state.at === null ? "last: " : "") + where), ...items];
    };

    // --- the group ---
    const holder = make("div", { class: "chart-grid" }), hint = make("p", { class: "dim" });
    const scales = new Map();
    const draw = () => { for (const [panel, figure] of figures) scales.set(figure, drawPanel(panel, figure)); reset.disabled = !state.zoom; };
    let figures = [];
    const build = () => {
      figures = panelsHere().map((panel, index) => {
        const label = `${panel.title}${panel.unit ? ", " + panel.unit : ""}, by ${state.axis}`;
        const picture = svg("svg", { role: "img", tabindex: "0", "aria-label": label, height: HEIGHT, "data-clip": `clip-${place.dataset.charts}-${index}` });
        const figure = make("figure", { class: "chart" }, make("figcaption", {}, make("strong", {}, panel.title), panel.unit ? ` ${panel.unit}` : ""), picture, make("p", { class: "readout" }), ...(panel.about ? [make("p", { class: "dim about" }, panel.about)] : []));
        listen(figure, picture);
        return [panel, figure];
      });
      holder.replaceChildren(...figures.map(([, figure]) => figure));
      const x = { round: "round", step: "optimizer step of the run", position: "position in the rollout, tokens" }[state.axis];
      hint.textContent = `Horizontal: ${x}. Drag over a panel to zoom, double-click to see everything; by keyboard: left and right move the cursor, plus and minus zoom, Escape shows everything.`;
      draw();
    };
    const zoomTo = (range) => { state.zoom = range; draw(); };
    const listen = (figure, picture) => {
      const at = (event) => scales.get(figure).toX(event.clientX - picture.getBoundingClientRect().left);
      const snap = (x) => { const [from, to] = domain(), xs = allX().filter((v) => v >= from && v <= to); return xs.length ? xs[nearest(xs, x)] : null; };
      picture.addEventListener("pointermove", (event) => {
        if (state.drag) state.drag[1] = at(event);
        state.at = snap(at(event));
        draw();
      });
      picture.addEventListener("pointerdown", (event) => { state.drag = [at(event), at(event)]; picture.setPointerCapture(event.pointerId); });
      picture.addEventListener("pointerup", () => {
        if (!state.drag) return;
        const [a, b] = state.drag.sort((p, q) => p - q), [from, to] = domain();
        state.drag = null;
        if (b - a > (to - from) / 40) zoomTo([a, b]); else draw();
      });
      picture.addEventListener("pointercancel", () => { state.drag = null; draw(); });
      picture.addEventListener("pointerleave", () => { if (!state.drag) { state.at = null; draw(); } });
      picture.addEventListener("dblclick", () => zoomTo(null));
      picture.addEventListener("keydown", (event) => {
        const [from, to] = domain(), xs = allX().filter((x) => x >= from && x <= to);
        const here = state.at === null ? xs.length : xs.indexOf(state.at), middle = state.at === null ? (from + to) / 2 : state.at;
        const act = {
          ArrowLeft: () => { state.at = xs[Math.max(here - 1, 0)]; draw(); }, ArrowRight: () => { state.at = xs[Math.min(here + 1, xs.length - 1)]; draw(); },
          "+": () => zoomTo([middle - (to - from) / 4, middle + (to - from) / 4]), "-": () => zoomTo(null), Escape: () => { state.at = null; zoomTo(null); },
        }[event.key];
        if (act && xs.length && !event.ctrlKey && !event.metaKey && !event.altKey) { act(); event.preventDefault(); }
      });
    };

    const bar = make("div", { class: "chart-bar" });
    for (const axis of data.axes.length > 1 ? data.axes : []) {
      const input = make("input", { type: "radio", name: `axis-${place.dataset.charts}`, value: axis });
      input.checked = axis === state.axis;
      input.addEventListener("change", () => { state.axis = axis; state.zoom = state.at = null; build(); });
      bar.append(make("label", {}, input, axis === "round" ? " per round" : " per optimizer step"));
    }
    const reset = make("button", { type: "button" }, "Show everything");
    reset.addEventListener("click", () => zoomTo(null));
    bar.append(reset);
    if (data.runs.length > 1) bar.append(...data.runs.map((run, i) => make("span", { class: `value s${i % 7}` }, make("i", { class: "swatch" }), run)));
    place.replaceChildren(bar, holder, hint);
    if (data.zero.length) place.append(make("p", { class: "dim" }, `0 in every round, so not drawn: ${data.zero.join(", ")}.`));
    build();
    new ResizeObserver(draw).observe(holder);
  }
})();
