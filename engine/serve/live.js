// The server's page: what is asked goes to the interface beside it, and answers come step by step.
const SPEEDS = {
  turbo: ["Instant", "a few steps, with a generator that was trained for so few"],
  fast: ["Quick", "takes short cuts, good for a first look"],
  balanced: ["Balanced", "takes fewer short cuts"],
  exact: ["Thorough", "takes no short cuts"],
};
const MODES = {
  realistic: ["Natural", "only changes that a real image could show"],
  audit: ["Anything", "also unnatural changes; they give the model's tricks away"],
  official: ["Published", "the numbers of the paper, whatever the model; many steps"],
};
const METHODS_SAID = {
  lax: "LAX (trained)", gradxinput: "gradient × input", ig: "integrated gradients", smoothgrad: "SmoothGrad", gradcam: "Grad-CAM",
  occlusion: "occlusion (slow)", ablation: "ablation (slow)", rise: "RISE (slow)",
};
const LAID = { crop: "cut to a square and scaled", pad: "laid on a black square and scaled", squash: "squashed to a square" };
const OTHER = -1, SHOWN_TARGETS = 24;
const heat = document.body.dataset.heat.split(" ");

let model, shares = null, given = null, target = OTHER;
let asking = null, predicting = null, looking = null, playing = 0;
// A run on the screen: frames[i] is after step i, frames[0] the image itself.
let run = null;

// Asking the server

class Refused extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

let key = "";
try {
  key = sessionStorage.getItem("counterlens-key") || "";
} catch { /* not allowed here: it is kept in this page alone */ }

async function call(path, { json, accept = "application/json", signal } = {}) {
  const headers = { Accept: accept };
  if (json) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    const sent = json ? { method: "POST", body: JSON.stringify(json) } : {};
    answer = await fetch(path, { ...sent, headers, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused("The server cannot be reached. Is it still running, and is this device online?");
  }
  if (!answer.ok) throw refusal(answer.status, await said(answer), answer.headers.get("Retry-After"));
  return answer;
}

async function said(answer) {  // what a problem's details say; proxies answer other things
  try {
    return (await answer.json()).detail || "";
  } catch {
    return "";
  }
}

function refusal(status, detail, after) {
  const when = after ? ` There should be room in about ${after} second${after === "1" ? "" : "s"}.` : "";
  const sentence = {
    401: "This key is not accepted here.",
    404: detail || "The server does not know this.",
    408: "The image took too long to arrive. The connection may be slow.",
    409: "The run was stopped.",
    413: `The image is too large for this server (${detail}).`,
    429: `The server is busy.${when}`,
    502: `The model that this server asks gave no answer (${detail}).`,
    503: detail.startsWith("classifier: ") ? `The model that this server asks may be asked no more (${detail}).`
      : "The server is being started or stopped and takes nothing just now.",
    504: "The server had no time for this.",
  }[status] || (status >= 500 ? `Something went wrong in the server (${status}).` : `The server cannot do this: ${detail || status}.`);
  return new Refused(sentence, status);
}

function complain(error, again) {
  if (error.status === 401) return askForKey(key ? "This key is not accepted here." : "");
  if (!(error instanceof Refused)) throw error;
  const button = make("button", { type: "button", textContent: "Try again" });
  button.addEventListener("click", () => { problem(); again(); });
  problem(error.message, button);
}

function askForKey(why) {
  problem(why);
  $("door").hidden = false;
  $("board").inert = true;
  $("key").value = "";
  $("key").focus();
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(typed)) return problem("A key has letters, digits and signs only, without spaces.");
  key = typed;
  try {
    sessionStorage.setItem("counterlens-key", key);
  } catch { /* see above */ }
  problem();
  $("door").hidden = true;
  $("board").inert = false;
  if (model) renew();
  else begin();
});

async function* events(answer) {  // server-sent events: [name, data]
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done) throw new Refused("The connection broke off before the result was there.");
    const blocks = (text + part.value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const [name, data] = block.split("\n");
      if (name.startsWith("event: ")) yield [name.slice(7), JSON.parse(data.slice(6))];
    }
  }
}

