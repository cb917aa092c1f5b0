"use strict";
const $ = (id) => document.getElementById(id);
const INLINE = document.querySelector("script[data-asset]") !== null;

function problem(text) {
  $("problem").textContent = text;
  document.body.classList.remove("busy");
}

// Assets: inside this page (base64 of gzip), or files beside it.
async function asset(name) {
  if (!INLINE) {
    const answer = await fetch(name);
    if (!answer.ok) throw new Error(`${name}: cannot be loaded (${answer.status})`);
    return new Uint8Array(await answer.arrayBuffer());
  }
  const text = document.querySelector(`script[data-asset="${name}"]`).textContent;
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The model runs in a worker, so that the page answers while it computes.
const WORKER = `
let ort, chain = Promise.resolve();
const sessions = {};
onmessage = (message) => { chain = chain.then(() => answer(message.data)); };
async function answer({ id, of, load, run }) {
  try {
    if (load) {
      if (load.runtime) {
        ort = await import(URL.createObjectURL(new Blob([load.runtime], { type: "text/javascript" })));
        ort.env.wasm.numThreads = 1;
        ort.env.wasm.wasmBinary = load.wasm;
        ort.env.logLevel = "fatal";
      }
      sessions[of] = await ort.InferenceSession.create(load.model, { executionProviders: ["wasm"] });
      postMessage({ id });
    } else {
      const feeds = {};
      for (const [name, { type, data, dims }] of Object.entries(run)) feeds[name] = new ort.Tensor(type, data, dims);
      const began = performance.now();
      const results = await sessions[of].run(feeds);
      const out = {};
      for (const [name, tensor] of Object.entries(results)) out[name] = tensor.data;
      postMessage({ id, out, ms: performance.now() - began });
    }
  } catch (error) { postMessage({ id, error: String(error && error.message || error) }); }
}`;
let worker, count = 0;
const waiting = new Map();
function ask(message, transfer = []) {
  return new Promise((resolve, reject) => {
    waiting.set(++count, { resolve, reject });
    worker.postMessage({ id: count, ...message }, transfer);
  });
}

let card, evidence, size, target = -1, latest = 0, loaded = false, filled = false;

function simd() {  // the smallest module with an instruction on vectors
  return WebAssembly.validate(new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1,
    8, 0, 65, 0, 253, 15, 253, 98, 11]));
}

function pixels(canvas) {
  return canvas.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, size, size).data;
}

function planes(rgba) {
  const n = size * size, out = new Float32Array(3 * n);
  for (let i = 0; i < n; i++) for (let c = 0; c < 3; c++) out[c * n + i] = rgba[4 * i + c] / 255;
  return out;
}

