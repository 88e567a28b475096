import { describe, expect, it } from 'vitest';
import de from './de.json';
import en from './en.json';
import es from './es.json';
import fr from './fr.json';
import it_ from './it.json';

const places = (text: string) => [...new Set(text.match(/\{\w+\}/g) ?? [])].sort();
const files = import.meta.glob<string>(['../**/*.svelte', '../**/*.ts'], { query: '?raw', import: 'default', eager: true });

describe.each(Object.entries({ fr, de, es, it: it_ }))('%s', (_, words: Record<string, string>) => {
  it('has every key of English, with the same places and plurals', () => {
    expect(Object.keys(words)).toEqual(Object.keys(en));
    for (const [key, text] of Object.entries(en)) {
      expect(places(words[key] ?? ''), key).toEqual(places(text));
      expect(words[key]?.includes(' | '), key).toBe(text.includes(' | '));
    }
  });
});

const texts = import.meta.glob<string>('./*.json', { query: '?raw', import: 'default', eager: true });

describe.each(Object.entries(texts))('%s', (_, text) => {
  it('says nothing twice: of two equal keys the first would be lost', () => {
    const keys = [...text.matchAll(/^ {2}"(\w+)":/gm)].map(([, key]) => key);
    expect(keys.length).toBeGreaterThan(200);
    expect(new Set(keys).size).toBe(keys.length);
  });
});

describe('English', () => {
  it('has no key that nobody uses', () => {
    const code = Object.values(files).join('\n');
    const unused = Object.keys(en).filter((key) => !key.startsWith('segment_') && !code.includes(`'${key}'`));
    expect(unused).toEqual([]);
  });
});
