// Compute the logits of a file in WebAssembly: `node wasm.mjs FOLDER JOB.json ANSWER.json`; as score.py does.
// FOLDER is where `npm install onnxruntime-web` was run.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [folder, jobPath, answerPath] = process.argv.slice(2);
const require = createRequire(join(resolve(folder), "package.json"));
const ort = require("onnxruntime-web");
const job = JSON.parse(readFileSync(jobPath, "utf-8"));

async function open(path) {
  return ort.InferenceSession.create(new Uint8Array(readFileSync(path)), { executionProviders: ["wasm"] });
}

function nested(data, shape) {
  if (shape.length === 1) return Array.from(data);
  const size = data.length / shape[0];
  return Array.from({ length: shape[0] }, (_, i) => nested(data.subarray(i * size, (i + 1) * size), shape.slice(1)));
}

async function logits(session, batch) {
  const feed = {};
  for (const [name, rows] of Object.entries(batch)) {
    if (!session.inputNames.includes(name)) continue;
    feed[name] = new ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
  }
  const result = (await session.run(feed)).logits;
  return nested(result.data, result.dims);
}

async function saturates() {
  const session = await open(job.probe);
  const result = await session.run({ x: new ort.Tensor("uint8", new Uint8Array(job.probe_width).fill(255), [1, job.probe_width]) });
  return result[session.outputNames[0]].data.some((value) => value !== 255 * 127 * job.probe_width);
}

const session = await open(job.model);
const answer = { onnxruntime: ort.env.versions.common, processor: [], saturates: await saturates(), logits: [] };
for (const batch of job.batches) answer.logits.push(await logits(session, batch));
writeFileSync(answerPath, JSON.stringify(answer));
