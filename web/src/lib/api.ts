/** Calls to the server. A failed call throws `Refusal` with a message for a person. */

export class Refusal extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string,
    readonly retryAfter: number | null,
  ) {
    super(message);
  }
}

/** True when the server could not be reached at all. */
export function isOffline(error: unknown): boolean {
  return error instanceof Refusal && error.status === 0;
}

const ROOT = '/api/v1';

async function refused(response: Response): Promise<Refusal> {
  let message = `${response.status} ${response.statusText}`;
  let code = 'error';
  try {
    const body = (await response.json()) as { message?: unknown; code?: unknown };
    if (typeof body.message === 'string') message = body.message;
    if (typeof body.code === 'string') code = body.code;
  } catch {
    // A proxy's page: the status line is all there is.
  }
  const wait = Number(response.headers.get('retry-after') ?? NaN);
  return new Refusal(response.status, message, code, Number.isFinite(wait) ? wait : null);
}

export async function call<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  let response: Response;
  try {
    response = await fetch(ROOT + path, {
      method,
      signal: signal ?? null,
      credentials: 'same-origin',
      headers: body === undefined ? {} : { 'content-type': 'application/json' },
      body: body === undefined ? null : JSON.stringify(body),
    });
  } catch (error) {
    if (error instanceof DOMException && error.name === 'AbortError') throw error;
    throw new Refusal(0, 'No connection to the server.', 'offline', null);
  }
  if (!response.ok) throw await refused(response);
  return (response.status === 204 ? undefined : await response.json()) as T;
}

export async function upload<T>(path: string, file: Blob): Promise<T> {
  let response: Response;
  try {
    response = await fetch(ROOT + path, {
      method: 'POST',
      credentials: 'same-origin',
      headers: { 'content-type': 'application/octet-stream' },
      body: file,
    });
  } catch {
    throw new Refusal(0, 'No connection to the server.', 'offline', null);
  }
  if (!response.ok) throw await refused(response);
  return (await response.json()) as T;
}

export const get = <T>(path: string, signal?: AbortSignal) => call<T>('GET', path, undefined, signal);
export const post = <T>(path: string, body?: unknown) => call<T>('POST', path, body);
export const patch = <T>(path: string, body: unknown) => call<T>('PATCH', path, body);
export const remove = (path: string) => call<void>('DELETE', path);

export function eventsAddress(path: string): string {
  return ROOT + path;
}
