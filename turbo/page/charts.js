// Learning curves: one small SVG for each question. Colour tells series apart in one run, and the
// runs where there are several; then dashes tell the series.

const CHARTS = [
  {
    title: "Success",
    note: "Share of the episodes that reached the goal. Points are evaluations on fresh deals.",
    form: percent, floor: 0,
    series: [{ name: "success_rate", label: "while training", band: ["success_low", "success_high"] }],
    points: [
      { name: "eval_success_rate", label: "policy, fresh deals",
        bar: ["eval_success_low", "eval_success_high"] },
      { name: "eval_teacher_success_rate", label: "merged teacher, fresh deals",
        bar: ["eval_teacher_success_low", "eval_teacher_success_high"] },
    ],
    ceiling: "success",
  },
  {
    title: "Return", note: "Mean undiscounted sum of the environment's rewards.", form: plain,
    series: [{ name: "episode_return", label: "while training" }],
    points: [
      { name: "eval_episode_return", label: "policy, fresh deals" },
      { name: "eval_teacher_episode_return", label: "merged teacher, fresh deals" },
    ],
    ceiling: "return",
  },
  {
    title: "KL to the teacher", note: "Mean over the thought tokens, in nats.", form: plain, floor: 0,
    series: [{ name: "teacher_kl", label: "KL to the teacher" }],
  },
  {
    title: "Entropy", note: "Mean over the sampled tokens, in nats.", form: plain, floor: 0,
    series: [
      { name: "thought_entropy", label: "thought" },
      { name: "action_entropy", label: "action" },
    ],
  },
  {
    title: "Clip fraction", note: "Share of the steps whose ratio left the clip range.",
    form: percent, floor: 0,
    series: [{ name: "clip_fraction", label: "clip fraction" }],
  },
  {
    title: "Thought collapse",
    note: "Thoughts collapse when fewer are right, fewer differ, and self-BLEU rises.",
    form: percent, floor: 0, roof: 1,
    series: [
      { name: "reasoning_score", label: "right, says the exact solver" },
      { name: "distinct_thoughts", label: "distinct" },
      { name: "self_bleu", label: "self-BLEU" },
    ],
  },
  {
    title: "Thought length", note: "Mean number of thought tokens of a step.", form: plain, floor: 0,
    series: [
      { name: "thought_length", label: "policy" },
      { name: "teacher_thought_length", label: "teacher" },
    ],
  },
  {
    title: "Teacher against student", note: "Share of the thoughts that are right.",
    form: percent, floor: 0, roof: 1,
    series: [
      { name: "reasoning_score", label: "student" },
      { name: "teacher_reasoning_score", label: "teacher, in the same states" },
    ],
    points: [
      { name: "eval_reasoning_score", label: "student, fresh deals" },
      { name: "eval_teacher_reasoning_score", label: "teacher, fresh deals" },
    ],
    needs: /teacher/,
  },
  {
    title: "Step of an update",
    note: "KL of the policy to the one that played, and to itself before the first step: what " +
      "sampling and training disagree by.",
    form: plain, floor: 0,
    series: [
      { name: "approx_kl", label: "approximate KL" },
      { name: "sampling_kl", label: "before the first step" },
    ],
  },
  {
    title: "Gradient norm", note: "Before clipping, mean over the minibatches.", form: plain, floor: 0,
    series: [
      { name: "grad_norm", label: "policy" },
      { name: "critic_grad_norm", label: "critic" },
    ],
  },
  {
    title: "Loss", note: "Mean over the minibatches of an update.", form: plain,
    series: [
      { name: "policy_loss", label: "policy" },
      { name: "value_loss", label: "critic", unused: 0 },
      { name: "sft_loss", label: "imitation", unused: 0 },
    ],
  },
];
const PHASES = ["rollout", "score", "write", "train", "merge", "other"];
const BOX = { width: 400, height: 190, left: 44, right: 12, top: 8, bottom: 26 };

let meanings = {}; // what every metric is, from turbo/log.py

const someKnown = (values) => Boolean(values) && values.some(known);

// What a chart has of a run: its lines and its points that hold any number.
function present(chart, run) {
  const used = (s) => !("unused" in s && run.curves[s.name].every((v) => v === s.unused));
  const lines = (chart.series || []).filter((s) => someKnown(run.curves[s.name]) && used(s));
  const points = (chart.points || []).filter((s) => someKnown(run.evaluations[s.name]));
  const all = [...lines, ...points];
  const enough = chart.needs ? all.some((s) => chart.needs.test(s.name)) : all.length;
  return enough ? { lines, points } : { lines: [], points: [] };
}

