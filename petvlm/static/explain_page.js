// The explaining half: a report beside the pictures, and what was looked at while it was written. It stands behind viewer_page.js in one script.
// What the words, tokens and lattices are comes from petvlm.explain in `setup.explained`, one entry per record; texts reach the page as text only.

const LOOKS = ['selected', 'other_selected', 'layer', 'head', 'lesion', 'overlay', 'strength'];
KEYS.push(...LOOKS);
const DEEP = 12;                            // mm between the layers of tokens that a projection looks through

// ---------- pure functions: no page needed (tests/test_explain.py runs them in node) ----------
export function half(bits) {                // a float16
  const e = bits >> 10 & 31, m = bits & 1023;
  return (bits >> 15 ? -1 : 1)*(e === 0 ? m*2**-24 : e === 31 ? NaN : (1024 + m)*2**(e - 25));
}
let HALVES = null;
export function halves(bytes) {
  HALVES ||= Float32Array.from({length: 65536}, (_, i) => half(i));
  return Float32Array.from(new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength/2), b => HALVES[b]);
}
const floats = bytes => new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength/4);
const sum = x => x.reduce((a, b) => a + b, 0);

// Text tokens of a section that belong to a span of the report; all of them for the empty span (petvlm.attentionrecord.chosen).
export const tokensIn = (section, span) => [...section.spans.keys()].filter(i => !span.length || (section.spans[i][0] < span[1] && section.spans[i][1] > span[0]));
// The mean over text tokens `rows`, over layers and heads or of one: x (T, L, H, n) -> n numbers.
export function mean(x, [L, H], n, rows, layer, head) {
  const out = new Float64Array(n), all = k => [...Array(k).keys()], ls = layer == null ? all(L) : [layer], hs = head == null ? all(H) : [head];
  for (const t of rows) for (const l of ls) for (const h of hs) { const at = ((t*L + l)*H + h)*n; for (let k = 0; k < n; k++) out[k] += x[at + k]; }
  return out.map(v => v/(rows.length*ls.length*hs.length));
}

// Values of image tokens painted where they lie: pixel (r, c) is the place start + r*down + c*right (LPS mm); the largest stays (petvlm.attentionrecord.drawn).
export function paintTokens(section, values, start, down, right, rows, cols, out) {
  const m = section.inverse, turn = d => [0, 1, 2].map(i => m[i][0]*d[0] + m[i][1]*d[1] + m[i][2]*d[2]), u = apply(m, start), du = turn(down), dv = turn(right), [D, H, W] = section.size;
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) {
    const x = u[0] + r*du[0] + c*dv[0] + .5, y = u[1] + r*du[1] + c*dv[1] + .5, z = u[2] + r*du[2] + c*dv[2] + .5;
    if (!(x >= 0 && y >= 0 && z >= 0 && x < D && y < H && z < W)) continue;
    let v = 0, first = 0;
    for (const [d, h, w] of section.lattices) {
      v += values[first + (Math.floor(x*d/D)*h + Math.floor(y*h/H))*w + Math.floor(z*w/W)];
      first += d*h*w;
    }
    if (v > out[r*cols + c]) out[r*cols + c] = v;
  }
}
// Where a section's tokens are looked at most (petvlm.explain.most_looked_at), and whether a place lies in it; LPS mm.
export function mostLookedAt(section, values) {
  const [[d, h, w]] = section.lattices, [D, H, W] = section.size; let k = 0;
  for (let i = 1; i < d*h*w; i++) if (values[i] > values[k]) k = i;
  return apply(section.affine, [(Math.floor(k/(h*w)) + .5)*D/d - .5, (Math.floor(k/w) % h + .5)*H/h - .5, (k % w + .5)*W/w - .5]);
}
export const holds = (section, place) => apply(section.inverse, place).every((v, i) => v >= -.5 && v < section.size[i] - .5);
const minus = (a, b) => [a[0] - b[0], a[1] - b[1], a[2] - b[2]];
const ray = at => { const start = at(0, 0); return [start, minus(at(1, 0), start), minus(at(0, 1), start)]; };

