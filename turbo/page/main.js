// Puts the page together, and keeps it new where a server is behind it.

const POLL = 2000; // milliseconds between two questions to the server
const KEYS = [
  ["j, ↓ and k, ↑", "next and previous episode"],
  ["l, → and h, ←", "next and previous step"],
  ["Page Down, Page Up, Home, End", "further in the list"],
  ["/", "search; Escape leaves it"],
  ["x", "the other run, where there are several"],
  ["c", "clear the filters"],
  ["?", "this help"],
];

// Runs whose episodes are shown.
const browsed = (runs) => runs.slice(0, 2);

function showHelp() {
  const dialog = document.getElementById("help");
  if (!dialog.open) dialog.showModal();
}

function drawHelp() {
  const rows = KEYS.map(([keys, what]) => [h("dt", {}, keys), h("dd", {}, what)]);
  refill(document.getElementById("help"), h("h2", {}, "Keys"), h("dl", {}, rows),
    h("p", { class: "quiet" }, "A click on a curve shows the episodes of that update."),
    h("form", { method: "dialog" }, h("button", {}, "close")));
}

const last = (values) => (values || []).filter(known).at(-1);

function drawHead(data, live) {
  const runs = data.runs.map((run, i) => {
    const s = run.settings, e = run.evaluations;
    const success = (who) => {
      const at = (e[`eval_${who}success_rate`] || []).findLastIndex(known);
      if (at < 0) return null;
      const [rate, low, high] = ["rate", "low", "high"].map((x) => (e[`eval_${who}success_${x}`] || [])[at]);
      const band = known(low) && known(high) ? ` [${percent(low)}, ${percent(high)}]` : "";
      return `${percent(rate)}${band}`;
    };
    const own = success(""), teacher = success("teacher_");
    const facts = [
      `${run.env}, guidance ${s.guidance ?? "unknown"}, ` +
        (run.seeds ? `mean over seeds ${s.seed.join(", ")}` : `seed ${s.seed ?? "unknown"}`) +
        (known(run.shortest) ? `, as far as seed ${run.shortest} is` : ""),
      `${last(run.curves.update) ?? 0} of ${s.updates ?? "?"} updates, ` +
        `${plain(last(run.curves.env_steps))} steps, ${duration(last(run.curves.elapsed))}`,
      own ? `success on fresh deals ${own}` : null, teacher ? `merged teacher ${teacher}` : null,
    ];
    const letter = data.runs.length > 1 ? h("span", { class: `letter c${i}` }, LETTERS[i]) : null;
    return h("div", { class: "run" }, h("h1", {}, letter, run.name),
      h("p", {}, facts.filter(Boolean).join(" · ")));
  });
  const state = live ? h("p", { id: "live", role: "status" }, "live") : null;
  refill(document.getElementById("head"), runs, state);
  document.title = `${data.runs.map((r) => r.name).join(", ")} – gtr-turbo`;
}

// All settings, those first in which runs differ.
function drawSettings(runs) {
  const both = runs.map((run) => ({ ...run.settings, ...prefixed("version of ", run.versions) }));
  const names = [...new Set(both.flatMap(Object.keys))];
  const text = (values, name) => (name in values ? JSON.stringify(values[name]) : "");
  const differs = (name) => new Set(both.map((values) => text(values, name))).size > 1;
  names.sort((a, b) => differs(b) - differs(a));
  const head = h("tr", {}, h("th", {}, "setting"), runs.map((r) => h("th", {}, r.name)));
  const rows = names.map((name) => h("tr", { class: differs(name) ? "differs" : null },
    h("th", { scope: "row" }, name), both.map((values) => h("td", {}, text(values, name)))));
  const box = document.getElementById("settings");
  refill(box, box.firstElementChild, h("table", {}, h("thead", {}, head), h("tbody", {}, rows)));
}

function prefixed(prefix, values) {
  return Object.fromEntries(Object.entries(values).map(([k, v]) => [prefix + k, v]));
}

function draw(data, live) {
  drawHead(data, live);
  const charts = document.getElementById("charts");
  drawCharts(charts, data.runs, data.metrics, (update) => window.browser.only(update));
  drawSettings(data.runs);
}

function listen(browser) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.getElementById("help").open) return;
    const target = event.target;
    if (target.matches("input, select, textarea")) {
      if (event.key === "Escape") target.blur();
      if (!(target.type === "checkbox" && "jkhl/?xc".includes(event.key))) return;
    }
    if (browser.key(event.key)) event.preventDefault();
  });
  window.addEventListener("resize", () => browser.panes.forEach((pane) => pane.drawRows()));
}

// Ask the server for news, for as long as the page is open.
async function follow(state) {
  const told = (text) => { document.getElementById("live").textContent = text; };
  for (;;) {
    await new Promise((done) => setTimeout(done, POLL));
    try {
      const answer = await fetch(`data.json?state=${state}`);
      if (answer.status === 200) {
        const data = await answer.json();
        state = data.state;
        draw(data, true);
        window.browser.setRuns(browsed(data.runs));
      } else if (answer.status !== 204) throw new Error(await answer.text());
      told("live");
    } catch (error) {
      told(`waiting for the server: ${error.message}`);
    }
  }
}

function start() {
  const live = document.documentElement.dataset.source === "live";
  const holder = document.getElementById("data");
  const data = JSON.parse(holder.textContent);
  holder.remove();
  drawHelp();
  window.browser = new Browser(
    document.getElementById("filters"), document.getElementById("panes"), browsed(data.runs));
  draw(data, live);
  if (location.hash) window.browser.recall(location.hash);
  listen(window.browser);
  if (live) follow(data.state);
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start();
