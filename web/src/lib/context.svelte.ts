/** What fills the window, counted by the server with the model's own tokenizer. */
import { post } from './api';
import { talk } from './talk.svelte';
import type { ContextView } from './wire';

const WAIT_MS = 500;

class Context {
  view = $state.raw<ContextView | null>(null);
  #timer: ReturnType<typeof setTimeout> | undefined;
  #asked = 0;

  get draftTokens(): number | null {
    if (!this.view) return null;
    return this.view.segments.find((segment) => segment.kind === 'turn')?.tokens ?? null;
  }

  get free(): number {
    const view = this.view;
    return view?.window ? Math.max(0, view.window - view.used + (this.draftTokens ?? 0)) : 0;
  }

  get need(): number {
    return this.draftTokens ?? 0;
  }

  /** Tokens by which prompt and draft exceed the window. */
  get over(): number {
    return this.view?.window ? Math.max(0, this.view.used - this.view.window + 1) : 0;
  }

  plan(): void {
    clearTimeout(this.#timer);
    const conversation = talk.current;
    if (!conversation) {
      this.view = null;
      return;
    }
    this.#timer = setTimeout(() => void this.#ask(conversation.id), this.view ? WAIT_MS : 0);
  }

  async #ask(id: string): Promise<void> {
    const asked = ++this.#asked;
    try {
      const body = { draft: talk.draft, model: talk.model?.id ?? null };
      const view = await post<ContextView>(`/conversations/${id}/context`, body);
      if (asked === this.#asked && talk.current?.id === id) this.view = view;
    } catch {
      // The meter waits; the question itself says what is wrong.
    }
  }
}

export const context = new Context();