// Where the pixels of a panel lie: [start, down, right] of a plane; of a projection one for each depth.
export function raysOf(setup, name, answer) {
  if (name === 'mip') {
    const out = [], reach = -setup.mip.depth[0];
    for (let deep = -reach; deep <= reach; deep += DEEP) out.push(ray((r, c) => mipPlace(setup.mip, answer.angle, r, c, deep)));
    return out;
  }
  const p = setup.planes[name], {shape, affine} = setup.frame;
  return [ray((r, c) => { const v = [0, 0, 0]; v[p.axis] = answer.index; v[p.rows] = p.flip ? shape[p.rows] - 1 - r : r; v[p.cols] = c; return apply(affine, v); })];
}

// ---------- the two sources ----------
KernelSource.prototype.attention = function(record, span, layer, head) { return this.ask('attention', {type: 'attention', record, span, layer, head}); };
LocalSource.prototype.attention = async function(record, span, layer, head) {
  const {sections, shape} = this.setup.explained[record], maps = [], asked = [layer, head];
  for (const [i, name] of [[0, 'layer'], [1, 'head']]) {
    if (asked[i] == null) continue;
    if (asked[i] < 0 || asked[i] >= shape[i]) return {error: `${name} is ${asked[i]}, this model has 0 to ${shape[i] - 1}`};
    if (sections[0].kept[i] !== shape[i]) return {error: `${name} ${asked[i]}: this page keeps the mean over ${shape[i]} ${name}s alone`};
  }
  let inside = 0, image = 0, even = 0, tokens = 0, hot = 0;
  sections.forEach((s, k) => {
    const rows = tokensIn(s, span), bytes = what => this.data[`${what} ${record}.${k}`];
    if (!rows.length) { maps.push(null); return; }
    const map = mean(halves(bytes('attention')), s.kept, s.weights.length, rows, layer, head), total = sum(map) || 1;
    const of = what => mean(floats(bytes(what)), shape, 1, rows, layer, head)[0]*rows.length;
    const here = of('image');
    maps.push(Array.from(map, v => v/total));
    inside += of('inside'); image += here; even += here*sum(s.weights)/s.weights.length; tokens += rows.length; hot += sum(s.weights);
  });
  if (!tokens) return {error: 'no word of the model stands here'};
  return {maps, inside: image > 0 && hot > 0 ? inside/image : null, even: image > 0 ? even/image : 0, on_image: image/tokens, tokens};
};

// ---------- one record ----------
const percent = x => `${(100*x).toPrecision(100*x >= 10 ? 3 : 2)} %`;

export class Explainer extends Viewer {
  constructor(el, setup, source, store) {                  // base constructor: build, first pictures
    super(el, setup, source, store);
    this.markLesion(false); this.choose();
  }
  get told() { return this.setup.explained[this.setup.which]; }
  get spanKey() { return this.setup.which ? 'other_selected' : 'selected'; }

  build(el) {
    super.build(el);
    const bar = this.root.querySelector('.petvlm-bar'), grid = this.root.querySelector('.petvlm-grid');
    this.inside = make('div', {class: 'petvlm-line petvlm-inside', role: 'status'});
    this.box = this.text();
    bar.after(this.controls(), make('div', {class: 'petvlm-explain'}, make('div', {class: 'petvlm-said'}, make('b', {}, this.told.title), this.box, this.inside), grid));
  }
  controls() {
    const {store, setup} = this, bar = make('div', {class: 'petvlm-bar'}), whole = make('button', {type: 'button'}, 'whole report');
    whole.addEventListener('click', () => { store.set('selected', []); if (setup.explained.length > 1) store.set('other_selected', []); });
    const slider = make('input', {type: 'range', min: 0, max: 1, step: .05, value: store.get('strength'), 'aria-label': 'strength of the overlay'});
    slider.addEventListener('input', () => store.set('strength', +slider.value));
    this.shows.strength = () => { slider.value = store.get('strength'); };
    const most = i => Math.min(...setup.explained.map(r => r.sections[0].kept[i])), of = i => Math.max(...setup.explained.map(r => r.shape[i]));
    bar.append(this.choice('show', ['attention', 'S', 'nothing'], store.get('overlay'), v => store.set('overlay', v), 'overlay'), make('label', {}, 'strength ', slider),
      this.number('layer', most(0), of(0)), this.number('head', most(1), of(1)), this.choice('choose', ['sentence', 'word'], setup.shared.unit, v => this.unit(v)), whole);
    return bar;
  }
  number(label, kept, all) {
    const names = ['mean', ...(kept > 1 ? Array(kept).keys() : [])].map(String);
    const select = make('select', {'aria-label': label}, ...names.map(v => make('option', {value: v}, v === 'mean' ? `mean of ${all}` : v)));
    select.addEventListener('change', () => this.store.set(label, select.value === 'mean' ? null : +select.value));
    this.shows[label] = () => { const v = this.store.get(label); select.value = v == null ? 'mean' : String(v); };
    this.shows[label]();
    return make('label', {}, `${label} `, select);
  }
  unit(v) { this.setup.shared.unit = v; for (const one of [this, this.twin]) if (one) one.box.classList.toggle('petvlm-by-word', v === 'word'); }

