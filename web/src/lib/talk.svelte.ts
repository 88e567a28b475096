/** The conversation that is open: its branch on screen, and what a person does with it. */
import { get, patch, post, Refusal, remove } from './api';
import { MessageView } from './answer.svelte';
import { Drafts } from './drafts';
import { t } from './i18n.svelte';
import { library } from './library.svelte';
import { notices } from './notices.svelte';
import { session } from './session.svelte';
import type { Conversation, DocumentFacts, Message, ModelFacts, Page, Params, Persona } from './wire';

const PAGE = 40;
const MOST = 200;

class Talk {
  current = $state.raw<Conversation | null>(null);
  messages = $state.raw<MessageView[]>([]);
  documents = $state.raw<DocumentFacts[]>([]);
  hasEarlier = $state(false);
  isOpening = $state(false);
  isSending = $state(false);
  isTemporary = $state(false);
  draft = $state('');
  /** The model and the persona of the next question where no conversation is open yet. */
  chosenModel = $state<string | null>(null);
  chosenPersona = $state.raw<Persona | null>(null);
  /** The title is being written. */
  isRenaming = $state(false);
  /** The question that is being edited. */
  editing = $state<string | null>(null);
  /** Grows when the transcript should go to its end. */
  jumps = $state(0);

  readonly drafts = new Drafts();

  /** Conversations asked for, readings of the open one, and own changes to it: what comes late is told by them. */
  #visits = 0;
  #readings = 0;
  #changes = 0;

  get model(): ModelFacts | undefined {
    return session.model(this.current?.model ?? this.chosenModel ?? this.chosenPersona?.model ?? session.settings.model);
  }

  get last(): MessageView | undefined {
    return this.messages.at(-1);
  }

  get isWriting(): boolean {
    return this.last?.isWriting ?? false;
  }

  /** Shows an empty conversation; it is made on the server with its first question. */
  fresh(isNew = true): void {
    this.#visits += 1;
    this.isOpening = false;
    this.#leave();
    this.current = null;
    this.messages = [];
    this.documents = [];
    this.hasEarlier = false;
    this.isTemporary = false;
    this.chosenPersona = null;
    this.draft = this.drafts.get('new');
    if (isNew && location.pathname !== '/') history.pushState(null, '', '/');
    document.title = 'bise';
  }