const image64 = () => $("input").toDataURL("image/png").split(",")[1];
const bitmap = (base64) => createImageBitmap(new Blob([unpacked(base64)], { type: "image/png" }));

// The image, and what the model says of it

function renewed() {
  leaveResult();
  return renew();
}

async function renew() {
  stop();
  clearRun();
  given = planes($("input"));
  predicting?.abort();
  looking?.abort();
  const mine = predicting = new AbortController();
  shares = null;
  ready();
  problem();
  $("before").setAttribute("aria-busy", "true");
  try {
    const answer = await call("v1/predictions", { json: { image: image64() }, signal: mine.signal });
    if (mine.signal.aborted) return;
    ({ shares } = await answer.json());
    bars($("before"), model.labels, shares, predicted(), -1);
    if (target === predicted()) target = OTHER;
    showTargets();
    ready();
    if (model.usable_methods[0] === "lax") await look();
  } catch (error) {
    if (!mine.signal.aborted) complain(error, renew);
  } finally {
    if (predicting === mine) $("before").removeAttribute("aria-busy");
  }
}

const predicted = () => shares.indexOf(Math.max(...shares));

function ready() {
  $("run").disabled = model.guides === false || !(shares || asking);
  $("look").disabled = !shares;
}

// What is asked

function showTargets() {
  const { labels } = model, named = (i) => [i, labels[i]];
  let choices = labels.map((_, i) => named(i)), more = 0;
  if (labels.length > FEW) {
    const wanted = $("find").value.trim().toLowerCase();
    const likely = labels.map((_, i) => i);
    if (shares) likely.sort((a, b) => shares[b] - shares[a]);
    const found = likely.filter((i) => labels[i].toLowerCase().includes(wanted));
    const shown = wanted ? found.slice(0, SHOWN_TARGETS) : found.slice(0, FEW);
    more = found.length - shown.length;
    if (target !== OTHER && !shown.includes(target)) shown.unshift(target);
    choices = shown.map(named);
    $("found").textContent = !wanted ? `the ${shares ? "likeliest" : "first"} ${FEW} are shown`
      : found.length ? `${found.length} found${more ? ", go on typing" : ""}` : "no such label";
  }
  offerTargets([[OTHER, "whatever is next"], ...choices], target, (i) => {
    target = i;
    pressTarget(i);
  });
  for (const button of $("targets").children) button.disabled = Boolean(shares) && Number(button.dataset.target) === predicted();
}

function offerRadios(id, names, told, chosen) {
  $(id).closest("fieldset").hidden = !names.length;
  $(id).replaceChildren(...names.map((name) => {
    const radio = make("input", { type: "radio", name: id, value: name, checked: name === chosen });
    radio.addEventListener("change", explainChoices);
    return make("label", {}, radio, make("span", { textContent: told[name]?.[0] || name }));
  }));
}

const chosen = (id) => document.querySelector(`input[name=${id}]:checked`)?.value;

function explainChoices() {
  if (model.guides === false) {
    $("meaning").textContent = "This server's model can only be asked, so nothing here can lead a change. It takes a student of " +
      "it (--surrogate); what the model says, and where it looks, is there without one.";
    return;
  }
  const parts = [[SPEEDS, "speeds"], [MODES, "modes"]].map(([told, id]) => told[chosen(id)]?.slice().join(": "));
  $("meaning").textContent = parts.filter(Boolean).map((part) => `${part}.`).join(" ");
}

// A run

function clearRun() {
  run = null;
  pause();
  for (const id of ["output", "difference"]) {
    brush($(id)).clearRect(0, 0, size, size);
  }
  Object.assign($("step"), { max: 1, value: 0, disabled: true });
  $("play").disabled = true;
  $("at").textContent = "Nothing to see yet.";
  for (const id of ["before-line", "target-line"]) $(id).setAttribute("points", "");
  $("cursor").setAttribute("d", "");
  $("name-target").textContent = "wanted";
  $("name-source").textContent = "before";
  for (const id of ["after", "answer", "numbers", "progress"]) $(id).replaceChildren();
  $("output").setAttribute("aria-label", "The changed image, none yet");
}

