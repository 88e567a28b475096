/** Whether an answer waits for its model to be loaded. */
import { session } from './session.svelte';

export function isLoading(model: string | null): boolean {
  const facts = session.models.find((known) => known.id === model);
  return facts !== undefined && (facts.state === 'cold' || facts.state === 'loading');
}
