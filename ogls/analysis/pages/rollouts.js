"use strict";
// The list of rollouts, search over all of them, and one rollout with its group and its problem. A page has its rollouts
// as data, or asks the server of `ogls view --serve` for them (ogls/analysis/serve.py).
(() => {
  const views = Page.json("token-data");
  if (!views || !Tokens) return;
  const { make, escaped } = Page, { section, query } = Tokens;
  const FILTERS = [["all", "all"], ["fixed", "failed, then fixed"], ["steered", "most steered"], ["collapsed", "collapsed"], ["correct", "correct"], ["failed", "failed"]];
  const PAGE = 100;
  const served = views.some((view) => view.served);
  const key = (r) => `${r.round}/${r.problem_id}/${r.sample}`;
  const anchorOf = (r) => `${r.view.run}/r${String(r.round).padStart(3, "0")}/${r.problem_id}/${r.sample}`;

  // --- what the page has: selected rollouts with all numbers, and the rollouts of its groups ---
  const selected = views.flatMap((view) => view.rollouts.map((r) => ({ view, ...r })));
  const read = new Map(selected.map((r) => [anchorOf(r), r]));
  const groups = new Map(), everything = [];
  const addGroup = (view, group) => {
    const outcomes = new Set(group.rollouts.map((r) => r.outcome));
    group.kind = outcomes.has("correct") && outcomes.has("failed") ? "mixed" : outcomes.has("correct") ? "correct" : outcomes.has("failed") ? "failed" : "";
    groups.set(`${view.run}/${group.round}/${group.problem_id}`, group);
    for (const r of group.rollouts) {
      Object.assign(r, { view, round: group.round, problem_id: group.problem_id, kind: group.kind, unread: served ? "" : `The distributions of this rollout are not in this page: ogls view ${view.run} --problem ${group.problem_id} --sample ${r.sample}` });
      everything.push(r);
      const full = read.get(anchorOf(r));
      if (full) Object.assign(full, { gains: r.gains, why: r.why, kl: r.kl });
    }
    return group;
  };
  for (const view of views) for (const group of view.groups) addGroup(view, group);

  const ask = async (path, values) => {
    try {
      const answer = await fetch(`api/${path}?` + new URLSearchParams(values)), content = await answer.json();
      if (!answer.ok) throw new Error(content.detail);
      return content;
    } catch (error) {
      query("count").textContent = `The server did not answer: ${error.message}`;
      throw error;
    }
  };
  const groupOf = async (view, round, problem_id) => {
    const known = groups.get(`${view.run}/${round}/${problem_id}`);
    if (known || !served) return known;
    const content = await ask("group", { round, problem_id });
    view.problems[problem_id] = content.problem;
    return addGroup(view, content.group);
  };
  const rolloutOf = async (r) => {
    const known = read.get(anchorOf(r));
    if (known) return known;
    const group = await groupOf(r.view, r.round, r.problem_id), light = group.rollouts.find((other) => other.sample === r.sample);
    if (!served) return { tags: [], exemplars: [], later: null, numbers: null, note: "", ...light };
    const content = await ask("rollout", { round: r.round, problem_id: r.problem_id, sample: r.sample });
    Object.assign(r.view.vocabulary, content.vocabulary);
    const full = { ...light, ...content.rollout, view: r.view };
    read.set(anchorOf(full), full);
    return full;
  };

  // --- search: the same fields as Search in ogls/analysis/rollout_search.py ---
  const ORDERS = {
    newest: (a, b) => b.round - a.round, oldest: (a, b) => a.round - b.round, kl: (a, b) => (b.kl ?? -1) - (a.kl ?? -1),
    longest: (a, b) => b.text.length - a.text.length, shortest: (a, b) => a.text.length - b.text.length,
  };
  const searchHere = (wanted) => {
    const text = wanted.text.toLowerCase();
    const found = everything.filter((r) => (!text || `${r.problem_id} ${r.answer ?? ""} ${r.text.join("")}`.toLowerCase().includes(text)) && (!wanted.verdict || r.verdict === wanted.verdict)
      && (!wanted.round || r.round === Number(wanted.round)) && (!wanted.group || r.kind === wanted.group) && (!wanted.target || (wanted.target === "with") === Boolean(r.gains)));
    const by = ORDERS[wanted.sort] || ORDERS.newest, inOrder = (a, b) => a.round - b.round || (a.problem_id < b.problem_id ? -1 : a.problem_id > b.problem_id ? 1 : a.sample - b.sample);
    return { total: found.length, rows: found.sort((a, b) => by(a, b) || inOrder(a, b)) };
  };
  const form = query("search");
  const fields = () => Object.fromEntries(new FormData(form));
  const searching = () => { const f = fields(); return Boolean(f.text || f.verdict || f.round || f.group || f.target || f.sort !== "newest"); };

  // --- list ---
  const state = { filter: "all", rollout: null, shown: PAGE, asked: 0 };
  const chosen = () => selected.filter((r) => state.filter === "all" || r.tags.includes(state.filter));
  const item = (r) => {
    const button = make("button", { type: "button", "aria-current": String(state.rollout !== null && anchorOf(r) === anchorOf(state.rollout)) },
      `${views.length > 1 ? r.view.run + " " : ""}r${String(r.round).padStart(3, "0")} ${escaped(r.problem_id)}, sample ${r.sample} `, Group.badge(r.verdict));
    button.addEventListener("click", async () => { await open(r); query("heading").focus({ preventScroll: true }); });
    return make("li", {}, button);
  };
  const drawList = async () => {
    const now = ++state.asked, on = searching();
    let found = { total: 0, rows: chosen() }, status = `${found.rows.length} of ${selected.length} rollouts`;
    if (on) {
      found = served ? await ask("search", { ...fields(), limit: state.shown }) : searchHere(fields());
      if (now !== state.asked) return; // a later search has been asked for
      if (served) for (const row of found.rows) row.view = views[0];
      const searched = served || views.every((v) => v.complete) ? views.reduce((n, v) => n + v.total, 0) : everything.length;
      status = `${found.total} of ${searched} rollouts found`;
    }
    query("list").replaceChildren(...found.rows.slice(0, state.shown).map(item));
    query("more").hidden = !on || found.total <= state.shown;
    query("clear").hidden = !on;
    query("count").textContent = status;
    query("list").setAttribute("aria-busy", "false");
  };
  const drawFilters = () => {
    query("filters").replaceChildren(...FILTERS.map(([name, label]) => {
      const count = name === "all" ? selected.length : selected.filter((r) => r.tags.includes(name)).length;
      const input = make("input", { type: "radio", name: "filter", value: name });
      input.checked = name === state.filter;
      input.disabled = !count;
      input.addEventListener("change", () => { state.filter = name; form.reset(); drawList(); const first = chosen()[0]; if (first && !chosen().includes(state.rollout)) open(first); });
      return make("label", {}, input, ` ${label} (${count})`);
    }));
  };
  const drawSearch = () => {
    const options = (name, values) => form.elements[name].replaceChildren(make("option", { value: "" }, "any"), ...values.map((v) => make("option", { value: v }, String(v))));
    options("verdict", ["correct", "incorrect", "no_answer", "truncated", "timeout", "error"]);
    options("round", [...new Set(views.flatMap((v) => v.sampled))].sort((a, b) => a - b));
    const total = views.reduce((n, v) => n + v.total, 0), all = served || views.every((v) => v.complete);
    query("search-title").textContent = all ? `Search all ${total} rollouts` : `Search ${everything.length} of ${total} rollouts (all: ogls view ${views[0].run} --serve)`;
  };

  // --- one rollout ---
  const open = async (light) => {
    const now = ++opened, r = await rolloutOf(light), group = await groupOf(r.view, r.round, r.problem_id);
    if (now !== opened) return;
    state.rollout = r;
    section.classList.remove("evaluated");
    const problem = r.view.problems[r.problem_id];
    const hash = "#" + encodeURIComponent(anchorOf(r));
    if (location.hash !== hash) history[location.hash ? "pushState" : "replaceState"](null, "", hash);
    query("heading").replaceChildren(`${views.length > 1 ? r.view.run + ", " : ""}round ${r.round}, ${escaped(r.problem_id)}, sample ${r.sample} `, Group.badge(r.verdict), make("span", { class: "answer" }, ` ${Group.answered(r, problem.expected)}`));
    query("problem").textContent = escaped(problem.problem);
    const facts = [];
    if (r.tags.length) facts.push(["Shown because", r.tags.map((tag) => (FILTERS.find(([name]) => name === tag) || [tag, tag])[1]).join(", ")]);
    if (r.later) facts.push(["Fixed", `${r.later.how} (round ${r.later.round})`]);
    if (r.why) facts.push(["No target", r.why]);
    if (r.note && r.note !== r.why) facts.push(["Steering", r.note]);
    query("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
    drawContexts(r, problem);
    Tokens.show(r);
    if (group) Group.show(query("group"), group, { expected: problem.expected, split: "train", current: r.sample, onOpen: (other) => open(other) });
    else query("group").replaceChildren(make("p", { class: "dim" }, `The other rollouts of this problem are too long for this page: ogls view ${r.view.run} --serve`));
    History.show(query("history"), r.view, r.problem_id, served ? showCompletions : null);
    drawList();
  };
  let opened = 0;
  // What the teacher read: equal texts once, with the samples that have them.
  const drawContexts = (r, problem) => {
    const parts = [];
    const folded = (summary, text) => parts.push(make("details", {}, make("summary", {}, summary), make("pre", {}, escaped(text))));
    if (problem.solution) folded("Reference solution", problem.solution);
    if (r.later && r.later.text) folded(`Greedy completion of the policy of round ${r.later.round}`, r.later.text);
    let contexts = 0, different = 0;
    for (const pool of r.exemplars) {
      const byText = new Map();
      for (const e of pool.texts) byText.set(e.text, [...(byText.get(e.text) || []), e.sample < 0 ? "the reference solution" : `sample ${e.sample}`]);
      contexts += pool.texts.length;
      different += byText.size;
      for (const [text, from] of byText) folded(`Pool ${pool.pool}: ${from.join(", ")}${from.length > 1 ? ` (${from.length} equal contexts)` : ""}`, text);
    }
    const read = contexts ? `${contexts} contexts, ${different} different` : "no context is in this page";
    query("contexts-title").textContent = `Reference solution and what the teacher read: ${read}`;
    query("texts").replaceChildren(...parts);
  };
  // A benchmark problem takes the place of the rollout: its completions have texts and verdicts, and no targets.
  const showCompletions = async (split, problem, round) => {
    const now = ++opened, group = await ask("completions", { split: split.split, round, problem_id: problem.id });
    if (now !== opened) return;
    const back = make("button", { type: "button" }, "Back to the rollout");
    back.addEventListener("click", () => open(state.rollout));
    query("heading").replaceChildren(`${escaped(split.split)}, ${escaped(problem.id)}, evaluated after round ${round} `, back);
    query("problem").textContent = escaped(problem.problem);
    section.classList.add("evaluated");
    Group.show(query("group"), group, { expected: problem.expected, split: split.split, current: null, onOpen: null });
    query("group").scrollIntoView();
  };

  // --- events ---
  let timer = 0;
  const searchSoon = () => {
    clearTimeout(timer);
    query("list").setAttribute("aria-busy", "true"); // until the rollouts of this question are listed
    state.shown = PAGE;
    timer = setTimeout(drawList, served ? 250 : 0);
  };
  for (const event of ["input", "change"]) form.addEventListener(event, searchSoon);
  form.addEventListener("submit", (e) => { e.preventDefault(); searchSoon(); });
  query("clear").addEventListener("click", () => { form.reset(); drawList(); });
  query("more").addEventListener("click", () => { state.shown += 4 * PAGE; drawList(); });
  const fromHash = () => {
    let wanted = "";
    try { wanted = decodeURIComponent(location.hash.slice(1)); } catch { /* no anchor of this page */ }
    return [...selected, ...everything].find((r) => anchorOf(r) === wanted);
  };
  addEventListener("hashchange", () => { const r = fromHash(); if (r) { state.filter = "all"; form.reset(); drawFilters(); open(r); section.scrollIntoView(); } });
  if (matchMedia("(max-width: 50rem)").matches) query("lists").open = false;
  drawFilters();
  drawSearch();
  if (selected.length) { const linked = fromHash(); open(linked || selected[0]); if (linked) section.scrollIntoView(); }
})();
