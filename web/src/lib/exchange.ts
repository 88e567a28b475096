/** Saves a conversation as a file. */
import { notices } from './notices.svelte';
import { saveText } from './copy';
import { t } from './i18n.svelte';

export async function exportConversation(id: string, form: 'markdown' | 'json'): Promise<void> {
  const response = await fetch(`/api/v1/conversations/${id}/export?form=${form}`);
  if (!response.ok) {
    notices.failure = t('exportFailed');
    return;
  }
  const ending = form === 'markdown' ? 'md' : 'json';
  saveText(`bise-${id.slice(0, 8)}.${ending}`, await response.text(), form === 'json' ? 'application/json' : 'text/markdown');
}
