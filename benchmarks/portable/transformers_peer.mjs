// Open a folder with transformers.js: `node transformers_peer.mjs FOLDER SUBFOLDER JOB.json ANSWER.json`.
// FOLDER is where `npm install @huggingface/transformers` was run, SUBFOLDER where it looks for model.onnx.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";

const [folder, subfolder, jobPath, answerPath] = process.argv.slice(2);
const require = createRequire(join(resolve(folder), "package.json"));
const { AutoModelForSequenceClassification, AutoTokenizer, env } = require("@huggingface/transformers");
const job = JSON.parse(readFileSync(jobPath, "utf-8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(job.model);

const name = basename(job.model);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForSequenceClassification.from_pretrained(name, { dtype: "fp32", subfolder });
const answer = { versions: `transformers.js ${env.version}`, ids: [], logits: [] };
for (const text of job.texts) {
  const inputs = await tokenizer(text, { truncation: true, max_length: job.max_length });
  answer.ids.push(Array.from(inputs.input_ids.data, Number));
  answer.logits.push(Array.from((await model(inputs)).logits.data));
}
writeFileSync(answerPath, JSON.stringify(answer));
