// The page half of the viewer: controls, pictures, hands. It stands behind viewer_sources.js and page.js in one script.

const KEYS = ['position', 'suv_window', 'hu_window', 'opacity', 'pet_map', 'angle', 'outlines'];

// ---------- the page ----------
const fixed = v => v == null ? 'none' : Math.abs(v) >= 100 ? v.toFixed(0) : v.toFixed(2);

export class Viewer {
  constructor(el, setup, source, store) {
    Object.assign(this, {setup, source, store, zoom: 1, tool: 'crosshair', ruler: null, ball: null, panels: {}, maps: {}, shows: {}});
    for (const [name, text] of Object.entries(setup.maps)) this.maps[name] = base64(text);
    this.build(el);
    store.on(key => this.changed(key));
    source.woken = () => this.again();
    this.observer = new ResizeObserver(() => this.layout());
    for (const p of Object.values(this.panels)) this.observer.observe(p.canvas);
    this.layout(); this.follow(); this.askMip(); this.read();
  }

  // --- controls ---
  build(el) {
    const {setup} = this, root = make('div', {class: 'petvlm-viewer'}), bar = make('div', {class: 'petvlm-bar'});
    root.dataset.lmSuppressShortcuts = 'true';             // JupyterLab leaves the keys to us
    if (setup.images.includes('pet')) bar.append(...this.windowControl('suv_window', setup.unit, setup.presets.pet), this.choice('PET', Object.keys(setup.maps), this.store.get('pet_map'), v => this.store.set('pet_map', v), 'pet_map'));
    if (setup.images.includes('ct')) bar.append(...this.windowControl('hu_window', 'HU', setup.presets.ct));
    if (setup.images.length === 2) {
      const slider = make('input', {type: 'range', min: 0, max: 1, step: .05, value: this.store.get('opacity'), 'aria-label': 'opacity of PET'});
      slider.addEventListener('input', () => this.store.set('opacity', +slider.value));
      this.shows.opacity = () => { slider.value = this.store.get('opacity'); };
      bar.append(make('label', {}, 'PET over CT ', slider));
    }
    const boxes = setup.labels.map(k => [k, make('input', {type: 'checkbox'})]);
    this.shows.outlines = () => { for (const [k, box] of boxes) box.checked = this.store.get('outlines').includes(k); };
    this.shows.outlines();
    for (const [k, box] of boxes) {
      box.addEventListener('change', () => this.store.set('outlines', boxes.filter(b => b[1].checked).map(b => b[0])));
      bar.append(make('label', {}, box, ` ${(setup.captions || {})[k] || k}`));
    }
    const tools = setup.images.includes('pet') ? ['crosshair', 'distance', 'sphere'] : ['crosshair', 'distance'];
    bar.append(this.choice('tool', tools, this.tool, v => { this.tool = v; }));
    this.radius = make('input', {type: 'number', min: 1, max: 100, step: 1, value: 10, 'aria-label': 'radius of the sphere in mm'});
    if (setup.images.includes('pet')) bar.append(make('label', {}, 'radius ', this.radius, ' mm'));
    const grid = make('div', {class: 'petvlm-grid'});
    for (const name of [...Object.keys(setup.planes), ...(setup.mip ? ['mip'] : [])]) grid.append(this.panel(name));
    this.line = make('div', {class: 'petvlm-line', role: 'status'}); this.note = make('div', {class: 'petvlm-line'});
    this.bars = make('div', {class: 'petvlm-bars'});
    root.append(bar, grid, this.line, this.note, this.bars, ...this.lists());
    el.append(root); this.root = root; root.petvlm = this; this.legend();
  }
  choice(label, names, chosen, act, key) {
    const select = make('select', {'aria-label': label}, ...names.map(n => make('option', {value: n, selected: n === chosen}, n)));
    select.addEventListener('change', () => act(select.value));
    if (key) this.shows[key] = () => { select.value = this.store.get(key); };
    return make('label', {}, `${label} `, select);
  }
  windowControl(key, label, presets) {
    const names = Object.keys(presets), box = (i, what) => make('input', {type: 'number', step: 'any', value: this.store.get(key)[i], 'aria-label': `${label} ${what}`});
    const low = box(0, 'from'), high = box(1, 'to'), same = n => presets[n][0] === this.store.get(key)[0] && presets[n][1] === this.store.get(key)[1];
    const menu = make('select', {'aria-label': `${label} window`}, ...[...names, 'own'].map(n => make('option', {value: n}, n)));
    const show = () => { [low.value, high.value] = this.store.get(key); menu.value = names.find(same) || 'own'; };
    menu.addEventListener('change', () => { if (presets[menu.value]) this.store.set(key, [...presets[menu.value]]); });
    for (const b of [low, high]) b.addEventListener('change', () => { if (+low.value < +high.value) this.store.set(key, [+low.value, +high.value]); else show(); });
    this.shows[key] = show; show();
    return [make('label', {}, `${label} `, menu), make('label', {}, low, ' to ', high)];
  }
  lists() {
    const {setup} = this, out = [];
    if (setup.spots.length) out.push(make('div', {class: 'petvlm-list'}, make('b', {}, 'Lesions'), ...setup.spots.map(s => {
      const b = make('button', {type: 'button'}, s.suvmax == null ? s.name : `${s.name}: SUVmax ${fixed(s.suvmax)}, ${fixed(s.ml)} ml`);
      b.addEventListener('click', () => this.store.set('position', [...s.mm]));
      return b;
    })));
    for (const [head, text] of setup.reports) out.push(make('h3', {}, head), make('p', {class: 'petvlm-report'}, text));
    return out;
  }
  legend() {
    const bar = (key, label, map) => {
      const c = make('canvas', {width: 256, height: 1, class: 'petvlm-ramp'}), g = c.getContext('2d'), picture = g.createImageData(256, 1), [lo, hi] = this.store.get(key);
      for (let i = 0; i < 256; i++) picture.data.set([map[3*i], map[3*i + 1], map[3*i + 2], 255], 4*i);
      g.putImageData(picture, 0, 0);
      return make('span', {class: 'petvlm-legend'}, `${label}: ${lo} `, c, ` ${hi}`);
    };
    const has = k => this.setup.images.includes(k), out = [];
    if (has('pet')) out.push(bar('suv_window', `${this.setup.unit} (g/ml), slices`, this.maps[this.store.get('pet_map')]), bar('suv_window', `${this.setup.unit} (g/ml), MIP`, this.maps['inverted grey']));
    if (has('ct')) out.push(bar('hu_window', 'CT (HU)', this.maps.grey));
    this.bars.replaceChildren(...out, ...(this.setup.precision ? [make('span', {}, this.setup.precision)] : []));
  }

