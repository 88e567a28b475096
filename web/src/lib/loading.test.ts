import { describe, expect, it } from 'vitest';
import { loadingOf, loadingWords } from './loading';
import type { ModelFacts } from './wire';

const model = (state: string, loaded?: number | null): ModelFacts => ({
  id: 'm', title: 'm', context: 4096, parameters: null, state, is_embedded: false, fault: null, loaded,
});

describe('loadingOf', () => {
  it('tells the share of a model that is being loaded', () => {
    expect(loadingOf([model('loading', 0.62)], 'm')).toEqual({ share: 0.62 });
  });

  it('tells that a model has to be loaded where no share is known', () => {
    expect(loadingOf([model('cold')], 'm')).toEqual({ share: null });
    expect(loadingOf([model('loading', null)], 'm')).toEqual({ share: null });
  });

  it('says whole percents, and 100 only for all', () => {
    expect(loadingWords('m', { share: 0.629 })).toBe('m is loading, 62 %');
    expect(loadingWords('m', { share: 0.9999 })).toBe('m is loading, 99 %');
    expect(loadingWords('m', { share: null })).toBe('m is loading');
  });

  it('tells nothing of a model that is there, or is not known', () => {
    expect(loadingOf([model('ready')], 'm')).toBeNull();
    expect(loadingOf([model('hosted')], 'm')).toBeNull();
    expect(loadingOf([], 'm')).toBeNull();
  });
});
