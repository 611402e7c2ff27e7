// The retrieval browser: a text finds volumes, a volume finds texts. Vectors are compared here; texts are put on the page as text. It stands behind page.js in one script.

// ---------- numbers ----------
export function floats(text) {                              // base64 of little-endian float32
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}
export function products(matrix, vector) {                  // cosine of each row of (N, d) with (d,)
  const d = vector.length, out = new Float64Array(matrix.length/d);
  for (let i = 0; i < out.length; i++) { let s = 0; for (let k = 0; k < d; k++) s += matrix[i*d + k]*vector[k]; out[i] = s; }
  return out;
}
export function order(similar) { return Array.from(similar.keys()).sort((a, b) => similar[b] - similar[a] || a - b); }
export function place(similar, own) {                       // best and worst rank of `own`, from 1; they differ where others are exactly as similar
  let better = 0, equal = 0;
  for (const s of similar) { if (s > similar[own]) better++; else if (s === similar[own]) equal++; }
  return [better + 1, better + equal];
}

// ---------- the page ----------
const KEYS = ['direction', 'chosen', 'top'];
const WAYS = {text: 'a text finds volumes', volume: 'a volume finds texts'};

export class Retrieval {
  constructor(el, setup, store, ask) {
    Object.assign(this, {setup, store, ask, n: setup.names.length, typed: null, wanted: 0});
    this.vectors = {text: floats(setup.text), volume: floats(setup.image)};
    this.build(el); store.on(() => { this.typed = null; this.draw(); }); this.draw();
  }
  build(el) {
    this.root = make('div', {class: 'petvlm-retrieval'}); this.root.petvlm = this; this.root.dataset.lmSuppressShortcuts = 'true';
    this.way = make('select', {'aria-label': 'what finds what'}, ...Object.entries(WAYS).map(([k, v]) => make('option', {value: k}, v)));
    this.way.addEventListener('change', () => { this.wanted++; this.typed = null; this.store.set('direction', this.way.value); });
    this.word = make('input', {type: 'search', placeholder: this.ask ? 'type a query, or part of a text to choose one' : 'part of a text', 'aria-label': 'query'});
    this.word.addEventListener('input', () => this.list());
    const form = make('form', {}, this.word, ...(this.ask ? [make('button', {type: 'submit'}, 'find')] : []));
    form.addEventListener('submit', e => { e.preventDefault(); if (this.ask && this.word.value.trim()) this.question(this.word.value.trim()); });
    form.addEventListener('keydown', e => e.stopPropagation());
    this.queries = make('div', {class: 'petvlm-rlist', role: 'group', 'aria-label': 'queries'});
    this.asked = make('div', {class: 'petvlm-asked'}); this.line = make('div', {class: 'petvlm-say', role: 'status'}); this.cards = make('div', {class: 'petvlm-cards'});
    this.recall = make('span', {class: 'petvlm-recall'});
    this.root.append(make('div', {class: 'petvlm-rbar'}, make('label', {}, this.way), form, this.recall), make('div', {class: 'petvlm-rgrid'}, this.queries, make('div', {}, this.asked, this.line, this.cards)));
    if (this.setup.caution) this.root.append(make('p', {}, this.setup.caution));
    el.append(this.root);
  }

  // --- what is asked ---
  get direction() { return this.store.get('direction'); }
  get found() { return this.direction === 'text' ? 'volume' : 'text'; }
  picture(i) { return make('img', {src: `data:image/png;base64,${this.setup.thumbs[i]}`, alt: this.setup.names[i], width: this.setup.size[0], height: this.setup.size[1], loading: 'lazy'}); }
  list() {
    const part = this.word.value.trim().toLowerCase(), rows = [];
    for (let i = 0; i < this.n; i++) {
      if (part && !this.setup.texts[i].toLowerCase().includes(part) && !this.setup.names[i].toLowerCase().includes(part)) continue;
      const b = make('button', {type: 'button', 'aria-pressed': String(this.typed === null && i === this.store.get('chosen'))}, make('small', {}, this.setup.names[i]),
        this.direction === 'text' ? make('span', {class: 'petvlm-rclip'}, this.setup.texts[i]) : this.picture(i));
      b.dataset.row = i; b.addEventListener('click', () => { this.wanted++; this.typed = null; this.store.set('chosen', i); this.draw(); });
      rows.push(b);
    }
    this.queries.replaceChildren(...rows);
    if (!rows.length) this.queries.append(make('p', {}, this.ask ? 'No text here says so; press find to ask for it.' : 'No text here says so.'));
  }
  async question(text) {
    const me = ++this.wanted; this.line.textContent = 'asking the model ...';
    const answer = await this.ask(text);
    if (me !== this.wanted) return;                        // overtaken by a later question
    if (answer.error) { this.line.textContent = answer.error; return; }
    this.typed = {text, vector: Float32Array.from(answer.vector)};
    if (this.direction !== 'text') { const typed = this.typed; this.store.set('direction', 'text'); this.typed = typed; }
    this.draw();
  }