  // --- what changed, what follows ---
  changed(key) {
    if (this.shows[key]) this.shows[key]();
    if (key === 'position') { this.follow(false); this.draw('mip'); this.read(); }
    else if (key === 'angle') this.askMip();
    else if (key === 'outlines') this.follow();
    else {
      for (const name of Object.keys(this.panels)) { this.colour(name); this.draw(name); }
      this.legend();
      if (key.endsWith('_window')) { this.follow(); if (key === 'suv_window') this.askMip(); }
    }
  }
  ijk() { return apply(this.setup.frame.inverse, this.store.get('position')).map((v, i) => clamp(v, 0, this.setup.frame.shape[i] - 1)); }
  slice(name) { return Math.round(this.ijk()[this.setup.planes[name].axis]); }
  follow(all = true) {
    for (const name of Object.keys(this.setup.planes)) {
      const p = this.panels[name], index = this.slice(name);
      this.draw(name);
      if (all || p.wanted !== index) { p.wanted = index; this.ask(name, index); }
    }
  }
  async ask(name, index) {
    const answer = await this.source.plane(name, index, {pet: this.store.get('suv_window'), ct: this.store.get('hu_window')}, this.store.get('outlines'));
    if (!answer) return;                                   // overtaken by a later request
    if (answer.error) { this.say(answer.error); return; }
    this.panels[name].answer = answer; this.colour(name); this.draw(name);
  }
  async askMip() {
    if (!this.panels.mip) return;
    const angle = this.store.get('angle'), answer = await this.source.mip(angle, this.store.get('suv_window'));
    if (!answer) return;
    if (answer.error) { this.say(answer.error); return; }
    this.panels.mip.answer = answer; this.colour('mip'); this.draw('mip');
  }
  async read() {
    const r = await this.source.read(this.store.get('position'));
    if (!r) return;
    if (r.error) { this.say(r.error); return; }
    this.reading = r;
    const about = this.setup.precision ? 'about ' : '', words = [];
    for (const k of this.setup.images) words.push(r.values[k] == null ? `outside the ${k.toUpperCase()}` : k === 'pet' ? `${this.setup.unit} ${about}${fixed(r.values[k])}` : `HU ${about}${r.values[k].toFixed(0)}`);
    this.line.textContent = [...words, r.place, r.side, ...Object.values(r.labels)].filter(Boolean).join('   |   ');
  }
  say(text) { this.note.textContent = text; }
  again() { this.say(''); this.follow(); this.askMip(); this.read(); }      // the kernel was busy and answers now

