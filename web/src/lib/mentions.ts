/** What "/", "@" and "#" offer in the question field: prompts and commands, personas and models, files. */
import { attached } from './attach.svelte';
import { commands } from './commands';
import { t } from './i18n.svelte';
import { personas } from './personas.svelte';
import { session } from './session.svelte';
import { talk } from './talk.svelte';
import { find, type Call, type Sign } from './calls';

export { callAt, type Call } from './calls';

const MOST = 8;

export interface Suggestion {
  key: string;
  label: string;
  hint: string;
  /** What is written in place of the word. */
  text?: string;
  run?: () => void;
}

/** Returns what fits a call, best first. */
export function suggestions(call: Call): Suggestion[] {
  return find(offers[call.sign](), call.text).slice(0, MOST);
}

const offers: Record<Sign, () => Suggestion[]> = {
  '/': () => [
    ...(session.settings.prompts ?? []).map(({ name, text }) => ({ key: `/${name}`, label: `/${name}`, hint: text.slice(0, 90), text })),
    ...commands()
      .filter((command) => command.slash)
      .map(({ slash, label, run }) => ({ key: `//${slash}`, label: `/${slash}`, hint: label, run })),
  ],
  '@': () => [
    ...personas.all.map((persona) => ({
      key: persona.id, label: `@${persona.name}`, hint: persona.system.slice(0, 90), run: () => void talk.become(persona),
    })),
    ...session.models
      .filter((model) => !model.fault)
      .map((model) => ({ key: model.id, label: `@${model.id}`, hint: t('answersNext'), run: () => void talk.choose(model.id) })),
  ],
  '#': () =>
    talk.documents
      .filter((file) => !attached.files.some((other) => other.id === file.id))
      .map((file) => ({
        key: file.id, label: `#${file.name}`, hint: t('tokens', { n: file.tokens }),
        run: () => attached.add(file),
      })),
};
