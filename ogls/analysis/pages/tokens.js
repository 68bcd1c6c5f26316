"use strict";
// The token view. All texts are inserted as text nodes; all numbers come from the data in the page, which
// ogls/analysis/token_numbers.py describes.
(() => {
  const root = document.documentElement;
  for (const button of document.querySelectorAll("[data-theme-switch]"))
    button.addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
    });

  const dataElement = document.getElementById("token-data");
  if (!dataElement) return;
  const views = JSON.parse(dataElement.textContent);
  const section = document.getElementById("tokens");
  const query = (name) => section.querySelector(`[data-${name}]`);
  const rollouts = views.flatMap((view) => view.rollouts.map((rollout) => ({ view, ...rollout })));
  const FILTERS = [["all", "all"], ["fixed", "failed, then fixed"], ["steered", "most steered"], ["collapsed", "collapsed"], ["correct", "correct"], ["failed", "failed"]];
  const MEASURES = [
    ["steering", "steering: log p(target) - log p(base) of the sampled token", "nats"],
    ["norm", "norm of the direction, correct minus incorrect", "logits"],
    ["kl", "KL(target || base)", "nats"],
    ["entropy", "entropy of the student", "nats"],
  ];
  const NAMES = { base: "base", reference: "reference", correct: "correct", incorrect: "incorrect", student: "student", trained: "after training" };
  const state = { filter: "all", rollout: null, token: 0, measure: "steering", points: [null, null], compare: false };

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  // Control characters and direction marks are shown as escapes. Whitespace is shown as symbols in quoted texts and in
  // tokens that contain nothing else.
  const escaped = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  const quoted = (text) => "\u201c" + escaped(text).replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423") + "\u201d";
  const anchorOf = (r) => `${r.view.run}/r${String(r.round).padStart(3, "0")}/${r.problem_id}/${r.sample}`;
  const signed = (x) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(2);

  // --- numbers ---
  const weighted = (numbers, point, t, k) =>
    Object.entries(point.weights).reduce((sum, [d, w]) => sum + w * numbers.logprobs[d][t][k], 0) / point.temperature;
  const target = (numbers, point, t, k) => weighted(numbers, point, t, k) - numbers.points[point.name].log_z[t];
  const baseOf = (r) => (r.numbers.logprobs.base ? "base" : "student");
  const values = (r, measure, point) => {
    const n = r.numbers, base = baseOf(r);
    if (!n) return [];
    if (measure === "norm") return n.direction_norm || [];
    if (measure === "entropy") return n.entropy.student || [];
    if (!point) return [];
    if (measure === "kl") return n.points[point.name].kl;
    return n.ids.map((_, t) => target(n, point, t, 0) - n.logprobs[base][t][0]);
  };
  const pointsOf = (r) => (r.numbers ? r.view.points.filter((p) => r.numbers.points[p.name]) : []);
  const mean = (list) => list.reduce((a, b) => a + b, 0) / Math.max(list.length, 1);

  // --- list ---
  const chosen = () => rollouts.filter((r) => state.filter === "all" || r.tags.includes(state.filter));
  const drawList = () => {
    const list = query("list"), matching = chosen();
    list.replaceChildren(...matching.map((r) => {
      const label = `r${String(r.round).padStart(3, "0")} ${escaped(r.problem_id)}, sample ${r.sample}: ${r.verdict}`;
      const button = make("button", { type: "button", "aria-current": String(r === state.rollout) }, (views.length > 1 ? r.view.run + " " : "") + label);
      button.addEventListener("click", () => { open(r); query("heading").focus(); });
      return make("li", {}, button);
    }));
    query("count").textContent = `${matching.length} of ${rollouts.length} rollouts`;
  };
  const drawFilters = () => {
    query("filters").replaceChildren(...FILTERS.map(([name, label]) => {
      const count = name === "all" ? rollouts.length : rollouts.filter((r) => r.tags.includes(name)).length;
      const input = make("input", { type: "radio", name: "filter", value: name });
      input.checked = name === state.filter;
      input.addEventListener("change", () => { state.filter = name; drawList(); const first = chosen()[0]; if (first && !chosen().includes(state.rollout)) open(first); });
      return make("label", {}, input, ` ${label} (${count})`);
    }));
  };

  // --- one rollout ---
  const open = (r) => {
    state.rollout = r;
    state.token = 0;
    const possible = pointsOf(r);
    state.points = state.points.map((old, pane) => possible.find((p) => old && p.name === old.name) || (pane === 1 && possible.find((p) => p.strength === 1 && p.name !== "own")) || possible[0] || null);
    history.replaceState(null, "", "#" + encodeURIComponent(anchorOf(r)));
    query("heading").textContent = `${views.length > 1 ? r.view.run + ", " : ""}round ${r.round}, ${escaped(r.problem_id)}, sample ${r.sample}`;
    const facts = [["Verdict", r.verdict + (r.answer === null ? ", no answer found" : `: answered ${escaped(r.answer)}, expected ${escaped(r.expected)}`)], ["Shown because", r.tags.join(", ")]];
    if (r.later) facts.push(["Fixed", `${r.later.how} (round ${r.later.round})`]);
    if (!r.numbers) facts.push(["Steering", `not shown: ${r.note}`]);
    query("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
    const texts = [make("h3", {}, "Problem"), make("pre", {}, escaped(r.problem))];
    if (r.solution) texts.push(make("h3", {}, "Reference solution"), make("pre", {}, escaped(r.solution)));
    if (r.later && r.later.text) texts.push(make("h3", {}, `Greedy completion of the policy of round ${r.later.round}`), make("pre", {}, escaped(r.later.text)));
    for (const pool of r.exemplars) for (const e of pool.texts)
      texts.push(make("h3", {}, `Pool ${pool.pool}: ${e.sample < 0 ? "the reference solution" : "sample " + e.sample}`), make("pre", {}, escaped(e.text)));
    query("texts").replaceChildren(...texts);
    drawList();
    draw();
  };

  const recipesOf = (r) => [...new Map(pointsOf(r).map((p) => [label(p), p])).keys()];
  const label = (p) => (p.name === "own" ? `target of this run (${p.recipe}${p.strength === null ? "" : " " + p.strength})` : p.recipe);
  const strengths = (r, p) => pointsOf(r).filter((q) => label(q) === label(p));
  const drawControls = () => {
    const r = state.rollout;
    query("measure").replaceChildren(...MEASURES.map(([name, text]) => { const o = make("option", { value: name }, text); o.selected = name === state.measure; return o; }));
    for (const pane of [0, 1]) {
      const point = state.points[pane], select = section.querySelector(`[data-recipe="${pane}"]`);
      select.replaceChildren(...recipesOf(r).map((name) => { const o = make("option", { value: name }, name); o.selected = point && name === label(point); return o; }));
      const range = section.querySelector(`[data-strength="${pane}"]`), matching = point ? strengths(r, point) : [];
      range.max = Math.max(matching.length - 1, 0);
      range.value = Math.max(matching.indexOf(point), 0);
      range.setAttribute("aria-valuetext", point && point.strength !== null ? String(point.strength) : "none");
      section.querySelector(`[data-strength-label="${pane}"]`).hidden = matching.length < 2;
      section.querySelector(`[data-strength-value="${pane}"]`).textContent = point && point.strength !== null ? point.strength : "";
    }
    query("compare").checked = state.compare;
    query("other").hidden = !state.compare;
  };

  const draw = () => {
    drawControls();
    const r = state.rollout, panes = state.compare ? [0, 1] : [0];
    const all = panes.map((pane) => values(r, state.measure, state.points[pane]));
    const strongest = Math.max(...all.flat().map(Math.abs), 1e-3), scale = fullScale(strongest);
    const [, text, unit] = MEASURES.find(([name]) => name === state.measure);
    query("legend").textContent = state.measure === "steering"
      ? `${text}, in ${unit}. Blue with a solid line: more likely; orange with a dotted line: less likely. Largest absolute value: ${strongest.toFixed(2)} ${unit}; full colour from ${scale.toFixed(2)} ${unit}.`
      : `${text}, in ${unit}. Largest value: ${strongest.toFixed(2)} ${unit}; full colour from ${scale.toFixed(2)} ${unit}.`;
    query("panes").replaceChildren(...panes.map((pane) => drawPane(pane, all[pane], scale)));
    inspect();
  };
  // Full colour starts at 4 nats at most, so that a token with a change of 20 nats does not hide changes of 2 nats.
  const fullScale = (strongest) => (state.measure === "steering" || state.measure === "kl" ? Math.min(strongest, 4) : strongest);
  const drawPane = (pane, list, scale) => {
    const r = state.rollout, point = state.points[pane];
    const name = point ? label(point) + (point.name !== "own" && point.strength !== null ? ` ${point.strength}` : "") : "text";
    const flow = make("div", { class: "flow", role: "listbox", tabindex: "0", "aria-orientation": "horizontal", "aria-label": `Tokens under ${name}`, "data-pane": pane });
    const mistake = firstMistake(r, point);
    r.text.forEach((piece, t) => {
      const known = t < list.length, x = known ? list[t] : 0, strong = Math.min(Math.abs(x) / scale, 1);
      const option = make("span", { class: "t", role: "option", id: `t${pane}-${t}`, "aria-selected": String(t === state.token), "aria-label": tokenLabel(r, point, t, known ? x : null) });
      if (!known || (mistake >= 0 && t > mistake && r.view.until === "first_mistake")) option.classList.add("untaught");
      if (known) option.style.backgroundColor = `rgba(var(--${state.measure !== "steering" ? "plain" : x >= 0 ? "up" : "down"}), ${(0.55 * strong).toFixed(3)})`;
      if (known && state.measure === "steering" && strong > 0.25) option.classList.add(x > 0 ? "up" : "down");
      if (t === mistake) { option.classList.add("mistake"); option.title = `first mistake: lowered by at least ${r.view.mistake_nats} nats`; }
      if (t === state.token) option.classList.add("active");
      shownText(option, piece);
      option.addEventListener("mouseenter", () => select(t));
      option.addEventListener("click", () => { select(t); flow.focus(); });
      flow.append(option);
    });
    flow.setAttribute("aria-activedescendant", `t${pane}-${state.token}`);
    flow.addEventListener("keydown", keys);
    const n = r.numbers && point ? r.numbers.points[point.name] : null;
    const where = mistake < 0 ? "no mistake" : `first mistake at token ${mistake}`;
    const sum = n ? `mean KL ${mean(n.kl).toFixed(4)} nats, steering of sampled tokens ${signed(mean(values(r, "steering", point)))} nats, entropy ${mean(n.entropy).toFixed(3)} nats, ${where}` : r.note;
    return make("div", { class: "pane" }, make("h3", {}, name), make("p", { class: "sum" }, sum), flow);
  };
  // The first token whose log-prob the target lowers by train.mistake_nats; -1 without one.
  const firstMistake = (r, point) => (point && r.numbers ? values(r, "steering", point).findIndex((x) => x <= -r.view.mistake_nats) : -1);
  const shownText = (option, piece) => {
    if (!piece) return option.append(make("i", {}, "\u00b7"));
    for (const part of piece.split(/(\n)/)) {
      if (part === "\n") option.append(make("i", {}, "\u23ce"), "\n");
      else if (part && !part.trim()) option.append(make("i", {}, "\u2423".repeat(part.length)));
      else option.append(escaped(part));
    }
  };
  const tokenLabel = (r, point, t, x) => `token ${t}: ${quoted(r.text[t])}` + (x === null ? ", not distilled" : `, ${state.measure} ${state.measure === "steering" ? signed(x) : x.toFixed(2)}`);

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
    else if (event.key === "[" || event.key === "]") step(pane, event.key === "]" ? 1 : -1);
    else return;
    event.preventDefault();
  };
  const refocus = (pane) => { const flow = section.querySelector(`.flow[data-pane="${pane}"]`); if (flow) flow.focus(); };
  const choose = (pane, name) => {
    const matching = pointsOf(state.rollout).filter((p) => label(p) === name), old = state.points[pane];
    state.points[pane] = matching.find((p) => old && p.strength === old.strength) || matching[0];
    draw();
    refocus(pane);
  };
  const step = (pane, change) => {
    const matching = strengths(state.rollout, state.points[pane]);
    state.points[pane] = matching[Math.min(Math.max(matching.indexOf(state.points[pane]) + change, 0), matching.length - 1)];
    draw();
    refocus(pane);
  };

  // --- the token ---
  const inspect = () => {
    const r = state.rollout, t = state.token, n = r.numbers, box = query("inspect");
    const head = make("h3", {}, `Token ${t}: ${quoted(r.text[t] || "")}`);
    if (!n || t >= n.ids.length) return box.replaceChildren(head, make("p", {}, n ? "Beyond the token limit: not distilled." : r.note));
    const panes = (state.compare ? [0, 1] : [0]).filter((pane) => state.points[pane]);
    const ids = n.ids[t], columns = Object.keys({ ...NAMES, ...n.logprobs }).filter((d) => n.logprobs[d] && !(d === "base" && !r.view.points.some((p) => p.weights.base !== undefined) && n.logprobs.student)).map((d) => [NAMES[d] || d, ids.map((_, k) => n.logprobs[d][t][k])]);
    for (const pane of panes) columns.push([`target ${panes.length > 1 ? "AB"[pane] : ""}`.trim(), ids.map((_, k) => target(n, state.points[pane], t, k))]);
    const rows = [...new Set([0, ...columns.flatMap(([, lp]) => lp.map((_, k) => k).sort((a, b) => lp[b] - lp[a]).slice(0, 5))])];
    const lastColumn = columns[columns.length - 1][1];
    rows.sort((a, b) => lastColumn[b] - lastColumn[a]);
    const measured = panes.map((pane) => `${panes.length > 1 ? "AB"[pane] + ": " : ""}steering ${signed(values(r, "steering", state.points[pane])[t])}, KL ${n.points[state.points[pane].name].kl[t].toFixed(3)} nats`);
    if (n.direction_norm) measured.push(`direction norm ${n.direction_norm[t].toFixed(2)}`);
    if (n.entropy.student) measured.push(`student entropy ${n.entropy.student[t].toFixed(3)} nats`);
    const cell = (lp) => make("td", {}, Math.exp(lp) < 0.0005 ? "<0.1%" : (100 * Math.exp(lp)).toFixed(1) + "%");
    const table = make("table", {}, make("caption", {}, "Probabilities of the most likely tokens; the sampled token is bold"),
      make("thead", {}, make("tr", {}, make("th", { class: "text", scope: "col" }, "token"), ...columns.map(([name]) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...rows.map((k) => make("tr", k === 0 ? { class: "sampled" } : {}, make("th", { class: "text", scope: "row" }, quoted(r.view.vocabulary[ids[k]])), ...columns.map(([, lp]) => cell(lp[k]))))));
    box.replaceChildren(head, make("p", {}, measured.join("; ")), make("div", { class: "scroll" }, table));
  };

  // --- events ---
  query("measure").addEventListener("change", (e) => { state.measure = e.target.value; draw(); });
  query("compare").addEventListener("change", (e) => { state.compare = e.target.checked; draw(); });
  query("controls").addEventListener("submit", (e) => e.preventDefault());
  for (const pane of [0, 1]) {
    const select = section.querySelector(`[data-recipe="${pane}"]`), range = section.querySelector(`[data-strength="${pane}"]`);
    select.addEventListener("change", () => { choose(pane, select.value); select.focus(); });
    range.addEventListener("input", () => { state.points[pane] = strengths(state.rollout, state.points[pane])[Number(range.value)]; draw(); });
  }
  const fromHash = () => rollouts.find((r) => anchorOf(r) === decodeURIComponent(location.hash.slice(1)));
  addEventListener("hashchange", () => { const r = fromHash(); if (r) { state.filter = "all"; drawFilters(); open(r); section.scrollIntoView(); } });
  drawFilters();
  if (rollouts.length) { const linked = fromHash(); open(linked || rollouts[0]); if (linked) section.scrollIntoView(); }
})();