  // --- panels ---
  panel(name) {
    const canvas = make('canvas', {tabIndex: 0, class: 'petvlm-canvas', 'aria-label': name === 'mip' ? 'maximum-intensity projection' : `${name} plane`});
    const p = this.panels[name] = {canvas, picture: document.createElement('canvas'), lines: []};
    canvas.addEventListener('pointerdown', e => {
      canvas.focus({preventScroll: true}); canvas.setPointerCapture(e.pointerId);
      p.drag = {x: e.offsetX, y: e.offsetY, angle: this.store.get('angle'), moved: false, from: this.store.get('position')};
      this.press(name, e, true); e.preventDefault();
    });
    canvas.addEventListener('pointermove', e => { if (!p.drag) return; p.drag.moved ||= Math.hypot(e.offsetX - p.drag.x, e.offsetY - p.drag.y) > 3; this.press(name, e, false); });
    canvas.addEventListener('pointerup', e => { if (p.drag) this.release(name, e); p.drag = null; this.draw(name); });
    canvas.addEventListener('pointercancel', () => { p.drag = null; this.draw(name); });
    canvas.addEventListener('wheel', e => { e.preventDefault(); this.wheel(name, e); }, {passive: false});
    canvas.addEventListener('keydown', e => { if (this.key(name, e)) { e.preventDefault(); e.stopPropagation(); } });
    return canvas;
  }
  layout() {
    const dpr = globalThis.devicePixelRatio || 1;
    for (const [name, p] of Object.entries(this.panels)) {
      const w = Math.round(p.canvas.clientWidth*dpr), h = Math.round(p.canvas.clientHeight*dpr);
      if (w && h && (p.canvas.width !== w || p.canvas.height !== h)) { p.canvas.width = w; p.canvas.height = h; }
      this.draw(name);
    }
  }
  // Millimetres of a picture's pixel: [along columns, along rows].
  pixel(name) {
    const {planes, frame, mip} = this.setup;
    return name === 'mip' ? [mip.mm, mip.dz] : [frame.spacing[planes[name].cols], frame.spacing[planes[name].rows]];
  }
  sides(name) {
    return name === 'mip' ? this.panels.mip.answer.sides : this.setup.planes[name].sides;
  }
  // Row and column of a place (fractions; the middle of pixel 0 is 0).
  spot(name, xyz) {
    if (name === 'mip') return mipPixel(this.setup.mip, this.panels.mip.answer.angle, xyz);
    const p = this.setup.planes[name], v = apply(this.setup.frame.inverse, xyz);
    return [p.flip ? this.setup.frame.shape[p.rows] - 1 - v[p.rows] : v[p.rows], v[p.cols]];
  }
  fit(name) {
    const p = this.panels[name], {rows, cols} = p.answer, [sx, sy] = this.pixel(name), {width, height} = p.canvas;
    const scale = Math.min(width/(cols*sx), height/(rows*sy))*this.zoom, kx = sx*scale, ky = sy*scale;
    let ox = (width - cols*kx)/2, oy = (height - rows*ky)/2;
    // while a button is down the view stands still
    if (this.zoom > 1) { const [r, c] = this.spot(name, p.drag ? p.drag.from : this.store.get('position')); ox = width/2 - (c + .5)*kx; oy = height/2 - (r + .5)*ky; }
    return {kx, ky, ox, oy, scale};
  }
  hit(name, e) {
    const p = this.panels[name], f = this.fit(name), k = p.canvas.width/p.canvas.clientWidth;
    return [(e.offsetY*k - f.oy)/f.ky - .5, (e.offsetX*k - f.ox)/f.kx - .5];
  }
  place(name, [row, col]) {
    const p = this.setup.planes[name], {shape, affine} = this.setup.frame, v = this.ijk();
    v[p.axis] = this.panels[name].answer.index;
    v[p.rows] = clamp(p.flip ? shape[p.rows] - 1 - row : row, 0, shape[p.rows] - 1); v[p.cols] = clamp(col, 0, shape[p.cols] - 1);
    return apply(affine, v);
  }

