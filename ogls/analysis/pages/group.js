"use strict";
// All rollouts of a problem side by side: where they part, as a tree of shared text, and each against one of them.
const Group = (() => {
  const { make, escaped, quoted } = Page;
  const SIGNS = { correct: "\u2713", incorrect: "\u2717", no_answer: "\u2717", truncated: "\u2702" };
  const KINDS = { correct: "good", incorrect: "bad", no_answer: "bad", truncated: "open" };

  // A verdict with its sign and colour; what the verifier could not decide has neither colour.
  const badge = (verdict) => make("span", { class: `verdict ${KINDS[verdict] || "dim"}` }, `${SIGNS[verdict] || "?"} ${escaped(verdict)}`);
  const answered = (r, expected) => (r.answer === null ? "no answer" : r.verdict === "correct" ? `answer ${escaped(r.answer)}` : `answer ${escaped(r.answer)}, expected ${escaped(expected)}`);

  const sharedLength = (a, b) => { let i = 0; while (i < a.length && i < b.length && a[i] === b[i]) i++; return i; };

  // --- the tree: text that a set of rollouts shares, then one branch per next token ---
  const shorten = (text) => (text.length > 90 ? text.slice(0, 45) + " \u2026 " + text.slice(-40) : text);
  const counts = (rollouts) => {
    const correct = rollouts.filter((r) => r.outcome === "correct").length, failed = rollouts.filter((r) => r.outcome === "failed").length;
    const parts = [make("span", { class: "good" }, `\u2713${correct}`), " ", make("span", { class: "bad" }, `\u2717${failed}`)];
    const rest = rollouts.length - correct - failed;
    return make("span", { class: "counts" }, ...parts, rest ? ` ?${rest}` : "");
  };
  const samples = (rollouts) => make("span", { class: "dim" }, ` ${rollouts.length === 1 ? "sample" : "samples"} ${rollouts.map((r) => (r.greedy ? "greedy" : r.sample)).join(", ")}`);
  const tree = (rollouts, from) => {
    const first = rollouts[0].text, shared = Math.min(...rollouts.map((r) => sharedLength(first, r.text)));
    const text = first.slice(from, shared).join(""), ended = rollouts.every((r) => r.text.length === shared);
    const line = make("div", { class: "branch" }, counts(rollouts), " ", make("code", {}, text ? quoted(shorten(text)) : "(end)"), samples(rollouts));
    if (rollouts.length === 1 || ended) return make("li", {}, line);
    const branches = new Map();
    for (const r of rollouts) { const next = r.text[shared] ?? ""; branches.set(next, [...(branches.get(next) || []), r]); }
    const ordered = [...branches.values()].sort((a, b) => b.length - a.length);
    return make("li", {}, line, make("p", { class: "dim part" }, `they part at token ${shared}`), make("ul", {}, ...ordered.map((branch) => tree(branch, shared))));
  };

  // --- the cards ---
  const card = (r, reference, context) => {
    const same = r === reference ? r.text.length : sharedLength(r.text, reference.text), text = make("div", { class: "card-text mono" });
    const strongest = Math.min(Math.max(...(r.gains || []).map(Math.abs), 0.25), 4);
    r.text.forEach((piece, t) => {
      const token = make("span", { class: "t" }), x = r.gains && r.gains.length ? r.gains[t] : undefined;
      if (x) Tokens.colour(token, x, Math.min(Math.abs(x) / strongest, 1), true);
      if (r !== reference && t < same) token.classList.add("shared");
      if (r !== reference && t === same) { token.classList.add("parts"); token.title = `parts here, at token ${t}`; }
      Tokens.shownText(token, piece);
      text.append(token);
    });
    const facts = [`${r.text.length} tokens`];
    if (r.kl !== undefined && r.kl !== null) facts.push(`mean KL ${r.kl.toFixed(3)} nats`);
    if (r.gains) facts.push(r.mistake === null || r.mistake === undefined ? "no mistake" : `first mistake at token ${r.mistake}`);
    if (r !== reference) facts.push(same === r.text.length && same === reference.text.length ? "the same text" : `parts at token ${same}`);
    const head = make("button", { type: "button", class: "card-head" }, r.greedy ? "greedy " : `sample ${r.sample} `, badge(r.verdict));
    if (context.onOpen) head.addEventListener("click", () => context.onOpen(r)); else head.disabled = true;
    const why = !r.gains && r.why && context.split === "train" ? [make("p", { class: "dim why" }, `No target: ${r.why}.`)] : [];
    return make("article", { class: "card" + (context.current === r.sample && context.split === "train" ? " current" : ""), "aria-label": `sample ${r.sample}` },
      head, make("p", {}, answered(r, context.expected)), text, make("p", { class: "dim" }, facts.join(", ")), ...why);
  };

  // context: expected (the answer), split, current (a sample), onOpen (a rollout was chosen; without it none can be).
  const show = (place, group, context) => {
    const rollouts = group.rollouts;
    let reference = rollouts.find((r) => r.outcome === "correct") || rollouts[0];
    const choose = make("select", {}, ...rollouts.map((r, i) => make("option", { value: i }, `${r.greedy ? "greedy" : "sample " + r.sample}, ${r.verdict}`)));
    choose.value = rollouts.indexOf(reference);
    const cards = make("div", { class: "cards" });
    const draw = () => cards.replaceChildren(...rollouts.map((r) => card(r, reference, context)));
    choose.addEventListener("change", () => { reference = rollouts[Number(choose.value)]; draw(); });
    const answers = new Map();
    for (const r of rollouts) { const a = r.answer === null ? "no answer" : r.answer; answers.set(a, [...(answers.get(a) || []), r]); }
    const listed = [...answers].sort((a, b) => b[1].length - a[1].length).map(([a, of]) => make("li", {}, `${escaped(a)} `, counts(of)));
    const what = context.split === "train" ? `Group: the ${rollouts.length} rollouts of ${escaped(group.problem_id)} in round ${group.round}` : `The ${rollouts.length} completions of ${escaped(group.problem_id)} after round ${group.round}`;
    place.replaceChildren(make("h2", {}, what), make("p", { class: "answers" }, counts(rollouts), ` Answers, expected ${escaped(context.expected)}: `), make("ul", { class: "inline" }, ...listed),
      make("h3", {}, "Where they part"), make("ul", { class: "tree" }, tree(rollouts, 0)),
      make("label", {}, "Side by side, compared with ", choose), make("p", { class: "dim" }, "Grey: the text that a rollout shares with that one. Outlined: the token at which it parts. Colours: steering, as above."), cards);
    draw();
  };
  return { show, badge, answered };
})();
