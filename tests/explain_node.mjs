// Runs the explaining script without a page: attention of spans, tokens painted on planes and projections, as JSON for tests/test_explain.py.
// node explain_node.mjs <script.mjs> <setup.json> <volumes.bin> <questions.json>
import {readFileSync} from 'node:fs';
import {pathToFileURL} from 'node:url';

const [script, setupFile, volumes, questions] = process.argv.slice(2);
const js = await import(pathToFileURL(script).href);
const setup = JSON.parse(readFileSync(setupFile, 'utf8'));
const source = await js.LocalSource.open(setup, new Uint8Array(readFileSync(volumes)));
const out = [];
for (const q of JSON.parse(readFileSync(questions, 'utf8'))) {
  const found = await source.attention(q.record, q.span, q.layer, q.head);
  if (found.error || !q.plane) { out.push(found); continue; }
  const answer = q.plane === 'mip' ? await source.mip(q.angle) : await source.plane(q.plane, q.index, null, []), values = new Float32Array(answer.rows*answer.cols);
  setup.explained[q.record].sections.forEach((s, k) => {
    if (found.maps[k]) for (const ray of js.raysOf(setup, q.plane, answer)) js.paintTokens(s, found.maps[k], ...ray, answer.rows, answer.cols, values);
  });
  out.push({...found, rows: answer.rows, cols: answer.cols, values: Array.from(values)});
}
// The kernel's source asks once and gives back what it is told.
const sent = [], model = {on(_, f) { this.hear = f; }, off() { this.hear = null; }, send(m) { sent.push(m); }}, kernel = new js.KernelSource(model), asked = kernel.attention(1, [3, 9], null, 2);
model.hear({channel: 'attention', seq: sent[0].seq, view: kernel.view, maps: [[.5, .5], null], inside: null}, []);
const {view, ...question} = sent[0], found = (await asked).maps;
console.log(JSON.stringify({kernel: {asked: question, found}, out, halves: [0, 1, 1023, 1024, 0x3c00, 0x3555, 0x7bff, 0x0400, 0xc000].map(js.half)}));
