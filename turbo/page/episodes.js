// The browser of episodes: filters, one list for each run of which only the visible rows exist, and
// the chosen episode step by step.

const ROW = 40; // height of a row in pixels, as in view.css
const OUTCOMES = [["", "any outcome"], ["won", "success"], ["lost", "no success"]];
const VERDICTS = [
  ["perception", "Reads the picture"],
  ["aim", "Aims at a correct plan"],
  ["follows", "Acts as it aims"],
];

// What the text filter looks in.
function searchText(episode) {
  if (episode.text === undefined) {
    const said = episode.steps.map((s) => `${answerOf(s)} ${s.action ?? ""} ${s.error ?? ""}`);
    episode.text = `${episode.deal} ${said.join(" ")}`.toLowerCase();
  }
  return episode.text;
}

const answerOf = (step) => (step.tokens ? step.tokens.join("") : step.answer ?? step.thought ?? "");

function passes(episode, f) {
  if (f.outcome && episode.success !== (f.outcome === "won")) return false;
  if (f.collapsed && !episode.collapsed) return false;
  if (f.illegal && !episode.illegal) return false;
  if (f.from !== null && episode.update < f.from) return false;
  if (f.to !== null && episode.update > f.to) return false;
  return !f.text || searchText(episode).includes(f.text);
}

// One run's list and its chosen episode.
class Pane {
  constructor(run, number, several, browser) {
    Object.assign(this, { run, number, browser, at: 0, step: 0, shown: [] });
    this.count = h("p", { class: "count", role: "status" });
    this.space = h("div", { class: "space", role: "presentation" });
    this.list = h("div", {
      class: "list", role: "listbox", tabindex: 0, onscroll: () => this.drawRows(),
      "aria-label": `Episodes of ${run.name}`,
    }, this.space);
    this.detail = h("article", { class: "detail" });
    const title = several ? h("h3", { class: `c${number}` }, `${LETTERS[number]} ${run.name}`) : null;
    this.root = h("div", { class: "pane", onpointerdown: () => browser.activate(number) },
      title, this.count, h("div", { class: "columns" }, this.list, this.detail));
  }

  get episode() {
    return this.shown[this.at];
  }

  // Show what passes the filters, and stay at the chosen episode while it does.
  filter(f) {
    const chosen = this.episode;
    this.shown = this.run.episodes.filter((e) => passes(e, f));
    const there = chosen
      ? this.shown.findIndex((e) => e.update === chosen.update && e.number === chosen.number) : -1;
    if (there < 0) this.step = 0;
    this.at = Math.max(0, there);
    const [few, all] = [this.shown.length, this.run.episodes.length];
    const more = this.run.recorded > all ? ` (${this.run.recorded.toLocaleString("en")} recorded)` : "";
    this.count.textContent =
      `${few.toLocaleString("en")} of ${all.toLocaleString("en")} episodes${more}`;
    this.space.style.height = `${few * ROW}px`;
    this.draw();
  }

  draw() {
    this.reveal();
    this.drawRows();
    this.drawDetail();
  }