  // --- the text ---
  text() {
    const letters = Array.from(this.told.text), box = make('div', {class: 'petvlm-text'}), cut = (a, b) => letters.slice(a, b).join('');    // Python counts characters, not UTF-16
    let at = 0; this.sentences = [];
    const upTo = (to, into) => { if (to > at) into.append(cut(at, to)); at = Math.max(at, to); };
    for (const s of [...this.told.headings.map(span => ({span})), ...this.told.sentences].sort((a, b) => a.span[0] - b.span[0])) {
      upTo(s.span[0], box);
      if (!s.words) { box.append(make('b', {}, cut(...s.span))); at = s.span[1]; continue; }
      const e = make('span', {class: 'petvlm-sentence', tabIndex: 0, role: 'button'}), entry = {...s, e, parts: []};
      for (const span of s.words) {
        upTo(span[0], e);
        const w = make('span', {class: 'petvlm-word'}, cut(...span));
        e.append(w); at = span[1]; entry.parts.push({span, e: w});
      }
      upTo(s.span[1], e); box.append(e); this.sentences.push(entry);
      e.addEventListener('click', event => this.pick(entry, event.target));
      e.addEventListener('keydown', event => { if (this.stepKey(entry, event)) { event.preventDefault(); event.stopPropagation(); } });
    }
    upTo(letters.length, box);
    box.addEventListener('mouseover', event => this.peekAt(this.unitAt(event.target)));
    box.addEventListener('mouseleave', () => this.peekAt(null));
    return box;
  }
  unitAt(target) {                                         // the span of the word or sentence that an element belongs to
    const s = this.sentences.find(x => x.e.contains(target)), word = s && this.setup.shared.unit === 'word' && s.parts.find(w => w.e === target);
    return word ? word.span : s ? s.span : null;
  }
  peekAt(span) {                                           // what the pointer rests on is shown until it moves on; a choice ends it
    if (String(span) === this.peeked) return;
    this.peeked = String(span); this.peek = span;
    clearTimeout(this.waiting); this.waiting = setTimeout(() => this.choose(), 150);
  }
  pick(entry, target) {
    const span = this.unitAt(target), now = this.store.get(this.spanKey);
    const again = now.length && now[0] === span[0] && now[1] === span[1];
    this.goes = again ? '' : String(span);
    this.store.set(this.spanKey, again ? [] : [...span]);
    if (!again && this.twin) this.twin.answerTo(entry);
  }
  stepKey(entry, {key}) {                                  // Enter chooses, arrows go on by a word or a sentence
    if (key === 'Enter' || key === ' ') { this.pick(entry, entry.e); return true; }
    if (key !== 'ArrowRight' && key !== 'ArrowLeft') return false;
    const units = this.setup.shared.unit === 'word' ? this.sentences.flatMap(s => s.parts) : this.sentences, now = this.store.get(this.spanKey), by = key === 'ArrowRight' ? 1 : -1;
    const at = units.findIndex(u => u.span[0] === now[0] && u.span[1] === now[1]), next = units[at < 0 ? 0 : clamp(at + by, 0, units.length - 1)];
    this.goes = String(next.span); this.store.set(this.spanKey, [...next.span]); (next.parts ? next.e : next.e.parentElement).focus();
    return true;
  }
  // What was chosen in the other report: the sentence here that speaks of the same.
  answerTo(entry) {
    const same = s => s.about.some(a => entry.about.some(b => a.lesion === b.lesion)) || s.sites.some(k => entry.sites.includes(k)), found = this.sentences.find(same);
    if (found) this.store.set(this.spanKey, [...found.span]);
    this.say(found || !entry.sites.length ? '' : 'no sentence here speaks of it');
  }
  highlight(span) {
    const [a, b] = span.length ? span : [-1, -1];
    for (const s of this.sentences) {
      const whole = a <= s.span[0] && s.span[1] <= b;
      s.e.classList.toggle('petvlm-chosen', whole); s.e.setAttribute('aria-pressed', whole);
      for (const w of s.parts) w.e.classList.toggle('petvlm-chosen', !whole && w.span[0] < b && w.span[1] > a);
    }
  }

