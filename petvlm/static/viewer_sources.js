// The browser's half of the viewer. One way to draw, two sources of voxels: slices asked from the kernel (KernelSource), reduced volumes at hand (LocalSource).
// Geometry, letters and names come from petvlm.scene in `setup`; nothing about orientation is assumed here. Texts reach the page as text only, and nothing is fetched.

const PATIENCE = 20000;                     // ms after which an unanswered request is given up
const INK = {cross: '#00b0ff', ruler: '#ffd600', sphere: '#76ff03', lesions: '#00e5ff', hot: '#ff8f00'};

// ---------- pure functions: no page needed (tests/test_widget.py runs them in node) ----------
export const clamp = (x, lo, hi) => Math.min(Math.max(x, lo), hi);
export const apply = (m, v) => [0, 1, 2].map(i => m[i][0]*v[0] + m[i][1]*v[1] + m[i][2]*v[2] + m[i][3]);
export const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
export const linear = ([lo, hi]) => Float32Array.from({length: 256}, (_, i) => lo + (hi - lo)*i/255);

export function base64(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

// (rows, cols) of `data` (D, H, W) in slice `index` of a plane, as drawn.
export function cut(data, shape, plane, index) {
  const stride = [shape[1]*shape[2], shape[2], 1], rows = shape[plane.rows], cols = shape[plane.cols], out = new Uint8Array(rows*cols);
  for (let r = 0; r < rows; r++) {
    const start = index*stride[plane.axis] + (plane.flip ? rows - 1 - r : r)*stride[plane.rows];
    for (let c = 0; c < cols; c++) out[r*cols + c] = data[start + c*stride[plane.cols]];
  }
  return out;
}

// What each of 256 bytes looks like: colour (r, g, b) and place in the window (0 to 1). `table` says what a byte stands for.
export function lookup(table, [lo, hi], map) {
  const rgb = new Uint8Array(768), level = new Float32Array(256);
  for (let i = 0; i < 256; i++) {
    level[i] = clamp((table[i] - lo)/(hi - lo), 0, 1);
    const j = 3*Math.round(level[i]*255);
    rgb[3*i] = map[j]; rgb[3*i + 1] = map[j + 1]; rgb[3*i + 2] = map[j + 2];
  }
  return {rgb, level};
}

// PET over CT as RGBA: the overlay reaches `opacity` at a quarter of its window, so that the CT stays readable where nothing is taken up; at opacity 1 the PET stands alone.
export function blend(ct, pet, n, opacity) {
  const out = new Uint8ClampedArray(4*n);
  for (let i = 0; i < n; i++) {
    const c = ct ? 3*ct.bytes[i] : 0, p = pet ? pet.bytes[i] : 0;
    const a = !pet ? 0 : !ct || opacity >= 1 ? 1 : opacity*Math.min(1, 4*pet.look.level[p]);
    for (let k = 0; k < 3; k++) out[4*i + k] = (ct ? ct.look.rgb[c + k]*(1 - a) : 0) + (pet ? pet.look.rgb[3*p + k]*a : 0);
    out[4*i + 3] = 255;
  }
  return out;
}

// Borders between pixels of different label: label -> [x0, y0, x1, y1, ...]; the higher label owns a border (petvlm.scene.outline).
export function outline(labels, rows, cols) {
  const found = new Map();
  const add = (k, ...line) => { if (!found.has(k)) found.set(k, []); found.get(k).push(...line); };
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) {
    const here = labels[r*cols + c];
    if (r + 1 < rows && labels[(r + 1)*cols + c] !== here) add(Math.max(here, labels[(r + 1)*cols + c]), c, r + 1, c + 1, r + 1);
    if (c + 1 < cols && labels[r*cols + c + 1] !== here) add(Math.max(here, labels[r*cols + c + 1]), c + 1, r, c + 1, r + 1);
  }
  return found;
}

export function interpolate(x, xs, ys) {
  if (x <= xs[0]) return ys[0];
  for (let i = 1; i < xs.length; i++) if (x <= xs[i]) return ys[i - 1] + (ys[i] - ys[i - 1])*(x - xs[i - 1])/(xs[i] - xs[i - 1]);
  return ys[ys.length - 1];
}

