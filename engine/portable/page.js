"use strict";
// What the offline page and the server's page share: drawing of images, maps, curves and bars, and taking an image in.
const $ = (id) => document.getElementById(id);
const make = (tag, fields = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...inside);
  return element;
};
const strong = (text) => make("strong", { textContent: text });
const percent = (p) =>  // never broken over two lines
  (p > 0.999 && p < 1 ? ">\u00a099.9\u00a0%" : p > 0 && p < 0.001 ? "<\u00a00.1\u00a0%" : `${(100 * p).toFixed(1)}\u00a0%`);
const unpacked = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const FEW = 12;  // labels that are all shown

let size = 1, ground = "#1a1a1a", fit = "squash", filled = false, taken = () => {};

function problem(...said) {
  $("problem").replaceChildren(...said);
  document.body.classList.remove("busy");
  if (said[0]) $("problem").scrollIntoView({ block: "nearest" });
}

// Images

const brush = (canvas) => canvas.getContext("2d", { willReadFrequently: true });

function planes(canvas) {  // [3, size, size] in [0, 1]
  const n = size * size, out = new Float32Array(3 * n), rgba = brush(canvas).getImageData(0, 0, size, size).data;
  for (let i = 0; i < n; i++) for (let c = 0; c < 3; c++) out[c * n + i] = rgba[4 * i + c] / 255;
  return out;
}

function show(canvas, of) {  // of(i): [r, g, b] in 0..255
  const context = brush(canvas), image = context.createImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    const [r, g, b] = of(i);
    image.data.set([r, g, b, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

const grey = (image, i) => (image[i] + image[size * size + i] + image[2 * size * size + i]) / 3;

function showChange(canvas, before, after) {  // orange is brighter, blue is darker, over the image in faint grey
  const n = size * size, change = new Float32Array(n);
  let largest = 0.02;
  for (let i = 0; i < n; i++) {
    change[i] = grey(after, i) - grey(before, i);
    largest = Math.max(largest, Math.abs(change[i]));
  }
  show(canvas, (i) => {
    const v = change[i] / largest, a = Math.abs(v) ** 0.7, under = 26 + 60 * grey(before, i);
    return (v > 0 ? [255, 138, 60] : [70, 160, 255]).map((colour) => under + a * (colour - under));
  });
}

function showEvidence(canvas, image, map, heat) {  // map: [size * size] in [0, 1]; heat: colours as hex, low to high
  const table = heat.map((code) => [0, 2, 4].map((at) => parseInt(code.slice(at, at + 2), 16)));
  show(canvas, (i) => {
    const place = map[i] * (table.length - 1), low = Math.min(Math.floor(place), table.length - 2);
    const under = 25 + 128 * grey(image, i), weight = 0.75 * map[i];
    return [0, 1, 2].map((c) => under + weight * (table[low][c] + (place - low) * (table[low + 1][c] - table[low][c]) - under));
  });
}

// Numbers

function bars(list, labels, shares, first, wanted) {
  const order = shares.map((_, i) => i);
  if (order.length > FEW) order.sort((a, b) => shares[b] - shares[a]).splice(8);
  list.replaceChildren(...order.map((i) => {
    const fill = make("i"), bar = make("span", { className: "bar" }, fill);
    fill.style.width = `${100 * shares[i]}%`;
    bar.setAttribute("aria-hidden", "true");
    return make("li", { className: (i === first ? "first" : "") + (i === wanted ? " wanted" : "") },
      make("span", { className: "name", textContent: labels[i] }), bar,
      make("span", { className: "share", textContent: percent(shares[i]) }));
  }));
}

function line(id, xs, values) {  // x and y in [0, 1], on a plot of 200 to 80
  $(id).setAttribute("points", values.map((v, i) => `${200 * xs[i]},${4 + 72 * (1 - v)}`).join(" "));
}

function curves(areas, keep, remove) {  // over the share of pixels, the most salient first
  const most = Math.max(...areas), xs = areas.map((area) => area / most);
  line("keep", xs, keep);
  line("remove", xs, remove);
  $("most").textContent = `${(100 * most).toFixed(0)} % of the pixels`;
}

function showWorth(name, area, keep, remove, msi, took) {
  $("map").setAttribute("aria-label", `Where the model sees evidence for ${name}`);
  $("h-evidence").textContent = `Where the evidence for ${name} is`;
  $("worth").replaceChildren("Shown alone, the marked ", strong(percent(area)), " of the image make it ", strong(name),
    ` with ${percent(keep)}; without them it is ${percent(remove)}.`);
  $("score").textContent = `MSI ${msi.toFixed(2)}; the best map would have 1.${took}`;
}

function showAnswer(source, wanted, said) {  // each a label's name and share; said.share is of the wanted one
  const answer = $("answer");
  answer.replaceChildren("The model said ", strong(source.name), ` (${percent(source.share)}). `);
  if (said.name === wanted.name) {
    answer.append("With this change it says ", strong(said.name), ` (${percent(wanted.share)}).`);
  } else {
    answer.append(`With this change it still says ${said.name}: no way to `, strong(wanted.name),
      ` was found; that has ${percent(wanted.share)} now.`);
  }
}

// An image: opened, dropped, pasted, drawn, or a sample

function prepare(side, colour, how, then) {  // the pages' canvases; `then` is told of every new image
  size = side;
  fit = how;
  ground = colour;
  taken = (name) => {
    $("hint").hidden = true;
    $("input").setAttribute("aria-label", name);
    return then(name);
  };
  for (const id of ["input", "map", "output", "difference", "ink"]) $(id).width = $(id).height = size;
  if (size > 96) for (const canvas of document.querySelectorAll(".picture canvas")) canvas.style.imageRendering = "auto";
  empty();
  draw();
  $("file").addEventListener("change", (event) => {
    open(event.target.files[0]);
    event.target.value = "";  // the same file again is a change too
  });
  $("clear").addEventListener("click", () => { empty(); taken("Your image, empty"); });
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
}

function empty() {
  const context = brush($("input"));
  context.fillStyle = ground;
  context.fillRect(0, 0, size, size);
  filled = false;
}

function put(picture, name = "Your image") {  // anything that drawImage takes
  const context = brush($("input"));
  // Where it lies, as images/fitting.py has it: cropped or padded to a square, or squashed.
  const side = (fit === "pad" ? Math.max : Math.min)(picture.width, picture.height);
  const [w, h] = [picture.width, picture.height].map((n) => (fit === "squash" ? size : Math.round(size * n / side)));
  const place = [Math.ceil((size - w) / 2), Math.ceil((size - h) / 2), w, h];
  context.fillStyle = "#000";
  context.fillRect(0, 0, size, size);
  context.fillStyle = "#fff";  // under what is transparent
  context.fillRect(...place);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, ...place);
  filled = true;
  return taken(name);
}

async function open(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) return problem(`${file.name || "this"}: not an image`);
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    return problem(`${file.name || "the image"}: this browser cannot read it; try PNG or JPEG`);
  }
  await put(picture);
}