  reveal() {
    const top = this.at * ROW, height = this.list.clientHeight;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW > this.list.scrollTop + height) this.list.scrollTop = top + ROW - height;
  }

  drawRows() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
    const count = Math.ceil((this.list.clientHeight || 600) / ROW) + 8;
    const rows = this.shown.slice(first, first + count).map((e, i) => this.row(e, first + i));
    refill(this.space, ...rows);
    const chosen = this.episode ? this.rowId(this.at) : null;
    if (chosen) this.list.setAttribute("aria-activedescendant", chosen);
    else this.list.removeAttribute("aria-activedescendant");
  }

  rowId(i) {
    return `row-${this.number}-${i}`;
  }

  row(e, i) {
    const node = h("div", {
      class: i === this.at ? "row chosen" : "row", role: "option", id: this.rowId(i),
      "aria-selected": String(i === this.at), "aria-posinset": i + 1,
      "aria-setsize": this.shown.length, onclick: () => this.browser.choose(this, i),
    },
      outcome(e), h("span", { class: "update" }, `update ${e.update}`),
      h("span", { class: "deal" }, e.deal || `episode ${e.number}`),
      e.illegal ? h("span", { class: "mark" }, "illegal") : null,
      e.collapsed ? h("span", { class: "mark" }, "collapse") : null,
      h("span", { class: "return" }, plain(e.return)));
    node.style.top = `${i * ROW}px`;
    return node;
  }

  drawDetail() {
    const e = this.episode;
    if (!e) {
      const why = this.run.recorded ? "No episode passes the filters." : "No episode is recorded yet.";
      refill(this.detail, h("p", { class: "quiet" }, why));
      return;
    }
    this.step = Math.max(0, Math.min(this.step, e.steps.length - 1));
    const step = e.steps[this.step];
    const parts = step ? drawStep(e, step, this.run) : [h("p", { class: "quiet" }, "It has no steps.")];
    const held = this.detail.querySelector(".step:focus");
    refill(this.detail, episodeHead(e), this.strip(e), ...parts);
    if (held) this.detail.querySelector(".step.chosen").focus();
  }

  // All steps in a row: what was done, and whether it paid.
  strip(e) {
    const one = (s, i) => h("button", {
      type: "button", class: `step ${tone(s)}${i === this.step ? " chosen" : ""}`,
      "aria-pressed": String(i === this.step), title: s.error ?? `reward ${plain(s.reward)}`,
      onclick: () => this.browser.goto(this, i),
    }, s.action ?? "illegal");
    const cut = e.left_out ? h("span", { class: "quiet" }, `${e.left_out} more not recorded`) : null;
    return h("div", { class: "strip", role: "group", "aria-label": "Steps" }, e.steps.map(one), cut);
  }
}

function tone(step) {
  if (step.action === undefined || step.action === null) return "bad";
  return step.reward > 0 ? "good" : step.reward < 0 ? "bad" : "";
}

function outcome(e) {
  if (e.success === undefined) return h("span", { class: "outcome" }, "?");
  return e.success
    ? h("span", { class: "outcome good", title: "success" }, "✓")
    : h("span", { class: "outcome bad", title: "no success" }, "✗");
}

function episodeHead(e) {
  const facts = [
    e.success === undefined ? null : e.success ? "success" : "no success",
    e.solvable === false ? "cannot be solved" : null,
    `return ${plain(e.return)}`,
    e.collapsed ? "collapsed thought" : null,
  ];
  return h("div", { class: "head" },
    h("h4", {}, outcome(e), ` Update ${e.update}, episode ${e.number}`, e.deal ? `: ${e.deal}` : ""),
    h("p", { class: "facts" }, facts.filter(Boolean).join(" · ")));
}

function drawStep(e, s, run) {
  const data = s.frame ? run.frames[s.frame] : null;
  const picture = data
    ? h("img", {
      class: "frame", alt: "What the policy saw", src: `data:image/png;base64,${data}`,
      onload: ({ target }) => target.classList.toggle("small", target.naturalWidth < 200),
    })
    : h("p", { class: "frame quiet" }, "No picture was recorded.");
  return [
    h("div", { class: "scene" }, picture, h("div", { class: "side" }, facts(s), prompt(e, s))),
    drawTokens(s),
  ];
}

function facts(s) {
  const rows = [];
  const add = (name, value, tone) => rows.push(h("dt", {}, name), h("dd", { class: tone }, value));
  if (s.action === undefined || s.action === null) add("Action", `illegal: ${s.error ?? "unreadable"}`, "bad");
  else add("Action", s.action, "action");
  const bonus = s.format_reward ? ` and ${plain(s.format_reward)} for the format` : "";
  add("Reward", plain(s.reward) + bonus, tone(s));
  for (const [name, label] of VERDICTS) {
    const value = (s.verdict || {})[name];
    if (value === true) add(label, "✓ yes", "good");
    else if (value === false) add(label, "✗ no", "bad");
    else add(label, "not judged", "quiet");
  }
  return h("dl", { class: "facts" }, rows);
}

