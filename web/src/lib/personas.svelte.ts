/** Named ways of answering: instructions, and a model and parameters where they are fixed. */
import { get, patch, post, remove } from './api';
import { notices } from './notices.svelte';
import type { Conversation, Persona } from './wire';

export type PersonaFields = Omit<Persona, 'id'>;

class Personas {
  all = $state.raw<Persona[]>([]);

  /** Returns the persona that a conversation was given. */
  of(conversation: Conversation): Persona | undefined {
    return this.all.find((persona) => persona.id === conversation.persona_id);
  }

  async load(): Promise<void> {
    this.all = (await get<{ personas: Persona[] }>('/personas')).personas;
  }

  /** Makes a persona, or with an id changes one; returns false where the server refused. */
  async keep(fields: PersonaFields, id: string | null): Promise<boolean> {
    return this.#attempt(() => (id === null ? post('/personas', fields) : patch(`/personas/${id}`, fields)));
  }

  async delete(id: string): Promise<void> {
    await this.#attempt(() => remove(`/personas/${id}`));
  }

  async #attempt(work: () => Promise<unknown>): Promise<boolean> {
    notices.failure = null;
    try {
      await work();
      await this.load();
      return true;
    } catch (error) {
      notices.fail(error);
      return false;
    }
  }
}

export const personas = new Personas();