function setAsking(controller) {
  asking = controller;
  $("board").classList.toggle("asking", Boolean(controller));
  $("run").textContent = controller ? "Stop" : "Show the change";
  ready();
}

function stop() {
  asking?.abort();
}

async function ask() {
  if (asking) return stop();
  clearRun();
  leaveResult();
  problem();
  const json = { image: image64(), speed: chosen("speeds"), mode: chosen("modes") };
  if (target !== OTHER) json.target = target;
  await follow("v1/counterfactuals", json, ask);
}

async function follow(path, json, again) {
  const mine = new AbortController();
  setAsking(mine);
  $("progress").textContent = "The run begins.";
  if (json && $("output").getBoundingClientRect().bottom > innerHeight) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    $("output").scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
  }
  $("at").textContent = "Waiting for its turn …";
  const own = run = { frames: [], total: 0, result: null };
  const source = shares && predicted();
  if (shares) run.frames[0] = { image: image64(), source: shares[source], target: target === OTHER ? null : shares[target] };
  try {
    if (!model.streams) {
      const answer = await (await call(path, { json, signal: mine.signal })).json();
      if (run === own) await finished(answer, "");
      return;
    }
    const answer = await call(path, { json, accept: "text/event-stream", signal: mine.signal });
    const name = (answer.headers.get("Location") || path).split("/").pop();
    for await (const [kind, data] of events(answer)) {
      if (run !== own) return;  // another image or result took its place
      if (kind === "progress") await stepped(data);
      if (kind === "error") throw refusal(data.status, data.detail);
      if (kind === "result") {
        await finished(data, name);
        break;
      }
    }
  } catch (error) {
    if (error.status === 404 && !json) {
      gone();
    } else if (mine.signal.aborted) {
      if (run === own) stopped();
    } else {
      $("at").textContent = run?.frames.length > 1 ? $("at").textContent : "Nothing to see yet.";
      complain(error, again);
    }
  } finally {
    if (asking === mine) setAsking(null);
  }
}

function stopped() {
  const done = run.frames.length - 1;
  $("progress").textContent = $("answer").textContent = done > 0
    ? `Stopped after step ${done} of ${run.total}. What there is can still be looked at.` : "Stopped.";
  if (done < 1) $("at").textContent = "Nothing to see yet.";
}

async function stepped({ step, total, image, source_confidence: source, target_confidence: wanted }) {
  const slider = $("step"), following = Number(slider.value) >= run.frames.length - 1;
  run.total = total;
  run.frames.length = Math.min(run.frames.length, step);  // another try begins at 1 again
  run.frames[step] = { image, source, target: wanted };
  Object.assign(slider, { max: total, disabled: false });
  const quarter = Math.floor(4 * step / total);
  if (quarter > Math.floor(4 * (step - 1) / total)) $("progress").textContent = `Step ${step} of ${total}.`;
  if (following) {
    slider.value = step;
    await look_at(step);
  }
  drawCourse();
}

async function finished(result, name) {
  if (result.status === "skipped") {
    clearRun();
    $("answer").textContent = "The model says this already; choose something else.";
    $("progress").textContent = $("answer").textContent;
    return;
  }
  const total = Math.max(run.total, 1);
  run.total = total;
  run.result = result;
  run.frames.length = Math.min(run.frames.length, total);
  if (!run.frames[0]) await takeInput(result.input);
  const { source, target: wanted, prediction } = result.indices;
  const { shares: now } = result.shares ? result
    : await (await call("v1/predictions", { json: { image: result.image } })).json();
  Object.assign(run.frames[0], { source: shares[source], target: shares[wanted] });
  run.frames[total] = { image: result.image, source: now[source], target: now[wanted] };
  Object.assign($("step"), { max: total, value: total, disabled: false });
  $("play").disabled = false;
  $("name-target").textContent = `${result.target} (wanted)`;
  $("name-source").textContent = `${result.source} (before)`;
  drawCourse();
  await look_at(total);
  bars($("after"), model.labels, now, prediction, wanted);
  showAnswer({ name: result.source, share: shares[source] }, { name: result.target, share: now[wanted] },
    { name: result.prediction });
  $("output").setAttribute("aria-label", `The changed image: the model says ${result.prediction}`);
  const seconds = result.total_s < 1 ? `${(1000 * result.total_s).toFixed(0)} ms` : `${result.total_s.toFixed(1)} s`;
  const told = `Mean change ${(100 * result.l1).toFixed(1)} % of the range; `;
  if (name) {
    const link = make("a", { href: `#task=${name}`, textContent: "This address" });
    $("numbers").replaceChildren(`${told}${total} steps in ${seconds}. `, link,
      ` shows it again for about ${Math.round(model.kept_s / 60)} minutes.`);
    history.replaceState(null, "", `#task=${name}`);
  } else {
    $("numbers").textContent = `${told}${seconds}.`;
  }
  $("progress").textContent = $("answer").textContent;
  document.body.dataset.answers = Number(document.body.dataset.answers || 0) + 1;
}

