// What every page here stands on: where its state lives, and elements made of text that stays text. It stands before the page's own script.

// ---------- where the state lives: traits of the widget, or a page of its own ----------
// Drawn at once, told to Python when the hand has rested for `wait` ms. Python echoes what it was told; an echo that comes after the hand has moved on must not take it back.
export class TraitStore {
  constructor(model, keys, wait = 0) { Object.assign(this, {model, keys, wait, timer: null, heard: [], untold: new Map()}); }
  get(key) { return this.model.get(key); }
  set(key, value) {
    this.untold.set(key, value); this.model.set(key, value);
    clearTimeout(this.timer);
    if (this.wait) this.timer = setTimeout(() => this.tell(), this.wait); else this.tell();
  }
  tell() { this.untold.clear(); this.model.save_changes(); }
  on(hear) {
    for (const key of this.keys) {
      const f = () => { if (this.untold.has(key) && this.get(key) !== this.untold.get(key)) this.model.set(key, this.untold.get(key)); else hear(key); };
      this.heard.push([`change:${key}`, f]); this.model.on(`change:${key}`, f);
    }
  }
  close() { clearTimeout(this.timer); for (const [event, f] of this.heard) this.model.off(event, f); }
}

export class PlainStore {
  constructor(values) { this.values = {...values}; }
  get(key) { return this.values[key]; }
  set(key, value) { this.values[key] = value; this.hear(key); }
  on(hear) { this.hear = hear; }
  close() { this.hear = () => {}; }
}

// ---------- elements ----------
function make(tag, props, ...kids) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props || {})) { if (k === 'class') e.className = v; else if (k === 'role' || k.includes('-')) e.setAttribute(k, v); else e[k] = v; }
  e.append(...kids);
  return e;
}
