// Greedy generation with llama.cpp, timed. The job is JSON on the standard input, see `run` in llama_cpp.py.

import { existsSync, readFileSync } from "node:fs";
import { getLlama } from "node-llama-cpp";

const { model: modelPath, prompts, threads, repeats } = JSON.parse(readFileSync(0, "utf8"));
const now = () => performance.now() / 1000;

const started = now();
const llama = await getLlama({ gpu: false, build: "never", maxThreads: threads });
const model = await llama.loadModel({ modelPath });
const contextSize = Math.max(...prompts.map(({ ids, count }) => ids.length + count));
const context = await model.createContext({ contextSize, threads: { ideal: threads, min: threads } });
const sequence = context.getSequence();
const load_seconds = now() - started;

async function generate(ids, count) {
  await sequence.clearHistory();
  const tokens = [], times = [now()];
  for await (const token of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
    tokens.push(token);
    times.push(now());
    if (tokens.length === count) break;
  }
  return { tokens, first: times[1] - times[0], rest: times.at(-1) - times[1] };
}

/** The process's own: what the system reports of resources begins with the peak of the process that started it. */
function peakMemory() {
  const status = "/proc/self/status";
  const own = existsSync(status) && /^VmHWM:\s*(\d+) kB/m.exec(readFileSync(status, "utf8"));
  return 1024 * (own ? Number(own[1]) : process.resourceUsage().maxRSS);
}

const found = [];
for (const { ids, count } of prompts) {
  await generate(ids, Math.min(2, count));
  const runs = [];
  for (let run = 0; run < repeats; run++) runs.push(await generate(ids, count));
  found.push(runs);
}
console.log(JSON.stringify({ load_seconds, peak_memory_bytes: peakMemory(), prompts: found }));
process.exit(0);
