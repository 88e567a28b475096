/** What the page tells its reader beside the conversation: failures, toasts, waits; and which layer is open. */
import { isOffline, Refusal } from './api';

const TRIES = 3;
const LONGEST_WAIT_S = 30;

export type Layer = 'settings' | 'palette' | 'shortcuts' | 'compare' | 'filing';

export interface Toast {
  id: number;
  text: string;
  action?: { label: string; run: () => void };
}

class Notices {
  failure = $state<string | null>(null);
  toasts = $state.raw<Toast[]>([]);
  layer = $state<Layer | null>(null);
  /** Which part of the settings opens first. */
  settingsPart = $state('general');
  waiting = $state<{ seconds: number; cancel: () => void } | null>(null);
  needsSignIn = $state<'sign-in' | 'first' | null>(null);
  isDown = $state(false);
  /** When the connection is tried again, in milliseconds since 1970. */
  retryAt = $state(0);
  isSidebarOpen = $state(window.matchMedia('(min-width: 900px)').matches);
  spokenStatus = $state('');

  #nextToast = 1;

  toast(text: string, action?: Toast['action']): void {
    const id = this.#nextToast++;
    this.toasts = [...this.toasts.slice(-2), action ? { id, text, action } : { id, text }];
    setTimeout(() => this.dismiss(id), action ? 10_000 : 4000);
  }

  dismiss(id: number): void {
    this.toasts = this.toasts.filter((toast) => toast.id !== id);
  }

  fail(error: unknown): void {
    if (error instanceof Refusal && error.status === 401) {
      this.needsSignIn = 'sign-in';
      return;
    }
    // The banner says that the connection is gone; the question stays where it was typed.
    if (isOffline(error)) this.isDown = true;
    else this.failure = error instanceof Error ? error.message : String(error);
  }

  /** Shows the settings, at one of their parts. */
  openSettings(part = 'general'): void {
    this.settingsPart = part;
    this.layer = 'settings';
  }

  /** Tries again where the server is busy, after the time it asks for; undefined when a person gave up. */
  async patiently<T>(work: () => Promise<T>): Promise<T | undefined> {
    for (let tried = 1; ; tried += 1) {
      try {
        return await work();
      } catch (error) {
        if (!(error instanceof Refusal) || error.status !== 429 || tried >= TRIES) throw error;
        if (!(await this.#pause(Math.min(error.retryAfter ?? 3, LONGEST_WAIT_S)))) return undefined;
      }
    }
  }

  async #pause(seconds: number): Promise<boolean> {
    let isCancelled = false;
    for (let left = Math.max(1, Math.round(seconds)); left > 0 && !isCancelled; left -= 1) {
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, 1000);
        this.waiting = {
          seconds: left,
          cancel: () => {
            isCancelled = true;
            clearTimeout(timer);
            resolve();
          },
        };
      });
    }
    this.waiting = null;
    return !isCancelled;
  }
}

export const notices = new Notices();
