/** The page as a whole: starting, addresses, news from the server, and deletions that can be undone. */
import { get, isOffline, post, Refusal } from './api';
import { Changes } from './changes';
import { t } from './i18n.svelte';
import { library } from './library.svelte';
import { notices } from './notices.svelte';
import { personas } from './personas.svelte';
import { session } from './session.svelte';
import { talk } from './talk.svelte';
import type { Bootstrap, Change, Conversation } from './wire';

const START_WAIT_MS = 2000;

class App {
  isReady = $state(false);
  /** The server is of another version than the page: it should be loaded anew. */
  isOutdated = $state(false);

  #changes: Changes | null = null;

  async start(): Promise<void> {
    try {
      this.#take(await get<Bootstrap>('/bootstrap'));
      notices.needsSignIn = null;
      notices.isDown = false;
      notices.failure = null;
    } catch (error) {
      this.isReady = true;
      if (error instanceof Refusal && error.status === 401) {
        notices.needsSignIn = error.code === 'no_account' ? 'first' : 'sign-in';
        return;
      }
      notices.isDown = isOffline(error);
      notices.retryAt = Date.now() + START_WAIT_MS;
      if (!notices.isDown) notices.failure = error instanceof Error ? error.message : String(error);
      setTimeout(() => void this.start(), START_WAIT_MS);
      return;
    }
    this.isReady = true;
    if (this.#changes) this.#changes.restart();
    else this.#changes = new Changes((change) => this.#hear(change), (waitMs) => this.#connection(waitMs));
    await this.go(location.pathname, false);
  }

  /** Opens what an address names. */
  async go(path: string, isNew = true): Promise<void> {
    const id = /^\/c\/([\w-]+)$/.exec(path)?.[1];
    if (id) await talk.open(id, isNew);
    else talk.fresh(isNew);
  }

  /** Tries the connection again at once. */
  retry(): void {
    if (this.#changes) this.#changes.retry();
    else void this.start();
  }

  /** Deletes conversations; for ten seconds a word brings them back. */
  async delete(conversations: readonly Conversation[]): Promise<void> {
    const [first] = conversations;
    if (!first) return;
    try {
      await post('/conversations/delete', { ids: conversations.map((conversation) => conversation.id) });
      for (const { id } of conversations) this.#drop(id);
      await library.lookAtFolders();
      if (first.temporary) return;
      const text =
        conversations.length === 1
          ? t('deleted', { title: first.title || t('untitled') })
          : t('deletedMany', { n: conversations.length });
      notices.toast(text, { label: t('undo'), run: () => void this.#restore(conversations) });
    } catch (error) {
      notices.fail(error);
    }
  }

  /** Ends the session here; what was typed and not sent is not left to whoever comes next. */
  async signOut(): Promise<void> {
    await post('/sign-out', {});
    talk.drafts.clear();
    location.assign('/');
  }

  // Inside

  #take(boot: Bootstrap): void {
    this.isOutdated = session.version !== '' && session.version !== boot.version;
    session.take(boot);
    library.take(boot);
    personas.all = boot.personas ?? [];
  }

  #drop(id: string): void {
    library.drop(id);
    if (talk.current?.id === id) talk.fresh();
  }

  async #restore(conversations: readonly Conversation[]): Promise<void> {
    try {
      await post('/conversations/restore', { ids: conversations.map((conversation) => conversation.id) });
      await this.#again();
      if (conversations.length === 1 && conversations[0]) await talk.open(conversations[0].id);
    } catch (error) {
      notices.fail(error);
    }
  }

  async #hear(change: Change): Promise<void> {
    if (change.kind === 'deleted') return this.#drop(change.id);
    if (change.kind === 'reload') return this.#again();
    if (change.kind === 'settings') return;
    if (change.kind === 'personas') return personas.load();
    const isHere = talk.current?.id === change.id;
    if (change.kind === 'run_started') library.mark(change.id, change.run ?? null);
    if (change.kind === 'run_ended' && !isHere) library.mark(change.id, null);
    if (isHere && change.kind === 'run_started' && !talk.isSending) {
      if (!talk.messages.some((view) => view.id === change.message && view.record.run_id === change.run)) {
        await talk.refresh();
        talk.jumps += 1;
      }
    }
    await talk.look(change.id);
  }

  async #again(): Promise<void> {
    this.#take(await get<Bootstrap>('/bootstrap'));
    if (talk.current) await talk.refresh();
  }

  /** Hears of the connection: null while it stands, else how long until it is tried again. */
  #connection(waitMs: number | null): void {
    const wasDown = notices.isDown;
    notices.isDown = waitMs !== null;
    notices.retryAt = Date.now() + (waitMs ?? 0);
    if (wasDown && waitMs === null) void this.#again().catch(() => undefined);
  }
}

export const app = new App();