  // --- lesions ---
  lists() {
    const {spots, explained, knows} = this.setup; this.buttons = [];
    if (!spots.length) return [];
    for (const s of spots) {
      const said = explained.map(r => r.sentences.filter(x => x.about.some(a => a.lesion === s.label)).length), n = knows ? `; sentences: ${said.join(' and ')}` : '';
      const b = make('button', {type: 'button'}, (s.suvmax == null ? s.name : `${s.name}: SUVmax ${fixed(s.suvmax)}, ${fixed(s.ml)} ml`) + n);
      b.addEventListener('click', () => { const off = this.store.get('lesion') === s.label; this.store.set('position', [...s.mm]); this.store.set('lesion', off ? 0 : s.label); });
      this.buttons.push([s.label, b]);
    }
    return [make('div', {class: 'petvlm-list'}, make('b', {}, 'Lesions'), ...this.buttons.map(b => b[1]))];
  }
  markLesion(follow) {
    const lesion = this.store.get('lesion'), found = [];
    for (const s of this.sentences) {
      const hit = lesion ? s.about.find(a => a.lesion === lesion) : null, doubt = !!hit && hit.wrong.length > 0;
      s.e.classList.toggle('petvlm-about', !!hit); s.e.classList.toggle('petvlm-doubt', doubt);
      s.e.title = doubt ? `means this lesion; wrong: ${hit.wrong.join(', ')}` : '';
      if (hit) found.push(s);
    }
    for (const [label, b] of this.buttons || []) b.classList.toggle('petvlm-on', label === lesion);
    if (!lesion) { if (follow) this.say(''); return; }
    const name = this.setup.names.lesions[lesion] || `lesion ${lesion}`;
    this.say(this.setup.knows ? `${name}: ${found.length === 1 ? '1 sentence speaks' : `${found.length || 'no'} sentences speak`} of it` : `${name}: nobody has said what this lesion is, so no sentence can be matched`);
    if (!follow || !found.length) return;
    this.box.scrollTop = found[0].e.offsetTop - 24;
    this.store.set(this.spanKey, [...found[0].span]);
  }
  press(name, e, first) { if (name !== 'mip') this.byHand = this.tool === 'crosshair'; super.press(name, e, first); }
  release(name, e) { if (name === 'mip' && !this.panels.mip.drag.moved) this.byHand = true; super.release(name, e); }
  async read() {
    const byHand = this.byHand; this.byHand = false;     // of this question alone: the hand may have moved on before the answer comes
    this.reading = null; await super.read();
    if (!byHand || !this.reading) return;
    const spot = this.setup.spots.find(s => s.name === this.reading.labels.lesions), label = spot ? spot.label : 0;
    if (label !== this.store.get('lesion')) this.store.set('lesion', label);
  }

