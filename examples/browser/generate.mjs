// A bundle's graph in the browser: token ids in, token ids out.
//
// Nothing about the model is known beforehand. Which inputs there are, how many layers, heads and how wide they are, is
// read from the session, so that the exported graph and one with attention as one operator run alike.

import * as ort from "onnxruntime-web";

const PAST = "past_key_values", PRESENT = "present";

/**
 * Open the graph of a bundle.
 *
 * @param {string} folder where the bundle is, as a URL that ends with a slash.
 * @param {string} graph the graph's name in it.
 * @returns {Promise<{session: ort.InferenceSession, heads: number, width: number}>} the session, and the shape of a
 *   cache whose graph leaves it open.
 */
export async function open(folder, graph = "model.onnx") {
  const [{ files }, { model }] = await Promise.all(
    ["manifest.json", "genai_config.json"].map((name) => readJson(folder + name)),
  );
  const graphs = files.map(({ path }) => path).filter((path) => path.endsWith(".onnx"));
  if (!graphs.includes(graph)) throw new Error(`the bundle has no ${graph}; it has ${graphs.join(", ")}.`);
  // A page has no files: ONNX Runtime has to be told where the weights are that the graph names.
  const data = files.map(({ path }) => path).filter((path) => path.endsWith(".onnx.data"));
  const session = await ort.InferenceSession.create(folder + graph, {
    executionProviders: ["wasm"],
    externalData: data.map((path) => ({ path, data: folder + path })),
  });
  return { session, heads: model.decoder.num_key_value_heads, width: model.decoder.head_size };
}

/**
 * The most likely token after a prompt, and after that, and so on.
 *
 * @param {object} model what `open` gives.
 * @param {number[]} prompt token ids.
 * @param {number} count how many at most.
 * @param {number[]} end tokens to stop behind.
 * @yields {number} a token id.
 */
export async function* generate(model, prompt, count, end = []) {
  const { session } = model;
  // Such a graph makes logits of as many of the last tokens as there are positions, and looks at nothing else of them.
  const positions = session.inputMetadata.find((input) => input.name === "position_ids");
  const first = positions?.shape[1] === "logits_to_keep" ? -1 : 0;
  let cache = emptyCache(model);
  let ids = prompt, length = 0;
  for (let made = 0; made < count; made++) {
    const past = length;
    length += ids.length;
    const known = {
      input_ids: () => row(ids),
      attention_mask: () => row(Array(length).fill(1)),
      position_ids: () => row(ids.map((_, index) => past + index).slice(first)),
    };
    const feeds = { ...cache };
    for (const name of session.inputNames) {
      if (name in cache) continue;
      if (!(name in known)) throw new Error(`the graph has an input ${name}, which this page can't give it.`);
      feeds[name] = known[name]();
    }
    const found = await session.run(feeds);
    const next = mostLikely(found.logits);
    yield next;
    if (end.includes(next)) return;
    cache = Object.fromEntries(Object.keys(cache).map((name) => [name, found[name.replace(PAST, PRESENT)]]));
    ids = [next];
  }
}

/** Keys and values of no token, `[1, heads, 0, width]`. */
function emptyCache({ session, heads, width }) {
  const inputs = session.inputMetadata.filter((input) => input.name.startsWith(`${PAST}.`));
  return Object.fromEntries(inputs.map(({ name, type, shape }) => {
    if (type !== "float32") throw new Error(`${name} is ${type}; this page gives float32.`);
    // The graph's own sizes, where it has some: names stand for sizes that it leaves open.
    const [rows, columns] = [[shape[1], heads], [shape[3], width]].map((sizes) => sizes.find(Number.isInteger));
    return [name, new ort.Tensor(type, new Float32Array(0), [1, rows, 0, columns])];
  }));
}

/** `[1, n]` of 64-bit integers. */
function row(values) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

/** The token with the largest logit behind the last one; `logits` is `[1, n, vocabulary]`. */
function mostLikely(logits) {
  const last = logits.data.subarray(logits.data.length - logits.dims.at(-1));
  return last.reduce((best, value, index) => (value > last[best] ? index : best), 0);
}

/** A file of JSON. */
export async function readJson(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response.json();
}
