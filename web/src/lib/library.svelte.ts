/** The conversations in the sidebar: listed, searched, filed, picked; and which of them are being answered. */
import { get, patch, post } from './api';
import { notices } from './notices.svelte';
import type { Bootstrap, Conversation, FolderFacts, Page } from './wire';

interface Listing {
  conversations: Conversation[];
  cursor?: string | null;
}

class Library {
  conversations = $state.raw<Conversation[]>([]);
  folders = $state.raw<FolderFacts[]>([]);
  hasMore = $state(false);
  /** Runs by conversation. */
  running = $state.raw<Record<string, string>>({});
  found = $state.raw<Conversation[] | null>(null);
  query = $state('');
  /** Conversations that are picked for a common action; null while nobody picks. */
  picked = $state.raw<ReadonlySet<string> | null>(null);

  /** What the folder dialog moves. */
  filing = $state.raw<readonly string[]>([]);

  #searchAbort: AbortController | null = null;
  #next: string | null = null;

  take(boot: Bootstrap): void {
    this.conversations = boot.conversations;
    this.folders = boot.folders ?? [];
    this.#turnPage(boot);
    this.running = Object.fromEntries(boot.runs.map((run) => [run.conversation_id, run.id]));
  }

  mark(conversation: string, run: string | null): void {
    const next = { ...this.running };
    if (run) next[conversation] = run;
    else delete next[conversation];
    this.running = next;
  }

  /** Puts a conversation where its time says, new or changed. */
  put(changed: Conversation): void {
    const rest = this.conversations.filter((known) => known.id !== changed.id);
    const isHidden = changed.archived === true;
    this.conversations = isHidden ? rest : [changed, ...rest].sort((a, b) => b.updated_at - a.updated_at);
    this.found = this.found?.map((known) => (known.id === changed.id ? { ...known, ...changed } : known)) ?? null;
  }

  drop(id: string): void {
    this.conversations = this.conversations.filter((known) => known.id !== id);
    this.found = this.found?.filter((known) => known.id !== id) ?? null;
    this.mark(id, null);
  }

  /** Reads one conversation again. */
  async look(id: string): Promise<Conversation | null> {
    try {
      const { conversation } = await get<Page>(`/conversations/${id}?limit=1`);
      this.put(conversation);
      if (conversation.folder) void this.lookAtFolders();
      return conversation;
    } catch {
      return null; // the next change in the list brings it
    }
  }

  async lookAtFolders(): Promise<void> {
    this.folders = (await get<{ folders: FolderFacts[] }>('/folders').catch(() => this)).folders;
  }

  async more(): Promise<void> {
    if (this.#next === null) return;
    const page = await get<Listing>(`/conversations?cursor=${encodeURIComponent(this.#next)}`);
    this.#add(page.conversations);
    this.#turnPage(page);
  }

  async openFolder(name: string): Promise<void> {
    try {
      this.#add((await get<Listing>(`/folders/conversations?name=${encodeURIComponent(name)}`)).conversations);
    } catch (error) {
      notices.fail(error);
    }
  }

  async search(query: string): Promise<void> {
    this.query = query;
    this.#searchAbort?.abort();
    if (!query.trim()) {
      this.found = null;
      return;
    }
    const abort = (this.#searchAbort = new AbortController());
    try {
      const page = await get<Listing>(`/conversations?q=${encodeURIComponent(query)}`, abort.signal);
      if (!abort.signal.aborted) this.found = page.conversations;
    } catch (error) {
      if (!abort.signal.aborted) notices.fail(error);
    }
  }

  async change(id: string, changes: Partial<Conversation>): Promise<Conversation | null> {
    try {
      const changed = await patch<Conversation>(`/conversations/${id}`, changes);
      this.put(changed);
      if ('folder' in changes) await this.lookAtFolders();
      return changed;
    } catch (error) {
      notices.fail(error);
      return null;
    }
  }

  /** Changes several conversations, all or none; the server tells every tab to look again. */
  async changeMany(ids: readonly string[], changes: { folder?: string | null; pinned?: boolean }): Promise<void> {
    try {
      await post('/conversations/change', { ids, changes });
      this.conversations = this.conversations.map((known) => (ids.includes(known.id) ? { ...known, ...changes } : known));
      await this.lookAtFolders();
    } catch (error) {
      notices.fail(error);
    }
  }

  async renameFolder(name: string, to: string | null): Promise<void> {
    try {
      await post('/folders/rename', { name, to });
      this.conversations = this.conversations.map((known) => (known.folder === name ? { ...known, folder: to } : known));
      await this.lookAtFolders();
    } catch (error) {
      notices.fail(error);
    }
  }

  /** Asks into which folder conversations shall go. */
  file(ids: readonly string[]): void {
    this.filing = ids;
    notices.layer = 'filing';
  }

  pick(id: string): void {
    const next = new Set(this.picked ?? []);
    if (!next.delete(id)) next.add(id);
    this.picked = next;
  }

  #turnPage(page: Listing): void {
    this.#next = page.cursor ?? null;
    this.hasMore = this.#next !== null;
  }

  #add(entries: Conversation[]): void {
    const known = new Set(this.conversations.map((entry) => entry.id));
    this.conversations = [...this.conversations, ...entries.filter((entry) => !known.has(entry.id))];
  }
}

export const library = new Library();
