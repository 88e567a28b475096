/** Who is here, which models are served, and the person's settings. */
import { get, patch } from './api';
import { browserLanguage, isLanguage, speak } from './i18n.svelte';
import { notices } from './notices.svelte';
import type { Bootstrap, ModelFacts, Settings } from './wire';

export type Theme = 'system' | 'light' | 'dark';

class Session {
  person = $state.raw<Bootstrap['person']>({ name: '', role: 'admin' });
  version = $state('');
  models = $state.raw<ModelFacts[]>([]);
  settings = $state.raw<Settings>({});
  /** Questions that the operator offers on the empty screen; null where none are configured. */
  examples = $state.raw<readonly string[] | null>(null);

  take(boot: Bootstrap): void {
    this.version = boot.version;
    this.person = boot.person;
    this.models = boot.models;
    this.examples = boot.examples?.length ? boot.examples : null;
    this.#apply(boot.settings);
  }

  /** Returns a model by name; the default where none has it. */
  model(name: string | null | undefined): ModelFacts | undefined {
    return this.models.find((model) => model.id === name) ?? this.models[0];
  }

  /** Reads which models are loaded now. */
  async lookAtModels(): Promise<void> {
    this.models = (await get<{ models: ModelFacts[] }>('/models')).models;
  }

  async set(changes: Settings): Promise<void> {
    this.#apply({ ...this.settings, ...changes });
    try {
      await patch('/settings', changes);
    } catch (error) {
      notices.fail(error);
    }
  }

  #apply(settings: Settings): void {
    this.settings = settings;
    const theme = settings.theme ?? 'system';
    if (theme === 'system') delete document.documentElement.dataset['theme'];
    else document.documentElement.dataset['theme'] = theme;
    void speak(isLanguage(settings.language) ? settings.language : browserLanguage());
  }
}

export const session = new Session();