  // --- what was looked at ---
  changed(key) {
    if (!LOOKS.includes(key)) { super.changed(key); return; }
    if (this.shows[key]) this.shows[key]();
    if (key === this.spanKey) { this.peek = null; if (this.goes !== String(this.store.get(key))) this.goes = ''; }
    if (key === this.spanKey || key === 'layer' || key === 'head') this.choose();
    else if (key === 'lesion') this.markLesion(true);
    else if (key === 'overlay' || key === 'strength') this.repaint();
  }
  async choose() {
    const own = this.store.get(this.spanKey), span = this.peek || own, layer = this.store.get('layer'), head = this.store.get('head');
    this.highlight(own);
    const found = await this.source.attention(this.setup.which, span, layer, head);
    if (!found) return;                                    // overtaken
    if (found.error) { this.say(found.error); return; }
    const peak = (s, map) => { let first = 0, out = 0; for (const [d, h, w] of s.lattices) { out += Math.max(...map.slice(first, first + d*h*w)); first += d*h*w; } return out; };
    this.found = found; this.own = Math.max(...this.told.sections.map((s, k) => found.maps[k] ? peak(s, found.maps[k]) : 0));
    const inside = found.inside == null ? 'S is empty here' : `inside S: ${percent(found.inside)} of the attention on the image; spread evenly it would be ${percent(found.even)}`;
    const what = (name, at) => at == null ? `mean of ${name}s` : `${name} ${at}`;
    this.inside.textContent = `${this.peek ? 'under the pointer, ' : ''}${inside}\n${percent(found.on_image)} of all attention is on the image; ${found.tokens} text token${found.tokens > 1 ? 's' : ''}, ${what('layer', layer)}, ${what('head', head)}`;
    if (this.goes && this.goes === String(span)) { this.goes = ''; this.go(found.maps); }        // not by an answer to an earlier choice
    this.repaint(); if (this.twin) this.twin.repaint();
  }
  again() { super.again(); this.choose(); }
  // A text chosen by hand whose region does not hold the crosshair: to the token looked at most, so that something is seen.
  go(maps) {
    const {frame} = this.setup, seen = [...this.told.sections.entries()].filter(([k]) => maps[k]), place = this.store.get('position');
    if (seen.some(([, s]) => holds(s, place))) return;
    const [k, s] = seen.reduce((a, b) => Math.max(...maps[b[0]]) > Math.max(...maps[a[0]]) ? b : a), at = apply(frame.inverse, mostLookedAt(s, maps[k]));
    this.store.set('position', apply(frame.affine, at.map((v, i) => clamp(v, 0, frame.shape[i] - 1))));
  }
  repaint() {
    if (!this.found) return;
    this.top = Math.max(this.own, this.twin && this.twin.found ? this.twin.own : 0, 1e-9);    // one scale for both runs
    this.version = (this.version || 0) + 1;
    this.legend();
    for (const name of Object.keys(this.panels)) this.draw(name);
  }
  legend() {
    super.legend();
    if (!this.found || this.store.get('overlay') !== 'attention') return;
    const c = make('canvas', {width: 256, height: 1, class: 'petvlm-ramp'}), g = c.getContext('2d'), picture = g.createImageData(256, 1), even = 1/this.told.sections[this.found.maps.findIndex(Boolean)].weights.length;
    picture.data.set(this.tints(Float32Array.from({length: 256}, (_, i) => i/255)));
    g.putImageData(picture, 0, 0);
    this.bars.append(make('span', {class: 'petvlm-legend'}, 'share of the attention on the image: 0 ', c, ` ${percent(this.top)} a token; evenly ${percent(even)}`));
  }
  // Levels from 0 to 1 as RGBA; the strength is reached at half of the scale.
  tints(levels) {
    const map = this.ramp ||= base64(this.setup.ramp), out = new Uint8ClampedArray(4*levels.length), strength = this.store.get('strength');
    for (let i = 0; i < levels.length; i++) {
      const v = clamp(levels[i], 0, 1), j = 3*Math.round(255*v);
      out[4*i] = map[j]; out[4*i + 1] = map[j + 1]; out[4*i + 2] = map[j + 2]; out[4*i + 3] = 255*strength*Math.min(1, 2*v);
    }
    return out;
  }
  overlay(name, p) {
    const {rows, cols} = p.answer, n = rows*cols, values = new Float32Array(n), hot = new Float32Array(n), mask = this.store.get('overlay') === 'S', rays = raysOf(this.setup, name, p.answer);
    this.told.sections.forEach((s, k) => {
      if (!this.found.maps[k]) return;
      for (const r of rays) paintTokens(s, mask ? s.weights : this.found.maps[k], ...r, rows, cols, values);
      if (name !== 'mip') paintTokens(s, s.weights, ...rays[0], rows, cols, hot);
    });
    p.values = values; p.tint ||= document.createElement('canvas'); p.tint.width = cols; p.tint.height = rows;
    p.tint.getContext('2d').putImageData(new ImageData(this.tints(values.map(v => v/(mask ? 1 : this.top))), cols, rows), 0, 0);
    p.edges = name === 'mip' ? [] : outline(Uint8Array.from(hot, v => v > 0), rows, cols).get(1) || [];
    p.drawn = this.version; p.of = p.answer;
  }
  close() { clearTimeout(this.waiting); super.close(); }
  drawLines(g, p, f) {
    const name = Object.keys(this.panels).find(k => this.panels[k] === p), {rows, cols} = p.answer, shows = this.found && this.store.get('overlay') !== 'nothing';
    if (shows) {
      if (p.drawn !== this.version || p.of !== p.answer) this.overlay(name, p);
      g.imageSmoothingEnabled = false; g.drawImage(p.tint, f.ox, f.oy, cols*f.kx, rows*f.ky);
    }
    super.drawLines(g, p, f);
    if (!shows || !this.store.get('outlines').includes('hot')) return;
    g.strokeStyle = INK.hot; g.beginPath();                // S on the tokens: dashed, two pixels of four
    for (let i = 0; i < p.edges.length; i += 4) if ((p.edges[i] + p.edges[i + 1]) % 4 < 2) { g.moveTo(f.ox + p.edges[i]*f.kx, f.oy + p.edges[i + 1]*f.ky); g.lineTo(f.ox + p.edges[i + 2]*f.kx, f.oy + p.edges[i + 3]*f.ky); }
    g.stroke();
  }
}