  async open(id: string, isNew = true): Promise<void> {
    const visit = (this.#visits += 1);
    this.isOpening = this.current?.id !== id;
    if (!this.isOpening) return;
    try {
      const page = await get<Page>(`/conversations/${id}?limit=${PAGE}`);
      if (visit !== this.#visits) return; // another one was asked for since
      this.#leave();
      this.messages = page.messages.map((message) => this.#view(message));
      this.#show(page);
      this.draft = this.drafts.get(id);
      if (isNew) history.pushState(null, '', `/c/${id}`);
      this.jumps += 1;
    } catch (error) {
      if (visit !== this.#visits) return;
      if (error instanceof Refusal && error.status === 404) {
        this.fresh(true);
        notices.toast(t('gone'));
      } else notices.fail(error);
    } finally {
      if (visit === this.#visits) this.isOpening = false;
    }
  }

  /** Reads all of the conversation, for a print. */
  async all(): Promise<void> {
    while (this.hasEarlier) {
      const known = this.messages.length;
      await this.earlier();
      if (this.messages.length === known) return;
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
    const reading = (this.#readings += 1);
    const changes = this.#changes;
    const limit = Math.min(MOST, Math.max(PAGE, this.messages.length + 2));
    const page = await get<Page>(`/conversations/${id}?limit=${limit}`);
    if (this.current?.id !== id || reading !== this.#readings) return; // a later one brings newer news
    if (changes !== this.#changes) return this.refresh(); // it may not know what was asked since
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

  /**
   * Asks; the answer reads from the message `keepFrom` on where given. Returns false when nothing was sent, so that
   * the text stays where it was typed.
   */
  async send(
    text: string,
    parent?: string | null,
    documents: string[] = [],
    keepFrom: string | null = null,
  ): Promise<boolean> {
    if (this.isSending || !text.trim()) return false;
    this.isSending = true;
    notices.failure = null;
    const clientId = crypto.getRandomValues(new Uint32Array(4)).join('-');
    try {
      const conversation = this.current ?? (await this.create());
      const parentId = parent === undefined ? (this.last?.id ?? null) : parent;
      const body = {
        text,
        parent_id: parentId,
        client_id: clientId,
        model: this.model?.id ?? null,
        documents,
        ...(keepFrom ? { keep_from: keepFrom } : {}),
      };
      const asked = await notices.patiently(() =>
        post<{ message: Message; answer: Message }>(`/conversations/${conversation.id}/messages`, body),
      );
      if (!asked) return false;
      if (this.current?.id !== conversation.id) {
        this.drafts.set(conversation.id, '');
        return true;
      }
      const at = parentId === null ? 0 : this.messages.findIndex((view) => view.id === parentId) + 1;
      for (const view of this.messages.slice(at)) view.close();
      this.messages = [...this.messages.slice(0, at), this.#view(asked.message), this.#view(asked.answer)];
      this.#changes += 1;
      library.mark(conversation.id, asked.answer.run_id);
      if (this.draft === text) this.saveDraft(''); // else the next question is being typed already
      this.jumps += 1;
      notices.spokenStatus = t('answering');
      if (!conversation.title) void this.look(conversation.id);
      return true;
    } catch (error) {
      notices.fail(error);
      return false;
    } finally {
      this.isSending = false;
    }
  }

  async create(): Promise<Conversation> {
    const persona = this.chosenPersona;
    const made = await post<Conversation>('/conversations', {
      model: this.model?.id ?? null,
      system: persona?.system ?? session.settings.system ?? '',
      params: persona?.params ?? session.settings.params ?? {},
      temporary: this.isTemporary,
      ...(persona ? { persona_id: persona.id } : {}),
    });
    this.current = { ...made, temporary: this.isTemporary };
    this.drafts.set('new', '');
    if (!this.isTemporary) {
      this.drafts.set(made.id, this.draft);
      library.put(made);
      history.pushState(null, '', `/c/${made.id}`);
    }
    return this.current;
  }

  /** Opens the last question to be edited. */
  editLast(): void {
    const last = this.messages.findLast((view) => view.record.role === 'user');
    if (!last || this.isWriting) return;
    this.editing = last.id;
    this.jumps += 1;
  }

  /** Shows an earlier or a later version of the last message that has several. */
  step(by: number): void {
    const view = this.messages.findLast((message) => message.record.siblings.length > 1);
    const target = view?.record.siblings[view.record.siblings.indexOf(view.id) + by];
    if (target) void this.showBranch(target);
  }

  async stop(): Promise<void> {
    const run = this.last?.record.run_id;
    if (!run || !this.isWriting) return;
    try {
      await remove(`/runs/${run}`);
    } catch (error) {
      if (!(error instanceof Refusal && error.status === 404)) notices.fail(error);
      else await this.refresh();
    }
  }

  async regenerate(view: MessageView, options: { model?: string; hint?: string } = {}): Promise<void> {
    await this.#attempt(async () => {
      const answer = await notices.patiently(() => post<Message>(`/messages/${view.id}/regenerate`, options));
      if (!answer) return;
      const at = this.messages.indexOf(view);
      for (const old of this.messages.slice(at)) old.close();
      this.messages = [...this.messages.slice(0, at), this.#view(answer)];
      this.#changes += 1;
      library.mark(answer.conversation_id, answer.run_id);
      this.jumps += 1;
    });
  }

  async goOn(view: MessageView): Promise<void> {
    await this.#attempt(async () => {
      const answer = await notices.patiently(() => post<Message>(`/messages/${view.id}/continue`));
      if (!answer) return;
      view.take(answer);
      this.#changes += 1;
      library.mark(answer.conversation_id, answer.run_id);
    });
  }

  async showBranch(messageId: string): Promise<void> {
    const id = this.current?.id;
    if (!id) return;
    await this.#attempt(async () => {
      await patch(`/conversations/${id}`, { leaf: messageId });
      await this.refresh();
    });
  }

  /** Copies the branch up to a message into a conversation of its own. */
  async branchOff(message: Message): Promise<void> {
    await this.#attempt(async () => {
      const made = await post<Conversation>(`/messages/${message.id}/branch`);
      library.put(made);
      await this.open(made.id);
    });
  }

  /** Begins a conversation with a summary of this one, which its model writes; the question goes along. */
  async sumUp(): Promise<void> {
    const here = this.current;
    if (!here || this.isSending) return;
    this.isSending = true;
    const draft = this.draft;
    await this.#attempt(async () => {
      const made = await notices.patiently(() =>
        post<{ conversation: Conversation }>(`/conversations/${here.id}/summary`, { model: this.model?.id ?? null }),
      );
      if (!made) return;
      this.saveDraft('');
      await this.open(made.conversation.id, !this.isTemporary);
      if (!this.isTemporary) library.put(made.conversation);
      this.saveDraft(draft);
    });
    this.isSending = false;
  }

  async rate(view: MessageView, feedback: number | null): Promise<void> {
    await this.#attempt(async () => {
      const rated = await post<Message>(`/messages/${view.id}/feedback`, { feedback });
      view.record = { ...view.record, feedback: rated.feedback };
    });
  }

