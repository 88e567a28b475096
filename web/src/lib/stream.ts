/** The reducer of a run's events: what one event does to the answer on screen. Pure, so that it can be tested. */
import type { Message, Status, Timings, Usage } from './wire';

export interface RunEvent {
  seq: number;
  kind: string;
  body: Record<string, unknown>;
}

export interface Live {
  status: Status;
  seq: number;
  text: string;
  prefill: { done: number; total: number } | null;
  timings: Timings | null;
  usage: Usage | null;
  finish_reason: string | null;
  error: string | null;
  /** Requests that wait before this one. */
  before?: number;
  /** Passages of documents that were prepared for the search, of all. */
  reading?: { done: number; total: number } | null;
}

export function liveOf(message: Message): Live {
  const { status, seq, text, timings, usage, finish_reason, error } = message;
  return { status, seq, text, timings, usage, finish_reason, error, prefill: null };
}

export function isWriting(status: Status): boolean {
  return status === 'queued' || status === 'prefill' || status === 'running';
}

/** Returns the answer after `event`; an event that was seen already changes nothing. */
export function reduce(live: Live, event: RunEvent): Live {
  if (event.seq <= live.seq) return live;
  const next = { ...live, seq: event.seq };
  const body = event.body;
  switch (event.kind) {
    case 'message': {
      const choices = body['choices'] as { delta?: { content?: string } }[] | undefined;
      next.text = live.text + (choices?.[0]?.delta?.content ?? '');
      break;
    }
    case 'state':
      next.status = body['status'] as Status;
      next.before = Number(body['before'] ?? 0);
      next.reading = null;
      break;
    case 'prefill':
      next.prefill = { done: Number(body['done']), total: Number(body['total']) };
      break;
    case 'reading':
      next.reading = { done: Number(body['done']), total: Number(body['total']) };
      break;
    case 'usage':
      next.timings = { ...live.timings, ...(body as Timings) };
      break;
    case 'end':
      next.status = body['status'] as Status;
      next.finish_reason = (body['finish_reason'] as string | null) ?? null;
      next.error = (body['error'] as string | null) ?? null;
      next.usage = (body['usage'] as Usage | null) ?? live.usage;
      next.timings = (body['timings'] as Timings | null) ?? live.timings;
      break;
  }
  return next;
}
