/** What the page shows: conversations, the one that is open, models and settings. Everything true is the server's. */
import { get, isOffline, patch, post, Refusal, remove } from './api';
import { MessageView } from './answer.svelte';
import { browserLanguage, isLanguage, speak, t } from './i18n.svelte';
import { Changes } from './changes';
import type {
  Bootstrap, Change, Conversation, DocumentFacts, Message, ModelFacts, Page, Params, Settings,
} from './wire';

const PAGE = 40;
const TRIES = 3;
const DRAFTS = 'bise.drafts';
export type Theme = 'system' | 'light' | 'dark';

export interface Toast {
  id: number;
  text: string;
  action?: { label: string; run: () => void };
}

class App {
  isReady = $state(false);
  needsSignIn = $state<'sign-in' | 'first' | null>(null);
  failure = $state<string | null>(null);
  isDown = $state(false);
  person = $state.raw<Bootstrap['person']>({ name: '', role: 'admin' });
  version = $state('');
  models = $state.raw<ModelFacts[]>([]);
  settings = $state.raw<Settings>({});
  conversations = $state.raw<Conversation[]>([]);
  hasMore = $state(false);
  running = $state.raw<Record<string, string>>({});
  found = $state.raw<Conversation[] | null>(null);
  query = $state('');

  current = $state.raw<Conversation | null>(null);
  messages = $state.raw<MessageView[]>([]);
  documents = $state.raw<DocumentFacts[]>([]);
  hasEarlier = $state(false);
  isOpening = $state(false);
  isSending = $state(false);
  isTemporary = $state(false);
  waiting = $state<{ seconds: number; cancel: () => void } | null>(null);
  /** The model for the next question where no conversation is open yet. */
  chosenModel = $state<string | null>(null);
  draft = $state('');
  toasts = $state.raw<Toast[]>([]);
  layer = $state<'settings' | 'palette' | 'shortcuts' | 'compare' | null>(null);
  isSidebarOpen = $state(window.matchMedia('(min-width: 900px)').matches);
  /** Grows when the transcript should go to its end. */
  jumps = $state(0);
  spokenStatus = $state('');

  #changes: Changes | null = null;
  #searchAbort: AbortController | null = null;
  #nextToast = 1;

  get model(): ModelFacts | undefined {
    const wanted = this.current?.model ?? this.chosenModel ?? this.settings.model;
    return this.models.find((model) => model.id === wanted) ?? this.models[0];
  }

  get last(): MessageView | undefined {
    return this.messages.at(-1);
  }

  get isWriting(): boolean {
    return this.last?.isWriting ?? false;
  }

  async start(): Promise<void> {
    try {
      const boot = await get<Bootstrap>('/bootstrap');
      this.needsSignIn = null;
      this.version = boot.version;
      this.person = boot.person;
      this.models = boot.models;
      this.conversations = boot.conversations;
      this.hasMore = boot.conversations.filter((found) => !found.pinned).length >= PAGE;
      this.running = Object.fromEntries(boot.runs.map((run) => [run.conversation_id, run.id]));
      this.#apply(boot.settings);
      this.isDown = false;
      this.failure = null;
    } catch (error) {
      if (error instanceof Refusal && error.status === 401) {
        this.needsSignIn = error.code === 'no_account' ? 'first' : 'sign-in';
        this.isReady = true;
        return;
      }
      this.isDown = isOffline(error);
      this.failure = error instanceof Error ? error.message : String(error);
      this.isReady = true;
      setTimeout(() => void this.start(), 2000);
      return;
    }
    this.isReady = true;
    this.#changes ??= new Changes((change) => this.#take(change), (down) => this.#connection(down));
    await this.go(location.pathname, false);
  }

  /** Opens what an address names. */
  async go(path: string, isNew = true): Promise<void> {
    const id = /^\/c\/([\w-]+)$/.exec(path)?.[1];
    if (id) await this.open(id, isNew);
    else this.fresh(isNew);
  }

  /** Shows an empty conversation; it is made on the server with its first question. */
  fresh(isNew = true): void {
    this.#leave();
    this.current = null;
    this.messages = [];
    this.documents = [];
    this.hasEarlier = false;
    this.isTemporary = false;
    this.draft = this.#drafts()['new'] ?? '';
    if (isNew && location.pathname !== '/') history.pushState(null, '', '/');
    document.title = 'bise';
  }