// Steps, looked at one by one

let lookedAt = 0;
async function look_at(step) {
  const mine = ++lookedAt, frame = run?.frames[step];
  if (!frame) return;
  const picture = frame.image && await bitmap(frame.image);
  if (mine !== lookedAt || !run) return;
  if (picture) {
    brush($("output")).drawImage(picture, 0, 0, size, size);
    if (run.frames[0]) showChange($("difference"), given, planes($("output")));
  }
  const { result, total } = run, named = (share, name) => (share == null ? [] : [`${name}: ${percent(share)}`]);
  const at = step === 0 ? "Before" : model.streams ? `Step ${step} of ${total}` : "After";
  const source = result ? result.source : shares ? model.labels[predicted()] : "before";
  const wanted = result ? result.target : target === OTHER ? "wanted" : model.labels[target];
  const chances = [...named(frame.target, wanted), ...named(frame.source, source)].join(" · ");
  $("at").textContent = `${at}\n${chances}`;
  $("step").setAttribute("aria-valuetext", `${at}. ${chances}`);
  const x = total ? 200 * step / total : 0;
  $("cursor").setAttribute("d", `M${x} 4V76`);
}

function drawCourse() {
  for (const [id, which] of [["target-line", "target"], ["before-line", "source"]]) {
    const known = run.frames.map((frame, i) => [i / run.total, frame?.[which]]).filter(([, share]) => share != null);
    line(id, known.map(([x]) => x), known.map(([, share]) => share));
  }
}

$("step").addEventListener("input", () => {
  pause();
  const last = run.frames.length - 1;
  if (Number($("step").value) > last) $("step").value = last;
  look_at(Number($("step").value));
});

function pause() {
  clearTimeout(playing);
  playing = 0;
  $("play").textContent = "▶";
  $("play").setAttribute("aria-label", "Play the steps");
}

$("play").addEventListener("click", () => {
  if (playing) return pause();
  let step = Number($("step").value);
  if (step >= run.total) step = -1;
  $("play").textContent = "❚❚";
  $("play").setAttribute("aria-label", "Pause");
  const next = async () => {
    step += 1;
    $("step").value = step;
    await look_at(step);
    if (step >= run.total) pause();
    else if (playing) playing = setTimeout(next, Math.min(400, 6000 / run.total));
  };
  playing = setTimeout(next, 0);
});

// Evidence

async function look() {
  looking?.abort();
  const mine = looking = new AbortController();
  $("evidence").setAttribute("aria-busy", "true");
  const image = given;
  try {
    const method = model.streams ? { method: $("method").value } : {};
    const answer = await call("v1/saliency", { json: { image: image64(), ...method }, signal: mine.signal });
    const found = await answer.json();
    const picture = await bitmap(found.map);
    if (mine.signal.aborted) return;
    brush($("map")).drawImage(picture, 0, 0, size, size);
    showEvidence($("map"), image, planes($("map")).subarray(0, size * size), heat);
    $("evidence").classList.remove("blank");
    showWorth(found.target, found.mask_area, found.keep[0], found.remove[0], found.msi, "");
    if (found.areas) curves(found.areas, found.keep_area, found.remove_area);
    document.body.dataset.maps = Number(document.body.dataset.maps || 0) + 1;
  } catch (error) {
    if (!mine.signal.aborted) complain(error, look);
  } finally {
    if (looking === mine) $("evidence").removeAttribute("aria-busy");
  }
}

