/**
 * Listens to a run from a number on and comes back by itself after a lost connection, from where it was. It never
 * ends a run: leaving is silent.
 */
import { eventsAddress } from './api';
import type { RunEvent } from './stream';

const KINDS = ['message', 'state', 'prefill', 'usage', 'sources', 'parts', 'reading', 'end'];
const FIRST_WAIT_MS = 300;
const LAST_WAIT_MS = 5000;

export interface Listener {
  /** Number of the last event that was taken. */
  seq(): number;
  take(event: RunEvent): void;
  /** The connection broke. Returns false when the run is known to be over, so that nobody asks again. */
  broken(): Promise<boolean>;
}

export class Follower {
  #source: EventSource | null = null;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #wait = FIRST_WAIT_MS;
  #isClosed = false;

  constructor(
    private readonly runId: string,
    private readonly listener: Listener,
  ) {
    this.#open();
    window.addEventListener('online', this.#now);
    document.addEventListener('visibilitychange', this.#now);
  }

  close(): void {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    this.#source?.close();
    window.removeEventListener('online', this.#now);
    document.removeEventListener('visibilitychange', this.#now);
  }

  #now = (): void => {
    if (this.#isClosed || this.#source || document.hidden) return;
    clearTimeout(this.#timer);
    this.#open();
  };

  #open(): void {
    const source = new EventSource(eventsAddress(`/runs/${this.runId}/events?after=${this.listener.seq()}`));
    this.#source = source;
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => {
        this.#wait = FIRST_WAIT_MS;
        const { data, lastEventId } = event as MessageEvent<string>;
        this.listener.take({ seq: Number(lastEventId), kind, body: JSON.parse(data) as Record<string, unknown> });
        if (kind === 'end') this.close();
      });
    }
    source.onerror = () => {
      source.close();
      if (this.#source === source) this.#source = null;
      void this.#again();
    };
  }

  async #again(): Promise<void> {
    if (this.#isClosed) return;
    const goesOn = await this.listener.broken();
    if (this.#isClosed || this.#source) return;
    if (!goesOn) {
      this.close();
      return;
    }
    this.#timer = setTimeout(() => this.#open(), this.#wait);
    this.#wait = Math.min(this.#wait * 2, LAST_WAIT_MS);
  }
}
