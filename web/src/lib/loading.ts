/** Whether an answer waits for its model to be loaded, and how far that is. */
import { t } from './i18n.svelte';
import type { ModelFacts } from './wire';

export interface Loading {
  /** 0 to 1; null where the server cannot tell. */
  share: number | null;
}

/** Returns null for a model that is loaded, hosted or unknown. */
export function loadingOf(models: readonly ModelFacts[], name: string): Loading | null {
  const facts = models.find((known) => known.id === name);
  if (facts?.state !== 'cold' && facts?.state !== 'loading') return null;
  return { share: facts.state === 'loading' ? (facts.loaded ?? null) : null };
}

/** Returns it in words; whole percents, so that 100 % means all. */
export function loadingWords(model: string, { share }: Loading): string {
  return share === null ? t('loadingModel', { model }) : t('loadingShare', { model, share: Math.floor(100 * share) });
}