  // --- hands ---
  press(name, e, first) {
    const p = this.panels[name];
    if (!p.answer) return;
    if (name === 'mip') { if (p.drag.moved) this.turn(p.drag.angle - this.setup.mip.step*Math.round((e.offsetX - p.drag.x)/12)); return; }
    const xyz = this.place(name, this.hit(name, e));
    if (this.tool === 'distance') {
      this.ruler = {name, index: p.answer.index, a: first ? xyz : this.ruler ? this.ruler.a : xyz, b: xyz};
      this.say(`distance ${distance(this.ruler.a, this.ruler.b).toFixed(1)} mm`); this.draw(name);
    } else this.store.set('position', xyz);
  }
  release(name, e) {
    const p = this.panels[name];
    if (!p.answer) return;
    if (name === 'mip' && !p.drag.moved) {
      const [r, c] = this.hit(name, e).map(Math.round), {rows, cols, depths, depth, angle} = p.answer;
      if (r < 0 || c < 0 || r >= rows || c >= cols) return;
      this.store.set('position', mipPlace(this.setup.mip, angle, r, c, depth[0] + depth[1]*depths[r*cols + c]));
    }
    if (name !== 'mip' && this.tool === 'sphere') this.measure();
  }
  async measure() {
    const at = this.store.get('position'), radius = +this.radius.value, s = await this.source.sphere(at, radius);
    if (!s) return;
    if (s.error) { this.say(s.error); return; }
    this.ball = {at, radius};
    const about = this.setup.precision ? 'about ' : '', peak = s.suvpeak == null ? '' : `, SUVpeak ${fixed(s.suvpeak)}`;
    this.say(`sphere of ${radius} mm radius (${fixed(s.ml)} ml): ${about}SUVmax ${fixed(s.suvmax)}${peak}, SUVmean ${fixed(s.suvmean)} (${s.unit})`);
    for (const n of Object.keys(this.setup.planes)) this.draw(n);
  }
  turn(angle) { this.store.set('angle', ((angle % 360) + 360) % 360); }
  wheel(name, e) {
    if (e.ctrlKey) { this.enlarge(e.deltaY < 0 ? 1.25 : .8); return; }
    const p = this.panels[name]; p.rolled = (Math.abs(e.deltaY) >= 40 ? 0 : p.rolled || 0) + e.deltaY;
    if (Math.abs(p.rolled) < 40) return;
    const step = p.rolled > 0 ? -1 : 1; p.rolled = 0;
    if (name === 'mip') this.turn(this.store.get('angle') + step*this.setup.mip.step); else this.move(name, 0, 0, step);
  }
  enlarge(by) { this.zoom = clamp(this.zoom*by, 1, 10); if (this.zoom < 1.01) this.zoom = 1; for (const n of Object.keys(this.panels)) this.draw(n); }
  move(name, down, right, through) {
    const p = this.setup.planes[name], v = this.ijk().map(Math.round);
    v[p.rows] += p.flip ? -down : down; v[p.cols] += right; v[p.axis] += through;
    this.store.set('position', apply(this.setup.frame.affine, v.map((x, i) => clamp(x, 0, this.setup.frame.shape[i] - 1))));
  }
  key(name, e) {
    const steps = {ArrowUp: [-1, 0, 0], ArrowDown: [1, 0, 0], ArrowLeft: [0, -1, 0], ArrowRight: [0, 1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1]}[e.key];
    if (name === 'mip' && (e.key === 'ArrowLeft' || e.key === 'ArrowRight')) this.turn(this.store.get('angle') + (e.key === 'ArrowLeft' ? 1 : -1)*this.setup.mip.step);
    else if (steps && name !== 'mip') this.move(name, ...steps);
    else if (e.key === '+' || e.key === '=') this.enlarge(1.25);
    else if (e.key === '-') this.enlarge(.8);
    else if (e.key === 'Home') this.store.set('position', [...this.setup.start]);
    else return false;
    return true;
  }