let promptOpen = true; // as it was left at the last step

function prompt(e, s) {
  if (!e.prompt && !s.state) return null;
  const toggled = (event) => { promptOpen = event.target.open; };
  return h("details", { class: "prompt", open: promptOpen, ontoggle: toggled }, h("summary", {}, "Prompt"),
    h("pre", {}, e.prompt, h("b", {}, s.state ?? "")));
}

// The answer token by token: how far the policy is from its teacher at each of them.
function drawTokens(s) {
  if (!s.tokens) {
    return h("div", { class: "said" }, h("h5", {}, "Thought"), h("pre", {}, s.thought ?? s.answer ?? ""));
  }
  const cut = s.thought_tokens ?? s.tokens.length;
  const piece = (text, i) => {
    const kl = s.kl ? s.kl[i] : null;
    return h("span", { class: klClass(kl), title: known(kl) ? `KL ${plain(kl)} nats` : null }, text);
  };
  const pieces = s.tokens.map(piece);
  const thought = (s.kl || []).slice(0, cut).filter(known);
  const mean = thought.length ? thought.reduce((a, b) => a + b, 0) / thought.length : null;
  const about = mean === null ? "no teacher" : `mean KL ${plain(mean)} nats`;
  return h("div", { class: "said" },
    h("h5", {}, "Thought ", h("span", { class: "quiet" }, `${cut} tokens, ${about}`)),
    h("pre", { class: "tokens thought" }, pieces.slice(0, cut)),
    h("h5", {}, "Action ", h("span", { class: "quiet" }, `${s.tokens.length - cut} tokens`)),
    h("pre", { class: "tokens" }, pieces.slice(cut)),
    thought.length ? klLegend() : null);
}

// All panes, their filters and their keys.
class Browser {
  constructor(form, root, runs) {
    Object.assign(this, { form, root, active: 0 });
    this.drawFilters(runs.length > 1);
    this.setRuns(runs);
  }

  setRuns(runs) {
    const before = this.panes || [], tops = before.map((pane) => pane.list.scrollTop);
    this.panes = runs.map((run, i) => new Pane(run, i, runs.length > 1, this));
    this.root.className = runs.length > 1 ? "two" : "one";
    refill(this.root, ...this.panes.map((p) => p.root));
    this.panes.forEach((pane, i) => {
      const old = before[i];
      if (!old || !old.episode) return;
      pane.shown = [old.episode];
      pane.step = old.step;
    });
    this.filter();
    this.panes.forEach((pane, i) => {
      if (before[i]) pane.list.scrollTop = tops[i];
    });
    this.activate(Math.min(this.active, runs.length - 1));
  }

  drawFilters(several) {
    const changed = () => this.filter();
    const check = (name, label, why) => h("label", { title: why },
      h("input", { type: "checkbox", name, onchange: changed }), label);
    const whole = (name, label) => h("label", {}, label,
      h("input", { type: "number", name, min: 0, step: 1, oninput: changed }));
    refill(this.form,
      h("select", { name: "outcome", "aria-label": "Outcome", onchange: changed },
        OUTCOMES.map(([value, label]) => h("option", { value }, label))),
      check("collapsed", "collapsed", "A wrong thought of it was said, word for word, in another state"),
      check("illegal", "illegal answer", "An answer of it named no legal action"),
      whole("from", "updates from"), whole("to", "to"),
      h("input", { type: "search", name: "text", placeholder: "text  ( / )",
        "aria-label": "Text in answers, actions and deals", oninput: changed }),
      several ? h("label", { title: "Show the same update, episode and step of both runs" },
        h("input", { type: "checkbox", name: "linked", checked: true }), "linked") : null,
      h("button", { type: "button", onclick: () => this.clear() }, "clear"),
      h("button", { type: "button", onclick: () => showHelp() }, "keys ( ? )"));
    this.form.addEventListener("submit", (event) => event.preventDefault());
  }

