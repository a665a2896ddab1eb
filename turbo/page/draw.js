"use strict";
// Elements, numbers and colours. Text becomes text nodes only: nothing that a model wrote is markup.

const SVG = "http://www.w3.org/2000/svg";

const shown = (child) => child !== null && child !== undefined && child !== false;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (!shown(value)) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (shown(child)) node.append(child instanceof Node ? child : String(child)); // a text node
  }
  return node;
}

function refill(node, ...children) {
  node.replaceChildren();
  return fill(node, {}, children);
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const g = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
const LETTERS = "ABCDEF"; // of the runs, where there are several
const known = (x) => typeof x === "number" && Number.isFinite(x);

const percent = (x) => `${(100 * x).toFixed(Math.abs(x) < 0.1 && x !== 0 ? 1 : 0)}%`;

function plain(x) {
  if (!known(x)) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return x.toExponential(1);
  if (size >= 1000) return Math.round(x).toLocaleString("en");
  return String(Number(x.toPrecision(3)));
}

function duration(seconds) {
  if (!known(seconds)) return "–";
  const minutes = Math.round(seconds / 60);
  if (minutes < 1) return `${Math.round(seconds)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// Round numbers that cut [low, high] into about `count` parts.
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

// Bounds of the steps of the colour scale of KL, in nats: even on a logarithmic axis, the same in
// every episode, update and run.
const KL_STEPS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1];

function klClass(kl) {
  if (!known(kl)) return "";
  let level = 0;
  while (level < KL_STEPS.length && kl >= KL_STEPS[level]) level++;
  return `kl kl${level}`;
}

function klLegend() {
  const swatch = (i) =>
    h("span", { class: `kl kl${i}` }, i === 0 ? `< ${KL_STEPS[0]}` : KL_STEPS[i - 1]);
  const swatches = [...Array(KL_STEPS.length + 1).keys()].map(swatch);
  return h("div", { class: "legend" }, h("span", {}, "KL to the teacher, nats, from"), swatches);
}
