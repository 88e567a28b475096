/**
 * Markdown to tokens: marked's lexer with maths. Tokens become components, never HTML strings, so what a model
 * writes can only ever be text.
 */
import { Marked, type Token, type TokenizerExtension, type Tokens } from 'marked';

export type MathToken = { type: 'math'; raw: string; text: string; display: boolean };
export type Block = Token | MathToken;
export type Links = Record<string, Pick<Tokens.Link | Tokens.Image, 'href' | 'title'>>;

const DISPLAY = /^(?:\$\$([^$]+?)\$\$|\\\[([\s\S]+?)\\\])[^\S\n]*(?:\n|$)/;
const INLINE = /^(?:\$\$([^$\n]+?)\$\$|\\\(([^\n]+?)\\\)|\\\[([^\n]+?)\\\]|\$(?![\s$])((?:\\[^\n]|[^$\\\n])*?[^\s\\$]|\\[^\n])\$(?!\d))/;

const blockMath: TokenizerExtension = {
  name: 'math',
  level: 'block',
  start: (source) => source.match(/(?:^|\n)(?:\$\$|\\\[)/)?.index,
  tokenizer(source) {
    const found = DISPLAY.exec(source);
    return found ? { type: 'math', raw: found[0], text: (found[1] ?? found[2] ?? '').trim(), display: true } : undefined;
  },
};

const inlineMath: TokenizerExtension = {
  name: 'math',
  level: 'inline',
  // Prices stay text: a formula opens before a non-space and its closing sign has no digit after it.
  start: (source) => source.match(/\$|\\[([]/)?.index,
  tokenizer(source) {
    const found = INLINE.exec(source);
    if (!found) return undefined;
    const text = found[1] ?? found[2] ?? found[3] ?? found[4] ?? '';
    return { type: 'math', raw: found[0], text: text.trim(), display: found[1] !== undefined || found[3] !== undefined };
  },
};

const marked = new Marked({ gfm: true, extensions: [blockMath, inlineMath] });

/** Returns the blocks of `source`, and adds its link definitions to `links`, which it also reads. */
export function lex(source: string, links: Links = {}): Block[] {
  const lexer = new marked.Lexer(marked.defaults);
  // The lexer makes its own table of definitions; those from the settled part are handed in.
  lexer.tokens.links = links;
  return [...lexer.lex(source)];
}

/** Line ends and NUL as the lexer wants them. */
export function normalised(text: string): string {
  if (!/[\r\u0000]/.test(text)) return text;
  return text.replace(/\r\n?/g, '\n').replaceAll('\u0000', '\ufffd');
}