function draw() {
  const ink = $("ink");
  let last = null, changed = false;
  const stroke = (event) => {
    const box = ink.getBoundingClientRect(), context = brush($("input"));
    const here = [(event.clientX - box.left) / box.width * size, (event.clientY - box.top) / box.height * size];
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
    if (changed) taken("Your drawing");
    changed = false;
  };
  ink.addEventListener("pointerup", lift);
  ink.addEventListener("pointercancel", lift);
}

function offer(samples) {  // [name, what drawImage takes]
  $("samples").replaceChildren(...samples.map(([name, picture]) => {
    const canvas = make("canvas", { width: size, height: size });
    brush(canvas).drawImage(picture, 0, 0, size, size);
    const button = make("button", { type: "button" }, canvas);
    button.setAttribute("aria-label", `Sample: ${name}`);
    button.addEventListener("click", () => put(picture, `Sample: ${name}`));
    return button;
  }));
}

// Targets: buttons, the label's place or -1 in each

function offerTargets(choices, chosen, choose) {
  $("targets").replaceChildren(...choices.map(([i, name]) => {
    const button = make("button", { type: "button", textContent: name });
    button.dataset.target = i;
    button.addEventListener("click", () => choose(i));
    return button;
  }));
  pressTarget(chosen);
}

function pressTarget(chosen) {
  for (const button of $("targets").children) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.target) === chosen));
  }
}