  async open(id: string, isNew = true): Promise<void> {
    if (this.current?.id === id) return;
    this.isOpening = true;
    try {
      const page = await get<Page>(`/conversations/${id}?limit=${PAGE}`);
      this.#leave();
      this.messages = page.messages.map((message) => this.#view(message));
      this.#show(page);
      this.draft = this.#drafts()[id] ?? '';
      if (isNew) history.pushState(null, '', `/c/${id}`);
      this.jumps += 1;
    } catch (error) {
      if (error instanceof Refusal && error.status === 404) {
        this.fresh(true);
        this.toast(t('gone'));
      } else this.#fail(error);
    } finally {
      this.isOpening = false;
    }
  }

  async earlier(): Promise<void> {
    const first = this.messages[0];
    if (!this.current || !first || !this.hasEarlier) return;
    const id = this.current.id;
    const page = await get<Page>(`/conversations/${id}?limit=${PAGE}&before=${first.id}`);
    if (this.current?.id !== id || this.messages[0] !== first) return;
    this.messages = [...page.messages.map((message) => this.#view(message)), ...this.messages];
    this.hasEarlier = page.has_earlier;
  }

  /** Reads the open conversation again, keeping running streams. */
  async refresh(): Promise<void> {
    if (!this.current) return;
    const id = this.current.id;
    const limit = Math.min(200, Math.max(PAGE, this.messages.length + 2));
    const page = await get<Page>(`/conversations/${id}?limit=${limit}`);
    if (this.current?.id !== id) return;
    const known = new Map(this.messages.map((view) => [view.id, view]));
    this.messages = page.messages.map((message) => {
      const view = known.get(message.id);
      if (!view) return this.#view(message);
      known.delete(message.id);
      view.take(message);
      return view;
    });
    for (const view of known.values()) view.close();
    this.#show(page);
  }

  /** Asks; returns false when nothing was sent, so that the text stays where it was typed. */
  async send(text: string, parent?: string | null, documents: string[] = []): Promise<boolean> {
    if (this.isSending || !text.trim()) return false;
    this.isSending = true;
    this.failure = null;
    const clientId = crypto.getRandomValues(new Uint32Array(4)).join('-');
    try {
      const conversation = this.current ?? (await this.create());
      const parentId = parent === undefined ? (this.last?.id ?? null) : parent;
      const body = { text, parent_id: parentId, client_id: clientId, model: this.model?.id ?? null, documents };
      const asked = await this.#patiently(() =>
        post<{ message: Message; answer: Message }>(`/conversations/${conversation.id}/messages`, body),
      );
      if (!asked) return false;
      if (this.current?.id !== conversation.id) return true;
      const at = parentId === null ? 0 : this.messages.findIndex((view) => view.id === parentId) + 1;
      for (const view of this.messages.slice(at)) view.close();
      this.messages = [...this.messages.slice(0, at), this.#view(asked.message), this.#view(asked.answer)];
      this.#mark(conversation.id, asked.answer.run_id);
      this.saveDraft('');
      this.jumps += 1;
      this.spokenStatus = t('answering');
      if (!conversation.title) void this.#reload(conversation.id);
      return true;
    } catch (error) {
      this.#fail(error);
      return false;
    } finally {
      this.isSending = false;
    }
  }

  async create(): Promise<Conversation> {
    const made = await post<Conversation>('/conversations', {
      model: this.model?.id ?? null,
      system: this.settings.system ?? '',
      params: this.settings.params ?? {},
      temporary: this.isTemporary,
    });
    this.current = { ...made, temporary: this.isTemporary };
    if (!this.isTemporary) {
      this.conversations = [made, ...this.conversations.filter((known) => known.id !== made.id)];
      history.pushState(null, '', `/c/${made.id}`);
    }
    return this.current;
  }

  async stop(): Promise<void> {
    const run = this.last?.record.run_id;
    if (!run || !this.isWriting) return;
    try {
      await remove(`/runs/${run}`);
    } catch (error) {
      if (!(error instanceof Refusal && error.status === 404)) this.#fail(error);
      else await this.refresh();
    }
  }

  async regenerate(view: MessageView, options: { model?: string; hint?: string } = {}): Promise<void> {
    try {
      const answer = await this.#patiently(() => post<Message>(`/messages/${view.id}/regenerate`, options));
      if (!answer) return;
      const at = this.messages.indexOf(view);
      for (const old of this.messages.slice(at)) old.close();
      this.messages = [...this.messages.slice(0, at), this.#view(answer)];
      this.#mark(answer.conversation_id, answer.run_id);
      this.jumps += 1;
    } catch (error) {
      this.#fail(error);
    }
  }

  async goOn(view: MessageView): Promise<void> {
    try {
      const answer = await this.#patiently(() => post<Message>(`/messages/${view.id}/continue`));
      if (answer) {
        view.take(answer);
        this.#mark(answer.conversation_id, answer.run_id);
      }
    } catch (error) {
      this.#fail(error);
    }
  }

  async showBranch(messageId: string): Promise<void> {
    if (!this.current) return;
    try {
      await patch(`/conversations/${this.current.id}`, { leaf: messageId });
      await this.refresh();
    } catch (error) {
      this.#fail(error);
    }
  }

  /** Copies the branch up to a message into a conversation of its own. */
  async branchOff(message: Message): Promise<void> {
    try {
      const made = await post<Conversation>(`/messages/${message.id}/branch`);
      this.#replace(made);
      await this.open(made.id);
    } catch (error) {
      this.#fail(error);
    }
  }

  async rate(view: MessageView, feedback: number | null): Promise<void> {
    try {
      const rated = await post<Message>(`/messages/${view.id}/feedback`, { feedback });
      view.record = { ...view.record, feedback: rated.feedback };
    } catch (error) {
      this.#fail(error);
    }
  }

  async change(id: string, changes: Partial<Conversation>): Promise<void> {
    try {
      const changed = await patch<Conversation>(`/conversations/${id}`, changes);
      this.#replace(changed);
    } catch (error) {
      this.#fail(error);
    }
  }

  async delete(conversation: Conversation): Promise<void> {
    try {
      await remove(`/conversations/${conversation.id}`);
      this.#drop(conversation.id);
      if (conversation.temporary) return;
      this.toast(t('deleted', { title: conversation.title || t('untitled') }), {
        label: t('undo'),
        run: () => void this.#restore(conversation.id),
      });
    } catch (error) {
      this.#fail(error);
    }
  }

  async more(): Promise<void> {
    const cursor = this.conversations.filter((found) => !found.pinned).at(-1)?.updated_at;
    if (cursor === undefined) return;
    const page = await get<{ conversations: Conversation[] }>(`/conversations?cursor=${cursor}`);
    const known = new Set(this.conversations.map((found) => found.id));
    this.conversations = [...this.conversations, ...page.conversations.filter((found) => !known.has(found.id))];
    this.hasMore = page.conversations.length >= PAGE;
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
      const path = `/conversations?q=${encodeURIComponent(query)}`;
      const page = await get<{ conversations: Conversation[] }>(path, abort.signal);
      if (!abort.signal.aborted) this.found = page.conversations;
    } catch (error) {
      if (!abort.signal.aborted) this.#fail(error);
    }
  }

  async choose(model: string): Promise<void> {
    if (this.current) await this.change(this.current.id, { model });
    else this.chosenModel = model;
  }

  async set(changes: Settings): Promise<void> {
    this.#apply({ ...this.settings, ...changes });
    try {
      await patch('/settings', changes);
    } catch (error) {
      this.#fail(error);
    }
  }

  async setParams(params: Params): Promise<void> {
    if (this.current) await this.change(this.current.id, { params });
    else await this.set({ params });
  }

  async setSystem(system: string): Promise<void> {
    if (this.current) await this.change(this.current.id, { system });
    else await this.set({ system });
  }

  saveDraft(text: string): void {
    this.draft = text;
    const drafts = this.#drafts();
    const key = this.current?.id ?? 'new';
    if (text) drafts[key] = text;
    else delete drafts[key];
    if (this.current) delete drafts['new'];
    if (this.isTemporary) return;
    try {
      localStorage.setItem(DRAFTS, JSON.stringify(drafts));
    } catch {
      // The browser keeps nothing in private windows; the draft lives as long as the page.
    }
  }

  toast(text: string, action?: Toast['action']): void {
    const id = this.#nextToast++;
    this.toasts = [...this.toasts.slice(-2), action ? { id, text, action } : { id, text }];
    setTimeout(() => this.dismiss(id), action ? 10_000 : 4000);
  }

  dismiss(id: number): void {
    this.toasts = this.toasts.filter((toast) => toast.id !== id);
  }

  // Inside

  #view(message: Message): MessageView {
    return new MessageView(message, (view) => {
      this.#mark(view.record.conversation_id, null);
      this.spokenStatus = t(view.live.status === 'complete' ? 'answered' : 'answerEnded');
    });
  }

  #show(page: Page): void {
    this.current = page.conversation;
    this.isTemporary = page.conversation.temporary ?? false;
    this.documents = page.documents;
    this.hasEarlier = page.has_earlier;
    document.title = page.conversation.title ? `${page.conversation.title} · bise` : 'bise';
  }

  #leave(): void {
    for (const view of this.messages) view.close();
    this.failure = null;
  }