  get filters() {
    const f = this.form.elements;
    const whole = (x) => (x.value === "" || !Number.isFinite(+x.value) ? null : +x.value);
    return {
      outcome: f.outcome.value, collapsed: f.collapsed.checked, illegal: f.illegal.checked,
      from: whole(f.from), to: whole(f.to), text: f.text.value.trim().toLowerCase(),
    };
  }

  filter() {
    const f = this.filters;
    this.panes.forEach((pane) => pane.filter(f));
    this.link();
  }

  clear() {
    this.form.reset();
    this.filter();
  }

  only(update) {
    this.form.elements.from.value = this.form.elements.to.value = update;
    this.filter();
    this.root.scrollIntoView({ block: "nearest" });
  }

  activate(number) {
    this.active = number;
    this.panes.forEach((p, i) => p.root.classList.toggle("active", i === number));
  }

  choose(pane, i) {
    if (!pane.shown.length) return;
    pane.at = Math.max(0, Math.min(i, pane.shown.length - 1));
    pane.step = 0;
    pane.draw();
    this.activate(pane.number);
    this.link();
    this.remember();
  }

  goto(pane, step) {
    if (!pane.episode) return;
    const all = this.linked ? this.panes.filter((p) => p.episode) : [pane];
    for (const p of all) {
      p.step = Math.max(0, Math.min(step, p.episode.steps.length - 1));
      p.drawDetail();
    }
    this.activate(pane.number);
    this.remember();
  }

  get linked() {
    const box = this.form.elements.linked;
    return Boolean(box && box.checked);
  }

  // Bring the other pane to the same episode of the same update, or to the nearest.
  link() {
    const own = this.panes[this.active], e = own.episode;
    if (!this.linked || !e) return;
    const far = (o) => Math.abs(o.update - e.update) * 1e6 + Math.abs(o.number - e.number);
    for (const pane of this.panes.filter((p) => p !== own && p.shown.length)) {
      let best = 0;
      pane.shown.forEach((o, i) => { if (far(o) < far(pane.shown[best])) best = i; });
      if (best === pane.at) continue;
      Object.assign(pane, { at: best, step: 0 });
      pane.draw();
    }
  }

  // The address names the chosen step, so that it can be kept: #update/episode/step. Browsers
  // let it change some times a second only: it waits until the keys rest.
  remember() {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => {
      const { episode, step } = this.panes[0];
      if (episode) history.replaceState(null, "", `#${episode.update}/${episode.number}/${step}`);
    }, 200);
  }

  recall(hash) {
    const [update, number, step] = hash.slice(1).split("/").map(Number);
    const pane = this.panes[0];
    const i = pane.shown.findIndex((e) => e.update === update && e.number === number);
    if (i < 0) return;
    this.choose(pane, i);
    if (Number.isInteger(step)) this.goto(pane, step);
  }

  // Returns whether the key meant something.
  key(name) {
    const pane = this.panes[this.active];
    const page = Math.max(1, Math.floor(pane.list.clientHeight / ROW) - 1);
    const moves = {
      j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: page, PageUp: -page,
      Home: -Infinity, End: Infinity,
    };
    const steps = { l: 1, ArrowRight: 1, h: -1, ArrowLeft: -1 };
    if (name in moves) {
      const to = pane.at + moves[name];
      this.choose(pane, to === Infinity ? pane.shown.length - 1 : to);
    } else if (name in steps) this.goto(pane, pane.step + steps[name]);
    else if (name === "x" && this.panes.length > 1) this.activate(1 - this.active);
    else if (name === "c") this.clear();
    else if (name === "/") this.form.elements.text.focus();
    else if (name === "?") showHelp();
    else return false;
    return true;
  }
}
