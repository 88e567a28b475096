/** What the server says; the shapes of src/bise/server/assistant_routes.py. */

export type Status = 'queued' | 'prefill' | 'running' | 'complete' | 'stopped' | 'interrupted' | 'error';

export interface Params {
  temperature?: number | null;
  top_p?: number | null;
  max_tokens?: number | null;
  seed?: number | null;
}

export interface Conversation {
  id: string;
  title: string;
  pinned: boolean;
  archived?: boolean;
  folder: string | null;
  persona_id?: string | null;
  model: string | null;
  system: string;
  params: Params;
  leaf_id: string | null;
  created_at: number;
  updated_at: number;
  snippet?: string | null;
  temporary?: boolean;
}

export interface FolderFacts {
  name: string;
  conversations: number;
}

export interface Persona {
  id: string;
  name: string;
  system: string;
  model: string | null;
  params: Params;
}

export interface Usage {
  prompt_tokens: number;
  cached_tokens: number;
  completion_tokens: number;
  /** What the answer costs by the ledger's rates. */
  cost?: string | null;
  currency?: string | null;
}

export interface Timings {
  completion_tokens?: number;
  tokens_per_second?: number | null;
  ttft_s?: number | null;
  queue_s?: number;
  prefill_s?: number;
  decode_s?: number;
}

export interface Source {
  number: number;
  document_id: string;
  name: string;
  text: string;
  /** Where the passage lies in the document's text, and on which page. */
  start?: number | null;
  page?: number | null;
}

/** What belongs to a message and is no text of it. */
export type Part =
  | { type: 'thinking'; text: string; seconds?: number | null }
  | { type: 'tool_call'; name: string; arguments: unknown }
  | { type: 'tool_result'; name: string; text: string }
  | { type: 'dropped'; messages: string[] }
  | { type: 'summary'; conversation_id: string; title: string; messages: number; is_small: boolean };

export interface Message {
  id: string;
  conversation_id: string;
  parent_id: string | null;
  role: 'user' | 'assistant';
  text: string;
  model: string | null;
  status: Status;
  created_at: number;
  params: Params;
  parts?: Part[];
  documents: string[];
  sources: Source[];
  finish_reason: string | null;
  error: string | null;
  usage: Usage | null;
  timings: Timings | null;
  feedback: number | null;
  run_id: string | null;
  seq: number;
  siblings: string[];
}

export interface DocumentFacts {
  id: string;
  name: string;
  kind: string;
  tokens: number;
}

export interface ModelFacts {
  id: string;
  title: string;
  context: number | null;
  parameters: number | null;
  state: string;
  is_embedded: boolean;
  fault: string | null;
  /** How much of it is read, 0 to 1, while it is being loaded. */
  loaded?: number | null;
  /** Tokens that one token sees in the layers with a sliding window. */
  sliding_window?: number | null;
}

export interface Page {
  conversation: Conversation;
  documents: DocumentFacts[];
  messages: Message[];
  has_earlier: boolean;
  total: number;
}

export interface Settings {
  language?: string | null;
  theme?: string | null;
  model?: string | null;
  system?: string | null;
  params?: Params | null;
  prompts?: { name: string; text: string }[] | null;
}

export interface Bootstrap {
  version: string;
  person: { name: string; role: string };
  models: ModelFacts[];
  settings: Settings;
  conversations: Conversation[];
  /** Where the next page of the list begins. */
  cursor?: string | null;
  folders?: FolderFacts[];
  personas?: Persona[];
  runs: { id: string; conversation_id: string; message_id: string }[];
  /** Questions that the operator offers on the empty screen; absent where none are configured. */
  examples?: string[];
}

export interface Segment {
  kind: 'system' | 'files' | 'history' | 'turn' | 'answer';
  tokens: number;
}

export interface ContextView {
  model: string;
  window: number | null;
  used: number;
  segments: Segment[];
  cached: number;
  prompt: number;
  /** The oldest message, which would go first. */
  dropped_first: string | null;
  sliding_window?: number | null;
  /** Where it overflows: the oldest turns that would have to go. */
  dropping?: { messages: number; tokens: number; keep_from: string | null } | null;
}

export interface Change {
  kind: 'conversation' | 'deleted' | 'run_started' | 'run_ended' | 'settings' | 'personas' | 'reload';
  id: string;
  message?: string;
  run?: string;
}