  #mark(conversation: string, run: string | null): void {
    const next = { ...this.running };
    if (run) next[conversation] = run;
    else delete next[conversation];
    this.running = next;
  }

  #drop(id: string): void {
    this.conversations = this.conversations.filter((known) => known.id !== id);
    this.found = this.found?.filter((known) => known.id !== id) ?? null;
    this.#mark(id, null);
    if (this.current?.id === id) this.fresh();
  }

  async #restore(id: string): Promise<void> {
    try {
      this.#replace(await post<Conversation>(`/conversations/${id}/restore`));
      await this.open(id);
    } catch (error) {
      this.#fail(error);
    }
  }

  #replace(changed: Conversation): void {
    if (this.current?.id === changed.id) {
      this.current = { ...this.current, ...changed };
      document.title = changed.title ? `${changed.title} · bise` : 'bise';
      if (this.current.temporary) return;
    }
    const rest = this.conversations.filter((known) => known.id !== changed.id);
    this.conversations = [changed, ...rest].sort((a, b) => b.updated_at - a.updated_at);
    this.found = this.found?.map((known) => (known.id === changed.id ? { ...known, ...changed } : known)) ?? null;
  }

  async #reload(id: string): Promise<void> {
    try {
      const page = await get<Page>(`/conversations/${id}?limit=1`);
      this.#replace(page.conversation);
    } catch {
      // The next change in the list brings it.
    }
  }

  async #take(change: Change): Promise<void> {
    if (change.kind === 'deleted') this.#drop(change.id);
    else if (change.kind === 'reload') await this.#again();
    else if (change.kind === 'settings') return;
    else {
      const isHere = this.current?.id === change.id;
      if (change.kind === 'run_started') this.#mark(change.id, change.run ?? null);
      if (change.kind === 'run_ended' && !isHere) this.#mark(change.id, null);
      if (isHere && change.kind === 'run_started' && !this.isSending) {
        if (!this.messages.some((view) => view.id === change.message && view.record.run_id === change.run)) {
          await this.refresh();
          this.jumps += 1;
        }
      }
      if (!(isHere && this.current?.temporary)) await this.#reload(change.id);
    }
  }

  async #again(): Promise<void> {
    const boot = await get<Bootstrap>('/bootstrap');
    this.models = boot.models;
    this.conversations = boot.conversations;
    this.running = Object.fromEntries(boot.runs.map((run) => [run.conversation_id, run.id]));
    if (this.current) await this.refresh();
  }

  #connection(isDown: boolean): void {
    const wasDown = this.isDown;
    this.isDown = isDown;
    if (wasDown && !isDown) void this.#again().catch(() => undefined);
  }

  #drafts(): Record<string, string> {
    try {
      return JSON.parse(localStorage.getItem(DRAFTS) ?? '{}') as Record<string, string>;
    } catch {
      return {};
    }
  }

  #apply(settings: Settings): void {
    this.settings = settings;
    const theme = settings.theme ?? 'system';
    if (theme === 'system') delete document.documentElement.dataset['theme'];
    else document.documentElement.dataset['theme'] = theme;
    void speak(isLanguage(settings.language) ? settings.language : browserLanguage());
  }

  /** Tries again when the server is busy, as it asks; undefined when a person gave up. */
  async #patiently<T>(work: () => Promise<T>): Promise<T | undefined> {
    for (let tried = 1; ; tried += 1) {
      try {
        return await work();
      } catch (error) {
        if (!(error instanceof Refusal) || error.status !== 429 || tried >= TRIES) throw error;
        if (!(await this.#pause(Math.min(error.retryAfter ?? 3, 30)))) return undefined;
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

  #fail(error: unknown): void {
    if (error instanceof Refusal && error.status === 401) {
      this.needsSignIn = 'sign-in';
      return;
    }
    if (isOffline(error)) this.isDown = true;
    this.failure = isOffline(error) ? t('offline') : error instanceof Error ? error.message : String(error);
  }
}

export const app = new App();