// ---------- one record, or two side by side ----------
class Fan {                                                // one store, several listeners
  constructor(store) { this.store = store; this.ears = []; store.on(key => this.ears.forEach(hear => hear(key))); }
  get(key) { return this.store.get(key); }
  set(key, value) { this.store.set(key, value); }
  on(hear) { this.ears.push(hear); }
  close() {}
}
export class Explained {
  constructor(el, setup, source, store) {
    const shared = {unit: 'sentence'}, fan = new Fan(store), again = () => source instanceof KernelSource ? new KernelSource(source.model) : source;
    const row = make('div', {class: setup.explained.length > 1 ? 'petvlm-pair' : ''}), top = make('div', {class: 'petvlm-top'}), foot = make('div', {class: 'petvlm-top'});
    for (const e of [top, foot]) e.dataset.lmSuppressShortcuts = 'true';
    el.append(top, row, foot);
    this.store = store; this.parts = [top, row, foot];
    this.viewers = setup.explained.map((_, which) => new Explainer(row, {...setup, which, shared}, which ? again() : source, fan));
    const [a, b] = this.viewers;
    if (!b) return;
    a.twin = b; b.twin = a;
    for (const k of ['tool', 'radius']) Object.defineProperty(b, k, {get: () => a[k], set: v => { a[k] = v; }});      // one bar serves both
    top.append(...a.root.querySelectorAll('.petvlm-bar')); foot.append(...a.root.querySelectorAll('.petvlm-list'));      // they serve both
    for (const e of b.root.querySelectorAll('.petvlm-bar, .petvlm-list')) e.remove();
    b.line.remove();
  }
  close() { for (const v of this.viewers) v.close(); this.store.close(); for (const e of this.parts) e.remove(); }
}
PAGES.explain = Explained;
