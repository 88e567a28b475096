/** One message on screen: the server's record, and for answers the Markdown that grows. */
import remend from 'remend';
import { lex, type Block } from '../markdown/lex';
import { GrowingMarkdown } from '../markdown/tail';
import { get, Refusal } from './api';
import { Flusher } from './flush';
import { Follower } from './follower';
import { isWriting, liveOf, reduce, type Live } from './stream';
import type { Message, Part, Source } from './wire';

const MENDED = ['paragraph', 'list', 'heading', 'blockquote', 'text'];

export class MessageView {
  record = $state.raw<Message>() as Message;
  live = $state.raw<Live>() as Live;
  blocks = $state.raw<Block[]>([]);
  sources = $state.raw<Source[]>([]);
  parts = $state.raw<Part[]>([]);
  isOffline = $state(false);
  /** Changes twice in an answer, not with its text: what asks for it is not drawn with every token. */
  isWriting = $derived(isWriting(this.live.status));

  #markdown = new GrowingMarkdown();
  #next: Live;
  #flusher = new Flusher(() => this.#draw());
  #follower: Follower | null = null;
  #ended: (view: MessageView) => void;

  constructor(record: Message, ended: (view: MessageView) => void) {
    this.record = record;
    this.#ended = ended;
    this.#next = this.live = liveOf(record);
    this.sources = record.sources;
    this.parts = record.parts ?? [];
    this.#draw();
    this.#follow();
  }

  get id(): string {
    return this.record.id;
  }

  /** True for an answer that ended before it was complete, with text that can be gone on with. */
  get isCut(): boolean {
    const { status, text, finish_reason } = this.live;
    if (this.record.role === 'user' || this.isWriting || text === '') return false;
    return finish_reason === 'length' || status === 'stopped' || status === 'interrupted' || status === 'error';
  }

  /** Takes a newer record of the same message; keeps the running stream when it is the same run. */
  take(record: Message): void {
    const sameRun = record.run_id === this.record.run_id;
    if (sameRun && this.#follower && isWriting(record.status)) {
      this.record = { ...record, text: '' };
      return;
    }
    this.record = record;
    this.sources = record.sources;
    this.parts = record.parts ?? [];
    if (sameRun && record.seq < this.#next.seq && isWriting(record.status)) return;
    this.#follower?.close();
    this.#follower = null;
    this.#next = liveOf(record);
    this.#draw();
    this.#follow();
  }

  close(): void {
    this.#follower?.close();
    this.#follower = null;
  }

  #follow(): void {
    if (!this.isWriting || !this.record.run_id) return;
    this.#follower = new Follower(this.record.run_id, {
      seq: () => this.#next.seq,
      take: (event) => {
        this.isOffline = false;
        if (event.kind === 'sources') this.sources = event.body['sources'] as Source[];
        if (event.kind === 'parts') this.parts = event.body['parts'] as Part[];
        this.#next = reduce(this.#next, event);
        if (event.kind === 'end') {
          this.#follower = null;
          this.#draw();
          this.#ended(this);
        } else this.#flusher.plan();
      },
      broken: () => this.#look(),
    });
  }

  /** Asks what became of the answer after a lost connection. */
  async #look(): Promise<boolean> {
    try {
      const record = await get<Message>(`/messages/${this.id}`);
      this.isOffline = false;
      if (isWriting(record.status)) return true;
      this.#follower = null;
      this.take(record);
      this.#ended(this);
      return false;
    } catch (error) {
      const gone = error instanceof Refusal && [401, 403, 404].includes(error.status);
      this.isOffline = !gone;
      return !gone;
    }
  }

  #draw(): void {
    this.live = this.#next;
    if (this.record.role === 'user') return;
    this.#markdown.update(this.#next.text);
    this.blocks = isWriting(this.#next.status) ? mended(this.#markdown.blocks) : this.#markdown.blocks;
  }
}

/** Half-typed emphasis and code in the last block is shown as if it were closed. */
function mended(blocks: Block[]): Block[] {
  let last = blocks.length - 1;
  while (last >= 0 && blocks[last]?.type === 'space') last -= 1;
  const block = blocks[last];
  if (!block || !MENDED.includes(block.type) || block.raw.length > 8000) return blocks;
  const raw = remend(block.raw, { katex: false, htmlTags: false, linkMode: 'text-only' });
  return raw === block.raw ? blocks : [...blocks.slice(0, last), ...lex(raw)];
}
