import { describe, expect, it } from 'vitest';
import { callAt, find } from './calls';

const at = (text: string) => callAt(text.replace('^', ''), text.indexOf('^'));

describe('callAt', () => {
  it('finds the word that the caret stands in, with its place', () => {
    expect(at('Ask @Proof^ now')).toEqual({ sign: '@', text: 'proof', start: 4, end: 10 });
    expect(at('#^')).toEqual({ sign: '#', text: '', start: 0, end: 1 });
    expect(at('/tr^')).toEqual({ sign: '/', text: 'tr', start: 0, end: 3 });
  });

  it('leaves addresses, paths and finished words alone', () => {
    for (const text of ['ana@example^', 'see /usr/bin^', 'Ask @proof now^', 'a#b^', '/tr x^']) {
      expect(at(text), text).toBeNull();
    }
  });
});

describe('find', () => {
  it('puts what begins with the letters first', () => {
    const entries = ['@big-small', '@small-24b', '@other'].map((label) => ({ label }));
    expect(find(entries, 'small').map((entry) => entry.label)).toEqual(['@small-24b', '@big-small']);
  });
});
