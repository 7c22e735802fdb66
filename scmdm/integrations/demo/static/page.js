"use strict";
// Data from the server: `models` once, `samples` for each request, one for each model; frame k follows evaluation k + 1.
const state = { models: [], samples: [], at: 0, highest: 1, timer: null };
const byId = (id) => document.getElementById(id);
const COLOURS = { base: "#b4560b", adapted: "#2457c5" };
const FRAME_MS = 220;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  made.append(...children);
  return made;
}

// From almost white (decided) to violet (undecided).
function shade(entropy) {
  const x = Math.min(1, entropy / state.highest);
  const mix = (from, to) => Math.round(from + (to - from) * x);
  return [mix(250, 126), mix(247, 71), mix(254, 190)];
}
const css = (rgb) => `rgb(${rgb.join(",")})`;

function request() {
  const form = new FormData(byId("settings"));
  const sampler = { kind: form.get("kind"), steps: Number(form.get("steps")), temperature: Number(form.get("temperature")) };
  const keys = { seed: Number(form.get("seed")), sampler };
  const text = form.get("prompt");
  if (text !== "") keys[text.includes("[MASK]") ? "infill" : "prompt"] = text;
  return keys;
}

const quoted = (text) => (/^[\w./=+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function commandLine(keys) {
  const model = state.models.at(-1);
  const parts = ["scmdm sample", quoted(model.path), "num=1", `seed=${keys.seed}`];
  Object.entries(keys.sampler).forEach(([name, value]) => parts.push(`sampler.${name}=${value}`));
  ["prompt", "infill"].forEach((key) => { if (keys[key]) parts.push(quoted(`${key}=${keys[key]}`)); });
  return parts.join(" ");
}

async function denoise() {
  const keys = request();
  pause();
  setBusy(true);
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch("denoise", { method: "POST", headers, body: JSON.stringify(keys) });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    show(content, keys);
  } catch (error) {
    byId("error").textContent = error.message;
    byId("error").hidden = false;
  } finally {
    setBusy(false);
  }
}

function setBusy(busy) {
  byId("run").disabled = byId("next").disabled = busy;
  byId("run").textContent = busy ? "Denoising ..." : "Denoise";
  if (busy) byId("error").hidden = true;
}

function show(samples, keys) {
  state.samples = samples;
  const values = samples.flatMap((sample) => sample.frames.flatMap((frame) => frame.entropy));
  state.highest = Math.max(0.01, ...values.map((value) => value ?? 0));
  byId("at").max = Math.max(...samples.map((sample) => sample.frames.length));
  byId("high").textContent = state.highest.toFixed(1);
  byId("ramp").style.background = `linear-gradient(to right, ${css(shade(0))}, ${css(shade(state.highest))})`;
  byId("whose").textContent = `The ${state.models.at(-1).name} model's sample`;
  byId("command").textContent = commandLine(keys);
  byId("player").hidden = byId("below").hidden = false;
  goTo(0);
  play();
}

// Place 0 is before the first evaluation.
function goTo(place) {
  state.at = Math.max(0, Math.min(Number(byId("at").max), place));
  byId("at").value = state.at;
  const frame = state.samples[0].frames[Math.min(state.at, state.samples[0].frames.length) - 1];
  byId("where").textContent = `evaluation ${state.at} of ${byId("at").max}` + (frame ? `, t = ${frame.t.toFixed(3)}` : "");
  byId("panels").replaceChildren(...state.models.map((model, i) => panel(model, state.samples[i])));
  drawChart();
}

function panel(model, sample) {
  const frame = sample.frames[Math.min(state.at, sample.frames.length) - 1] ?? startOf(sample);
  const done = state.at >= sample.frames.length;
  const kind = model.carries ? "carries its estimate" : "forgets its estimate";
  const made = element("article", { class: `panel ${model.name}`, "data-done": done });
  made.append(element("h2", {}, `${model.name}, ${kind}`, element("span", { class: "path" }, model.path)));
  made.append(model.layout ? pictures(model, sample, frame) : cells(model, sample, frame));
  if (model.domain === "molecules") made.append(drawing(sample, frame, done));
  const evaluations = Math.min(state.at, sample.frames.length);
  const cost = `${evaluations} denoiser evaluation${evaluations === 1 ? "" : "s"}`;
  const verdict = sample.framed ? cost : `${cost}; the marks are not where the data has them`;
  made.append(element("p", { class: "note" }, done ? verdict : cost));
  if (!model.layout) made.append(element("p", { class: "result" }, done ? sample.text : ""));
  return made;
}

const startOf = (sample) => ({
  tokens: sample.given, revealed: [], drawing: null,
  entropy: sample.given.map(() => null), guess: sample.given.map(() => null),
});

function cells(model, sample, frame) {
  const made = element("div", { class: model.domain === "text" ? "cells text" : "cells" });
  const revealed = new Set(frame.revealed);
  frame.tokens.forEach((id, i) => {
    const hidden = id === model.mask_id;
    const shown = hidden ? frame.guess[i] : id;
    const name = hidden ? "hidden" : revealed.has(i) ? "new" : sample.given[i] !== model.mask_id ? "given" : "kept";
    const special = model.specials[shown];
    const cell = element("span", { class: `cell ${name}${special ? " special" : ""}` }, piece(sample, shown, special));
    if (hidden && frame.entropy[i] !== null) {
      const rgb = shade(frame.entropy[i]);
      cell.style.background = css(rgb);
      cell.style.color = frame.entropy[i] / state.highest > 0.6 ? "white" : "#5b4a78";
      cell.title = `entropy ${frame.entropy[i].toFixed(2)} nats`;
    }
    made.append(cell);
  });
  return made;
}

function piece(sample, id, special) {
  if (id === null) return " ";
  if (special === "pad") return "\u00b7";
  const text = sample.pieces[id];
  const byte = /^<0x([0-9A-F]{2})>$/.exec(text);
  if (byte) return ascii(parseInt(byte[1], 16)) ?? byte[1];
  if (special) return { "[BOS]": "\u25b7", "[EOS]": "\u25a0" }[text] ?? text;
  return text.replaceAll("\u2581", " ").replaceAll("\u0120", " ").replaceAll("\u010a", "\u21b5").replaceAll("\n", "\u21b5");
}

const ascii = (code) => (code >= 32 && code < 127 ? String.fromCharCode(code) : code === 10 ? "\u21b5" : null);

function drawing(sample, frame, done) {
  const place = frame.drawing;
  const text = done ? "The molecule" : "What the estimate would make now, most probable tokens";
  const made = element("div", { class: "drawing" });
  if (place === null) made.append(element("div", { class: "none" }, done ? "not a molecule" : "not a molecule yet"));
  else made.insertAdjacentHTML("beforeend", sample.drawings[place]);
  made.append(element("p", { class: "note" }, text));
  return made;
}

function pictures(model, sample, frame) {
  const made = element("div", { class: "pictures" });
  const guessed = frame.tokens.map((id, i) => (id === model.mask_id ? frame.guess[i] : id));
  const part = (canvas, text) => made.append(element("figure", {}, canvas, element("figcaption", {}, text)));
  part(paint(model.layout, (i) => level(model, frame.tokens[i]) ?? shade(frame.entropy[i] ?? state.highest)), "revealed, and entropy");
  part(paint(model.layout, (i) => level(model, guessed[i]) ?? [250, 247, 254]), "most probable levels");
  return made;
}

// A level of one channel, 0 to 255; null for what is none.
function level(model, id) {
  const { levels, first_id } = model.layout;
  return id === null || id < first_id ? null : Math.round(((id - first_id) * 255) / Math.max(1, levels - 1));
}

// `valueAt(position)` is a level of that channel, or a colour of the whole pixel.
function paint({ height, width, channels }, valueAt) {
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let pixel = 0; pixel < height * width; pixel++) {
    for (let c = 0; c < 3; c++) {
      const value = valueAt(1 + pixel * channels + Math.min(c, channels - 1));
      image.data[4 * pixel + c] = Array.isArray(value) ? value[c] : value;
    }
    image.data[4 * pixel + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function meanEntropy(frame) {
  const values = frame.entropy.filter((value) => value !== null);
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

function drawChart() {
  const [left, right, top, bottom] = [40, 1090, 10, 165];
  const curves = state.samples.map((sample) => sample.frames.map(meanEntropy));
  const most = Math.max(0.01, ...curves.flat().map((value) => value ?? 0));
  const x = (k) => left + ((right - left) * k) / Math.max(1, Number(byId("at").max));
  const y = (value) => bottom - ((bottom - top) * value) / most;
  const line = (x1, y1, x2, y2, colour) => `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="${colour}"/>`;
  const parts = [line(left, bottom, right, bottom, "#98a2b3"), line(left, top, left, bottom, "#98a2b3")];
  parts.push(`<text x="${left - 6}" y="${top + 5}" text-anchor="end">${most.toFixed(1)}</text>`);
  parts.push(`<text x="${left - 6}" y="${bottom + 4}" text-anchor="end">0</text>`);
  parts.push(`<text x="${(left + right) / 2}" y="${bottom + 20}" text-anchor="middle">denoiser evaluations</text>`);
  parts.push(line(x(state.at), top, x(state.at), bottom, "#c3cad6"));
  curves.forEach((curve, i) => {
    const colour = COLOURS[state.models[i].name];
    const points = curve.flatMap((value, k) => (value === null ? [] : [`${x(k + 1)},${y(value)}`]));
    parts.push(`<polyline fill="none" stroke="${colour}" stroke-width="2" points="${points.join(" ")}"/>`);
    parts.push(`<rect x="${right + 14}" y="${top + 18 * i}" width="14" height="4" fill="${colour}"/>`);
    parts.push(`<text x="${right + 34}" y="${top + 6 + 18 * i}">${state.models[i].name}</text>`);
  });
  byId("chart").innerHTML = parts.join("");
}

function play() {
  if (state.at >= Number(byId("at").max)) goTo(0);
  byId("play").innerHTML = "&#10074;&#10074;";
  state.timer = setInterval(() => (state.at >= Number(byId("at").max) ? pause() : goTo(state.at + 1)), FRAME_MS);
}

function pause() {
  clearInterval(state.timer);
  state.timer = null;
  byId("play").innerHTML = "&#9654;";
}

byId("settings").addEventListener("submit", (event) => { event.preventDefault(); denoise(); });
byId("next").addEventListener("click", () => { const seed = byId("settings").elements.seed; seed.value = Number(seed.value) + 1; denoise(); });
byId("play").addEventListener("click", () => (state.timer === null ? play() : pause()));
byId("at").addEventListener("input", (event) => { pause(); goTo(Number(event.target.value)); });

fetch("models").then((answer) => answer.json()).then((models) => {
  state.models = models;
  document.body.dataset.shows = models[0].layout ? "pictures" : "tokens";
  return denoise();
});
