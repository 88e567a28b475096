/** One stream per visible tab for what happens elsewhere: titles, other tabs' messages, ended runs. */
import { eventsAddress } from './api';
import type { Change } from './wire';

const FIRST_WAIT_MS = 500;
const LAST_WAIT_MS = 4000;

export class Changes {
  #source: EventSource | null = null;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #wait = FIRST_WAIT_MS;
  #wasHidden = false;

  constructor(
    private readonly take: (change: Change) => Promise<void>,
    /** Hears null when the connection stands, else the milliseconds until it is tried again. */
    private readonly connection: (waitMs: number | null) => void,
  ) {
    this.#open();
    window.addEventListener('online', () => this.retry());
    document.addEventListener('visibilitychange', () => {
      // Browsers allow six connections to a server: a hidden tab gives its one back.
      if (document.hidden) {
        this.#wasHidden = true;
        this.#close();
      } else this.retry();
    });
  }

  retry(): void {
    if (this.#source) return;
    clearTimeout(this.#timer);
    this.#open();
  }

  /** Listens anew: whoever is here may be someone else now. */
  restart(): void {
    this.#close();
    this.#open();
  }

  #close(): void {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }

  #open(): void {
    const source = new EventSource(eventsAddress('/events'));
    this.#source = source;
    source.addEventListener('hello', () => {
      this.#wait = FIRST_WAIT_MS;
      this.connection(null);
      if (this.#wasHidden) void this.take({ kind: 'reload', id: '' }).catch(() => undefined);
      this.#wasHidden = false;
    });
    source.addEventListener('change', (event) => {
      const change = JSON.parse((event as MessageEvent<string>).data) as Change;
      void this.take(change).catch(() => undefined);
    });
    source.onerror = () => {
      if (this.#source !== source) return;
      this.#close();
      this.connection(this.#wait);
      this.#timer = setTimeout(() => this.#open(), this.#wait);
      this.#wait = Math.min(this.#wait * 2, LAST_WAIT_MS);
    };
  }
}