// A result that is looked at again

const linked = () => /^#task=([\w-]{1,64})$/.exec(location.hash)?.[1];

function leaveResult() {
  if (linked()) history.replaceState(null, "", location.pathname + location.search);
}

async function takeInput(image) {
  const picture = await bitmap(image);
  brush($("input")).drawImage(picture, 0, 0, size, size);
  $("input").setAttribute("aria-label", "The image of this result");
  $("hint").hidden = true;
  filled = true;
  given = planes($("input"));
  const said = await call("v1/predictions", { json: { image: image64() } });
  ({ shares } = await said.json());
  bars($("before"), model.labels, shares, predicted(), -1);
  run.frames[0] = { image: image64() };
  showTargets();
  ready();
}

function gone() {
  clearRun();
  leaveResult();
  problem(`This result is gone: the server keeps one for about ${Math.round(model.kept_s / 60)} minutes, and forgets all when ` +
    "it is stopped. Choose an image to make a new one.");
}

async function again(name) {
  stop();
  clearRun();
  shares = null;
  await follow(`v1/counterfactuals/${name}`, null, () => again(name));
  if (run?.result && model.usable_methods[0] === "lax") await look();
}

addEventListener("hashchange", () => { if (linked()) again(linked()); });

// The beginning

async function begin() {
  if (document.body.dataset.key === "yes" && !key) return askForKey("");
  let drawn;
  try {
    [model] = (await (await call("v1/models")).json()).models;
    drawn = (await (await call("v1/samples")).json()).samples;
    $("door").hidden = true;
  } catch (error) {
    return complain(error, begin);
  }
  prepare(model.image_size, "#1a1a1a", model.fit, renewed);
  const known = Object.keys(SPEEDS), place = (name) => (known.includes(name) ? known.indexOf(name) : known.length);
  const speeds = [...model.speeds].sort((a, b) => place(a) - place(b));
  offerRadios("speeds", speeds, SPEEDS, model.default_speed || (speeds.includes("fast") ? "fast" : speeds[0]));
  offerRadios("modes", model.modes, MODES, model.default_mode);
  explainChoices();
  const many = model.labels.length > FEW;
  $("finder").hidden = !many;
  $("find").placeholder = `Search ${model.labels.length} labels`;
  $("find").setAttribute("aria-label", `Search ${model.labels.length} labels`);
  $("find").addEventListener("input", showTargets);
  showTargets();
  $("ramp").style.background = `linear-gradient(90deg, ${heat.map((code) => `#${code}`).join(", ")})`;
  $("evidence").classList.add("blank");
  $("evidence").hidden = !model.usable_methods.length;
  $("method").replaceChildren(...model.usable_methods.map((name) => make("option", { value: name, textContent: METHODS_SAID[name] || name })));
  $("method").addEventListener("change", () => { if (shares) look(); });
  $("look").addEventListener("click", look);
  $("run").addEventListener("click", ask);
  addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  const named = [model.name, model.classifier?.split(/[\\/]/).pop()].filter(Boolean).join(", ");
  $("about").textContent = `This server explains ${named}: ${model.labels.length} labels, images of ${size} by ${size} ` +
    `pixels (others are ${LAID[model.fit]}). Your image ` +
    (model.kept_s ? `stays in its memory, for ${Math.round(model.kept_s / 60)} minutes at most, and is written nowhere.`
      : "is forgotten once it is answered, and written nowhere.");
  const pictures = await Promise.all(drawn.map(async ({ name, image }) => [name, await bitmap(image)]));
  offer(pictures);
  if (linked()) await again(linked());
  else if (pictures.length) $("samples").firstElementChild.click();
  document.body.dataset.ready = "yes";
}
begin();
