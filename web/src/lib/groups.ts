/** The sidebar's list under headings by age. */
import type { Conversation } from './wire';

export type GroupKind = 'pinned' | 'today' | 'yesterday' | 'week' | 'older';

export interface Group {
  label: string;
  entries: Conversation[];
}

const DAY = 86_400;

export function kindOf(conversation: Conversation, now: number): GroupKind {
  if (conversation.pinned) return 'pinned';
  const midnight = new Date(now * 1000).setHours(0, 0, 0, 0) / 1000;
  if (conversation.updated_at >= midnight) return 'today';
  if (conversation.updated_at >= midnight - DAY) return 'yesterday';
  return conversation.updated_at >= midnight - 6 * DAY ? 'week' : 'older';
}

/** Returns conversations, newest first, pinned ones before all, under the labels of `label`. */
export function groups(
  conversations: readonly Conversation[],
  now: number,
  label: (kind: GroupKind, conversation: Conversation) => string,
): Group[] {
  const sorted = [...conversations].sort(
    (a, b) => Number(b.pinned) - Number(a.pinned) || b.updated_at - a.updated_at,
  );
  const found: Group[] = [];
  for (const conversation of sorted) {
    const name = label(kindOf(conversation, now), conversation);
    const last = found.at(-1);
    if (last?.label === name) last.entries.push(conversation);
    else found.push({ label: name, entries: [conversation] });
  }
  return found;
}