  // --- pictures ---
  colour(name) {
    const p = this.panels[name], a = p.answer;
    if (!a) return;
    const n = a.rows*a.cols, suv = this.store.get('suv_window');
    const dress = (layer, window, map) => layer && {bytes: layer.bytes, look: lookup(layer.table, window, map)};
    const rgba = name === 'mip' ? blend(null, dress(a, suv, this.maps['inverted grey']), n, 1)
      : blend(dress(a.layers.ct, this.store.get('hu_window'), this.maps.grey), dress(a.layers.pet, suv, this.maps[this.store.get('pet_map')]), n, this.store.get('opacity'));
    p.picture.width = a.cols; p.picture.height = a.rows;
    p.picture.getContext('2d').putImageData(new ImageData(rgba, a.cols, a.rows), 0, 0);
    p.lines = name === 'mip' ? [] : this.setup.labels.filter(k => a.layers[k]).map(k => [k, outline(a.layers[k].bytes, a.rows, a.cols)]);
  }
  draw(name) {
    const p = this.panels[name];
    if (!p || !p.answer || !p.canvas.width) return;
    const g = p.canvas.getContext('2d'), f = this.fit(name), {width, height} = p.canvas, {rows, cols} = p.answer;
    g.fillStyle = name === 'mip' ? '#fff' : '#000'; g.fillRect(0, 0, width, height);
    g.imageSmoothingEnabled = true; g.drawImage(p.picture, f.ox, f.oy, cols*f.kx, rows*f.ky);
    this.drawLines(g, p, f); this.drawCross(g, name, f); this.drawTools(g, name, f); this.drawText(g, name, f);
  }
  drawLines(g, p, f) {
    g.lineWidth = Math.max(1, (globalThis.devicePixelRatio || 1)*1.2);
    for (const [layer, lines] of p.lines) for (const [label, xy] of lines) {
      g.strokeStyle = INK[layer] || `hsl(${label*67 % 360}, 90%, 60%)`;
      g.beginPath();
      for (let i = 0; i < xy.length; i += 4) { g.moveTo(f.ox + xy[i]*f.kx, f.oy + xy[i + 1]*f.ky); g.lineTo(f.ox + xy[i + 2]*f.kx, f.oy + xy[i + 3]*f.ky); }
      g.stroke();
    }
  }
  drawCross(g, name, f) {
    const [r, c] = this.spot(name, this.store.get('position')), x = f.ox + (c + .5)*f.kx, y = f.oy + (r + .5)*f.ky, {width, height} = g.canvas, gap = 8*(globalThis.devicePixelRatio || 1);
    g.strokeStyle = INK.cross; g.lineWidth = 1; g.beginPath();
    for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, width, y], [x, 0, x, y - gap], [x, y + gap, x, height]]) { g.moveTo(x0, y0); g.lineTo(x1, y1); }
    g.stroke();
  }
  drawTools(g, name, f) {
    const at = xyz => { const [r, c] = this.spot(name, xyz); return [f.ox + (c + .5)*f.kx, f.oy + (r + .5)*f.ky]; }, dpr = globalThis.devicePixelRatio || 1;
    if (this.ruler && this.ruler.name === name && this.ruler.index === this.panels[name].answer.index) {
      g.strokeStyle = INK.ruler; g.lineWidth = 2*dpr; g.beginPath(); g.moveTo(...at(this.ruler.a)); g.lineTo(...at(this.ruler.b)); g.stroke();
      const [x, y] = at(this.ruler.b); this.write(g, `${distance(this.ruler.a, this.ruler.b).toFixed(1)} mm`, x + 6*dpr, y, 'left', INK.ruler);
    }
    if (!this.ball || name === 'mip') return;
    const axis = this.setup.planes[name].axis, off = (apply(this.setup.frame.inverse, this.ball.at)[axis] - this.panels[name].answer.index)*this.setup.frame.spacing[axis];
    if (Math.abs(off) >= this.ball.radius) return;
    g.strokeStyle = INK.sphere; g.lineWidth = 1.5*dpr; g.beginPath(); g.arc(...at(this.ball.at), Math.sqrt(this.ball.radius**2 - off**2)*f.scale, 0, 2*Math.PI); g.stroke();
  }
  write(g, text, x, y, align, colour = '#fff', around = '#000') {
    const dpr = globalThis.devicePixelRatio || 1;
    g.font = `bold ${13*dpr}px sans-serif`; g.textAlign = align; g.textBaseline = 'middle'; g.lineJoin = 'round';
    g.strokeStyle = around; g.lineWidth = 3*dpr; g.strokeText(text, x, y); g.fillStyle = colour; g.fillText(text, x, y);
  }
  drawText(g, name, f) {
    const {width, height} = g.canvas, dpr = globalThis.devicePixelRatio || 1, m = 10*dpr, [left, right, top, bottom] = this.sides(name), a = this.panels[name].answer;
    const [ink, ground] = name === 'mip' ? ['#000', '#fff'] : ['#fff', '#000'], say = (text, x, y, align) => this.write(g, text, x, y, align, ink, ground);
    say(left, m/2, height/2, 'left'); say(right, width - m/2, height/2, 'right'); say(top, width/2, m, 'center'); say(bottom, width/2, height - m, 'center');
    say(name === 'mip' ? `MIP ${a.angle}\u00b0` : `${name} ${a.index + 1}/${this.setup.frame.shape[this.setup.planes[name].axis]}`, m/2, m, 'left');
    const mm = [100, 50, 20, 10, 5, 2, 1].find(v => v*f.scale < .3*width) || 1, y = height - 1.2*m;
    g.strokeStyle = ground; g.lineWidth = 4*dpr; g.beginPath(); g.moveTo(m, y); g.lineTo(m + mm*f.scale, y); g.stroke();
    g.strokeStyle = ink; g.lineWidth = 2*dpr; g.stroke();
    say(`${mm} mm`, m, y - 1.1*m, 'left');
  }
  close() { this.observer.disconnect(); this.source.close(); this.store.close(); this.root.remove(); }
}

// ---------- two ways in ----------
export const PAGES = {};                   // what else than the viewer a `setup` may ask for by `page`: scripts that stand behind this one enter themselves
const opened = (el, setup, source, store) => new (PAGES[setup.page] || Viewer)(el, setup, source, store);
// A widget of anywidget: voxels from the kernel, or, where the widget carries them, from its `payload`.
async function render({model, el}) {
  const setup = model.get('setup'), payload = model.get('payload');
  const source = payload && payload.byteLength ? await LocalSource.open(setup, new Uint8Array(payload.buffer, payload.byteOffset, payload.byteLength)) : new KernelSource(model);
  const viewer = opened(el, setup, source, new TraitStore(model, KEYS, 120));
  return () => viewer.close();
}

// A page that carries everything (petvlm.offline.export_html).
export async function page() {
  const el = document.getElementById('petvlm');
  try {
    const setup = JSON.parse(document.getElementById('petvlm-setup').textContent);
    const source = await LocalSource.open(setup, base64(document.getElementById('petvlm-volumes').textContent.trim()));
    opened(el, setup, source, new PlainStore(setup.state));
  } catch (e) { el.append(`This page cannot be shown: ${e.message}`); throw e; }
}

export default {render};
