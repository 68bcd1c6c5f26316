"use strict";
// One rollout token by token: panes of text coloured by a measure, and the distributions of the selected token. The
// numbers are those that ogls/analysis/token_numbers.py describes; a rollout without them shows its text alone.
const Tokens = (() => {
  const section = document.getElementById("tokens");
  if (!section) return null;
  const { make, escaped, quoted, signed } = Page;
  const query = (name) => section.querySelector(`[data-${name}]`);
  const MEASURES = [
    ["steering", "steering: log p(target) - log p(base) of the sampled token", "nats", true],
    ["kl", "KL(target || base)", "nats", true],
    ["target_entropy", "entropy of the target", "nats", true],
    ["entropy", "entropy of the student", "nats", false],
    ["norm", "norm of the direction, correct minus incorrect", "logits", false],
  ]; // name, label, unit, whether it depends on the recipe
  const NAMES = { base: "base", reference: "reference", correct: "correct", incorrect: "incorrect", student: "student", trained: "after training" };
  const state = { rollout: null, token: 0, measure: "steering", points: [null, null], compare: false };

  // --- numbers ---
  const target = (n, point, t, k) =>
    Object.entries(point.weights).reduce((sum, [d, w]) => sum + w * n.logprobs[d][t][k], 0) / point.temperature - n.points[point.name].log_z[t];
  const values = (r, measure, point) => {
    const n = r.numbers;
    if (!n) return measure === "steering" && r.gains ? (r.gains.length ? r.gains : r.text.map(() => 0)) : [];
    if (measure === "norm") return n.direction_norm || [];
    if (measure === "entropy") return n.entropy.student || [];
    if (!point) return [];
    if (measure === "kl") return n.points[point.name].kl;
    if (measure === "target_entropy") return n.points[point.name].entropy;
    const base = n.logprobs.base ? "base" : "student";
    return n.ids.map((_, t) => target(n, point, t, 0) - n.logprobs[base][t][0]);
  };
  const mean = (list) => list.reduce((a, b) => a + b, 0) / Math.max(list.length, 1);
  const mostMoved = (list) => list.reduce((best, x, t) => (Math.abs(x) > Math.abs(list[best]) ? t : best), 0);
  // The first token whose log-prob the target lowers by train.mistake_nats; -1 without one.
  const firstMistake = (r, point) => values(r, "steering", point).findIndex((x) => x <= -r.view.mistake_nats);
  // Full colour starts at 4 nats at most, so that a token with a change of 20 nats does not hide changes of 2 nats, and at
  // a quarter of a nat at least, so that a rollout that is hardly moved looks like one.
  const fullScale = (strongest) => (["steering", "kl"].includes(state.measure) ? Math.min(Math.max(strongest, 0.25), 4) : strongest);

  // --- recipes ---
  const pointsOf = (r) => (r.numbers ? r.view.points.filter((p) => r.numbers.points[p.name]) : []);
  const label = (p) => (p.name === "own" ? `target of this run (${p.recipe}${p.strength === null ? "" : " " + p.strength})` : p.recipe);
  const title = (p) => label(p) + (p.name !== "own" && p.strength !== null ? ` ${p.strength}` : "");
  const recipesOf = (r) => [...new Set(pointsOf(r).map(label))];
  const strengths = (r, p) => pointsOf(r).filter((q) => label(q) === label(p));
  const same = (a, b) => a && b && a.temperature === b.temperature && JSON.stringify(Object.entries(a.weights).sort()) === JSON.stringify(Object.entries(b.weights).sort());
  const others = (r, point) => pointsOf(r).filter((p) => !same(p, point));
  const dependsOnRecipe = () => MEASURES.find(([name]) => name === state.measure)[3];
  const panes = () => (state.compare && dependsOnRecipe() && others(state.rollout, state.points[0]).length ? [0, 1] : [0]);
  // Side by side, the two targets differ: the pane that was not changed gives way, to `old` if that is another target.
  const keepApart = (changed, old = null) => {
    const [a, b] = [changed, 1 - changed], possible = others(state.rollout, state.points[a]);
    if (!state.points[b] || same(state.points[0], state.points[1]))
      state.points[b] = possible.find((p) => old && p.name === old.name) || possible.find((p) => p.strength === 1) || possible[0] || null;
  };

  // --- drawing ---
  const show = (r) => {
    state.rollout = r;
    const possible = pointsOf(r);
    state.points = state.points.map((old, pane) => possible.find((p) => old && p.name === old.name) || (pane === 0 && possible[0]) || null);
    keepApart(0);
    state.token = mostMoved(values(r, "steering", state.points[0]));
    draw();
  };
  const drawControls = () => {
    const r = state.rollout, possible = pointsOf(r), alone = others(r, state.points[0]).length === 0;
    query("controls").hidden = !possible.length;
    query("measure").replaceChildren(...MEASURES.filter(([name]) => values(r, name, state.points[0]).length).map(([name, text]) => { const o = make("option", { value: name }, text); o.selected = name === state.measure; return o; }));
    for (const pane of [0, 1]) {
      const point = state.points[pane], select = section.querySelector(`[data-recipe="${pane}"]`);
      select.replaceChildren(...recipesOf(r).map((name) => { const o = make("option", { value: name }, name); o.selected = point && name === label(point); return o; }));
      const range = section.querySelector(`[data-strength="${pane}"]`), matching = point ? strengths(r, point) : [];
      range.max = Math.max(matching.length - 1, 0);
      range.value = Math.max(matching.indexOf(point), 0);
      range.setAttribute("aria-valuetext", point && point.strength !== null ? String(point.strength) : "none");
      section.querySelector(`[data-strength-label="${pane}"]`).style.visibility = matching.length < 2 ? "hidden" : "visible";
      section.querySelector(`[data-strength-value="${pane}"]`).textContent = point && point.strength !== null ? point.strength : "";
    }
    const compare = query("compare");
    compare.disabled = alone || !dependsOnRecipe();
    compare.checked = state.compare;
    query("compare-label").title = alone ? "This rollout has one target only." : dependsOnRecipe() ? "" : "This measure is the same under every recipe.";
    query("other").hidden = panes().length < 2;
  };
  const draw = () => {
    if (!values(state.rollout, state.measure, state.points[0]).length) state.measure = "steering";
    drawControls();
    const r = state.rollout, shown = panes(), all = shown.map((pane) => values(r, state.measure, state.points[pane]));
    const strongest = Math.max(...all.flat().map(Math.abs), 1e-3), scale = fullScale(strongest);
    const [, text, unit] = MEASURES.find(([name]) => name === state.measure);
    const largest = `${strongest.toFixed(2)} ${unit}; full colour from ${scale.toFixed(2)} ${unit}.`;
    query("legend").textContent = !all.flat().length ? "" : state.measure === "steering"
      ? `${text}, in ${unit}. Blue with a solid line: more likely; orange with a dotted line: less likely. Largest absolute value: ${largest}`
      : `${text}, in ${unit}. Largest value: ${largest}`;
    query("work").classList.toggle("compared", shown.length > 1);
    query("panes").replaceChildren(...shown.map((pane) => drawPane(pane, all[pane], scale)));
    inspect();
  };
  const drawPane = (pane, list, scale) => {
    const r = state.rollout, point = state.points[pane], name = point ? title(point) : r.gains ? "target of this run" : "text";
    const flow = make("div", { class: "flow", role: "listbox", tabindex: "0", "aria-orientation": "horizontal", "aria-label": `Tokens under ${name}`, "data-pane": pane });
    const mistake = firstMistake(r, point);
    r.text.forEach((piece, t) => {
      const known = t < list.length, x = known ? list[t] : 0, strong = Math.min(Math.abs(x) / scale, 1);
      const option = make("span", { class: "t", role: "option", id: `t${pane}-${t}`, "aria-selected": String(t === state.token), "aria-label": tokenLabel(r, t, known ? x : null) });
      if (!known || (mistake >= 0 && t > mistake && r.view.until === "first_mistake")) option.classList.add("untaught");
      if (known) colour(option, x, strong, state.measure === "steering");
      if (t === mistake) { option.classList.add("mistake"); option.title = `first mistake: lowered by at least ${r.view.mistake_nats} nats`; }
      if (t === state.token) option.classList.add("active");
      shownText(option, piece);
      flow.append(option);
    });
    flow.setAttribute("aria-activedescendant", `t${pane}-${state.token}`);
    flow.addEventListener("keydown", keys);
    flow.addEventListener("pointermove", hover);
    flow.addEventListener("click", (event) => { const t = tokenAt(event); if (t !== null) { select(t); flow.focus({ preventScroll: true }); } });
    const n = r.numbers && point ? r.numbers.points[point.name] : null;
    const where = mistake < 0 ? "no mistake" : `first mistake at token ${mistake}`;
    const sum = n ? `mean KL ${mean(n.kl).toFixed(4)} nats, steering of sampled tokens ${signed(mean(values(r, "steering", point)))} nats, entropy ${mean(n.entropy).toFixed(3)} nats, ${where}`
      : r.gains ? `steering of sampled tokens ${signed(mean(list))} nats, ${where}` : "no target, so no colour";
    return make("div", { class: "pane" }, make("h3", {}, name), flow, make("p", { class: "sum" }, sum));
  };
  const colour = (element, x, strong, steering) => {
    element.style.backgroundColor = `rgba(var(--${!steering ? "plain" : x >= 0 ? "up" : "down"}), ${(0.55 * strong).toFixed(3)})`;
    if (steering && strong > 0.25) element.classList.add(x > 0 ? "up" : "down");
  };
  const shownText = (element, piece) => {
    if (!piece) return element.append(make("i", {}, "\u00b7"));
    for (const part of piece.split(/(\n)/)) {
      if (part === "\n") element.append(make("i", {}, "\u23ce"), "\n");
      else if (part && !part.trim()) element.append(make("i", {}, "\u2423".repeat(part.length)));
      else element.append(escaped(part));
    }
  };
  const tokenLabel = (r, t, x) => `token ${t}: ${quoted(r.text[t])}` + (x === null ? ", not distilled" : `, ${state.measure} ${state.measure === "steering" ? signed(x) : x.toFixed(2)}`);

  // --- selecting a token ---
  const select = (t) => {
    if (t === state.token) return;
    state.token = t;
    for (const flow of section.querySelectorAll(".flow")) {
      for (const old of flow.querySelectorAll(".active")) { old.classList.remove("active"); old.setAttribute("aria-selected", "false"); }
      const option = flow.children[t];
      option.classList.add("active");
      option.setAttribute("aria-selected", "true");
      flow.setAttribute("aria-activedescendant", option.id);
    }
    inspect();
  };
  const tokenAt = (event) => { const option = event.target.closest(".t"); return option ? Number(option.id.split("-")[1]) : null; };
  // Browsers report a move when the page scrolls or is drawn again under a mouse that rests: only a real move selects.
  let pointer = null;
  const hover = (event) => {
    const moved = !pointer || event.screenX !== pointer[0] || event.screenY !== pointer[1], t = tokenAt(event);
    pointer = [event.screenX, event.screenY];
    if (moved && t !== null) select(t);
  };
  const keys = (event) => {
    const r = state.rollout, last = r.text.length - 1, pane = Number(event.currentTarget.dataset.pane);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const list = values(r, state.measure, state.points[pane]), scale = fullScale(Math.max(...list.map(Math.abs), 1e-3));
    const large = list.map((x, t) => [Math.abs(x), t]).filter(([x]) => x > 0.25 * scale).map(([, t]) => t);
    const to = {
      ArrowRight: () => state.token + 1, ArrowLeft: () => state.token - 1, ArrowDown: () => state.token + 10, ArrowUp: () => state.token - 10,
      Home: () => 0, End: () => last, n: () => large.find((t) => t > state.token) ?? state.token, p: () => large.findLast((t) => t < state.token) ?? state.token,
    }[event.key];
    if (to) { select(Math.min(Math.max(to(), 0), last)); document.getElementById(`t${pane}-${state.token}`).scrollIntoView({ block: "nearest" }); }
    else if (event.key === "r") { const names = recipesOf(r); if (names.length) choose(pane, names[(names.indexOf(label(state.points[pane])) + 1) % names.length]); }
    else if ((event.key === "[" || event.key === "]") && state.points[pane]) step(pane, event.key === "]" ? 1 : -1);
    else return;
    event.preventDefault();
  };
  const refocus = (pane) => { const flow = section.querySelector(`.flow[data-pane="${pane}"]`); if (flow) flow.focus({ preventScroll: true }); };
  const choose = (pane, name) => {
    const old = state.points[pane], matching = pointsOf(state.rollout).filter((p) => label(p) === name), free = matching.filter((p) => !state.compare || !same(p, state.points[1 - pane]));
    state.points[pane] = free.find((p) => old && p.strength === old.strength) || free[0] || matching[0];
    keepApart(pane, old);
    draw();
    refocus(pane);
  };
  const setStrength = (pane, index, change) => {
    const matching = strengths(state.rollout, state.points[pane]), taken = panes().length > 1 ? state.points[1 - pane] : null;
    while (matching[index] && same(matching[index], taken)) index += change;
    if (!matching[index]) return;
    state.points[pane] = matching[index];
    keepApart(pane);
    draw();
  };
  const step = (pane, change) => { setStrength(pane, strengths(state.rollout, state.points[pane]).indexOf(state.points[pane]) + change, change); refocus(pane); };

  // --- the selected token ---
  const inspect = () => {
    const r = state.rollout, t = state.token, n = r.numbers, box = query("inspect"), head = make("h3", {}, `Token ${t}: ${quoted(r.text[t] || "")}`);
    if (!n) {
      const gain = r.gains && t < (r.gains.length || r.text.length) ? `steering ${signed(r.gains[t] || 0)} nats. ` : "";
      return box.replaceChildren(head, make("p", {}, gain + (r.unread || (r.why ? `No target: ${r.why}.` : r.note || ""))));
    }
    if (t >= n.ids.length) return box.replaceChildren(head, make("p", {}, "Beyond the token limit: not distilled."));
    const shown = panes().filter((pane) => state.points[pane]), ids = n.ids[t], tagged = (pane) => (shown.length > 1 ? "AB"[pane] : "");
    const repeated = (d) => d === "base" && !r.view.points.some((p) => p.weights.base !== undefined) && n.logprobs.student;
    // The targets come first, so that a narrow box cuts other columns.
    const columns = shown.filter((pane) => state.points[pane].name !== "after training").map((pane) => [`target ${tagged(pane)}`.trim(), ids.map((_, k) => target(n, state.points[pane], t, k))]);
    columns.push(...Object.keys({ ...NAMES, ...n.logprobs }).filter((d) => n.logprobs[d] && !repeated(d)).map((d) => [NAMES[d] || d, ids.map((_, k) => n.logprobs[d][t][k])]));
    const rows = [...new Set([0, ...columns.flatMap(([, lp]) => lp.map((_, k) => k).sort((a, b) => lp[b] - lp[a]).slice(0, 5))])];
    rows.sort((a, b) => columns[0][1][b] - columns[0][1][a]);
    const measured = shown.map((pane) => `${tagged(pane) ? tagged(pane) + ": " : ""}steering ${signed(values(r, "steering", state.points[pane])[t])}, KL ${n.points[state.points[pane].name].kl[t].toFixed(3)} nats`);
    if (n.direction_norm) measured.push(`direction norm ${n.direction_norm[t].toFixed(2)}`);
    if (n.entropy.student) measured.push(`student entropy ${n.entropy.student[t].toFixed(3)} nats`);
    const cell = (lp) => { const p = Math.exp(lp), text = p < 0.0005 ? "<0.1%" : (100 * p).toFixed(1) + "%"; return make("td", { style: `--p: ${(100 * p).toFixed(1)}%` }, text); };
    const table = make("table", {}, make("thead", {}, make("tr", {}, make("th", { class: "text", scope: "col" }, "token"), ...columns.map(([name]) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...rows.map((k) => make("tr", k === 0 ? { class: "sampled" } : {}, make("th", { class: "text mono", scope: "row" }, quoted(r.view.vocabulary[ids[k]])), ...columns.map(([, lp]) => cell(lp[k]))))));
    box.replaceChildren(head, make("p", {}, measured.join("; ")), make("p", { class: "dim" }, "Probabilities of the most likely tokens; the sampled token is bold."), make("div", { class: "scroll" }, table));
  };

  // --- events ---
  query("measure").addEventListener("change", (e) => { state.measure = e.target.value; draw(); });
  query("compare").addEventListener("change", (e) => { state.compare = e.target.checked; keepApart(0); draw(); });
  query("controls").addEventListener("submit", (e) => e.preventDefault());
  for (const pane of [0, 1]) {
    const recipe = section.querySelector(`[data-recipe="${pane}"]`), range = section.querySelector(`[data-strength="${pane}"]`);
    recipe.addEventListener("change", () => { choose(pane, recipe.value); recipe.focus(); });
    range.addEventListener("input", () => { const index = Number(range.value), now = strengths(state.rollout, state.points[pane]).indexOf(state.points[pane]); setStrength(pane, index, index > now ? 1 : -1); });
  }
  return { section, query, show, colour, shownText };
})();
