"use strict";
// Problems over rounds: one row per problem, one cell per round with the number of correct samples.
const History = (() => {
  const { make, escaped } = Page;
  const PAGE = 40;
  const shares = (problem) => problem.cells.filter((c) => c && c[1]).map((c) => c[0] / c[1]);
  const solved = (share) => share >= 0.5;
  const KINDS = [
    ["all", "all, most improved first", () => true],
    ["learned", "learned", (s) => !solved(s[0]) && solved(s[s.length - 1])],
    ["forgotten", "forgotten", (s) => solved(s[0]) && !solved(s[s.length - 1])],
    ["unsolved", "never solved", (s) => !s.some(solved)],
    ["unsteady", "solved and lost again", (s) => s.some((x, i) => i && solved(s[i - 1]) && !solved(x))],
  ];

  const cell = (value, round, onCell) => {
    if (!value) return make("td", { class: "cell" }, "");
    const [correct, samples, greedy] = value, text = `${correct}/${samples}`;
    const about = `round ${round}: ${correct} of ${samples} correct${greedy === null ? "" : greedy ? ", greedy correct" : ", greedy wrong"}`;
    const inside = onCell ? make("button", { type: "button", title: about, "aria-label": about }, text) : make("span", { title: about }, text);
    if (onCell) inside.addEventListener("click", onCell);
    return make("td", { class: "cell", style: `background-color: rgba(var(--plain), ${(0.55 * correct / Math.max(samples, 1)).toFixed(2)})` }, inside);
  };
  const table = (split, problems, onCell, current) => {
    const head = make("tr", {}, make("th", { scope: "col" }, "problem"), make("th", { scope: "col", class: "text" }, "answer"), ...split.rounds.map((r) => make("th", { scope: "col" }, String(r))));
    const rows = problems.map((p) => make("tr", p.id === current ? { class: "current" } : {}, make("th", { scope: "row", title: escaped(p.problem) }, escaped(p.id)), make("td", { class: "text" }, escaped(p.expected)),
      ...p.cells.map((value, i) => cell(value, split.rounds[i], onCell && value ? () => onCell(split, p, split.rounds[i]) : null))));
    return make("div", { class: "scroll" }, make("table", { class: "matrix" }, make("thead", {}, head), make("tbody", {}, ...rows)));
  };

  // view: its history; current: the problem on show; onCell(split, problem, round), if the texts can be had.
  const show = (place, view, current, onCell) => {
    const own = view.history.filter((s) => s.split === "train").flatMap((s) => s.problems.filter((p) => p.id === current).map((p) => [s, p]));
    const parts = [make("h2", {}, "Problems over rounds")];
    if (own.length) parts.push(make("p", {}, `This problem was sampled in more than one round:`), table(own[0][0], [own[0][1]], null, current));
    else parts.push(make("p", { class: "dim" }, "This problem was sampled for training in one round only."));
    for (const split of view.history) parts.push(browser(split, onCell, current));
    place.replaceChildren(...parts);
  };
  const browser = (split, onCell, current) => {
    const name = split.split === "train" ? "Training problems that were sampled again" : `Benchmark ${escaped(split.split)}`;
    const kind = make("select", { "aria-label": "Problems to show" }, ...KINDS.map(([value, text]) => make("option", { value }, text)));
    const text = make("input", { type: "search", placeholder: "text or problem id", "aria-label": "Search problems" });
    const status = make("span", { class: "dim" }), box = make("div"), more = make("button", { type: "button" }, "Show more");
    let limit = PAGE;
    const draw = () => {
      const test = KINDS.find(([value]) => value === kind.value)[2], wanted = text.value.toLowerCase();
      const found = split.problems.filter((p) => shares(p).length && test(shares(p)) && `${p.id} ${p.problem} ${p.expected}`.toLowerCase().includes(wanted));
      status.textContent = ` ${found.length} of ${split.total} problems`;
      box.replaceChildren(table(split, found.slice(0, limit), onCell && split.split !== "train" ? onCell : null, current));
      more.hidden = found.length <= limit;
    };
    for (const [element, event] of [[kind, "change"], [text, "input"]]) element.addEventListener(event, () => { limit = PAGE; draw(); });
    more.addEventListener("click", () => { limit += 4 * PAGE; draw(); });
    const details = make("details", {}, make("summary", {}, `${name}: ${split.total} problems over ${split.rounds.length} evaluated rounds`),
      make("p", {}, kind, " ", text, status), make("p", { class: "dim" }, "A cell is the number of correct samples of a round; full colour: all of them." + (onCell ? " A cell opens the completions." : "")), box, more);
    details.addEventListener("toggle", () => { if (details.open) draw(); });
    return details;
  };
  return { show };
})();