// Projection geometry (petvlm.scene.columns, mip_place): right and away of the viewer at `angle` degrees, LPS x and y.
export function sight(angle) {
  const a = angle*Math.PI/180;
  return {right: [Math.cos(a), Math.sin(a)], away: [-Math.sin(a), Math.cos(a)]};
}
export function mipPlace(g, angle, row, col, depth) {
  const {right, away} = sight(angle), u = (col - (g.cols - 1)/2)*g.mm;
  return [g.center[0] + u*right[0] + depth*away[0], g.center[1] + u*right[1] + depth*away[1], g.z + (g.rows - 1 - row)*g.dz];
}
export function mipPixel(g, angle, xyz) {
  const {right} = sight(angle), u = (xyz[0] - g.center[0])*right[0] + (xyz[1] - g.center[1])*right[1];
  return [g.rows - 1 - (xyz[2] - g.z)/g.dz, u/g.mm + (g.cols - 1)/2];
}
const ENDS = [['R', 'L'], ['A', 'P'], ['F', 'H']];
export const inWords = xyz => xyz.map((v, i) => `${ENDS[i][+(v > 0)]} ${Math.abs(v).toFixed(1)}`).join('  ') + ' mm';

// ---------- source 1: the kernel ----------
// One request in flight per channel (a plane, the projection, the reading ...). Of those that wait only the last is kept; an answer with another number than the one awaited is dropped.
// A request that is given up because the kernel is busy (a long cell, Run All) may be answered after all: then `woken` is called, and everything is asked anew.
export class KernelSource {
  constructor(model, patience = PATIENCE) {
    Object.assign(this, {model, patience, view: Math.random().toString(36).slice(2), seq: 0, flying: {}, waiting: {}, late: {}, woken: () => {}});
    this.listen = (content, buffers) => this.take(content, buffers || []);
    model.on('msg:custom', this.listen);
  }
  ask(channel, content) {
    return new Promise(resolve => {
      if (this.waiting[channel]) this.waiting[channel].resolve(null);
      this.waiting[channel] = {content, resolve};
      this.pump(channel);
    });
  }
  pump(channel) {
    if (this.flying[channel] || !this.waiting[channel]) return;
    const {content, resolve} = this.waiting[channel], seq = ++this.seq;
    delete this.waiting[channel];
    const timer = setTimeout(() => { this.late[channel] = seq; this.finish(channel, seq, {error: 'the kernel does not answer (busy, or restarted: run the cell again)'}); }, this.patience);
    this.flying[channel] = {seq, resolve, timer};
    this.model.send({...content, channel, seq, view: this.view});
  }
  take(content, buffers) {
    if (content.view !== this.view) return;
    if (this.late[content.channel] === content.seq) { delete this.late[content.channel]; this.woken(); return; }
    this.finish(content.channel, content.seq, {...content, bytes: buffers.map(b => new Uint8Array(b.buffer, b.byteOffset, b.byteLength))});
  }
  finish(channel, seq, answer) {
    const flying = this.flying[channel];
    if (!flying || flying.seq !== seq) return;
    clearTimeout(flying.timer); delete this.flying[channel];
    flying.resolve(answer);
    this.pump(channel);
  }
  async plane(name, index, windows, labels) {
    const answer = await this.ask(name, {type: 'plane', plane: name, index, windows, labels});
    if (!answer || answer.error) return answer;
    const layers = {};
    answer.layers.forEach((l, i) => { layers[l.name] = {bytes: answer.bytes[i], table: l.window && linear(l.window)}; });
    return {rows: answer.rows, cols: answer.cols, index: answer.index, layers};
  }
  async mip(angle, window) {
    const answer = await this.ask('mip', {type: 'mip', angle, window});
    return !answer || answer.error ? answer : {...answer, table: linear(answer.window), depths: answer.bytes[1], bytes: answer.bytes[0]};
  }
  async read(xyz) { const a = await this.ask('read', {type: 'read', position: xyz}); return a && (a.error ? a : a.reading); }
  async sphere(xyz, radius) { const a = await this.ask('sphere', {type: 'sphere', position: xyz, radius}); return a && (a.error ? a : a.sphere); }
  close() {
    this.model.off('msg:custom', this.listen);
    for (const f of Object.values(this.flying)) clearTimeout(f.timer);
    this.flying = {}; this.waiting = {};
  }
}