  async choose(model: string): Promise<void> {
    if (this.current) await this.change({ model });
    else this.chosenModel = model;
  }

  /** Lets a persona answer from here on; null goes back to the person's own defaults. */
  async become(persona: Persona | null): Promise<void> {
    if (!this.current) {
      this.chosenPersona = persona;
      if (persona?.model) this.chosenModel = null;
      return;
    }
    await this.change({
      persona_id: persona?.id ?? null,
      system: persona?.system ?? session.settings.system ?? '',
      params: persona?.params ?? session.settings.params ?? {},
      ...(persona?.model ? { model: persona.model } : {}),
    });
  }

  async setParams(params: Params): Promise<void> {
    if (this.current) await this.change({ params });
    else await session.set({ params });
  }

  async setSystem(system: string): Promise<void> {
    if (this.current) await this.change({ system });
    else await session.set({ system });
  }

  /** Takes a newer record of a conversation if it is the open one. */
  renew(changed: Conversation): void {
    if (this.current?.id !== changed.id) return;
    this.#changes += 1;
    this.current = { ...this.current, ...changed };
    document.title = changed.title ? `${changed.title} · bise` : 'bise';
  }

  async look(id: string): Promise<void> {
    if (this.current?.id === id && this.isTemporary) return;
    const conversation = await library.look(id);
    if (conversation) this.renew(conversation);
  }

  saveDraft(text: string): void {
    this.draft = text;
    if (this.isTemporary) return;
    this.drafts.set(this.current?.id ?? 'new', text);
  }

  // Inside

  async change(changes: Partial<Conversation>): Promise<void> {
    const id = this.current?.id;
    if (!id) return;
    await this.#attempt(async () => {
      const changed = await patch<Conversation>(`/conversations/${id}`, changes);
      this.renew(changed);
      if (!this.isTemporary) library.put(changed);
    });
  }

  async #attempt(work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      notices.fail(error);
    }
  }

  #view(message: Message): MessageView {
    return new MessageView(message, (view) => {
      library.mark(view.record.conversation_id, null);
      notices.spokenStatus = t(view.live.status === 'complete' ? 'answered' : 'answerEnded');
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
    this.editing = null;
    this.isRenaming = false;
    notices.failure = null;
  }
}

export const talk = new Talk();
