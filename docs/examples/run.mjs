// A counterfactual in Node: node run.mjs counterfactual.onnx digit.png [target] [changed.png]
// npm install --ignore-scripts onnxruntime-node pngjs
import { readFileSync, writeFileSync } from "node:fs";
import ort from "onnxruntime-node";
import { PNG } from "pngjs";

const stop = (text) => { console.error(text); process.exit(1); };
const [model, picture, target = "-1", out = "changed.png"] = process.argv.slice(2);
if (!picture) stop("node run.mjs counterfactual.onnx digit.png [target] [changed.png]");
const card = JSON.parse(readFileSync(model.replace(/\.onnx$/, ".json")));
const size = card.image_size, n = size * size;
const png = PNG.sync.read(readFileSync(picture));
if (png.width !== size || png.height !== size) stop(`${picture}: expected ${size}x${size} pixels`);

const image = new Float32Array(3 * n); // red, green and blue planes in [0, 1]
for (let i = 0; i < n; i++) for (let c = 0; c < 3; c++) image[c * n + i] = png.data[4 * i + c] / 255;
const session = await ort.InferenceSession.create(model, { intraOpNumThreads: 1 });
const feeds = {
  image: new ort.Tensor("float32", image, [1, 3, size, size]),
  target: new ort.Tensor("int64", BigInt64Array.of(BigInt(target)), [1]), // -1: the runner-up
};
for (const { name, default: own } of card.inputs.filter((input) => "default" in input)) {
  feeds[name] = new ort.Tensor("float32", Float32Array.of(own), [1]);
}
const began = performance.now();
const answer = await session.run(feeds);
const seconds = (performance.now() - began) / 1000;

const [source, wanted, said] = ["source", "resolved_target", "prediction"].map((k) => Number(answer[k].data[0]));
if (said < 0) stop("image or target cannot be used; counterfactual.json says what is expected");
for (let i = 0; i < n; i++) {
  for (let c = 0; c < 3; c++) png.data[4 * i + c] = Math.round(255 * answer.counterfactual.data[c * n + i]);
}
writeFileSync(out, PNG.sync.write(png));
const [from, to, now] = [source, wanted, said].map((i) => card.labels[i]);
console.log(JSON.stringify({ from, to, now, l1: answer.l1.data[0], seconds, file: out }));