// A line's interval, its low and high values, or nothing. Over seeds every metric may have one, drawn
// where it is alone; it ends where the chart does.
function bandOf(chart, s, run, part) {
  const alone = run.seeds && part.lines.length === 1;
  const names = s.band || (alone ? [`${s.name}_low`, `${s.name}_high`] : []);
  if (!names.length || !someKnown(run.curves[names[0]])) return null;
  const { floor = -Infinity, roof = Infinity } = chart;
  const within = (v) => known(v) ? Math.min(Math.max(v, floor), roof) : v;
  return names.map((name) => run.curves[name].map(within));
}

// What a chart shows, and what its bands are.
function noteOf(chart, runs, parts) {
  const banded = runs.filter((run, r) => parts[r].lines.some((s) => bandOf(chart, s, run, parts[r])));
  const kinds = [];
  if (banded.some((run) => !run.seeds)) kinds.push("Wilson");
  if (banded.some((run) => run.seeds)) kinds.push("over seeds: Student's t");
  const what = parts.some((p) => p.points.some((s) => s.bar)) ? "Bands and bars" : "Bands";
  return chart.note + (kinds.length ? ` ${what} are 95 % intervals (${kinds.join("; ")}).` : "");
}

function extent(values, floor, roof) {
  const numbers = values.filter(known);
  let low = floor === undefined ? Math.min(...numbers) : Math.min(floor, ...numbers);
  let high = Math.max(...numbers);
  if (roof !== undefined) high = Math.max(high, roof);
  if (high - low < 1e-12) high = low + (Math.abs(low) || 1);
  const room = (high - low) * 0.06;
  return [floor === undefined ? low - room : low, high + (roof === undefined ? room : 0)];
}

