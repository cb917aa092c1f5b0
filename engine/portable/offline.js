// The offline page: the model runs here, by onnxruntime-web, from this file or from files beside it.
const INLINE = document.querySelector("script[data-asset]") !== null;

// Assets: inside this page (base64 of gzip), or files beside it.
async function asset(name) {
  if (!INLINE) {
    const answer = await fetch(name);
    if (!answer.ok) throw new Error(`${name}: cannot be loaded (${answer.status})`);
    return new Uint8Array(await answer.arrayBuffer());
  }
  const text = document.querySelector(`script[data-asset="${name}"]`).textContent;
  const packed = unpacked(text);
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

let card, evidence, target = -1, latest = 0, loaded = false, touched = false;

function simd() {  // the smallest module with an instruction on vectors
  return WebAssembly.validate(new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1,
    8, 0, 65, 0, 253, 15, 253, 98, 11]));
}

async function explain() {
  if (!loaded) return;
  const mine = ++latest;
  document.body.classList.add("busy");
  $("problem").textContent = "";
  const image = planes($("input")), given = image.slice();
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
  bars($("before"), card.labels, shares, source, -1);
  for (const button of $("targets").children) button.disabled = Number(button.dataset.target) === source;
  if (wanted === source) {
    target = -1;
    pressTarget(target);
    return explain();
  }
  bars($("after"), card.labels, then, said, wanted);
  show($("output"), (i) => [0, 1, 2].map((c) => 255 * after[c * n + i]));
  showChange($("difference"), given, after);
  const named = (i, share) => ({ name: card.labels[i], share });
  showAnswer(named(source, shares[source]), named(wanted, then[wanted]), named(said));
  $("output").setAttribute("aria-label", `Counterfactual: the model says ${card.labels[said]}`);
  $("numbers").textContent = `Mean change ${(100 * out.l1[0]).toFixed(1)} % of the range, computed in ` +
    `${ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`} on this device, one thread.`;
  document.body.dataset.answers = Number(document.body.dataset.answers || 0) + 1;
  if (evidence) await explainInput(given, mine);
}

// The map of the prediction: its model is loaded after the first counterfactual is on the screen.
let mapped;
async function explainInput(image, mine) {
  try {
    mapped ??= asset("saliency.onnx").then((model) => ask({ of: "saliency", load: { model } }, [model.buffer]));
    await mapped;
    if (mine !== latest) return;
    const { out, ms } = await ask({ of: "saliency", run: {
      image: { type: "float32", data: image.slice(), dims: [1, 3, size, size] },
      target: { type: "int64", data: BigInt64Array.of(-1n), dims: [1] },
    } });
    if (mine !== latest) return;
    showEvidence($("map"), image, out.saliency, evidence.heat);
    showWorth(evidence.labels[Number(out.prediction[0])], out.mask_area[0], out.keep[0], out.remove[0], out.msi[0],
      ` Computed in ${ms.toFixed(0)} ms.`);
    curves(evidence.areas, [...out.keep_area], [...out.remove_area]);
    document.body.dataset.maps = Number(document.body.dataset.maps || 0) + 1;
  } catch (error) {
    if (mine === latest) problem(`The map could not be drawn: ${error.message}`);
  }
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
  if (card.page.saliency) {
    evidence = JSON.parse(new TextDecoder().decode(await asset("saliency.json")));
    $("ramp").style.background = `linear-gradient(90deg, ${evidence.heat.map((code) => `#${code}`).join(", ")})`;
  }
  $("evidence").hidden = !evidence;
  document.body.classList.toggle("both", Boolean(evidence));
  $("scales").hidden = !card.inputs.some((input) => input.name === "class_scale");
  prepare(card.image_size, card.page.ground, card.fit || "squash", () => {
    touched = true;
    return explain();
  });
  const choices = [[-1, "anything else"], ...card.labels.map((name, i) => [i, name])];
  offerTargets(choices.slice(0, 41), target, (i) => { target = i; pressTarget(i); explain(); });
  offer(card.page.samples.map(({ name, pixels }) => {
    const bytes = unpacked(pixels), canvas = make("canvas", { width: size, height: size });
    show(canvas, (i) => bytes.subarray(3 * i, 3 * i + 3));
    return [name, canvas];
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
  $("lever").addEventListener("change", explain);
  if (touched || !card.page.samples.length) explain();
  else $("samples").firstElementChild.click();
}
begin().catch((error) => problem(`The page could not be started: ${error.message}`));