function show(canvas, of) {  // of(i): [r, g, b] in 0..255
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    const [r, g, b] = of(i);
    image.data.set([r, g, b, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

const percent = (p) =>  // never broken over two lines
  (p > 0.999 && p < 1 ? ">\u00a099.9\u00a0%" : p > 0 && p < 0.001 ? "<\u00a00.1\u00a0%" : `${(100 * p).toFixed(1)}\u00a0%`);

function bars(list, shares, first, wanted) {
  const order = shares.map((_, i) => i);
  if (order.length > 12) order.sort((a, b) => shares[b] - shares[a]).splice(8);
  list.replaceChildren(...order.map((i) => {
    const item = document.createElement("li");
    item.className = (i === first ? "first" : "") + (i === wanted ? " wanted" : "");
    const name = Object.assign(document.createElement("span"), { className: "name", textContent: card.labels[i] });
    const bar = Object.assign(document.createElement("span"), { className: "bar" });
    bar.setAttribute("aria-hidden", "true");
    const fill = document.createElement("i");
    fill.style.width = `${100 * shares[i]}%`;
    bar.append(fill);
    const share = Object.assign(document.createElement("span"), { className: "share", textContent: percent(shares[i]) });
    item.append(name, bar, share);
    return item;
  }));
}

function strong(text) {
  return Object.assign(document.createElement("strong"), { textContent: text });
}

async function explain() {
  if (!loaded) return;
  const mine = ++latest;
  document.body.classList.add("busy");
  $("problem").textContent = "";
  const image = planes(pixels($("input"))), given = image.slice();
  const feeds = {
    image: { type: "float32", data: image, dims: [1, 3, size, size] },
    target: { type: "int64", data: BigInt64Array.of(BigInt(target)), dims: [1] },
  };
  const noise = card.inputs.find((input) => input.name === "noise");
  if (noise) {  // Box and Muller
    const shape = [1, ...noise.shape.slice(1)], data = new Float32Array(shape.reduce((a, b) => a * b));
    for (let i = 0; i < data.length; i++) {
      data[i] = Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
    }
    feeds.noise = { type: "float32", data, dims: shape };
  }
  const lever = 2 ** Number($("lever").value);  // stronger to the right, closer to the left
  for (const { name, default: own } of card.inputs.filter((input) => "default" in input)) {
    const times = name === "class_scale" ? lever : name === "distance_scale" ? 1 / lever : 1;
    feeds[name] = { type: "float32", data: Float32Array.of(own * times), dims: [1] };
  }
  let answer;
  try {
    answer = await ask({ of: "counterfactual", run: feeds });
  } catch (error) {
    if (mine === latest) problem(`The model could not be run: ${error.message}`);
    return;
  }
  if (mine !== latest) return;  // another image or target was asked for meanwhile
  document.body.classList.remove("busy");
  const { out, ms } = answer, n = size * size;
  const source = Number(out.source[0]), wanted = Number(out.resolved_target[0]), said = Number(out.prediction[0]);
  const after = out.counterfactual, shares = [...out.source_probabilities], then = [...out.probabilities];
  bars($("before"), shares, source, -1);
  for (const button of $("targets").children) button.disabled = Number(button.dataset.target) === source;
  if (wanted === source) {
    target = -1;
    press();
    return explain();
  }
  bars($("after"), then, said, wanted);
  show($("output"), (i) => [0, 1, 2].map((c) => 255 * after[c * n + i]));
  const change = new Float32Array(n);
  let largest = 0;
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) change[i] += (after[c * n + i] - given[c * n + i]) / 3;
    largest = Math.max(largest, Math.abs(change[i]));
  }
  const light = (i) => 26 + 60 * (given[i] + given[n + i] + given[2 * n + i]) / 3;  // the image, faintly
  show($("difference"), (i) => {
    const v = change[i] / (largest || 1), a = Math.abs(v) ** 0.7, ground = light(i);
    const [r, g, b] = v > 0 ? [255, 138, 60] : [70, 160, 255];
    return [ground + a * (r - ground), ground + a * (g - ground), ground + a * (b - ground)];
  });
  const name = (i) => card.labels[i];
  const line = $("answer");
  line.replaceChildren("The model said ", strong(name(source)), ` (${percent(shares[source])}). `);
  if (said === wanted) {
    line.append("With this change it says ", strong(name(said)), ` (${percent(then[said])}).`);
  } else {
    line.append(`With this change it still says ${name(said)}: no way to `, strong(name(wanted)),
      ` was found; that has ${percent(then[wanted])} now.`);
  }
  $("output").setAttribute("aria-label", `Counterfactual: the model says ${name(said)}`);
  $("numbers").textContent = `Mean change ${(100 * out.l1[0]).toFixed(1)} % of the range, computed in ` +
    `${ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`} on this device, one thread.`;
  document.body.dataset.answers = Number(document.body.dataset.answers || 0) + 1;
  if (evidence) await showEvidence(given, mine);
}

// The map of the prediction: its model is loaded after the first counterfactual is on the screen.
let mapped;
async function showEvidence(image, mine) {
  try {
    mapped ??= asset("saliency.onnx").then((model) => ask({ of: "saliency", load: { model } }, [model.buffer]));
    await mapped;
    if (mine !== latest) return;
    const { out, ms } = await ask({ of: "saliency", run: {
      image: { type: "float32", data: image.slice(), dims: [1, 3, size, size] },
      target: { type: "int64", data: BigInt64Array.of(-1n), dims: [1] },
    } });
    if (mine !== latest) return;
    const map = out.saliency, n = size * size, name = evidence.labels[Number(out.prediction[0])];
    const table = evidence.heat.map((code) => [0, 2, 4].map((at) => parseInt(code.slice(at, at + 2), 16)));
    show($("map"), (i) => {
      const place = map[i] * (table.length - 1), low = Math.min(Math.floor(place), table.length - 2);
      const grey = 25 + 128 * (image[i] + image[n + i] + image[2 * n + i]) / 3, weight = 0.75 * map[i];
      return [0, 1, 2].map((c) => {
        const heat = table[low][c] + (place - low) * (table[low + 1][c] - table[low][c]);
        return grey + weight * (heat - grey);
      });
    });
    $("map").setAttribute("aria-label", `Where the model sees evidence for ${name}`);
    $("h-evidence").textContent = `Where the evidence for ${name} is`;
    $("worth").replaceChildren("Shown alone, the marked ", strong(percent(out.mask_area[0])), " of the image make it ",
      strong(name), ` with ${percent(out.keep[0])}; without them it is ${percent(out.remove[0])}.`);
    curves([...out.keep_area], [...out.remove_area]);
    $("score").textContent = `MSI ${out.msi[0].toFixed(2)}; the best map would have 1. Computed in ${ms.toFixed(0)} ms.`;
    document.body.dataset.maps = Number(document.body.dataset.maps || 0) + 1;
  } catch (error) {
    if (mine === latest) problem(`The map could not be drawn: ${error.message}`);
  }
}

function curves(keep, remove) {  // over the share of pixels, the most salient first
  const most = Math.max(...evidence.areas);
  const line = (values) => values.map((v, i) => `${200 * evidence.areas[i] / most},${4 + 72 * (1 - v)}`).join(" ");
  $("keep").setAttribute("points", line(keep));
  $("remove").setAttribute("points", line(remove));
  $("most").textContent = `${(100 * most).toFixed(0)} % of the pixels`;
}

function press() {
  for (const button of $("targets").children) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.target) === target));
  }
}

function put(picture) {  // anything that drawImage takes, over the whole square
  const context = $("input").getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, size, size);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, size, size);
  filled = true;
  return explain();
}

async function open(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) return problem(`${file.name || "this"}: not an image`);
  try {
    await put(await createImageBitmap(file));
  } catch {
    problem(`${file.name || "the image"}: this browser cannot read it; try PNG or JPEG`);
  }
}

function empty() {
  const context = $("input").getContext("2d", { willReadFrequently: true });
  context.fillStyle = card.page.ground;
  context.fillRect(0, 0, size, size);
  filled = false;
}

function drawing() {
  const ink = $("ink");
  let last = null, changed = false;
  const at = (event) => {
    const box = ink.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * size, (event.clientY - box.top) / box.height * size];
  };
  const stroke = (event) => {
    const context = $("input").getContext("2d", { willReadFrequently: true }), here = at(event);
    Object.assign(context, { strokeStyle: $("colour").value, lineWidth: size / 11, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...(last || here));
    context.lineTo(here[0] + 0.01, here[1]);
    context.stroke();
    last = here;
    changed = true;
  };
  ink.addEventListener("pointerdown", (event) => {
    if (filled) empty();  // a drawing begins on an empty ground
    ink.setPointerCapture(event.pointerId);
    stroke(event);
  });
  ink.addEventListener("pointermove", (event) => { if (last) stroke(event); });
  const lift = () => {
    last = null;
    if (changed) explain();
    changed = false;
  };
  ink.addEventListener("pointerup", lift);
  ink.addEventListener("pointercancel", lift);
}

async function begin() {
  if (typeof WebAssembly !== "object" || !simd()) {
    return problem("This browser cannot run the model: it lacks WebAssembly with SIMD. Any browser since 2023 has it.");
  }
  if (INLINE && typeof DecompressionStream !== "function") {
    return problem("This browser cannot unpack the page (no DecompressionStream). Any browser since 2023 can.");
  }
  if (!INLINE && location.protocol === "file:") {
    return problem("This page loads its model from files beside it, which browsers allow over http only. Serve the " +
      "folder (python -m http.server), or use the page made with --single-page.");
  }
  document.body.classList.add("busy");
  $("answer").textContent = "Loading the model …";
  card = JSON.parse(new TextDecoder().decode(await asset("counterfactual.json")));
  size = card.image_size;
  if (card.page.saliency) {
    evidence = JSON.parse(new TextDecoder().decode(await asset("saliency.json")));
    $("ramp").style.background = `linear-gradient(90deg, ${evidence.heat.map((code) => `#${code}`).join(", ")})`;
  }
  $("evidence").hidden = !evidence;
  document.body.classList.toggle("both", Boolean(evidence));
  $("scales").hidden = !card.inputs.some((input) => input.name === "class_scale");
  const canvases = ["input", "map", "output", "difference"];
  for (const id of [...canvases, "ink"]) $(id).width = $(id).height = size;
  if (size > 96) for (const id of canvases) $(id).style.imageRendering = "auto";
  empty();
  const choices = [[-1, "anything else"], ...card.labels.map((name, i) => [i, name])];
  $("targets").replaceChildren(...choices.slice(0, 41).map(([i, name]) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.dataset.target = i;
    button.addEventListener("click", () => { target = i; press(); explain(); });
    return button;
  }));
  press();
  $("samples").replaceChildren(...card.page.samples.map(({ name, pixels: packed }) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    show(canvas, (i) => [bytes[3 * i], bytes[3 * i + 1], bytes[3 * i + 2]]);
    button.append(canvas);
    button.setAttribute("aria-label", `Sample: ${name}`);
    button.addEventListener("click", () => put(canvas));
    return button;
  }));
  $("about").textContent = `${card.page.about} Mode ${card.mode}, speed ${card.speed || "as published"}, ` +
    `${card.steps} steps; weights ${card.weights.slice(0, 12)}; counterlens ${card.versions.counterlens}, ` +
    `onnxruntime-web ${card.page.onnxruntime_web}.`;
  worker = new Worker(URL.createObjectURL(new Blob([WORKER], { type: "text/javascript" })));
  worker.onmessage = ({ data }) => {
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error) reject(new Error(data.error));
    else resolve(data);
  };
  worker.onerror = (event) => problem(`The model could not be started: ${event.message}`);
  const [runtime, wasm, model] = await Promise.all(["ort.mjs", "ort.wasm", "counterfactual.onnx"].map(asset));
  await ask({ of: "counterfactual", load: { runtime, wasm: wasm.buffer, model } }, [wasm.buffer, model.buffer]);
  loaded = true;
  drawing();
  $("file").addEventListener("change", (event) => open(event.target.files[0]));
  $("lever").addEventListener("change", explain);
  $("clear").addEventListener("click", () => { empty(); explain(); });
  addEventListener("paste", (event) => open([...event.clipboardData.files][0]));
  for (const name of ["dragenter", "dragover"]) {
    addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  }
  addEventListener("dragleave", () => $("drop").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    open(event.dataTransfer.files[0]);
  });
  if (card.page.samples.length) $("samples").firstElementChild.click();
  else explain();
}
begin().catch((error) => problem(`The page could not be started: ${error.message}`));
