/** Numbers in brackets that stand for passages: "[2]" in an answer opens what it cites. */
import { getContext, setContext } from 'svelte';
import type { Source } from './wire';

const KEY = Symbol('sources');

export interface Citations {
  source(number: number): Source | undefined;
  open(source: Source): void;
}

export function provideCitations(citations: Citations): void {
  setContext(KEY, citations);
}

export function citations(): Citations | undefined {
  return getContext(KEY);
}

/** Cuts a text at its citations: words, and numbers for which `isKnown` is true. */
export function citedParts(text: string, isKnown: (number: number) => boolean): (string | number)[] {
  if (!text.includes('[')) return [text];
  const parts: (string | number)[] = [];
  let end = 0;
  for (const match of text.matchAll(/\[(\d{1,3})\]/g)) {
    const number = Number(match[1]);
    if (!isKnown(number)) continue;
    if (match.index > end) parts.push(text.slice(end, match.index));
    parts.push(number);
    end = match.index + match[0].length;
  }
  if (end < text.length) parts.push(text.slice(end));
  return parts;
}