class Axes {
  constructor(updates, values, chart) {
    const [low, high] = extent(values, chart.floor, chart.roof);
    const [first, last] = [Math.min(...updates), Math.max(...updates)];
    const { width, height, left, right, top, bottom } = BOX;
    this.first = first;
    this.span = Math.max(1, last - first);
    this.x = (u) => left + ((u - first) / this.span) * (width - left - right);
    this.y = (v) => height - bottom - ((v - low) / (high - low)) * (height - top - bottom);
    this.frame = g("g", { class: "axes" });
    for (const t of ticks(low, high, 4)) {
      const y = this.y(t);
      this.frame.append(
        g("line", { x1: left, x2: width - right, y1: y, y2: y }),
        g("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, chart.form(t)),
      );
    }
    for (const t of ticks(first, first + this.span, 6).filter(Number.isInteger)) {
      const at = { x: this.x(t), y: height - 8, "text-anchor": "middle" };
      this.frame.append(g("text", at, t));
    }
  }

  // The update nearest to a place on the screen.
  at(event, picture, updates) {
    const box = picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * BOX.width;
    let best = 0;
    updates.forEach((u, i) => {
      if (Math.abs(this.x(u) - x) < Math.abs(this.x(updates[best]) - x)) best = i;
    });
    return best;
  }
}

// "M x y L x y ..."; a gap where a number is missing.
function path(xs, ys, axes) {
  let out = "", open = false;
  xs.forEach((x, i) => {
    if (!known(ys[i])) { open = false; return; }
    const place = `${axes.x(x).toFixed(1)} ${axes.y(ys[i]).toFixed(1)}`;
    out += open ? `L${place}` : `M${place}h0`; // h0: a number alone is a dot
    open = true;
  });
  return out;
}

// The area between two lines, in pieces where numbers are missing.
function area(xs, low, high, axes) {
  let out = "", start = 0;
  const piece = (from, to) => {
    if (to - from < 1) return;
    const up = xs.slice(from, to).map((x, i) => [x, high[from + i]]);
    const down = xs.slice(from, to).map((x, i) => [x, low[from + i]]).reverse();
    const places = [...up, ...down].map(([x, y]) => `${axes.x(x).toFixed(1)} ${axes.y(y).toFixed(1)}`);
    out += `M${places.join("L")}Z`;
  };
  xs.forEach((_, i) => {
    if (!known(low[i]) || !known(high[i])) { piece(start, i); start = i + 1; }
  });
  piece(start, xs.length);
  return out;
}

// Colour and dash of a series: see the top of this file.
function look(run, place, count) {
  return count > 1 ? `c${run} dash${place}` : `c${place}`;
}

function card(chart, picture, keys, tip) {
  const box = h("figure", { class: "card" },
    h("figcaption", {}, h("h3", {}, chart.title), h("p", {}, chart.note)),
    picture, h("div", { class: "keys" }, keys), tip);
  return box;
}

function key(label, style, kind, name) {
  const sample = g("svg", { width: 22, height: 10, "aria-hidden": "true" }, kind === "point"
    ? g("circle", { cx: 11, cy: 5, r: 3.5, class: `point ${style}` })
    : g("line", { x1: 1, x2: 21, y1: 5, y2: 5, class: `line ${style}` }));
  const m = meanings[name];
  const title = m ? `${name}: ${m.meaning}; ${m.unit}` : null;
  return h("span", { class: "key", title }, sample, label);
}

function drawChart(chart, runs, choose) {
  const parts = runs.map((run) => present(chart, run));
  if (!parts.some((p) => p.lines.length + p.points.length)) return null;
  const updates = [], values = [];
  runs.forEach((run, r) => {
    for (const s of parts[r].lines) {
      updates.push(...run.curves.update);
      values.push(...run.curves[s.name], ...(bandOf(chart, s, run, parts[r]) || []).flat());
    }
    for (const s of parts[r].points) {
      updates.push(...run.evaluations.update);
      values.push(...run.evaluations[s.name]);
      for (const n of s.bar || []) values.push(...(run.evaluations[n] || []));
    }
  });
  const tops = ceilingsOf(chart, runs);
  const axes = new Axes(updates, [...values, ...tops.map((t) => t.value)], chart);
  const size = `0 0 ${BOX.width} ${BOX.height}`;
  const told = `${chart.title}: ` + runs.map((run, r) => summary(chart, run, parts[r])).join("; ");
  const picture = g("svg", { viewBox: size, role: "img", "aria-label": told }, axes.frame);
  const keys = [];
  tops.forEach((top) => drawCeiling(picture, keys, axes, chart, top));
  runs.forEach((run, r) => drawRun(chart, picture, keys, axes, run, r, runs.length, parts[r]));
  const noted = { ...chart, note: noteOf(chart, runs, parts) };
  return card(noted, picture, keys, hover(chart, picture, axes, runs, parts, choose));
}

function ceilingsOf(chart, runs) {
  const out = [];
  for (const run of chart.ceiling ? runs : []) {
    for (const c of run.ceilings) {
      const value = c[chart.ceiling];
      const there = out.some((o) => o.value === value);
      if (known(value) && !there) out.push({ value, label: c.label, source: c.source });
    }
  }
  return out;
}

function drawCeiling(picture, keys, axes, chart, top) {
  const y = axes.y(top.value);
  const line = { x1: BOX.left, x2: BOX.width - BOX.right, y1: y, y2: y, class: "line ceiling" };
  const label = `best possible${top.label ? " " + top.label : ""}: ${chart.form(top.value)}`;
  picture.append(g("line", line, g("title", {}, top.source)));
  keys.push(key(label, "ceiling"));
}

function drawRun(chart, picture, keys, axes, run, r, count, part) {
  const name = count > 1 ? `${LETTERS[r]} ` : "";
  part.lines.forEach((s, place) => {
    const xs = run.curves.update, style = look(r, place, count);
    const band = bandOf(chart, s, run, part);
    if (band) {
      const [low, high] = band;
      picture.append(g("path", { d: area(xs, low, high, axes), class: `band ${style}` }));
    }
    picture.append(g("path", { d: path(xs, run.curves[s.name], axes), class: `line ${style}` }));
    keys.push(key(name + s.label, style, "line", s.name));
  });
  part.points.forEach((s, place) => {
    const style = count > 1 ? `c${r}` : `c${place + part.lines.length}`;
    const shape = place ? "hollow" : "";
    run.evaluations.update.forEach((u, i) => {
      const value = run.evaluations[s.name][i];
      if (!known(value)) return;
      const x = axes.x(u) + 2 * place, y = axes.y(value);
      const [low, high] = (s.bar || []).map((n) => (run.evaluations[n] || [])[i]);
      if (known(low) && known(high)) {
        const bar = { x1: x, x2: x, y1: axes.y(low), y2: axes.y(high), class: `line bar ${style}` };
        picture.append(g("line", bar));
      }
      picture.append(g("circle", { cx: x, cy: y, r: 3.5, class: `point ${style} ${shape}` }));
    });
    keys.push(key(name + s.label, `${style} ${shape}`, "point", s.name));
  });
}

// The newest figures in words, for those who do not see the picture.
function summary(chart, run, part) {
  const newest = (values) => chart.form(values.filter(known).at(-1));
  const lines = part.lines.map((s) => `${s.label} ${newest(run.curves[s.name])}`);
  const points = part.points.map((s) => `${s.label} ${newest(run.evaluations[s.name])}`);
  return `${run.name}: ${[...lines, ...points].join(", ")}`;
}

// A line under the pointer with the figures of that update; a click chooses its episodes.
function hover(chart, picture, axes, runs, parts, choose) {
  const all = [...new Set(runs.flatMap((run) => run.curves.update || []))].sort((a, b) => a - b);
  const tip = h("div", { class: "tip", hidden: true });
  if (!all.length) return tip;
  const bottom = BOX.height - BOX.bottom;
  const line = g("line", { class: "pointer", y1: BOX.top, y2: bottom, visibility: "hidden" });
  picture.append(line);
  picture.addEventListener("pointermove", (event) => {
    const u = all[axes.at(event, picture, all)];
    for (const end of ["x1", "x2"]) line.setAttribute(end, axes.x(u));
    line.setAttribute("visibility", "visible");
    const rows = runs.flatMap((run, r) => {
      const i = (run.curves.update || []).indexOf(u);
      const there = i < 0 ? [] : parts[r].lines.filter((s) => known(run.curves[s.name][i]));
      const name = runs.length > 1 ? `${LETTERS[r]} ` : "";
      return there.map((s) => h("div", {}, `${name}${s.label}: ${chart.form(run.curves[s.name][i])}`));
    });
    refill(tip, h("b", {}, `update ${u}`), rows);
    tip.hidden = false;
  });
  picture.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    tip.hidden = true;
  });
  picture.addEventListener("click", (event) => choose(all[axes.at(event, picture, all)]));
  return tip;
}

