/** Documents that go with the next question of a conversation; the server reads them. */
import { upload } from './api';
import { notices } from './notices.svelte';
import { talk } from './talk.svelte';
import { t } from './i18n.svelte';
import type { DocumentFacts } from './wire';

const MOST_MIB = 64;

class Attached {
  isReading = $state(false);
  /** By conversation: what was attached in one never goes with a question in another. */
  #all = $state.raw<Record<string, DocumentFacts[]>>({});

  get files(): DocumentFacts[] {
    return this.#all[talk.current?.id ?? ''] ?? [];
  }

  get ids(): string[] {
    return this.files.map((file) => file.id);
  }

  /** Lets a document of the open conversation go with its next question. */
  add(document: DocumentFacts): void {
    this.#set([...this.files, document]);
  }

  remove(id: string): void {
    this.#set(this.files.filter((file) => file.id !== id));
  }

  clear(): void {
    this.#set([]);
  }

  /** Hands files to the server to be read, in a conversation that is made where none is open. */
  async read(files: readonly File[]): Promise<void> {
    if (files.length === 0) return;
    this.isReading = true;
    notices.failure = null;
    try {
      for (const file of files) {
        check(file);
        const conversation = talk.current ?? (await talk.create());
        const path = `/conversations/${conversation.id}/documents?name=${encodeURIComponent(file.name)}`;
        const document = await upload<DocumentFacts>(path, file);
        this.#all = { ...this.#all, [conversation.id]: [...(this.#all[conversation.id] ?? []), document] };
        if (talk.current?.id === conversation.id) talk.documents = [...talk.documents, document];
      }
    } catch (error) {
      notices.fail(error);
    } finally {
      this.isReading = false;
    }
  }

  #set(files: DocumentFacts[]): void {
    const id = talk.current?.id;
    if (id) this.#all = { ...this.#all, [id]: files };
  }
}

/** Refuses what is known to be of no use before it travels. */
function check(file: File): void {
  if (isImage(file)) throw new Error(t('noImages', { name: file.name || t('image'), model: talk.model?.id ?? '' }));
  if (file.size > MOST_MIB * 2 ** 20) throw new Error(t('fileTooLarge', { name: file.name, most: MOST_MIB }));
}

/** True for pictures, by what the browser or the name's ending says; no model that is served reads them. */
function isImage(file: File): boolean {
  if (file.type === 'image/svg+xml') return false; // it is text
  return file.type.startsWith('image/') || /\.(?:png|jpe?g|gif|webp|avif|heic|heif|bmp|tiff?)$/i.test(file.name);
}

export const attached = new Attached();
