/**
 * Markdown that grows: only the open end is read again. Blocks that no later text can change are settled once
 * and keep their identity, so that the page touches nothing but the last lines of a long answer.
 */
import { lex, normalised, type Block, type Links } from './lex';

const OPEN_BLOCKS = 2; // a list or table may go on after a blank line and a half-written marker

export class GrowingMarkdown {
  #text = '';
  #settled: Block[] = [];
  #settledLength = 0;
  #links: Links = {};

  /** All blocks of the text so far; the first ones are the same objects as in the last call. */
  blocks: Block[] = [];

  /** How many of `blocks` are settled. */
  get settledCount(): number {
    return this.#settled.length;
  }

  get text(): string {
    return this.#text;
  }

  /** Makes the blocks equal to a full parse of `text`; cheap when `text` extends the last one. */
  update(text: string): void {
    const next = normalised(text);
    if (next === this.#text) return;
    const grows = next.startsWith(this.#text.slice(0, this.#settledLength));
    this.#text = next;
    if (!grows) this.#restart();
    this.#readTail();
  }

  #restart(): void {
    this.#settled = [];
    this.#settledLength = 0;
    this.#links = {};
  }

  #readTail(): void {
    const before = JSON.stringify(this.#links);
    const links: Links = { ...this.#links };
    const tail = lex(this.#text.slice(this.#settledLength), links);
    if (this.#settled.length > 0 && JSON.stringify(links) !== before) {
      // A link definition changes what earlier blocks mean: read everything once more.
      this.#restart();
      this.#readTail();
      return;
    }
    this.blocks = [...this.#settled, ...tail];
    this.#settle(tail, links);
  }

  #settle(tail: Block[], links: Links): void {
    let solid = 0;
    let keep = tail.length;
    while (keep > 0 && solid < OPEN_BLOCKS) {
      keep -= 1;
      if (tail[keep]?.type !== 'space') solid += 1;
    }
    // A definition may still grow ("[a]: ht" + "tps:"), and so may what it names.
    const firstDefinition = tail.findIndex((block) => block.type === 'def');
    if (firstDefinition >= 0) return;
    if (solid < OPEN_BLOCKS || keep === 0) return;
    const settled = tail.slice(0, keep);
    this.#settled = [...this.#settled, ...settled];
    this.#settledLength += settled.reduce((sum, block) => sum + block.raw.length, 0);
    this.#links = links;
  }
}
