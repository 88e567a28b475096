/** Documents that go with the next question; the server reads them. */
import { upload } from './api';
import { notices } from './notices.svelte';
import { talk } from './talk.svelte';
import { t } from './i18n.svelte';
import type { DocumentFacts } from './wire';

const MOST_BYTES = 32 * 1024 * 1024;

export const attached = $state<{ files: DocumentFacts[]; isReading: boolean }>({ files: [], isReading: false });

export async function attach(files: File[]): Promise<void> {
  if (files.length === 0) return;
  attached.isReading = true;
  notices.failure = null;
  try {
    for (const file of files) {
      if (file.size > MOST_BYTES) throw new Error(t('fileTooLarge', { name: file.name }));
      const conversation = talk.current ?? (await talk.create());
      const path = `/conversations/${conversation.id}/documents?name=${encodeURIComponent(file.name)}`;
      const document = await upload<DocumentFacts>(path, file);
      attached.files = [...attached.files, document];
      if (talk.current?.id === conversation.id) talk.documents = [...talk.documents, document];
    }
  } catch (error) {
    notices.failure = error instanceof Error ? error.message : String(error);
  } finally {
    attached.isReading = false;
  }
}

export function detach(id: string): void {
  attached.files = attached.files.filter((file) => file.id !== id);
}

export function clearAttached(): void {
  attached.files = [];
}
