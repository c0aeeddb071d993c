// Run an engine with onnxruntime-node: greedy, one token a pass, from token ids to token ids.
//
//   npm install --ignore-scripts
//   node generate.mjs engine.onnx 24 504 3575 282 4649     (how many new tokens, then those of the prompt)
//
// Any reader of engine.tokenizer.json, such as @huggingface/tokenizers, makes tokens of text and text of tokens.
// docs/architecture.md describes the graph's inputs and outputs; engines in float32.
import { readFileSync } from 'node:fs';
import ort from 'onnxruntime-node';

const [path, count, ...prompt] = process.argv.slice(2);
const about = JSON.parse(readFileSync(path.replace(/\.onnx$/, '.json'), 'utf8'));
const { num_layers: layers, key_value_heads: heads, head_dim: size, transfer_layers: steps } = about.dims;
const session = await ort.InferenceSession.create(path);
const int64 = (values, shape) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), shape);
const kinds = ['key', 'value'].flatMap((kind) => Array.from({ length: layers }, (_, n) => [kind, n]));

let length = 0; // of the cache
let cache = kinds.map(() => new Float32Array(0));

// Append rows [heads, more, size] to a cache [heads, length, size].
function appended(old, rows, more) {
  const joined = new Float32Array(heads * (length + more) * size);
  for (let head = 0; head < heads; head++) {
    joined.set(old.subarray(head * length * size, (head + 1) * length * size), head * (length + more) * size);
    joined.set(rows.subarray(head * more * size, (head + 1) * more * size), (head * (length + more) + length) * size);
  }
  return joined;
}

// Run a chain of tokens behind the cache, keep their keys and values, and return the likeliest token after the last.
async function next(tokens) {
  const rows = tokens.length;
  const mask = Uint8Array.from({ length: rows * rows }, (_, n) => (n % rows <= Math.floor(n / rows) ? 1 : 0));
  const feed = {
    input_ids: int64(tokens, [1, rows]),
    position_ids: int64(tokens.map((_, n) => length + n), [1, rows]),
    tree_mask: new ort.Tensor('bool', mask, [1, rows, rows]),
    logit_rows: int64([rows - 1], [1, 1]),
    cache_length: int64([length], [1]),
  };
  steps.forEach((_, k) => (feed[`pseudo_parent_${k + 1}`] = int64([], [1, 0]))); // no drafts
  kinds.forEach(([kind, n], i) => {
    feed[`${kind}_cache_${n}`] = new ort.Tensor('float32', cache[i], [1, heads, length, size]);
  });
  const found = await session.run(feed);
  cache = kinds.map(([kind, n], i) => appended(cache[i], found[`${kind}_new_${n}`].data, rows));
  length += rows;
  return found.logits.data.reduce((best, value, token, all) => (value > all[best] ? token : best), 0);
}

const tokens = [];
let chain = prompt.map(Number);
do {
  tokens.push(await next(chain));
  chain = tokens.slice(-1);
} while (tokens.length < Number(count) && !about.stop_tokens.includes(chain[0]));
console.log(tokens.join(' '));