// ---------- source 2: reduced volumes at hand ----------
export class LocalSource {
  static async open(setup, bytes) {
    const source = new LocalSource(); source.setup = setup; source.local = setup.local; source.data = {};
    for (const [name, start, stop] of setup.local.blobs) {
      const stream = new Blob([bytes.subarray(start, stop)]).stream().pipeThrough(new DecompressionStream('deflate'));
      source.data[name] = new Uint8Array(await new Response(stream).arrayBuffer());
    }
    return source;
  }
  async plane(name, index, windows, labels) {
    const {shape} = this.setup.frame, p = this.setup.planes[name], layers = {};
    for (const k of [...this.setup.images, ...labels]) layers[k] = {bytes: cut(this.data[k], shape, p, index), table: this.local.tables[k]};
    return {rows: shape[p.rows], cols: shape[p.cols], index, layers};
  }
  // Half a turn is stored; the other half is its mirror image.
  async mip(wanted) {
    const {rows, cols, step, sides} = this.setup.mip, angle = Math.round(wanted/step)*step % 360;
    const n = rows*cols, mirrored = angle >= 180, at = angle % 180/step*n;
    const bytes = this.data.mip.slice(at, at + n), depths = this.data.depth.slice(at, at + n);
    if (mirrored) for (let r = 0; r < rows; r++) { bytes.subarray(r*cols, (r + 1)*cols).reverse(); depths.subarray(r*cols, (r + 1)*cols).reverse(); }
    const [low, by] = this.setup.mip.depth;
    return {rows, cols, bytes, depths, angle, sides: sides[String(angle)], table: this.local.tables.pet, depth: mirrored ? [-low, -by] : [low, by]};
  }
  at(k, ijk) { const {shape} = this.setup.frame; return this.data[k][(ijk[0]*shape[1] + ijk[1])*shape[2] + ijk[2]]; }
  // Whether a place lies in the scan itself, not in what fills the common grid around it.
  within(k, xyz) { const {shape, inverse} = this.local.scans[k]; return apply(inverse, xyz).map(Math.round).every((v, i) => v >= 0 && v < shape[i]); }
  async read(xyz) {
    const {setup} = this, ijk = apply(setup.frame.inverse, xyz).map((v, i) => clamp(Math.round(v), 0, setup.frame.shape[i] - 1)), values = {}, labels = {};
    for (const k of setup.images) values[k] = this.within(k, xyz) ? this.local.tables[k][this.at(k, ijk)] : null;
    for (const k of setup.labels) { const v = this.at(k, ijk); labels[k] = v ? setup.names[k][v] || `${k.slice(0, -1)} ${v}` : ''; }
    let side = '';
    if (setup.midline) {
      const off = xyz[0] - interpolate(xyz[2], setup.midline[0], setup.midline[1]);
      side = Math.abs(off) < setup.midline_mm ? 'midline' : `${off > 0 ? 'left' : 'right'}, ${Math.abs(off).toFixed(0)} mm from the midline`;
    }
    return {mm: xyz, place: inWords(xyz), side, values, labels};
  }
  async sphere(xyz, radius) {
    const {setup} = this, {shape, spacing} = setup.frame, c = apply(setup.frame.inverse, xyz), reach = spacing.map(s => Math.ceil(radius/s));
    let n = 0, sum = 0, top = -Infinity, at = null;
    const [lo, hi] = [-1, 1].map(sign => c.map((v, i) => clamp(Math.round(v) + sign*reach[i], 0, shape[i] - 1)));
    for (let d = lo[0]; d <= hi[0]; d++) for (let h = lo[1]; h <= hi[1]; h++) for (let w = lo[2]; w <= hi[2]; w++) {
      const mm = apply(setup.frame.affine, [d, h, w]);
      if (distance(mm, xyz) > radius || !this.within('pet', mm)) continue;
      const v = this.local.tables.pet[this.at('pet', [d, h, w])];
      n++; sum += v; if (v > top) { top = v; at = mm; }
    }
    if (!n) return {error: `no voxel of the PET lies within ${radius} mm`};
    return {suvmax: top, suvpeak: null, suvmean: sum/n, ml: n*spacing[0]*spacing[1]*spacing[2]/1000, at, unit: setup.unit};
  }
  close() { this.data = {}; }
}
