import { describe, expect, it } from 'vitest';
import { citedParts } from './cite';

describe('citedParts', () => {
  const known = (number: number) => number <= 2;

  it('cuts a text at the numbers that stand for passages', () => {
    expect(citedParts('It is cold [1][2], they say [2].', known)).toEqual([
      'It is cold ', 1, 2, ', they say ', 2, '.',
    ]);
  });

  it('leaves other brackets as text', () => {
    for (const text of ['a[3]', 'x[i]', '[ 1 ]', 'no brackets', '']) {
      expect(citedParts(text, known).join('')).toBe(text);
      expect(citedParts(text, known).some((part) => typeof part === 'number')).toBe(false);
    }
  });
});
