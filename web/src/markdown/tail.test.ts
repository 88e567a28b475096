import { describe, expect, it } from 'vitest';
import { lex, normalised } from './lex';
import { GrowingMarkdown } from './tail';
import { CORPUS } from './corpus';

function full(text: string) {
  return lex(normalised(text));
}

describe('GrowingMarkdown', () => {
  for (const [name, text] of Object.entries(CORPUS)) {
    it(`equals a full parse at every prefix: ${name}`, () => {
      const growing = new GrowingMarkdown();
      for (let end = 0; end <= text.length; end += 1) {
        const prefix = text.slice(0, end);
        growing.update(prefix);
        expect(growing.blocks, JSON.stringify(prefix.slice(-40))).toEqual(full(prefix));
      }
    });

    it(`equals a full parse when pieces are uneven: ${name}`, () => {
      const growing = new GrowingMarkdown();
      let seed = 7;
      for (let end = 0; end < text.length; ) {
        seed = (seed * 1103515245 + 12345) % 2147483648;
        end = Math.min(text.length, end + 1 + (seed % 23));
        growing.update(text.slice(0, end));
        expect(growing.blocks).toEqual(full(text.slice(0, end)));
      }
    });
  }

  it('keeps settled blocks as the same objects', () => {
    const growing = new GrowingMarkdown();
    growing.update('one\n\ntwo\n\nthree\n\nfour');
    const first = growing.blocks[0];
    growing.update('one\n\ntwo\n\nthree\n\nfour\n\nfive');
    expect(growing.blocks[0]).toBe(first);
    expect(growing.settledCount).toBeGreaterThan(0);
  });

  it('starts again when the text was replaced', () => {
    const growing = new GrowingMarkdown();
    growing.update('a\n\nb\n\nc\n\nd');
    growing.update('other');
    expect(growing.blocks).toEqual(full('other'));
  });

  it('leaves prices as text', () => {
    const kinds = (text: string) => JSON.stringify(lex(text));
    expect(kinds('It costs $5 and $10.')).not.toContain('"math"');
    expect(kinds('Energy $E = mc^2$ here')).toContain('"math"');
    expect(kinds('\\(a+b\\)')).toContain('"math"');
  });
});
