/** Questions that were typed and not sent, in this browser alone; written a moment after the last key. */
const PLACE = 'bise.drafts';
const WAIT_MS = 300;

export class Drafts {
  #all: Record<string, string>;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor() {
    try {
      this.#all = JSON.parse(localStorage.getItem(PLACE) ?? '{}') as Record<string, string>;
    } catch {
      this.#all = {};
    }
    window.addEventListener('pagehide', () => this.#write());
  }

  get(key: string): string {
    return this.#all[key] ?? '';
  }

  /** Keeps a draft; an empty one is forgotten. */
  set(key: string, text: string): void {
    if (text) this.#all[key] = text;
    else delete this.#all[key];
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#write(), WAIT_MS);
  }

  /** Forgets all drafts, so that whoever signs in next does not read them. */
  clear(): void {
    this.#all = {};
    this.#write();
  }

  #write(): void {
    try {
      localStorage.setItem(PLACE, JSON.stringify(this.#all));
    } catch {
      // The browser keeps nothing in private windows; the draft lives as long as the page.
    }
  }
}
