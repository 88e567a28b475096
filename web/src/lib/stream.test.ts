import { describe, expect, it } from 'vitest';
import { isWriting, reduce, type Live, type RunEvent } from './stream';

const empty: Live = {
  status: 'queued', seq: 0, text: '', prefill: null, timings: null, usage: null, finish_reason: null, error: null,
};
const piece = (seq: number, content: string): RunEvent => ({
  seq, kind: 'message', body: { choices: [{ index: 0, delta: { content }, finish_reason: null }] },
});
const events: RunEvent[] = [
  { seq: 1, kind: 'state', body: { status: 'prefill' } },
  { seq: 2, kind: 'prefill', body: { done: 0, total: 12 } },
  { seq: 3, kind: 'state', body: { status: 'running' } },
  piece(4, 'Hel'),
  piece(5, 'lo'),
  { seq: 6, kind: 'usage', body: { completion_tokens: 2, tokens_per_second: 40, ttft_s: 0.2 } },
  piece(7, '!'),
  { seq: 8, kind: 'end', body: { status: 'complete', finish_reason: 'stop', error: null, usage: null, timings: null } },
];

describe('reduce', () => {
  it('adds pieces in order and ends complete', () => {
    const end = events.reduce(reduce, empty);
    expect(end.text).toBe('Hello!');
    expect(end.status).toBe('complete');
    expect(end.timings?.tokens_per_second).toBe(40);
  });

  it('loses and doubles nothing wherever a snapshot is taken and the events come again', () => {
    for (let cut = 0; cut <= events.length; cut += 1) {
      const snapshot = events.slice(0, cut).reduce(reduce, empty);
      for (let again = 0; again <= cut; again += 1) {
        expect(events.slice(again).reduce(reduce, snapshot).text).toBe('Hello!');
      }
    }
  });

  it('tells how many wait before and how far the reading of documents is, until the answer begins', () => {
    const waiting = reduce(empty, { seq: 1, kind: 'state', body: { status: 'queued', before: 2 } });
    expect(waiting.before).toBe(2);
    const reading = reduce(waiting, { seq: 2, kind: 'reading', body: { done: 3, total: 9 } });
    expect(reading.reading).toEqual({ done: 3, total: 9 });
    const running = reduce(reading, { seq: 3, kind: 'state', body: { status: 'running' } });
    expect([running.before, running.reading]).toEqual([0, null]);
  });

  it('knows which states are still being written', () => {
    expect((['queued', 'prefill', 'running'] as const).every(isWriting)).toBe(true);
    expect((['complete', 'stopped', 'interrupted', 'error'] as const).some(isWriting)).toBe(false);
  });
});