// Where the time of an update goes: phases on top of each other, with one scale for all runs.
function drawPhases(runs) {
  const totals = runs.map((run) => {
    const count = (run.curves.update || []).length;
    const phases = PHASES.filter((p) => (run.curves[`seconds_${p}`] || []).some((v) => v > 0));
    const sums = [Array(count).fill(0)];
    for (const p of phases) {
      const own = run.curves[`seconds_${p}`];
      sums.push(sums.at(-1).map((v, i) => v + (known(own[i]) ? own[i] : 0)));
    }
    return { run, phases, sums };
  });
  const highest = totals.flatMap((t) => t.sums.at(-1));
  return totals.filter((t) => t.phases.length).map((t) => {
    const letter = runs.length > 1 ? `, ${LETTERS[runs.indexOf(t.run)]}` : "";
    const chart = {
      title: `Time of an update${letter}`, note: "Seconds, phase by phase.", form: plain, floor: 0,
    };
    const axes = new Axes(t.run.curves.update, highest, chart), keys = [];
    const told = t.phases.map((p) => `${p} ${plain(t.run.curves[`seconds_${p}`].at(-1))} s`);
    const label = `${chart.title}, newest: ${told.join(", ")}`;
    const size = `0 0 ${BOX.width} ${BOX.height}`;
    const picture = g("svg", { viewBox: size, role: "img", "aria-label": label }, axes.frame);
    t.phases.forEach((p, i) => {
      const shape = area(t.run.curves.update, t.sums[i], t.sums[i + 1], axes);
      picture.append(g("path", { d: shape, class: `phase c${i}` }));
      keys.push(key(p, `c${i} thick`, "line", `seconds_${p}`));
    });
    return card(chart, picture, keys, null);
  });
}

function drawCharts(root, runs, metrics, choose) {
  meanings = metrics;
  const cards = CHARTS.map((chart) => drawChart(chart, runs, choose)).filter(Boolean);
  const all = [...cards, ...drawPhases(runs)];
  refill(root, all.length ? all : h("p", { class: "quiet" }, "No update is recorded yet."));
}