  // --- what is found ---
  similar() {
    const {chosen, d} = {chosen: this.store.get('chosen'), d: this.setup.dim};
    const vector = this.typed ? this.typed.vector : this.vectors[this.direction].subarray(chosen*d, (chosen + 1)*d);
    return products(this.vectors[this.found], vector);
  }
  draw() {
    const {setup, found} = this, own = this.typed ? -1 : this.store.get('chosen'), top = this.store.get('top');
    this.way.value = this.direction;
    const similar = this.similar(), ranked = order(similar), shown = ranked.slice(0, top);
    const spot = own < 0 ? null : place(similar, own), beyond = own >= 0 && !shown.includes(own);
    this.asked.replaceChildren(this.typed ? this.typed.text : this.direction === 'text' ? setup.texts[own] : make('div', {}, setup.names[own], this.picture(own)));
    const what = found === 'volume' ? 'its own volume' : 'its own text';
    this.line.textContent = spot === null ? 'A query of your own: nothing is known to be right.' : `${what} is at rank ${spot[0] === spot[1] ? spot[0] : `${spot[0]} to ${spot[1]} (as similar as others)`} of ${this.n}`;
    this.ranked = ranked;
    this.cards.className = `petvlm-cards petvlm-${found}s`;
    this.cards.replaceChildren(...[...shown, ...(beyond ? [own] : [])].map(i => this.card(i, ranked.indexOf(i) + 1, similar[i], own)));
    const k = setup.recalls[this.direction === 'text' ? 'text_to_image' : 'image_to_text'];
    this.recall.textContent = `${WAYS[this.direction]}, all ${this.n}: ` + Object.entries(k).map(([at, v]) => `R@${at} ${v.toFixed(1)} %`).join(', ');
    this.list();
    const pressed = this.queries.querySelector('[aria-pressed=true]');
    if (pressed) { const {offsetTop: y, offsetHeight: h} = pressed, q = this.queries, from = y - q.offsetTop; if (from < q.scrollTop || from + h > q.scrollTop + q.clientHeight) q.scrollTop = from - q.clientHeight/3; }
  }
  card(i, rank, similar, own) {
    const {setup, found} = this, mine = i === own, same = own >= 0 && !mine && setup.texts[i] === setup.texts[own];
    const head = make('div', {}, make('b', {}, `${rank}.`), ` ${similar.toFixed(3)} `, make('small', {}, setup.names[i]), mine ? ' \u2605 belongs to it' : same ? ' \u2261 says the same' : '');
    const card = make('div', {class: `petvlm-card${mine ? ' petvlm-own' : ''}`}, head, found === 'volume' ? this.picture(i) : make('p', {}, setup.texts[i]));
    card.dataset.row = i;
    return card;
  }
  close() { this.store.close(); this.root.remove(); }
}

// ---------- two ways in ----------
// A widget of anywidget; `asks` says whether the kernel has a text tower.
function render({model, el}) {
  const waiting = new Map(), view = Math.random().toString(36).slice(2); let seq = 0;
  const hear = m => { const done = m.view === view && waiting.get(m.seq); if (done) { waiting.delete(m.seq); done(m); } };
  model.on('msg:custom', hear);
  const ask = text => new Promise(done => { waiting.set(++seq, done); model.send({type: 'ask', seq, view, text}); });
  const page = new Retrieval(el, model.get('setup'), new TraitStore(model, KEYS), model.get('asks') ? ask : null);
  return () => { model.off('msg:custom', hear); page.close(); };
}

// A page that carries everything (petvlm.retrievalview.export_retrieval).
export function page() {
  const setup = JSON.parse(document.getElementById('petvlm-retrieval-setup').textContent);
  new Retrieval(document.getElementById('petvlm-retrieval'), setup, new PlainStore(setup.state), null);
}

export default {render};
