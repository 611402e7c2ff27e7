// Runs the viewer's script without a page: the same planes, readings, projections and outlines that a browser would get, as JSON for tests/test_widget.py.
// node viewer_node.mjs <script.mjs> <setup.json> <volumes.bin> <questions.json>
import {readFileSync} from 'node:fs';
import {pathToFileURL} from 'node:url';

const [script, setupFile, volumes, questions] = process.argv.slice(2);
const js = await import(pathToFileURL(script).href);
const setup = JSON.parse(readFileSync(setupFile, 'utf8'));
const source = await js.LocalSource.open(setup, new Uint8Array(readFileSync(volumes)));
const hex = bytes => Buffer.from(bytes).toString('hex'), out = [];
for (const q of JSON.parse(readFileSync(questions, 'utf8'))) {
  if (q.type === 'plane') {
    const a = await source.plane(q.plane, q.index, null, setup.labels), n = a.rows*a.cols, state = setup.state;
    const dress = (layer, window, map) => layer && {bytes: layer.bytes, look: js.lookup(layer.table, window, js.base64(setup.maps[map]))};
    const rgba = js.blend(dress(a.layers.ct, state.hu_window, 'grey'), dress(a.layers.pet, state.suv_window, state.pet_map), n, state.opacity);
    out.push({rows: a.rows, cols: a.cols, layers: Object.fromEntries(Object.entries(a.layers).map(([k, l]) => [k, hex(l.bytes)])), rgba: hex(rgba),
              lines: a.layers.lesions ? [...js.outline(a.layers.lesions.bytes, a.rows, a.cols)].map(([k, xy]) => [k, xy]) : []});
  } else if (q.type === 'mip') {
    const a = await source.mip(q.angle), g = setup.mip, values = Array.from(a.bytes, b => a.table[b]), top = values.indexOf(Math.max(...values)), row = Math.floor(top/a.cols), col = top % a.cols;
    const place = js.mipPlace(g, a.angle, row, col, a.depth[0] + a.depth[1]*a.depths[top]);
    out.push({bytes: hex(a.bytes), angle: a.angle, sides: a.sides, row, col, place, back: js.mipPixel(g, a.angle, place)});
  } else if (q.type === 'read') out.push(await source.read(q.position));
  else if (q.type === 'sphere') out.push(await source.sphere(q.position, q.radius));
}
// The kernel's source against a model that answers when it is told to.
const sent = [], model = {on(_, f) { this.hear = f; }, off() { this.hear = null; }, send(m) { sent.push(m); }};
const kernel = new js.KernelSource(model), seen = [], ask = i => kernel.ask('axial', {index: i}).then(a => seen.push([i, a && (a.error || a.index)]));
const asked = [0, 1, 2, 3].map(ask), flying = sent.length;
model.hear({channel: 'axial', seq: 99, view: kernel.view, index: 77}, []);               // a number nobody waits for
model.hear({channel: 'axial', seq: sent[0].seq, view: 'another', index: 78}, []);         // another view's answer
model.hear({channel: 'axial', seq: sent[0].seq, view: kernel.view, index: 0}, []);
model.hear({channel: 'axial', seq: sent[0].seq, view: kernel.view, index: 79}, []);       // the same once more: stale
const then = sent.length;
model.hear({channel: 'axial', seq: sent[1].seq, view: kernel.view, error: 'no such slice'}, []);
await Promise.all(asked);
// A busy kernel: the request is given up, and answered late.
const slow = {on(_, f) { this.hear = f; }, off() {}, send(m) { this.sent = m; }}, patient = new js.KernelSource(slow, 5); let woken = 0; patient.woken = () => woken++;
const given = await patient.ask('axial', {index: 4}), answered = m => slow.hear({channel: 'axial', seq: slow.sent.seq, view: patient.view, index: 4, ...m}, []);
answered({seq: 98}); answered({}); answered({});
console.log(JSON.stringify({out, kernel: {flying, then, asked: sent.map(m => m.index), late: [given.error, woken], seen: seen.sort((a, b) => a[0] - b[0])}}));
